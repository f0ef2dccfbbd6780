"""The operations a cached model calls: schemas, dispatch, and the public functions that check their arguments.

| op | what it does | CPU | CUDA |
|---|---|---|---|
| `ring_push` | stores a site's newest output in its ring | C++ | CUDA C++, else Triton |
| `ring_blend` | approximates an output from the last computed ones | C++ | Triton |
| `ring_blend_add` | the same, gated and added to the residual stream | C++ | Triton |
| `packed_push` | stores a site's newest output in 8 bits, and its change in 8 or 4 | C++ | CUDA C++ |
| `packed_blend`, `packed_blend_add` | as `ring_blend`, `ring_blend_add`, from a packed ring | C++ | Triton |
| `cfg_split` | splits the difference of the CFG branches into two bands | C++ | Triton |
| `cfg_reconstruct` | rebuilds the unconditional half from the conditional one | C++ | Triton |
| `cfg_guide` | the guided prediction itself, from the conditional one | C++ | Triton |

Where a library is not built, or Triton cannot be imported, plain PyTorch serves the op under the same name; the packed ops have no such
stand-in. `implementations()` says which serves, `fallback_reasons()` says why. FASTERCACHE_FORCE_REFERENCE=1 in the environment selects
PyTorch everywhere.

Every op reads what changes from step to step from a *row* on the device, 16 float32 values described in `fastercache.triton_kernels.row`,
so one graph serves all steps. The ops have no gradient, and mutate their arguments without returning them. A row that names a slot outside
the ring is an error on the CPU; on a GPU it cannot be checked without waiting for it, and is undefined.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastercache.triton_kernels import _triton
from fastercache.triton_kernels import cfg_split as _split
from fastercache.triton_kernels import packed as _packed
from fastercache.triton_kernels.cfg_reconstruct import (
    reference_cfg_guide,
    reference_cfg_reconstruct,
    triton_cfg_guide,
    triton_cfg_reconstruct,
)
from fastercache.triton_kernels.packed import PackedRow
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
    "PACKED_DTYPES",
    "ROW_SIZE",
    "PackedRow",
    "Row",
    "cfg_guide",
    "cfg_reconstruct",
    "cfg_split",
    "fallback_reasons",
    "implementations",
    "map_dtype",
    "packed_blend",
    "packed_blend_add",
    "packed_push",
    "prepare_cfg_split",
    "ring_blend",
    "ring_blend_add",
    "ring_push",
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PACKED_DTYPES = _packed.DTYPES
"""Of the outputs a packed ring can hold."""


@dataclass(frozen=True)
class _Op:
    """reference: plain PyTorch, registered where nothing faster is, if `fallback`. triton: `None` for an op that CUDA C++ alone serves."""

    schema: str
    reference: Callable[..., Any]
    triton: Callable[..., Any] | None
    fallback: bool = True


_OPS = {
    "ring_push": _Op("(Tensor(a!) ring, Tensor x, Tensor row) -> ()", reference_ring_push, triton_ring_push),
    "ring_blend": _Op("(Tensor(a!) out, Tensor ring, Tensor row) -> ()", reference_ring_blend, triton_ring_blend),
    "ring_blend_add": _Op("(Tensor(a!) x, Tensor gate, Tensor ring, Tensor row) -> ()", reference_ring_blend_add, triton_ring_blend_add),
    "packed_push": _Op("(Tensor(a!) ring, Tensor x, int bits) -> ()", _packed.reference_packed_push, None, False),
    "packed_blend": _Op(
        "(Tensor(a!) out, Tensor ring, Tensor row, int bits) -> ()", _packed.reference_packed_blend, _packed.triton_packed_blend, False
    ),
    "packed_blend_add": _Op(
        "(Tensor(a!) x, Tensor gate, Tensor ring, Tensor row, int bits) -> ()",
        _packed.reference_packed_blend_add,
        _packed.triton_packed_blend_add,
        False,
    ),
    "cfg_split": _Op(
        "(Tensor(a!) low, Tensor(b!) high, Tensor uncond, Tensor cond, int radius) -> ()",
        _split.reference_cfg_split,
        _split.triton_cfg_split,
    ),
    "cfg_reconstruct": _Op(
        "(Tensor(a!) out, Tensor cond, Tensor low, Tensor high, Tensor row, int cond_half) -> ()",
        reference_cfg_reconstruct,
        triton_cfg_reconstruct,
    ),
    "cfg_guide": _Op(
        "(Tensor(a!) out, Tensor cond, Tensor low, Tensor high, Tensor row, Tensor scale) -> ()", reference_cfg_guide, triton_cfg_guide
    ),
}

_IN_CUDA = ("ring_push", "packed_push")
"""The ops that csrc/cuda serves."""

_library = torch.library.Library("fastercache", "DEF")  # the registrations live as long as this object


def _load(name: str, what: str) -> str | None:
    """Loads the library `<name>*.so`, which registers itself. Returns why it could not, or None."""
    paths = sorted(Path(__file__).parent.glob(f"{name}.*"))
    if not paths:
        return f"the {what} library was not built (no fastercache/{name}*.so); installing with FASTERCACHE_BUILD=require shows why"
    try:
        torch.ops.load_library(str(paths[0]))
    except Exception as error:
        built = re.search(rb"fastercache built with torch ([\d.]+)", paths[0].read_bytes())
        version = built[1].decode() if built else "an unknown version"
        return f"{paths[0].name} was built with torch {version} and does not load with the installed torch {torch.__version__}: {error}"
    return None


def _register() -> tuple[dict[str, dict[str, str]], list[tuple[str, str]]]:
    """Defines the ops and picks an implementation for each device. Returns the name of each, and for fallbacks (device, reason)."""
    for name, op in _OPS.items():
        _library.define(name + op.schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.register_fake(f"fastercache::{name}", lambda *args: None, lib=_library)
    missing: dict[str, str | None]
    if os.environ.get("FASTERCACHE_FORCE_REFERENCE") == "1":
        missing = dict.fromkeys(("C++", "CUDA C++", "Triton"), "FASTERCACHE_FORCE_REFERENCE=1 is set")
    else:
        missing = {
            "C++": _load("_ops", "C++"),
            "CUDA C++": _load("_ops_cuda", "CUDA C++") if torch.version.cuda else "the installed torch has no CUDA",
            "Triton": f"Triton cannot be imported ({_triton.MISSING})" if _triton.MISSING else None,
        }
    chosen: dict[str, dict[str, str]] = {}
    for name, op in _OPS.items():
        on_cuda = next((how for how in _cuda_candidates(name, op) if missing[how] is None), None)
        if missing["C++"] and op.fallback:
            _library.impl(name, op.reference, "CPU")
        if on_cuda == "Triton" and op.triton is not None:
            _library.impl(name, op.triton, "CUDA")
        elif on_cuda is None and op.fallback:
            _library.impl(name, op.reference, "CUDA")
        stand_in = "PyTorch" if op.fallback else "none"
        chosen[name] = {"cpu": stand_in if missing["C++"] else "C++", "cuda": on_cuda or stand_in}
    reasons = []
    if missing["C++"]:
        reasons.append(("cpu", f"The CPU ops run on PyTorch: {missing['C++']}."))
    if missing["Triton"]:
        reasons.append(("cuda", f"The CUDA ops run on PyTorch: {missing['Triton']}."))
    elif missing["CUDA C++"] and torch.version.cuda:
        reasons.append(("cuda", f"On CUDA, ring_push runs on Triton and packed caches are not to be had: {missing['CUDA C++']}."))
    return chosen, reasons


def _cuda_candidates(name: str, op: _Op) -> list[str]:
    """What may serve an op on CUDA, best first."""
    return [*(["CUDA C++"] if name in _IN_CUDA else []), *(["Triton"] if op.triton else [])]


_CHOSEN, _REASONS = _register()
_ring_push = torch.ops.fastercache.ring_push.default
_ring_blend = torch.ops.fastercache.ring_blend.default
_ring_blend_add = torch.ops.fastercache.ring_blend_add.default
_packed_push = torch.ops.fastercache.packed_push.default
_packed_blend = torch.ops.fastercache.packed_blend.default
_packed_blend_add = torch.ops.fastercache.packed_blend_add.default
_cfg_split = torch.ops.fastercache.cfg_split.default
_cfg_reconstruct = torch.ops.fastercache.cfg_reconstruct.default
_cfg_guide = torch.ops.fastercache.cfg_guide.default


def implementations() -> dict[str, dict[str, str]]:
    """Which code serves each op: `{op: {"cpu": "C++" | "PyTorch" | "none", "cuda": "CUDA C++" | "Triton" | "PyTorch" | "none"}}`."""
    return {name: dict(chosen) for name, chosen in _CHOSEN.items()}


def fallback_reasons(device: str | None = None) -> list[str]:
    """Why something slower serves the ops, a sentence for each device or for the one named; empty when nothing falls back."""
    return [reason for of, reason in _REASONS if device in (None, of)]


def packed_missing(device: torch.device) -> str | None:
    """Why packed rings cannot be used on a device, or None where they can."""
    missing = [name for name, chosen in _CHOSEN.items() if not _OPS[name].fallback and chosen.get(device.type, "none") == "none"]
    if not missing:
        return None
    return " ".join([f"nothing serves {', '.join(missing)} on {device.type}.", *fallback_reasons(device.type)])


def map_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of `dtype` are computed and CFG maps are kept: float32, but float64 for float64."""
    return _triton.compute_dtype(dtype)


