"""CFG-Cache on a skipped step: rebuild the unconditional half of a batch from the conditional one.

The last full step left two real maps per plane, `low` and `high` (see `cfg_split`). FasterCache's Eq. 9-11, which its
authors run as fft2, mask and ifft2, are then a weighted sum of real tensors, because the Fourier transform is linear:

    rebuilt = cond + w_low * low + w_high * high

The guidance code that follows expects one batch with both halves, so the op also copies `cond` to its half: each
element of `cond` is read once and written twice. Where the caller has already placed `cond` in its half of `out`, that
copy is left out.

A third map, `previous`, adds `w_previous * previous`: the difference of the branches before the newest one, to
extrapolate from both. Where its weight is 0 it is not loaded, as it may never have been written.
"""

from __future__ import annotations

import torch

from ._triton import (
    BLOCK_SIZE,
    FUSED,
    HIGH,
    LOW,
    PREVIOUS,
    collapse,
    compute_dtype,
    grid,
    needs_wide,
    on_device_of,
    program_elements,
    strided_offset,
    tl,
    triton,
    widen,
)
from .coefficients import Coefficient


def _halves(out: torch.Tensor, cond_half: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The half of `out` that holds the conditional rows, and the one that is rebuilt."""
    first, last = out.chunk(2)
    return (first, last) if cond_half == 0 else (last, first)


def reference_cfg_reconstruct(
    out: torch.Tensor,
    cond: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    coefficients: torch.Tensor,
    cond_half: int,
    previous: torch.Tensor | None = None,
) -> None:
    """The op in plain PyTorch."""
    dtype = compute_dtype(out.dtype)
    copied, rebuilt = _halves(out, cond_half)
    total = (
        cond.to(dtype) + coefficients[Coefficient.LOW].to(dtype) * low + coefficients[Coefficient.HIGH].to(dtype) * high
    )
    rebuilt.copy_(total if previous is None else total + _reference_previous(previous, coefficients))
    copied.copy_(cond)


def _reference_previous(previous: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
    """The third map's term; 0 where its weight is 0, whatever the map holds."""
    weight = coefficients[Coefficient.PREVIOUS].to(previous.dtype)
    return torch.where(weight != 0, weight * previous, 0)


@triton.jit
def weighted_previous(previous, coefficients, index, elements):
    """The third map's term at `index`; 0 beyond `elements`, and everywhere where its weight is 0."""
    weight = tl.load(coefficients + PREVIOUS)
    return weight * tl.load(previous + index, mask=index < tl.where(weight != 0, elements, 0), other=0.0)


@triton.jit
def cfg_reconstruct_kernel(
    copied,
    rebuilt,
    cond,
    low,
    high,
    previous,
    coefficients,
    elements,
    sizes,
    strides,
    COPY: tl.constexpr,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    index = program_elements(BLOCK, WIDE)
    inside = index < elements
    w_low = tl.load(coefficients + LOW)
    w_high = tl.load(coefficients + HIGH)
    value = tl.load(cond + strided_offset(index, sizes, strides), mask=inside)
    total = widen(value) + w_low * tl.load(low + index, mask=inside) + w_high * tl.load(high + index, mask=inside)
    if previous is not None:
        total += weighted_previous(previous, coefficients, index, elements)
    tl.store(rebuilt + index, total.to(rebuilt.dtype.element_ty), mask=inside)
    if COPY:
        tl.store(copied + index, value, mask=inside)


def triton_cfg_reconstruct(
    out: torch.Tensor,
    cond: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    coefficients: torch.Tensor,
    cond_half: int,
    previous: torch.Tensor | None = None,
) -> None:
    """Launches the kernel; arguments as in `fastercache.ops.cfg_reconstruct`, taken as valid."""
    if cond.numel() == 0:
        return
    copied, rebuilt = _halves(out, cond_half)
    sizes, strides = collapse(cond.shape, cond.stride())
    with on_device_of(out):
        cfg_reconstruct_kernel[grid(cond.numel())](
            copied,
            rebuilt,
            cond,
            low,
            high,
            previous,
            coefficients,
            cond.numel(),
            sizes,
            strides,
            COPY=copied.data_ptr() != cond.data_ptr(),
            BLOCK=BLOCK_SIZE,
            WIDE=needs_wide(sizes, strides),
            **FUSED,
        )


def bytes_moved(elements: int, itemsize: int, map_itemsize: int = 4, in_place: bool = False, maps: int = 2) -> int:
    """Bytes a reconstruction of `elements` conditional elements must move.

    `cond` and the maps are read once; both halves of `out` are written, or only the rebuilt one where `cond` is already
    in place.
    """
    return elements * ((2 if in_place else 3) * itemsize + maps * map_itemsize)
