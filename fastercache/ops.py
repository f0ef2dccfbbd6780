"""The operations a cached model calls: schemas, dispatch, and the public functions that check their arguments.

| op | what it does | CPU | CUDA |
|---|---|---|---|
| `ring_push` | stores a site's newest output in its ring | C++ | Triton |
| `ring_blend` | approximates an output from the last computed ones | C++ | Triton |
| `ring_blend_add` | the same, gated and added to the residual stream | C++ | Triton |
| `cfg_split` | splits the difference of the CFG branches into two bands | C++ | Triton |
| `cfg_reconstruct` | rebuilds the unconditional half from the conditional one | C++ | Triton |

Where the C++ library is not built, or Triton cannot be imported, plain PyTorch serves the op under the same name: `implementations()` says
which, `fallback_reasons()` says why. FASTERCACHE_FORCE_REFERENCE=1 in the environment selects PyTorch everywhere.

Every op reads what changes from step to step from a *row* on the device, 16 float32 values described in `fastercache.triton_kernels.row`,
so one graph serves all steps. The ops have no gradient, and mutate their arguments without returning them. A row that names a slot outside
the ring is an error on the CPU; on a GPU it cannot be checked without waiting for it, and is undefined.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import torch

from fastercache.triton_kernels import _triton
from fastercache.triton_kernels import cfg_split as _split
from fastercache.triton_kernels.cfg_reconstruct import reference_cfg_reconstruct, triton_cfg_reconstruct
from fastercache.triton_kernels.ring_blend import (
    reference_ring_blend,
    reference_ring_blend_add,
    triton_ring_blend,
    triton_ring_blend_add,
)
from fastercache.triton_kernels.ring_push import reference_ring_push, triton_ring_push
from fastercache.triton_kernels.row import MAX_TAPS, ROW_SIZE, Row

__all__ = [
    "DTYPES",
    "MAX_TAPS",
    "ROW_SIZE",
    "Row",
    "cfg_reconstruct",
    "cfg_split",
    "fallback_reasons",
    "implementations",
    "map_dtype",
    "prepare_cfg_split",
    "ring_blend",
    "ring_blend_add",
    "ring_push",
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

# Name -> (schema, PyTorch, Triton, what a fake call returns)
_OPS: dict[str, tuple[str, Callable, Callable, Callable]] = {
    "ring_push": ("(Tensor(a!) ring, Tensor x, Tensor row) -> ()", reference_ring_push, triton_ring_push, lambda ring, x, row: None),
    "ring_blend": (
        "(Tensor ring, Tensor row) -> Tensor",
        reference_ring_blend,
        triton_ring_blend,
        lambda ring, row: ring.new_empty(ring.shape[1:]),
    ),
    "ring_blend_add": (
        "(Tensor(a!) x, Tensor gate, Tensor ring, Tensor row) -> ()",
        reference_ring_blend_add,
        triton_ring_blend_add,
        lambda x, gate, ring, row: None,
    ),
    "cfg_split": (
        "(Tensor(a!) low, Tensor(b!) high, Tensor uncond, Tensor cond, int radius) -> ()",
        _split.reference_cfg_split,
        _split.triton_cfg_split,
        lambda low, high, uncond, cond, radius: None,
    ),
    "cfg_reconstruct": (
        "(Tensor(a!) out, Tensor cond, Tensor low, Tensor high, Tensor row, int cond_half) -> ()",
        reference_cfg_reconstruct,
        triton_cfg_reconstruct,
        lambda out, cond, low, high, row, cond_half: None,
    ),
}

_library = torch.library.Library("fastercache", "DEF")  # the registrations live as long as this object


def _load_cpp() -> str | None:
    """Loads the C++ library, which registers itself for the CPU. Returns why it could not, or None."""
    paths = sorted(Path(__file__).parent.glob("_ops*.so"))
    if not paths:
        return "the C++ library was not built (no fastercache/_ops*.so); installing with FASTERCACHE_BUILD=require shows why"
    try:
        torch.ops.load_library(str(paths[0]))
    except Exception as error:
        built = re.search(rb"fastercache built with torch ([\d.]+)", paths[0].read_bytes())
        version = built[1].decode() if built else "an unknown version"
        return f"{paths[0].name} was built with torch {version} and does not load with the installed torch {torch.__version__}: {error}"
    return None


def _register() -> tuple[dict[str, str], list[str]]:
    """Defines the ops and picks an implementation for each device. Returns the name of each device's, and the reasons for fallbacks."""
    for name, (schema, _, _, fake) in _OPS.items():
        _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"fastercache::{name}", fake, lib=_library)
    no_cpp: str | None
    no_triton: str | None
    if os.environ.get("FASTERCACHE_FORCE_REFERENCE") == "1":
        no_cpp = no_triton = "FASTERCACHE_FORCE_REFERENCE=1 is set"
    else:
        no_cpp = _load_cpp()
        no_triton = f"Triton cannot be imported ({_triton.MISSING})" if _triton.MISSING else None
    for name, (_, reference, launcher, _) in _OPS.items():
        if no_cpp:
            _library.impl(name, reference, "CPU")
        _library.impl(name, reference if no_triton else launcher, "CUDA")
    chosen = {"cpu": "PyTorch" if no_cpp else "C++", "cuda": "PyTorch" if no_triton else "Triton"}
    reasons = [f"The {device} ops run on PyTorch: {why}." for device, why in (("CPU", no_cpp), ("CUDA", no_triton)) if why]
    return chosen, reasons


