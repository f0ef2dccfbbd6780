"""Storing a result in a packed ring, or what a block added to its residual stream."""

from __future__ import annotations

import torch

from fastercache.ops.checks import check_packed, check_tensor
from fastercache.ops.dispatch import define
from fastercache.ops.registry import Arguments, Op, Sizes
from fastercache.triton_kernels.packed import (
    line_bytes,
    reference_packed_push,
    reference_packed_push_residual,
    triton_packed_push,
    triton_packed_push_residual,
)


def _push_examples(sizes: Sizes) -> Arguments:
    for channels, bits in sizes.rings:
        yield (
            sizes.zeros(sizes.lines, line_bytes(channels, bits), dtype=torch.uint8),
            sizes.zeros(sizes.lines, channels),
            bits,
        )


def _residual_examples(sizes: Sizes) -> Arguments:
    for ring, x, bits in _push_examples(sizes):
        yield ring, x, torch.zeros_like(x), bits


_packed_push = define(
    Op(
        "packed_push",
        "(Tensor(a!) ring, Tensor x, int bits) -> ()",
        reference=reference_packed_push,
        triton=triton_packed_push,
        cuda=True,
        fallback=False,
        examples=_push_examples,
    )
)
_packed_push_residual = define(
    Op(
        "packed_push_residual",
        "(Tensor(a!) ring, Tensor x, Tensor entry, int bits) -> ()",
        reference=reference_packed_push_residual,
        triton=triton_packed_push_residual,
        cuda=True,
        fallback=False,
        examples=_residual_examples,
    )
)


def packed_push(ring: torch.Tensor, x: torch.Tensor, bits: int) -> None:
    """Stores `x` as the newest output of its site in a packed ring, and its change from the one before.

    Each line of channels is quantized in blocks of 128, `scale = max |value| / 127` (7 for a difference of 4 bits), to
    the nearest code. The difference is that of `x` to the newest output as the ring holds it, so that the error of one
    push does not go into the next. A value that is not finite makes its whole block NaN. Needs no coefficients: the
        newest output has one place.

    Args:
        ring: `[*shape[:-1], PackedLine(channels, bits).bytes]` uint8, contiguous. Changed in place.
        x: `[*shape]`, channels last, float32, bfloat16 or float16, on the device of `ring`; any strides.
        bits: of a difference's code, 8 or 4; 0 keeps no difference, for one tap.

    Moves the bytes of `x`, those of the newest output once for reading and the whole ring's for writing.

    Raises:
        ValueError: a shape, stride, device or `bits` is wrong.
        TypeError: a dtype is wrong.
        NotImplementedError: nothing serves packed rings on this device; `packed_missing` says why.
    """
    check_packed(ring, x, "x", bits)
    _packed_push(ring, x, bits)


def packed_push_residual(ring: torch.Tensor, x: torch.Tensor, entry: torch.Tensor, bits: int) -> None:
    """As `packed_push` of `x - entry`, what a block added to its residual stream. The difference is taken in float32
    and not rounded.

    Args:
        ring, bits: as in `packed_push`. The ring is changed in place.
        x: `[*shape]`, the stream that leaves the block, as in `packed_push`.
        entry: `[*shape]`, the stream that entered it, the dtype and device of `x`; any strides. May overlap `x`.

    Moves the bytes of `packed_push` and those of `entry`.

    Raises:
        ValueError, TypeError, NotImplementedError: as in `packed_push`.
    """
    check_packed(ring, x, "x", bits)
    check_tensor("entry", entry, x.shape, x.dtype, x.device)
    _packed_push_residual(ring, x, entry, bits)
