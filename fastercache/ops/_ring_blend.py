"""Approximating a result from the last computed ones, alone or added to the residual stream."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fastercache.ops.checks import check_contiguous, check_gated, check_ring, check_tensor
from fastercache.ops.dispatch import define
from fastercache.ops.registry import Arguments, Op, Sizes
from fastercache.triton_kernels.ring_blend import (
    plain_ring_blend,
    reference_ring_blend,
    reference_ring_blend_add,
    triton_ring_blend,
    triton_ring_blend_add,
)


def _blend_examples(sizes: Sizes) -> Arguments:
    for channels in sizes.channels:
        yield sizes.zeros(sizes.lines, channels), sizes.zeros(2, sizes.lines, channels), sizes.coefficients()


def _blend_add_examples(sizes: Sizes) -> Arguments:
    for channels in sizes.channels:
        yield (
            sizes.zeros(sizes.lines, channels),
            sizes.zeros(1),
            sizes.zeros(2, sizes.lines, channels),
            sizes.coefficients(),
        )


_ring_blend = define(
    Op(
        "ring_blend",
        "(Tensor(a!) out, Tensor ring, Tensor coefficients) -> ()",
        reference=reference_ring_blend,
        triton=triton_ring_blend,
        examples=_blend_examples,
    )
)
_ring_blend_add = define(
    Op(
        "ring_blend_add",
        "(Tensor(a!) x, Tensor gate, Tensor ring, Tensor coefficients) -> ()",
        reference=reference_ring_blend_add,
        triton=triton_ring_blend_add,
        examples=_blend_add_examples,
    )
)
_plain_blends = False


@contextmanager
def plain_blends(on: bool = True) -> Iterator[None]:
    """Graphs compiled inside blend in plain operations, which Inductor can fuse into what reads the blend, and not in
    the op.

    For measuring: the op is the default until the other is known to be faster. Packed rings stay with theirs.
    """
    global _plain_blends
    before, _plain_blends = _plain_blends, on
    try:
        yield
    finally:
        _plain_blends = before


def ring_blend(ring: torch.Tensor, coefficients: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Approximates a site's output from its last computed ones: `sum_k c_k ring[slot_k]` over the taps of
    `coefficients`.

    With taps A (newest) and B and coefficients `1 + w, -w` this is FasterCache's Eq. 5, `A + w (A - B)`. Slots that no
    tap in use names are not used and may hold anything. The sum is taken in float32 (float64 for float64) and rounded
    once.

    Args:
        ring: `[slots, *shape]`, as in `ring_push`.
        coefficients: `[16]` float32, contiguous, on the device of `ring`.
        out: `[*shape]`, the dtype and device of `ring`, contiguous, not in the ring; overwritten. A new tensor if not
            given.

    Returns:
        `out`.

    Moves the bytes of one slot for each tap and one for the result.

    Raises:
        ValueError, TypeError, RuntimeError: as in `ring_push`.
    """
    check_ring(ring, coefficients)
    if out is None and _plain_blends and torch.compiler.is_compiling():
        return plain_ring_blend(ring, coefficients)
    if out is None:
        out = ring.new_empty(ring.shape[1:])
    else:
        check_tensor("out", out, ring.shape[1:], ring.dtype, ring.device)
        check_contiguous("out", out)
    _ring_blend(out, ring, coefficients)
    return out


def ring_blend_add(x: torch.Tensor, gate: torch.Tensor, ring: torch.Tensor, coefficients: torch.Tensor) -> None:
    """Adds a site's approximated output to the residual stream: `x += gate * ring_blend(ring, coefficients)`.

    Computed in float32 (float64 for float64) and rounded once, where the unfused form rounds three times.

    Args:
        x: `[*shape]`, the dtype and device of `ring`; the last dimension contiguous, no two elements sharing memory.
            Changed in place.
        gate: broadcastable to `x` (`[B, 1, D]`, `[1, 1, D]`, `[1]`, ...); the dtype of `x`, or float32.
        ring: `[slots, *shape]`, as in `ring_push`.
        coefficients: `[16]` float32, contiguous, on the device of `ring`.

    Moves the bytes of one slot for each tap and two for `x`, and those of the gate.

    Raises:
        ValueError, TypeError, RuntimeError: as in `ring_push`.
    """
    check_ring(ring, coefficients)
    check_tensor("x", x, ring.shape[1:], ring.dtype, ring.device)
    check_gated(x, gate)
    _ring_blend_add(x, gate, ring, coefficients)
