"""Rebuilding the unconditional half of a batch from the conditional one."""

from __future__ import annotations

import torch

from fastercache.ops.checks import (
    check_coefficients,
    check_contiguous,
    check_dtype,
    check_map,
    check_maps,
    check_tensor,
    map_dtype,
)
from fastercache.ops.dispatch import define
from fastercache.ops.registry import Arguments, Op, Sizes
from fastercache.triton_kernels.cfg_reconstruct import reference_cfg_reconstruct, triton_cfg_reconstruct


def _examples(sizes: Sizes) -> Arguments:
    """With and without a third map, which are two kernels."""
    if sizes.planes:
        height, width, _ = sizes.planes
        low, high = (sizes.zeros(1, height, width, dtype=map_dtype(sizes.dtype)) for _ in range(2))
        for previous in (None, torch.zeros_like(low)):
            yield (
                sizes.zeros(2, height, width),
                sizes.zeros(1, height, width),
                low,
                high,
                sizes.coefficients(),
                1,
                previous,
            )


_cfg_reconstruct = define(
    Op(
        "cfg_reconstruct",
        "(Tensor(a!) out, Tensor cond, Tensor low, Tensor high, Tensor coefficients, int cond_half, Tensor? "
        "previous=None) -> ()",
        reference=reference_cfg_reconstruct,
        triton=triton_cfg_reconstruct,
        examples=_examples,
    )
)


def cfg_reconstruct(
    out: torch.Tensor,
    cond: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    coefficients: torch.Tensor,
    cond_half: int,
    previous: torch.Tensor | None = None,
) -> None:
    """Fills a batch of both branches from the conditional one: `cond` in its half, `cond + w_low * low + w_high * high`
    in the other.

    This is FasterCache's Eq. 9-11 with the maps of `cfg_split` and the weights of `coefficients`, without a Fourier
    transform. Computed in the dtype of the maps and rounded once. With a third map, `w_previous * previous` is added,
    which extrapolates the difference of the branches.

    Args:
        out: `[2 * n, ...]`, float32, bfloat16, float16 or float64, contiguous. Overwritten.
        cond: `[n, ...]`, the dtype and device of `out`; any strides. May already lie in its half of `out`; no other
            overlap with `out`.
        low: `[n, ...]`, float32 (float64 for float64), contiguous.
        high: as `low`.
        coefficients: `[16]` float32, contiguous, on the device of `out`.
        cond_half: 0 when the conditional rows come first in `out`, 1 when they come last.
        previous: as `low`; weighted by `coefficients[Coefficient.PREVIOUS]`, and not used where that is 0: it may then
            hold anything.

    Moves the bytes of `cond` (three times: one read, two writes) and of the maps.

    Raises:
        ValueError: a shape, stride, device or `cond_half` is wrong.
        TypeError: a dtype is wrong.
    """
    check_dtype("cond", cond)
    shape, dtype, device = cond.shape, cond.dtype, cond.device
    if not shape:
        raise ValueError("cond has no dimension, expected [n, ...]")
    check_tensor("out", out, (2 * shape[0], *shape[1:]), dtype, device)
    check_contiguous("out", out)
    check_maps(low, high, shape, dtype, device)
    if previous is not None:
        check_map("previous", previous, shape, dtype, device)
    check_coefficients(coefficients, device)
    if cond_half not in (0, 1):
        raise ValueError(f"cond_half is {cond_half!r}, expected 0 (conditional rows first) or 1 (last)")
    _cfg_reconstruct(out, cond, low, high, coefficients, cond_half, previous)
