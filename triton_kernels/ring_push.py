"""Push: store a site's newest output in its ring, or what a block added to its residual stream.

A *ring* is one tensor `[slots, *shape]`; a site's last computed outputs lie in its slots, and the coefficients say
which the next goes to:

    ring[coefficients.WRITE_SLOT] = x

The kernel is a copy, and shows the outline that all the others share. A *program* handles BLOCK neighbouring elements.
It reads the slot from the coefficients in device memory, so one compiled kernel (and one CUDA graph) serves every step.
`x` may have any strides: `strided_offset` turns the position of an element in `x` into its place in memory, while the
slot it is written to is contiguous.

A transformer block, or the whole stack of them, is skipped by adding what it added last time to its residual stream.
What it stores is therefore its output without the stream that entered it, and the difference is never written anywhere
else:

    ring[coefficients.WRITE_SLOT] = x - entry                    (push_residual)
"""

from __future__ import annotations

import torch

from ._triton import (
    BLOCK_SIZE,
    FUSED,
    WRITE_SLOT,
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


def reference_ring_push(ring: torch.Tensor, x: torch.Tensor, coefficients: torch.Tensor) -> None:
    """The op in plain PyTorch; the slot stays on the device, as reading them would stop the host until the GPU has
    caught up."""
    slot = coefficients[Coefficient.WRITE_SLOT : Coefficient.WRITE_SLOT + 1].long()
    ring.index_copy_(0, slot, x.unsqueeze(0))


def reference_ring_push_residual(
    ring: torch.Tensor, x: torch.Tensor, entry: torch.Tensor, coefficients: torch.Tensor
) -> None:
    """The op in plain PyTorch."""
    dtype = compute_dtype(ring.dtype)
    reference_ring_push(ring, (x.to(dtype) - entry.to(dtype)).to(ring.dtype), coefficients)


@triton.jit
def ring_push_kernel(
    ring, x, coefficients, elements, slot_stride, sizes, strides, BLOCK: tl.constexpr, WIDE: tl.constexpr
):
    index = program_elements(BLOCK, WIDE)
    inside = index < elements
    slot = tl.load(coefficients + WRITE_SLOT).to(tl.int64)  # 64 bits: a ring may hold more than 2**31 elements
    value = tl.load(x + strided_offset(index, sizes, strides), mask=inside)
    tl.store(ring + slot * slot_stride + index, value, mask=inside)


def triton_ring_push(ring: torch.Tensor, x: torch.Tensor, coefficients: torch.Tensor) -> None:
    """Launches the kernel; arguments as in `fastercache.ops.ring_push`, taken as valid."""
    if x.numel() == 0:
        return
    sizes, strides = collapse(x.shape, x.stride())
    with on_device_of(ring):
        ring_push_kernel[grid(x.numel())](
            ring,
            x,
            coefficients,
            x.numel(),
            ring.stride(0),
            sizes,
            strides,
            BLOCK=BLOCK_SIZE,
            WIDE=needs_wide(sizes, strides),
            **FUSED,
        )


@triton.jit
def ring_push_residual_kernel(
    ring,
    x,
    entry,
    coefficients,
    elements,
    slot_stride,
    sizes,
    x_strides,
    entry_strides,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    index = program_elements(BLOCK, WIDE)
    inside = index < elements
    slot = tl.load(coefficients + WRITE_SLOT).to(tl.int64)
    value = widen(tl.load(x + strided_offset(index, sizes, x_strides), mask=inside))
    before = widen(tl.load(entry + strided_offset(index, sizes, entry_strides), mask=inside))
    tl.store(ring + slot * slot_stride + index, (value - before).to(ring.dtype.element_ty), mask=inside)


def triton_ring_push_residual(
    ring: torch.Tensor, x: torch.Tensor, entry: torch.Tensor, coefficients: torch.Tensor
) -> None:
    """Launches the kernel; arguments as in `fastercache.ops.ring_push_residual`, taken as valid."""
    if x.numel() == 0:
        return
    sizes, x_strides, entry_strides = collapse(x.shape, x.stride(), entry.stride())
    with on_device_of(ring):
        ring_push_residual_kernel[grid(x.numel())](
            ring,
            x,
            entry,
            coefficients,
            x.numel(),
            ring.stride(0),
            sizes,
            x_strides,
            entry_strides,
            BLOCK=BLOCK_SIZE,
            **FUSED,
            WIDE=needs_wide(sizes, x_strides, entry_strides),
        )


def bytes_moved(elements: int, itemsize: int, residual: bool = False) -> int:
    """Bytes a push must move: `x` is read once, its slot written once; of a residual, `entry` is read as well."""
    return (3 if residual else 2) * elements * itemsize
