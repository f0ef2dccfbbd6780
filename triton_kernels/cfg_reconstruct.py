"""CFG-Cache on a skipped step: rebuild the unconditional half of a batch from the conditional one.

The last full step left two real maps per plane, `low` and `high` (see `cfg_split`). FasterCache's Eq. 9-11, which its authors run as
fft2, mask and ifft2, are then a weighted sum of real tensors, because the Fourier transform is linear:

    rebuilt = cond + w_low * low + w_high * high

The guidance code that follows expects one batch with both halves, so the op also copies `cond` to its half: each element of `cond` is read
once and written twice. Where the caller has already placed `cond` in its half of `out`, that copy is left out.

Guidance is one more weighted sum, `u + s (cond - u) = cond + (1 - s) (w_low * low + w_high * high)`, which `cfg_guide` gives directly.
"""

from __future__ import annotations

import torch

from ._triton import (
    BLOCK_SIZE,
    FUSED,
    HIGH,
    LOW,
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
from .row import Row


def _halves(out: torch.Tensor, cond_half: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The half of `out` that holds the conditional rows, and the one that is rebuilt."""
    first, last = out.chunk(2)
    return (first, last) if cond_half == 0 else (last, first)


def reference_cfg_reconstruct(
    out: torch.Tensor, cond: torch.Tensor, low: torch.Tensor, high: torch.Tensor, row: torch.Tensor, cond_half: int
) -> None:
    """The op in plain PyTorch."""
    dtype = compute_dtype(out.dtype)
    copied, rebuilt = _halves(out, cond_half)
    rebuilt.copy_(cond.to(dtype) + row[Row.LOW].to(dtype) * low + row[Row.HIGH].to(dtype) * high)
    copied.copy_(cond)


def reference_cfg_guide(
    out: torch.Tensor, cond: torch.Tensor, low: torch.Tensor, high: torch.Tensor, row: torch.Tensor, scale: torch.Tensor
) -> None:
    """The op in plain PyTorch."""
    dtype = compute_dtype(cond.dtype)
    residual = row[Row.LOW].to(dtype) * low + row[Row.HIGH].to(dtype) * high
    out.copy_(cond.to(dtype) + (1 - scale.to(dtype)) * residual)


@triton.jit
def cfg_reconstruct_kernel(
    copied, rebuilt, cond, low, high, row, elements, sizes, strides, COPY: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr
):
    index = program_elements(BLOCK, WIDE)
    inside = index < elements
    w_low = tl.load(row + LOW)
    w_high = tl.load(row + HIGH)
    value = tl.load(cond + strided_offset(index, sizes, strides), mask=inside)
    total = widen(value) + w_low * tl.load(low + index, mask=inside) + w_high * tl.load(high + index, mask=inside)
    tl.store(rebuilt + index, total.to(rebuilt.dtype.element_ty), mask=inside)
    if COPY:
        tl.store(copied + index, value, mask=inside)


def triton_cfg_reconstruct(
    out: torch.Tensor, cond: torch.Tensor, low: torch.Tensor, high: torch.Tensor, row: torch.Tensor, cond_half: int
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
            row,
            cond.numel(),
            sizes,
            strides,
            COPY=copied.data_ptr() != cond.data_ptr(),
            BLOCK=BLOCK_SIZE,
            WIDE=needs_wide(sizes, strides),
            **FUSED,
        )


@triton.jit
def cfg_guide_kernel(out, cond, low, high, row, scale, elements, sizes, strides, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    index = program_elements(BLOCK, WIDE)
    inside = index < elements
    rest = 1.0 - tl.load(scale).to(low.dtype.element_ty)
    residual = tl.load(row + LOW) * tl.load(low + index, mask=inside) + tl.load(row + HIGH) * tl.load(high + index, mask=inside)
    total = widen(tl.load(cond + strided_offset(index, sizes, strides), mask=inside)) + rest * residual
    tl.store(out + index, total.to(out.dtype.element_ty), mask=inside)


def triton_cfg_guide(
    out: torch.Tensor, cond: torch.Tensor, low: torch.Tensor, high: torch.Tensor, row: torch.Tensor, scale: torch.Tensor
) -> None:
    """Launches the kernel; arguments as in `fastercache.ops.cfg_guide`, taken as valid."""
    if cond.numel() == 0:
        return
    sizes, strides = collapse(cond.shape, cond.stride())
    with on_device_of(out):
        cfg_guide_kernel[grid(cond.numel())](
            out, cond, low, high, row, scale, cond.numel(), sizes, strides, BLOCK=BLOCK_SIZE, WIDE=needs_wide(sizes, strides), **FUSED
        )


def bytes_moved(elements: int, itemsize: int, map_itemsize: int = 4, in_place: bool = False) -> int:
    """Bytes a reconstruction of `elements` conditional elements must move.

    `cond` and both maps are read once; both halves of `out` are written, or only the rebuilt one where `cond` is already in place.
    """
    return elements * ((2 if in_place else 3) * itemsize + 2 * map_itemsize)