_CHOSEN, _REASONS = _register()
_ring_push = torch.ops.fastercache.ring_push.default
_ring_blend = torch.ops.fastercache.ring_blend.default
_ring_blend_add = torch.ops.fastercache.ring_blend_add.default
_cfg_split = torch.ops.fastercache.cfg_split.default
_cfg_reconstruct = torch.ops.fastercache.cfg_reconstruct.default


def implementations() -> dict[str, dict[str, str]]:
    """Which code serves each op: `{op: {"cpu": "C++" | "PyTorch", "cuda": "Triton" | "PyTorch"}}`."""
    return {name: dict(_CHOSEN) for name in _OPS}


def fallback_reasons() -> list[str]:
    """Why plain PyTorch serves the ops of a device, one sentence for each such device; empty when nothing falls back."""
    return list(_REASONS)


def map_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of `dtype` are computed and CFG maps are kept: float32, but float64 for float64."""
    return _triton.compute_dtype(dtype)


def _check_dtype(name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} has dtype {tensor.dtype}, expected one of {', '.join(str(dtype) for dtype in DTYPES)}")


def _check_tensor(name: str, tensor: torch.Tensor, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")
    if tensor.dtype != dtype:
        raise TypeError(f"{name} has dtype {tensor.dtype}, expected {dtype}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, expected {device}")


def _check_contiguous(name: str, tensor: torch.Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {list(tensor.stride())} for shape {list(tensor.shape)}, expected a contiguous tensor")


def _check_row(row: torch.Tensor, device: torch.device) -> None:
    if row.dim() != 1 or row.shape[0] != ROW_SIZE:
        raise ValueError(f"row has shape {list(row.shape)}, expected [{ROW_SIZE}]")
    if row.dtype != torch.float32:
        raise TypeError(f"row has dtype {row.dtype}, expected torch.float32")
    if row.device != device:
        raise ValueError(f"row is on {row.device}, expected {device}")
    _check_contiguous("row", row)


def _check_ring(ring: torch.Tensor, row: torch.Tensor) -> None:
    _check_dtype("ring", ring)
    if ring.dim() < 1 or ring.shape[0] < 1:
        raise ValueError(f"ring has shape {list(ring.shape)}, expected [slots, ...] with at least one slot")
    elements = 1
    for size, stride in zip(reversed(ring.shape[1:]), reversed(ring.stride()[1:]), strict=True):
        if size != 1 and stride != elements:
            raise ValueError(f"ring has strides {list(ring.stride())} for shape {list(ring.shape)}, expected each slot contiguous")
        elements *= max(size, 1)  # torch counts an empty dimension as 1 in strides
    if ring.shape[0] > 1 and ring.stride(0) < elements:
        raise ValueError(f"ring has slots of {elements} elements {ring.stride(0)} apart, expected slots that do not overlap")
    _check_row(row, ring.device)


def ring_push(ring: torch.Tensor, x: torch.Tensor, row: torch.Tensor) -> None:
    """Stores `x` as the newest output of its site: `ring[row[Row.WRITE_SLOT]] = x`.

    Args:
        ring: `[slots, *shape]`, float32, bfloat16, float16 or float64; each slot contiguous, at any distance from the next, so that a
            branch's rows `ring[:, n:2 * n]` of a ring for both branches will do. Changed in place.
        x: `[*shape]`, the dtype and device of `ring`; any strides. Must not overlap the ring.
        row: `[16]` float32, contiguous, on the device of `ring`.

    Moves twice the bytes of `x`.

    Raises:
        ValueError: a shape, stride or device is wrong.
        TypeError: a dtype is wrong.
        RuntimeError: on the CPU, when the row names a slot the ring does not have (IndexError from the PyTorch implementation).
    """
    _check_ring(ring, row)
    _check_tensor("x", x, ring.shape[1:], ring.dtype, ring.device)
    _ring_push(ring, x, row)


def ring_blend(ring: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """Approximates a site's output from its last computed ones: `sum_k c_k ring[slot_k]` over the row's taps.

    With taps A (newest) and B and coefficients `1 + w, -w` this is FasterCache's Eq. 5, `A + w (A - B)`. Slots that no tap in use names are
    not used and may hold anything. The sum is taken in float32 (float64 for float64) and rounded once.

    Args:
        ring: `[slots, *shape]`, as in `ring_push`.
        row: `[16]` float32, contiguous, on the device of `ring`.

    Returns:
        `[*shape]`, the dtype of `ring`, contiguous.

    Moves the bytes of one slot for each tap and one for the result.

    Raises:
        ValueError, TypeError, RuntimeError: as in `ring_push`.
    """
    _check_ring(ring, row)
    return _ring_blend(ring, row)


def ring_blend_add(x: torch.Tensor, gate: torch.Tensor, ring: torch.Tensor, row: torch.Tensor) -> None:
    """Adds a site's approximated output to the residual stream: `x += gate * ring_blend(ring, row)`.

    Computed in float32 (float64 for float64) and rounded once, where the unfused form rounds three times.

    Args:
        x: `[*shape]`, the dtype and device of `ring`; the last dimension contiguous, no two elements sharing memory. Changed in place.
        gate: broadcastable to `x` (`[B, 1, D]`, `[1, 1, D]`, `[1]`, ...); the dtype of `x`, or float32.
        ring: `[slots, *shape]`, as in `ring_push`.
        row: `[16]` float32, contiguous, on the device of `ring`.

    Moves the bytes of one slot for each tap and two for `x`, and those of the gate.

    Raises:
        ValueError, TypeError, RuntimeError: as in `ring_push`.
    """
    _check_ring(ring, row)
    _check_tensor("x", x, ring.shape[1:], ring.dtype, ring.device)
    if x.dim() and x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(f"x has strides {list(x.stride())}, expected 1 in the last dimension")
    if any(size > 1 and stride == 0 for size, stride in zip(x.shape, x.stride(), strict=True)):
        raise ValueError(f"x has strides {list(x.stride())} for shape {list(x.shape)}, expected no broadcast dimension")
    if gate.dtype not in (x.dtype, torch.float32):
        raise TypeError(f"gate has dtype {gate.dtype}, expected {x.dtype} or torch.float32")
    if gate.device != x.device:
        raise ValueError(f"gate is on {gate.device}, expected {x.device}")
    missing = x.dim() - gate.dim()
    if missing < 0 or any(mine not in (1, size) for mine, size in zip(gate.shape, x.shape[missing:], strict=True)):
        raise ValueError(f"gate has shape {list(gate.shape)}, expected one that broadcasts to x, {list(x.shape)}")
    _ring_blend_add(x, gate, ring, row)


def cfg_split(low: torch.Tensor, high: torch.Tensor, uncond: torch.Tensor, cond: torch.Tensor, radius: int) -> None:
    """Splits `d = uncond - cond` into two real maps: `low = P d`, the Fourier modes with `ky^2 + kx^2 <= radius^2`, and `high = d - low`.

    These are FasterCache's `D_LF` and `D_HF` (Eq. 6-8), moved to the latent space, which the linearity of the transform allows. Frequencies
    are exact integers; radius 0 keeps the mean alone. On CUDA the first call for a size uploads two small bases: call `prepare_cfg_split`
    before a CUDA graph is recorded.

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
    _check_dtype("uncond", uncond)
    if uncond.dim() < 2:
        raise ValueError(f"uncond has shape {list(uncond.shape)}, expected [..., H, W]")
    _check_tensor("cond", cond, uncond.shape, uncond.dtype, uncond.device)
    _check_maps(low, high, uncond)
    _check_radius(radius, uncond.shape[-2], uncond.shape[-1])
    _cfg_split(low, high, uncond, cond, radius)


