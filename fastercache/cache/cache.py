"""The caches of one run: planned to the byte before the first step, allocated once, freed after the last."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from fastercache import ops
from fastercache.cache.formats import format_of
from fastercache.cache.ring import Ring, RingSpec
from fastercache.schedule.plan import Plan


@dataclass(frozen=True)
class CachePlan:
    """All that a run keeps.

    rings: of the sites. format: of the rings. coefficients: vectors of coefficients, `[COEFFICIENT_COUNT]` float32.
    maps: kept of the difference of the branches, each of `map_shape`. predictions: kept outputs of the denoiser, each
    of `prediction_shape`, and the latents of the newest where `keeps_latents`. dtype: of maps, predictions and latents,
        float32, or float64 for a float64 model.
    """

    rings: tuple[RingSpec, ...]
    format: str
    coefficients: int
    maps: int
    map_shape: tuple[int, ...]
    predictions: int
    prediction_shape: tuple[int, ...]
    keeps_latents: bool
    dtype: torch.dtype

    @cached_property
    def bytes(self) -> int:
        """What the rings, maps and predictions take; the vectors of coefficients, 64 bytes each, are not counted."""
        form = format_of(self.format)
        rings = sum(form.bytes(ring) for ring in self.rings)
        maps = self.maps * math.prod(self.map_shape) * self.dtype.itemsize
        outputs = (self.predictions + self.keeps_latents) * math.prod(self.prediction_shape) * self.dtype.itemsize
        return rings + maps + outputs

    def refusal(self, device: torch.device) -> str | None:
        """Why the rings cannot be kept in the plan's format, or `None`."""
        form = format_of(self.format)
        return next((why for ring in self.rings if (why := form.refusal(ring, device))), None)


def plan_cache(
    plan: Plan,
    site_shapes: Callable[[int], Iterable[tuple[int, ...]]],
    prediction_shape: Callable[[], tuple[int, ...]],
    planes_shape: Callable[[], tuple[int, ...]],
    dtype: torch.dtype,
    format: str = "model",
) -> CachePlan:
    """Plan the caches of a run. Allocates nothing.

    site_shapes: the shapes of the tensors that a site gives, by its index, in a call of all branches. prediction_shape,
    planes_shape: of the denoiser's output in such a call, as it is and as latent planes; asked for only where something
    of it is kept. dtype: of the sites' results.
    """
    rings = []
    for site, number in enumerate(plan.cadence_of):
        cadence = plan.cadences[number]
        if cadence.branches:
            for shape in site_shapes(site):
                rows = shape[0] * len(cadence.branches) // len(plan.branches)
                rings.append(RingSpec(site, cadence.branches, cadence.slots, (rows, *shape[1:]), dtype))
    map_shape: tuple[int, ...] = ()
    if plan.maps:
        count, *rest = planes_shape()
        map_shape = (count // 2, *rest)
    return CachePlan(
        tuple(rings),
        format,
        len(plan.table[0]),
        plan.maps,
        map_shape,
        plan.predictions,
        tuple(prediction_shape()) if plan.predictions else (),
        plan.keeps_latents,
        ops.map_dtype(dtype),
    )


def ordinary_tensors() -> AbstractContextManager[Any]:
    """Tensors made inside may be written to in any mode: those made under `torch.inference_mode` could not be outside
    of it."""
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


class Cache:
    """The tensors of a `CachePlan` on a device: what ops read and write while a run lasts.

    coefficients: `[count, COEFFICIENT_COUNT]` float32, rewritten before every step; `vectors` are its rows, the last
    one that of the denoiser's output. low, high, previous: maps. predictions: `[slots, *prediction_shape]`. latents:
    `prediction_shape`.
    """

    def __init__(self, plan: CachePlan, device: torch.device):
        self.plan, self.device = plan, device
        with ordinary_tensors():
            self._allocate(plan, device)

    def _allocate(self, plan: CachePlan, device: torch.device) -> None:
        self.coefficients = torch.zeros((plan.coefficients, ops.COEFFICIENT_COUNT), device=device)
        self.vectors = self.coefficients.unbind()
        form = format_of(plan.format)
        self._rings: dict[int, list[Ring]] = {}
        for ring in plan.rings:
            self._rings.setdefault(ring.site, []).append(form.allocate(ring, device))

        def empty(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=plan.dtype, device=device)

        self.low, self.high = (empty(*plan.map_shape) if plan.maps else empty(0) for _ in range(2))
        self.previous = empty(*plan.map_shape) if plan.maps > 2 else None
        self.predictions = empty(plan.predictions, *plan.prediction_shape) if plan.predictions else None
        self.latents = empty(*plan.prediction_shape) if plan.keeps_latents else None

    def rings(self, site: int) -> tuple[Ring, ...]:
        """The rings of a site, one for each tensor it gives; none where nothing of it is kept."""
        return tuple(self._rings.get(site, ()))

    @property
    def bytes(self) -> int:
        """As allocated, without the vectors of coefficients."""
        kept = [tensor for rings in self._rings.values() for ring in rings for tensor in ring.tensors()]
        kept += [
            tensor
            for tensor in (self.low, self.high, self.previous, self.predictions, self.latents)
            if tensor is not None
        ]
        return sum(tensor.untyped_storage().nbytes() for tensor in kept)
