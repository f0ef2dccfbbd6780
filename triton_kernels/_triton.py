"""What the kernels share: Triton itself (or a stand-in that lets the modules import), the coefficients' places and
strided indexing."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace

import torch

from .coefficients import MAX_TAPS as _MAX_TAPS
from .coefficients import Coefficient

MISSING: str | None = None  # why Triton cannot be used; None when it can
try:
    import triton
    import triton.language as tl
except Exception as error:  # a broken install raises more than ImportError
    MISSING = f"{type(error).__name__}: {error}"
    triton = SimpleNamespace(jit=lambda function: function)
    tl = SimpleNamespace(constexpr=lambda value: value)

# A kernel may only use global numbers that are marked constexpr.
OF_TAP = tl.constexpr(int(Coefficient.OF_TAP))
READ_SLOT = tl.constexpr(int(Coefficient.READ_SLOT))
WRITE_SLOT = tl.constexpr(int(Coefficient.WRITE_SLOT))
LOW = tl.constexpr(int(Coefficient.LOW))
HIGH = tl.constexpr(int(Coefficient.HIGH))
TAPS = tl.constexpr(int(Coefficient.TAPS))
NOW = tl.constexpr(int(Coefficient.NOW))
NEWEST = tl.constexpr(int(Coefficient.NEWEST))
PREVIOUS = tl.constexpr(int(Coefficient.PREVIOUS))
FRESH = tl.constexpr(int(Coefficient.FRESH))
MAX_TAPS = tl.constexpr(_MAX_TAPS)

FUSED = {"enable_fp_fusion": True}
"""Of a launch: products and sums may become fused multiply-adds. Always given, because Triton's default has changed and
will again."""
UNFUSED = {"enable_fp_fusion": False}
"""As the C++ and CUDA code is compiled, where a value fused otherwise would fall on another code."""

BLOCK_SIZE = 1024  # elements a program handles: 8 for each of 128 threads, one 128-bit load of a 16-bit type


@triton.jit
def program_elements(BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Row-major indices of this program's elements, in 64 bits where 32 are too few (64-bit division is several times
    slower)."""
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    return program * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def strided_offset(index, sizes, strides):
    """Offset in memory of the element with row-major `index`. One dimension costs a multiplication, each further one a
    division."""
    offset = index * 0
    for d in tl.static_range(len(sizes) - 1, 0, -1):
        offset += (index % sizes[d]) * strides[d]
        index = index // sizes[d]
    return offset + index * strides[0]


@triton.jit
def widen(value):
    """`value` in the type to compute in: float32, but float64 for float64."""
    if value.dtype == tl.float64:
        return value
    else:
        return value.to(tl.float32)


def collapse(shape: Sequence[int], *strides: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Merges neighbouring dimensions that every tensor steps through evenly, so that kernels divide as seldom as
    possible.

    Args:
        shape: the sizes all tensors share.
        strides: for each tensor, its stride in each dimension (0 where it is broadcast).

    Returns:
        The merged sizes, then the merged strides of each tensor; at least one dimension.
    """
    merged: list[tuple[int, list[int]]] = []
    for d, size in enumerate(shape):
        steps = [stride[d] for stride in strides]
        if size == 1:
            continue
        if merged and all(outer == step * size for outer, step in zip(merged[-1][1], steps, strict=True)):
            merged[-1] = (merged[-1][0] * size, steps)
        else:
            merged.append((size, steps))
    merged = merged or [(1, [1] * len(strides))]
    sizes = tuple(size for size, _ in merged)
    return sizes, *(tuple(steps[i] for _, steps in merged) for i in range(len(strides)))


def needs_wide(sizes: Sequence[int], *strides: Sequence[int]) -> bool:
    """Whether an index or an offset may not fit 32 bits (with room for the last, partly filled block)."""
    span = max(sum((size - 1) * stride for size, stride in zip(sizes, steps, strict=True)) for steps in strides)
    elements = 1
    for size in sizes:
        elements *= size
    return max(span, elements) + BLOCK_SIZE >= 2**31


def grid(elements: int) -> tuple[int]:
    """One program for each block of elements."""
    return (triton.cdiv(elements, BLOCK_SIZE),)


def on_device_of(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Triton launches on the current GPU, which need not be the tensor's. A CPU tensor (interpreter) needs nothing."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return nullcontext()


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type to compute in: float32, but float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32