def cfg_reconstruct(
    out: torch.Tensor, cond: torch.Tensor, low: torch.Tensor, high: torch.Tensor, row: torch.Tensor, cond_half: int
) -> None:
    """Fills a batch of both branches from the conditional one: `cond` in its half, `cond + w_low * low + w_high * high` in the other.

    This is FasterCache's Eq. 9-11 with the maps of `cfg_split` and the row's weights, without a Fourier transform. Computed in the dtype of
    the maps and rounded once.

    Args:
        out: `[2 * n, ...]`, float32, bfloat16, float16 or float64, contiguous. Overwritten.
        cond: `[n, ...]`, the dtype and device of `out`; any strides. May already lie in its half of `out`; no other overlap with `out`.
        low: `[n, ...]`, float32 (float64 for float64), contiguous.
        high: as `low`.
        row: `[16]` float32, contiguous, on the device of `out`.
        cond_half: 0 when the conditional rows come first in `out`, 1 when they come last.

    Moves the bytes of `cond` (three times: one read, two writes) and of both maps.

    Raises:
        ValueError: a shape, stride, device or `cond_half` is wrong.
        TypeError: a dtype is wrong.
    """
    _check_dtype("cond", cond)
    if cond.dim() < 1:
        raise ValueError("cond has no dimension, expected [n, ...]")
    _check_tensor("out", out, torch.Size((2 * cond.shape[0], *cond.shape[1:])), cond.dtype, cond.device)
    _check_contiguous("out", out)
    _check_maps(low, high, cond)
    _check_row(row, cond.device)
    if cond_half not in (0, 1):
        raise ValueError(f"cond_half is {cond_half!r}, expected 0 (conditional rows first) or 1 (last)")
    _cfg_reconstruct(out, cond, low, high, row, cond_half)


