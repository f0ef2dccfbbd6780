"""Approximating a result from a packed ring, alone or added to the residual stream."""

from __future__ import annotations

import torch

from fastercache.ops.checks import check_coefficients, check_contiguous, check_gated, check_packed
from fastercache.ops.dispatch import define
from fastercache.ops.registry import Arguments, Op, Sizes
from fastercache.triton_kernels.packed import (
    line_bytes,
    reference_packed_blend,
    reference_packed_blend_add,
    triton_packed_blend,
    triton_packed_blend_add,
)


def _blend_examples(sizes: Sizes) -> Arguments:
    for channels, bits in sizes.rings:
        yield (
            sizes.zeros(sizes.lines, channels),
            sizes.zeros(sizes.lines, line_bytes(channels, bits), dtype=torch.uint8),
            sizes.coefficients(),
            bits,
        )


def _blend_add_examples(sizes: Sizes) -> Arguments:
    for x, ring, coefficients, bits in _blend_examples(sizes):
        yield x, sizes.zeros(1), ring, coefficients, bits


_packed_blend = define(
    Op(
        "packed_blend",
        "(Tensor(a!) out, Tensor ring, Tensor coefficients, int bits) -> ()",
        reference=reference_packed_blend,
        triton=triton_packed_blend,
        fallback=False,
        examples=_blend_examples,
    )
)
_packed_blend_add = define(
    Op(
        "packed_blend_add",
        "(Tensor(a!) x, Tensor gate, Tensor ring, Tensor coefficients, int bits) -> ()",
        reference=reference_packed_blend_add,
        triton=triton_packed_blend_add,
        fallback=False,
        examples=_blend_add_examples,
    )
)


def packed_blend(ring: torch.Tensor, coefficients: torch.Tensor, out: torch.Tensor, bits: int) -> torch.Tensor:
    """As `ring_blend` from a packed ring: `(c_0 + c_1) A - c_1 D` with the newest output A and its difference D to the
    one before.

    Args:
        ring: uint8, as in `packed_push`.
        coefficients: `[16]` float32, contiguous, on the device of `ring`; of at most 2 taps (1 where `bits` is 0). Its
            slots are not read.
        out: `[*shape]`, float32, bfloat16 or float16, contiguous, on the device of `ring`. Overwritten.
        bits: as the ring was pushed.

    Returns:
        `out`.

    Moves the bytes of the ring and of `out`.

    Raises:
        ValueError, TypeError, NotImplementedError: as in `packed_push`.
        RuntimeError: on the CPU, when the coefficients use more taps.
    """
    check_packed(ring, out, "out", bits)
    check_contiguous("out", out)
    check_coefficients(coefficients, ring.device)
    _packed_blend(out, ring, coefficients, bits)
    return out


def packed_blend_add(
    x: torch.Tensor, gate: torch.Tensor, ring: torch.Tensor, coefficients: torch.Tensor, bits: int
) -> None:
    """Adds a site's approximated output to the residual stream: `x += gate * packed_blend(ring, coefficients)`, rounded
    once.

    Args:
        x: `[*shape]`, float32, bfloat16 or float16; the last dimension contiguous, no two elements sharing memory.
            Changed in place.
        gate: broadcastable to `x`; the dtype of `x`, or float32.
        ring, coefficients, bits: as in `packed_blend`.

    Moves the bytes of the ring, two for `x`, and those of the gate.

    Raises:
        ValueError, TypeError, NotImplementedError, RuntimeError: as in `packed_blend`.
    """
    check_packed(ring, x, "x", bits)
    check_coefficients(coefficients, ring.device)
    check_gated(x, gate)
    _packed_blend_add(x, gate, ring, coefficients, bits)
