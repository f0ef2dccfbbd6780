"""Results in 8 bits, and their change from one to the next in 8 or 4: half of bfloat16's bytes, or 0.4 of them."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from fastercache import ops
from fastercache.cache.layout import RingLayout
from fastercache.cache.ring import CacheFormat, Ring, RingSpec, half, one

PACKED_TAPS = 2
"""Results that a packed ring holds: the newest, and its difference to the one before."""


class PackedFormat(CacheFormat):
    """difference_bits: of the difference between the two newest results."""

    ops = "packed"

    def __init__(self, name: str, difference_bits: int):
        self.name, self.difference_bits = name, difference_bits

    def bits(self, spec: RingSpec) -> int:
        """Of the difference; 0 where one tap needs none."""
        return self.difference_bits if spec.slots > 1 else 0

    def layout(self, spec: RingSpec) -> RingLayout:
        return RingLayout(1, math.prod(spec.shape[:-1]), ops.PackedLine(spec.shape[-1], self.bits(spec)).bytes)

    def bytes(self, spec: RingSpec) -> int:
        return self.layout(spec).bytes

    def refusal(self, spec: RingSpec, device: torch.device) -> str | None:
        if spec.slots > PACKED_TAPS:
            return f"it holds {PACKED_TAPS} taps, and the schedule blends {spec.slots}"
        if spec.dtype not in ops.PACKED_DTYPES:
            return f"it holds {', '.join(str(dtype) for dtype in ops.PACKED_DTYPES)}, and the model is {spec.dtype}"
        return ops.packed_missing(device)

    def allocate(self, spec: RingSpec, device: torch.device) -> PackedRing:
        *lines, channels = spec.shape
        line = ops.PackedLine(channels, self.bits(spec)).bytes
        tensor = torch.empty(self.layout(spec).bytes, dtype=torch.uint8, device=device)
        return PackedRing(tensor[: math.prod(lines) * line].view(*lines, line), channels, self.bits(spec), spec.dtype)


class PackedRing(Ring):
    """uint8 `[rows, ..., bytes of a line of channels]`; it has no slots, as every push turns the newest result into the
    older one."""

    def __init__(self, tensor: torch.Tensor, channels: int, bits: int, dtype: torch.dtype):
        self.tensor, self.channels, self.bits, self.dtype = tensor, channels, bits, dtype
        self.output_shape = torch.Size((*tensor.shape[:-1], channels))
        self._one = one(dtype, tensor.device)

    def push(self, x: torch.Tensor, coefficients: torch.Tensor, which: int | None) -> None:
        ops.packed_push(half(self.tensor, which), x, self.bits)

    def push_residual(
        self, x: torch.Tensor, entry: torch.Tensor, coefficients: torch.Tensor, which: int | None
    ) -> None:
        ops.packed_push_residual(half(self.tensor, which), x, entry, self.bits)

    def blend(self, coefficients: torch.Tensor, which: int | None, out: torch.Tensor | None = None) -> torch.Tensor:
        ring = half(self.tensor, which)
        if out is None:
            out = torch.empty((*ring.shape[:-1], self.channels), dtype=self.dtype, device=ring.device)
        return ops.packed_blend(ring, coefficients, out, self.bits)

    def blend_add(self, x: torch.Tensor, coefficients: torch.Tensor, which: int | None) -> None:
        ops.packed_blend_add(x, self._one, half(self.tensor, which), coefficients, self.bits)

    def tensors(self) -> Iterable[torch.Tensor]:
        return (self.tensor,)