# The checks accept what is right in as few tensor attributes as they can, about 0.1 us each, and then look for what is wrong: a run calls
# the ops some hundred times a step, and what they do may take less than 5 us.
_ROW_SHAPE, _SCALE_SHAPE = torch.Size((ROW_SIZE,)), torch.Size((1,))
_MAP_DTYPES = {dtype: map_dtype(dtype) for dtype in DTYPES}


def _check_dtype(name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} has dtype {tensor.dtype}, expected one of {', '.join(str(dtype) for dtype in DTYPES)}")


def _check_tensor(name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
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
    if row.shape == _ROW_SHAPE and row.dtype is torch.float32 and row.device == device and row.is_contiguous():
        return
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
    if not ring.is_contiguous():
        _check_slots(ring)
    _check_row(row, ring.device)


def _check_slots(ring: torch.Tensor) -> None:
    elements = 1
    for size, stride in zip(reversed(ring.shape[1:]), reversed(ring.stride()[1:]), strict=True):
        if size != 1 and stride != elements:
            raise ValueError(f"ring has strides {list(ring.stride())} for shape {list(ring.shape)}, expected each slot contiguous")
        elements *= max(size, 1)  # torch counts an empty dimension as 1 in strides
    if ring.shape[0] > 1 and ring.stride(0) < elements:
        raise ValueError(f"ring has slots of {elements} elements {ring.stride(0)} apart, expected slots that do not overlap")


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


def ring_blend(ring: torch.Tensor, row: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Approximates a site's output from its last computed ones: `sum_k c_k ring[slot_k]` over the row's taps.

    With taps A (newest) and B and coefficients `1 + w, -w` this is FasterCache's Eq. 5, `A + w (A - B)`. Slots that no tap in use names are
    not used and may hold anything. The sum is taken in float32 (float64 for float64) and rounded once.

    Args:
        ring: `[slots, *shape]`, as in `ring_push`.
        row: `[16]` float32, contiguous, on the device of `ring`.
        out: `[*shape]`, the dtype and device of `ring`, contiguous, not in the ring; overwritten. A new tensor if not given.

    Returns:
        `out`.

    Moves the bytes of one slot for each tap and one for the result.

    Raises:
        ValueError, TypeError, RuntimeError: as in `ring_push`.
    """
    _check_ring(ring, row)
    if out is None:
        out = ring.new_empty(ring.shape[1:])
    else:
        _check_tensor("out", out, ring.shape[1:], ring.dtype, ring.device)
        _check_contiguous("out", out)
    _ring_blend(out, ring, row)
    return out


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
    _check_gated(x, gate)
    _ring_blend_add(x, gate, ring, row)


def packed_push(ring: torch.Tensor, x: torch.Tensor, bits: int) -> None:
    """Stores `x` as the newest output of its site in a packed ring, and its change from the one before.

    Each row of channels is quantized in blocks of 128, `scale = max |value| / 127` (7 for a difference of 4 bits), to the nearest code. The
    difference is that of `x` to the newest output as the ring holds it, so that the error of one push does not go into the next. A
    value that is not finite makes its whole block NaN. Needs no row: the newest output has one place.

    Args:
        ring: `[*shape[:-1], PackedRow(channels, bits).bytes]` uint8, contiguous. Changed in place.
        x: `[*shape]`, channels last, float32, bfloat16 or float16, on the device of `ring`; any strides.
        bits: of a difference's code, 8 or 4; 0 keeps no difference, for one tap.

    Moves the bytes of `x`, those of the newest output once for reading and the whole ring's for writing.

    Raises:
        ValueError: a shape, stride, device or `bits` is wrong.
        TypeError: a dtype is wrong.
        NotImplementedError: nothing serves packed rings on this device; `packed_missing` says why.
    """
    _check_packed(ring, x, "x", bits)
    _packed_push(ring, x, bits)


def packed_blend(ring: torch.Tensor, row: torch.Tensor, out: torch.Tensor, bits: int) -> torch.Tensor:
    """As `ring_blend` from a packed ring: `(c_0 + c_1) A - c_1 D` with the newest output A and its difference D to the one before.

    Args:
        ring: uint8, as in `packed_push`.
        row: `[16]` float32, contiguous, on the device of `ring`; of at most 2 taps (1 where `bits` is 0). Its slots are not read.
        out: `[*shape]`, float32, bfloat16 or float16, contiguous, on the device of `ring`. Overwritten.
        bits: as the ring was pushed.

    Returns:
        `out`.

    Moves the bytes of the ring and of `out`.

    Raises:
        ValueError, TypeError, NotImplementedError: as in `packed_push`.
        RuntimeError: on the CPU, when the row has more taps.
    """
    _check_packed(ring, out, "out", bits)
    _check_contiguous("out", out)
    _check_row(row, ring.device)
    _packed_blend(out, ring, row, bits)
    return out


def packed_blend_add(x: torch.Tensor, gate: torch.Tensor, ring: torch.Tensor, row: torch.Tensor, bits: int) -> None:
    """Adds a site's approximated output to the residual stream: `x += gate * packed_blend(ring, row)`, rounded once.

    Args:
        x: `[*shape]`, float32, bfloat16 or float16; the last dimension contiguous, no two elements sharing memory. Changed in place.
        gate: broadcastable to `x`; the dtype of `x`, or float32.
        ring, row, bits: as in `packed_blend`.

    Moves the bytes of the ring, two for `x`, and those of the gate.

    Raises:
        ValueError, TypeError, NotImplementedError, RuntimeError: as in `packed_blend`.
    """
    _check_packed(ring, x, "x", bits)
    _check_row(row, ring.device)
    _check_gated(x, gate)
    _packed_blend_add(x, gate, ring, row, bits)


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
    shape = uncond.shape
    if len(shape) < 2:
        raise ValueError(f"uncond has shape {list(shape)}, expected [..., H, W]")
    _check_tensor("cond", cond, shape, uncond.dtype, uncond.device)
    _check_maps(low, high, uncond, shape)
    _check_radius(radius, shape[-2], shape[-1])
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
    shape, device = cond.shape, cond.device
    if not shape:
        raise ValueError("cond has no dimension, expected [n, ...]")
    _check_tensor("out", out, (2 * shape[0], *shape[1:]), cond.dtype, device)
    _check_contiguous("out", out)
    _check_maps(low, high, cond, shape)
    _check_row(row, device)
    if cond_half not in (0, 1):
        raise ValueError(f"cond_half is {cond_half!r}, expected 0 (conditional rows first) or 1 (last)")
    _cfg_reconstruct(out, cond, low, high, row, cond_half)


def cfg_guide(
    cond: torch.Tensor, low: torch.Tensor, high: torch.Tensor, row: torch.Tensor, scale: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """The guided prediction of a skipped step: `u + scale (cond - u)` with `u = cond + w_low * low + w_high * high`.

    For a sampler that would otherwise rebuild both branches with `cfg_reconstruct` only to combine them: 3 tensors are read and one is
    written. Computed in the dtype of the maps and rounded once.

    Args:
        cond: `[...]`, float32, bfloat16, float16 or float64; any strides.
        low: `[...]`, float32 (float64 for float64), contiguous.
        high: as `low`.
        row: `[16]` float32, contiguous, on the device of `cond`.
        scale: the guidance scale, `[1]` float32 on the device of `cond`.
        out: as `cond`, contiguous; overwritten. It may be `cond` itself, where that is contiguous. A new tensor if not given.

    Returns:
        `out`.

    Raises:
        ValueError: a shape, stride or device is wrong.
        TypeError: a dtype is wrong.
    """
    _check_dtype("cond", cond)
    shape, device = cond.shape, cond.device
    _check_maps(low, high, cond, shape)
    _check_row(row, device)
    _check_tensor("scale", scale, _SCALE_SHAPE, torch.float32, device)
    if out is None:
        out = torch.empty(shape, dtype=cond.dtype, device=device)
    else:
        _check_tensor("out", out, shape, cond.dtype, device)
        _check_contiguous("out", out)
    _cfg_guide(out, cond, low, high, row, scale)
    return out


def prepare_cfg_split(height: int, width: int, radius: int, dtype: torch.dtype, device: torch.device | str) -> None:
    """Makes the two Fourier bases that `cfg_split` of `[..., height, width]` inputs of `dtype` needs on `device`, and keeps them.

    Later calls then allocate and upload nothing, which the recording of a CUDA graph requires. The C++ implementation needs no bases.

    Raises:
        ValueError, TypeError: as in `cfg_split`.
    """
    _check_radius(radius, height, width)
    _split.prepare(height, width, radius, dtype, torch.empty(0, device=device).device)  # the device with its index, as tensors have it


def _check_gated(x: torch.Tensor, gate: torch.Tensor) -> None:
    if not x.is_contiguous():
        if x.shape[-1] > 1 and x.stride(-1) != 1:
            raise ValueError(f"x has strides {list(x.stride())}, expected 1 in the last dimension")
        if any(size > 1 and stride == 0 for size, stride in zip(x.shape, x.stride(), strict=True)):
            raise ValueError(f"x has strides {list(x.stride())} for shape {list(x.shape)}, expected no broadcast dimension")
    if gate.dtype is not torch.float32 and gate.dtype is not x.dtype:
        raise TypeError(f"gate has dtype {gate.dtype}, expected {x.dtype} or torch.float32")
    if gate.device != x.device:
        raise ValueError(f"gate is on {gate.device}, expected {x.device}")
    mine, sizes = gate.shape, x.shape
    if mine == sizes:
        return
    missing = len(sizes) - len(mine)
    if missing < 0 or any(size not in (1, whole) for size, whole in zip(mine, sizes[missing:], strict=True)):
        raise ValueError(f"gate has shape {list(mine)}, expected one that broadcasts to x, {list(sizes)}")


def _check_packed(ring: torch.Tensor, values: torch.Tensor, name: str, bits: int) -> None:
    if values.dtype not in PACKED_DTYPES:
        raise TypeError(f"{name} has dtype {values.dtype}, expected one of {', '.join(str(dtype) for dtype in PACKED_DTYPES)}")
    shape = values.shape
    if not shape or shape[-1] < 1:
        raise ValueError(f"{name} has shape {list(shape)}, expected [..., channels] with at least one channel")
    _check_tensor("ring", ring, (*shape[:-1], _packed.row_bytes(shape[-1], bits)), torch.uint8, values.device)
    # Dynamo does not trace the offset; the kernels check it again.
    if not torch.compiler.is_compiling() and ring.storage_offset() % _packed.ALIGNMENT:
        raise ValueError(f"ring begins {ring.storage_offset()} bytes into its storage, expected a multiple of {_packed.ALIGNMENT}")
    _check_contiguous("ring", ring)


def _check_maps(low: torch.Tensor, high: torch.Tensor, like: torch.Tensor, shape: torch.Size) -> None:
    dtype, device = _MAP_DTYPES[like.dtype], like.device
    if low is high:
        raise ValueError("low and high are one tensor, expected two")
    alike = low.shape == shape == high.shape and low.dtype is dtype is high.dtype and low.device == device == high.device
    if alike and low.is_contiguous() and high.is_contiguous():
        return
    for name, one in (("low", low), ("high", high)):
        _check_tensor(name, one, shape, dtype, device)
        _check_contiguous(name, one)


def _check_radius(radius: int, height: int, width: int) -> None:
    if not isinstance(radius, int) or isinstance(radius, bool):
        raise TypeError(f"radius is {radius!r}, expected an int")
    if not 0 <= 2 * radius < min(height, width):
        raise ValueError(f"radius is {radius} for planes of {height} x {width}, expected 0 <= radius < min(H, W) / 2")
