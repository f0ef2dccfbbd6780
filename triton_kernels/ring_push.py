"""Push: store a site's newest output in its ring.

A *ring* is one tensor `[slots, *shape]`; a site's last computed outputs lie in its slots, and the row says which slot the next one goes to:

    ring[row.WRITE_SLOT] = x

The kernel is a copy, and shows the outline that all the others share. A *program* handles BLOCK neighbouring elements. It reads the slot
from the row in device memory, so one compiled kernel (and one CUDA graph) serves every step. `x` may have any strides: `strided_offset`
turns the position of an element in `x` into its place in memory, while the slot it is written to is contiguous.
"""

from __future__ import annotations

import torch

from ._triton import BLOCK_SIZE, FUSED, WRITE_SLOT, collapse, grid, needs_wide, on_device_of, program_elements, strided_offset, tl, triton
from .row import Row


def reference_ring_push(ring: torch.Tensor, x: torch.Tensor, row: torch.Tensor) -> None:
    """The op in plain PyTorch; the slot stays on the device, as reading it would stop the host until the GPU has caught up."""
    slot = row[Row.WRITE_SLOT : Row.WRITE_SLOT + 1].long()
    ring.index_copy_(0, slot, x.unsqueeze(0))


@triton.jit
def ring_push_kernel(ring, x, row, elements, slot_stride, sizes, strides, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    index = program_elements(BLOCK, WIDE)
    inside = index < elements
    slot = tl.load(row + WRITE_SLOT).to(tl.int64)  # 64 bits: a ring may hold more than 2**31 elements
    value = tl.load(x + strided_offset(index, sizes, strides), mask=inside)
    tl.store(ring + slot * slot_stride + index, value, mask=inside)


def triton_ring_push(ring: torch.Tensor, x: torch.Tensor, row: torch.Tensor) -> None:
    """Launches the kernel; arguments as in `fastercache.ops.ring_push`, taken as valid."""
    if x.numel() == 0:
        return
    sizes, strides = collapse(x.shape, x.stride())
    with on_device_of(ring):
        ring_push_kernel[grid(x.numel())](
            ring, x, row, x.numel(), ring.stride(0), sizes, strides, BLOCK=BLOCK_SIZE, WIDE=needs_wide(sizes, strides), **FUSED
        )


def bytes_moved(elements: int, itemsize: int) -> int:
    """Bytes a push must move: `x` is read once, its slot written once."""
    return 2 * elements * itemsize
