"""Splitting the difference of the CFG branches into two bands."""

from __future__ import annotations

import torch

from fastercache.ops.checks import check_dtype, check_maps, check_radius, check_tensor, map_dtype
from fastercache.ops.dispatch import define
from fastercache.ops.registry import Arguments, Op, Sizes
from fastercache.triton_kernels import cfg_split as kernels


def _examples(sizes: Sizes) -> Arguments:
    if sizes.planes:
        height, width, radius = sizes.planes
        low, high = (sizes.zeros(1, height, width, dtype=map_dtype(sizes.dtype)) for _ in range(2))
        yield low, high, sizes.zeros(1, height, width), sizes.zeros(1, height, width), radius


_cfg_split = define(
    Op(
        "cfg_split",
        "(Tensor(a!) low, Tensor(b!) high, Tensor uncond, Tensor cond, int radius) -> ()",
        reference=kernels.reference_cfg_split,
        triton=kernels.triton_cfg_split,
        examples=_examples,
    )
)


def cfg_split(low: torch.Tensor, high: torch.Tensor, uncond: torch.Tensor, cond: torch.Tensor, radius: int) -> None:
    """Splits `d = uncond - cond` into two real maps: `low = P d`, the Fourier modes with `ky^2 + kx^2 <= radius^2`, and
    `high = d - low`.

    These are FasterCache's `D_LF` and `D_HF` (Eq. 6-8), moved to the latent space, which the linearity of the transform
    allows. Frequencies are exact integers; radius 0 keeps the mean alone. On CUDA the first call for a size uploads two
    small bases: call `prepare_cfg_split` before a CUDA graph is recorded.

    Args:
        low: `[..., H, W]`, float32 (float64 for float64 inputs), contiguous. Overwritten.
        high: as `low`, another tensor. Overwritten.
        uncond: `[..., H, W]`, float32, bfloat16, float16 or float64; any strides.
        cond: the shape, dtype and device of `uncond`; any strides.
        radius: cutoff, `0 <= radius < min(H, W) / 2`.

    Moves the bytes of both inputs and both maps.

    Raises:
        ValueError: a shape, stride, device or the radius is wrong.
        TypeError: a dtype is wrong, or the radius is not an int.
    """
    check_dtype("uncond", uncond)
    shape, dtype, device = uncond.shape, uncond.dtype, uncond.device
    if len(shape) < 2:
        raise ValueError(f"uncond has shape {list(shape)}, expected [..., H, W]")
    check_tensor("cond", cond, shape, dtype, device)
    check_maps(low, high, shape, dtype, device)
    check_radius(radius, shape[-2], shape[-1])
    _cfg_split(low, high, uncond, cond, radius)


def prepare_cfg_split(height: int, width: int, radius: int, dtype: torch.dtype, device: torch.device | str) -> None:
    """Makes the two Fourier bases that `cfg_split` of `[..., height, width]` inputs of `dtype` needs on `device`, and
    keeps them.

    Later calls then allocate and upload nothing, which the recording of a CUDA graph requires. The C++ implementation
    needs no bases.

    Raises:
        ValueError, TypeError: as in `cfg_split`.
    """
    check_radius(radius, height, width)
    kernels.prepare(
        height, width, radius, dtype, torch.empty(0, device=device).device
    )  # the device with its index, as tensors have it