def prepare_cfg_split(height: int, width: int, radius: int, dtype: torch.dtype, device: torch.device | str) -> None:
    """Makes the two Fourier bases that `cfg_split` of `[..., height, width]` inputs of `dtype` needs on `device`, and keeps them.

    Later calls then allocate and upload nothing, which the recording of a CUDA graph requires. The C++ implementation needs no bases.

    Raises:
        ValueError, TypeError: as in `cfg_split`.
    """
    _check_radius(radius, height, width)
    _split.prepare(height, width, radius, dtype, torch.empty(0, device=device).device)  # the device with its index, as tensors have it


def _check_maps(low: torch.Tensor, high: torch.Tensor, like: torch.Tensor) -> None:
    for name, tensor in (("low", low), ("high", high)):
        _check_tensor(name, tensor, like.shape, map_dtype(like.dtype), like.device)
        _check_contiguous(name, tensor)
    if low is high:
        raise ValueError("low and high are one tensor, expected two")


def _check_radius(radius: int, height: int, width: int) -> None:
    if not isinstance(radius, int) or isinstance(radius, bool):
        raise TypeError(f"radius is {radius!r}, expected an int")
    if not 0 <= 2 * radius < min(height, width):
        raise ValueError(f"radius is {radius} for planes of {height} x {width}, expected 0 <= radius < min(H, W) / 2")
