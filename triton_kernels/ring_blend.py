"""Blend: approximate a site's output from its last computed outputs, and optionally add it to the residual stream.

FasterCache's dynamic feature reuse (Eq. 5, `F = A + w (A - B)`), PAB's plain reuse (`F = A`) and TaylorSeer's extrapolation are all one sum
over the newest outputs ("taps"), newest first:

    blend = sum_k c_k ring[slot_k]          k < row.TAPS, at most 4 taps
    x    += gate * blend                    (blend_add)

The kernels move far more bytes than they compute, so all that matters is to touch each byte once: PyTorch would write and read back an
intermediate tensor for each product and each sum; here they stay in registers, in float32, and are rounded once. `blend_add` also saves
writing the blend and reading it again.

A tap that is not in use is not loaded at all (its mask is false for every element): its slot may never have been written.
"""

from __future__ import annotations

import torch

from ._triton import (
    BLOCK_SIZE,
    COEFFICIENT,
    MAX_TAPS,
    READ_SLOT,
    TAPS,
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
from .row import MAX_TAPS as TAP_COUNT
from .row import Row


def _reference_sum(ring: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """The blend before rounding. Every slot index is read, to stay on the device; `where` drops what unused taps hold, NaN included."""
    dtype = compute_dtype(ring.dtype)
    total = torch.zeros(ring.shape[1:], dtype=dtype, device=ring.device)
    for k in range(TAP_COUNT):
        slot = row[Row.READ_SLOT + k : Row.READ_SLOT + k + 1].long()
        term = row[Row.COEFFICIENT + k].to(dtype) * ring.index_select(0, slot)[0].to(dtype)
        total += torch.where(k < row[Row.TAPS], term, 0)
    return total


def reference_ring_blend(out: torch.Tensor, ring: torch.Tensor, row: torch.Tensor) -> None:
    """The op in plain PyTorch."""
    out.copy_(_reference_sum(ring, row))


def reference_ring_blend_add(x: torch.Tensor, gate: torch.Tensor, ring: torch.Tensor, row: torch.Tensor) -> None:
    """The op in plain PyTorch."""
    dtype = compute_dtype(x.dtype)
    x.copy_(x.to(dtype) + gate.to(dtype) * _reference_sum(ring, row))


@triton.jit
def weighted_sum(ring, row, index, elements, slot_stride):
    """The blend at `index`, before rounding; 0 beyond `elements`."""
    taps = tl.load(row + TAPS)
    total = tl.zeros(index.shape, tl.float32)
    for k in tl.static_range(MAX_TAPS):
        slot = tl.load(row + READ_SLOT + k).to(tl.int64)
        coefficient = tl.where(taps > k, tl.load(row + COEFFICIENT + k), 0.0)
        inside = index < tl.where(taps > k, elements, 0)  # nowhere, for a tap that is not in use
        value = tl.load(ring + slot * slot_stride + index, mask=inside, other=0.0)
        total = total + coefficient * widen(value)
    return total


@triton.jit
def ring_blend_kernel(out, ring, row, elements, slot_stride, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    index = program_elements(BLOCK, WIDE)
    inside = index < elements
    total = weighted_sum(ring, row, index, elements, slot_stride)
    tl.store(out + index, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def ring_blend_add_kernel(
    x, gate, ring, row, elements, slot_stride, sizes, x_strides, gate_strides, BLOCK: tl.constexpr, WIDE: tl.constexpr
):
    index = program_elements(BLOCK, WIDE)
    inside = index < elements
    total = weighted_sum(ring, row, index, elements, slot_stride)
    x_pointers = x + strided_offset(index, sizes, x_strides)
    factor = tl.load(gate + strided_offset(index, sizes, gate_strides), mask=inside)
    value = widen(tl.load(x_pointers, mask=inside)) + widen(factor) * total
    tl.store(x_pointers, value.to(x.dtype.element_ty), mask=inside)


def triton_ring_blend(out: torch.Tensor, ring: torch.Tensor, row: torch.Tensor) -> None:
    """Launches the kernel; arguments as in `fastercache.ops.ring_blend`, taken as valid."""
    if out.numel() == 0:
        return
    with on_device_of(ring):
        ring_blend_kernel[grid(out.numel())](
            out, ring, row, out.numel(), ring.stride(0), BLOCK=BLOCK_SIZE, WIDE=needs_wide((out.numel(),), (1,))
        )


def triton_ring_blend_add(x: torch.Tensor, gate: torch.Tensor, ring: torch.Tensor, row: torch.Tensor) -> None:
    """Launches the kernel; arguments as in `fastercache.ops.ring_blend_add`, taken as valid."""
    if x.numel() == 0:
        return
    sizes, x_strides, gate_strides = collapse(x.shape, x.stride(), gate.expand(x.shape).stride())
    with on_device_of(ring):
        ring_blend_add_kernel[grid(x.numel())](
            x,
            gate,
            ring,
            row,
            x.numel(),
            ring.stride(0),
            sizes,
            x_strides,
            gate_strides,
            BLOCK=BLOCK_SIZE,
            WIDE=needs_wide(sizes, x_strides, gate_strides),
        )


def bytes_moved(elements: int, itemsize: int, taps: int, gate_bytes: int | None = None) -> int:
    """Bytes a blend must move: each tap is read once and the result written once.

    With `gate_bytes` (the bytes of the gate) the model is that of blend_add, which also reads the gate and `x`.
    """
    if gate_bytes is None:
        return (taps + 1) * elements * itemsize
    return (taps + 2) * elements * itemsize + gate_bytes
