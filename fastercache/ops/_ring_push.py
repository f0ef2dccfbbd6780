"""Storing a result in its ring, or what a block added to its residual stream."""

from __future__ import annotations

import torch

from fastercache.ops.checks import check_ring, check_tensor, map_dtype
from fastercache.ops.dispatch import define
from fastercache.ops.registry import Arguments, Op, Sizes
from fastercache.triton_kernels.ring_push import (
    reference_ring_push,
    reference_ring_push_residual,
    triton_ring_push,
    triton_ring_push_residual,
)


def _push_examples(sizes: Sizes) -> Arguments:
    for channels in sizes.channels:
        yield sizes.zeros(2, sizes.lines, channels), sizes.zeros(sizes.lines, channels), sizes.coefficients()
    if sizes.prediction:
        dtype = map_dtype(sizes.dtype)
        yield (
            sizes.zeros(1, *sizes.prediction, dtype=dtype),
            sizes.zeros(*sizes.prediction, dtype=dtype),
            sizes.coefficients(),
        )


def _residual_examples(sizes: Sizes) -> Arguments:
    for channels in sizes.channels:
        yield (
            sizes.zeros(2, sizes.lines, channels),
            sizes.zeros(sizes.lines, channels),
            sizes.zeros(sizes.lines, channels),
            sizes.coefficients(),
        )


_ring_push = define(
    Op(
        "ring_push",
        "(Tensor(a!) ring, Tensor x, Tensor coefficients) -> ()",
        reference=reference_ring_push,
        triton=triton_ring_push,
        cuda=True,
        examples=_push_examples,
    )
)
_ring_push_residual = define(
    Op(
        "ring_push_residual",
        "(Tensor(a!) ring, Tensor x, Tensor entry, Tensor coefficients) -> ()",
        reference=reference_ring_push_residual,
        triton=triton_ring_push_residual,
        examples=_residual_examples,
    )
)


def ring_push(ring: torch.Tensor, x: torch.Tensor, coefficients: torch.Tensor) -> None:
    """Stores `x` as the newest output of its site: `ring[coefficients[Coefficient.WRITE_SLOT]] = x`.

    Args:
        ring: `[slots, *shape]`, float32, bfloat16, float16 or float64; each slot contiguous, at any distance from the
            next, so that a branch's rows `ring[:, n:2 * n]` of a ring for both branches will do. Changed in place.
        x: `[*shape]`, the dtype and device of `ring`; any strides. Must not overlap the ring.
        coefficients: `[16]` float32, contiguous, on the device of `ring`.

    Moves twice the bytes of `x`.

    Raises:
        ValueError: a shape, stride or device is wrong.
        TypeError: a dtype is wrong.
        RuntimeError: on the CPU, when the coefficients name a slot the ring does not have (IndexError from the PyTorch
            implementation).
    """
    check_ring(ring, coefficients)
    check_tensor("x", x, ring.shape[1:], ring.dtype, ring.device)
    _ring_push(ring, x, coefficients)


def ring_push_residual(ring: torch.Tensor, x: torch.Tensor, entry: torch.Tensor, coefficients: torch.Tensor) -> None:
    """Stores what a block, or a stack of them, added to its residual stream:
    `ring[coefficients[Coefficient.WRITE_SLOT]] = x - entry`.

    Computed in float32 (float64 for float64) and rounded once.

    Args:
        ring: `[slots, *shape]`, as in `ring_push`. Changed in place.
        x: `[*shape]`, the stream that leaves the block, the dtype and device of `ring`; any strides. Must not overlap
            the ring.
        entry: as `x`, the stream that entered the block. May overlap `x`.
        coefficients: `[16]` float32, contiguous, on the device of `ring`.

    Moves three times the bytes of `x`.

    Raises:
        ValueError, TypeError, RuntimeError: as in `ring_push`.
    """
    check_ring(ring, coefficients)
    check_tensor("x", x, ring.shape[1:], ring.dtype, ring.device)
    check_tensor("entry", entry, ring.shape[1:], ring.dtype, ring.device)
    _ring_push_residual(ring, x, entry, coefficients)
