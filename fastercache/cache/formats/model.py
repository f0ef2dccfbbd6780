"""Results in the model's own dtype: lossless, and as large as the results."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache

import torch

from fastercache import ops
from fastercache.cache.layout import RingLayout
from fastercache.cache.ring import CacheFormat, Ring, RingSpec, half, one


class ModelFormat(CacheFormat):
    name = "model"
    ops = "ring"

    def layout(self, spec: RingSpec) -> RingLayout:
        return RingLayout(spec.slots, spec.shape[0], math.prod(spec.shape[1:]) * spec.dtype.itemsize)

    def bytes(self, spec: RingSpec) -> int:
        return self.layout(spec).bytes

    def allocate(self, spec: RingSpec, device: torch.device) -> ModelRing:
        elements, shape, strides = self._strided(spec.slots, spec.shape, spec.dtype)
        return ModelRing(torch.empty(elements, dtype=spec.dtype, device=device).as_strided(shape, strides))

    @staticmethod
    @lru_cache(maxsize=256)  # the rings of a model are of a few shapes
    def _strided(
        slots: int, shape: tuple[int, ...], dtype: torch.dtype
    ) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
        """Elements of a ring, and its shape and strides."""
        layout = RingLayout(slots, shape[0], math.prod(shape[1:]) * dtype.itemsize)
        strides = (math.prod(shape[dim + 1 :]) for dim in range(len(shape)))
        return layout.bytes // dtype.itemsize, (slots, *shape), (layout.slot_stride_bytes // dtype.itemsize, *strides)


class ModelRing(Ring):
    """`[slots, rows, ...]`."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor
        self.output_shape, self.dtype = tensor.shape[1:], tensor.dtype
        self._one = one(tensor.dtype, tensor.device)

    def push(self, x: torch.Tensor, coefficients: torch.Tensor, which: int | None) -> None:
        ops.ring_push(half(self.tensor, which, 1), x, coefficients)

    def push_residual(
        self, x: torch.Tensor, entry: torch.Tensor, coefficients: torch.Tensor, which: int | None
    ) -> None:
        ops.ring_push_residual(half(self.tensor, which, 1), x, entry, coefficients)

    def blend(self, coefficients: torch.Tensor, which: int | None, out: torch.Tensor | None = None) -> torch.Tensor:
        return ops.ring_blend(half(self.tensor, which, 1), coefficients, out)

    def blend_add(self, x: torch.Tensor, coefficients: torch.Tensor, which: int | None) -> None:
        ops.ring_blend_add(x, self._one, half(self.tensor, which, 1), coefficients)

    def tensors(self) -> Iterable[torch.Tensor]:
        return (self.tensor,)
