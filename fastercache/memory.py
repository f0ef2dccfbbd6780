"""The caches of one run: planned to the byte before the first step, allocated once, freed at the end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastercache import ops
from fastercache.families import BranchOrder, Family, Site
from fastercache.plan import Branch, Plan, group_of


def branch_rows(rows: int, order: BranchOrder, branches: Sequence[Branch]) -> slice:
    """Which of `rows` (a batch, or a multiple of one) belong to the given branches."""
    if order == "none" or len(branches) == 2:
        return slice(0, rows)
    first = branches[0] == ("uncond" if order == "uncond-first" else "cond")
    return slice(0, rows // 2) if first else slice(rows // 2, rows)


@dataclass(frozen=True)
class RingPlan:
    """One cached tensor of one site, `[slots, rows, ...]`; `branches` are those it has rows for, in the order of the batch."""

    site: int
    group: int
    branches: tuple[Branch, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class CachePlan:
    """All that a run keeps. `maps` is the shape of each of the two difference maps of CFG-Cache, or `None` where it is not used."""

    rings: tuple[RingPlan, ...]
    maps: tuple[int, ...] | None
    maps_dtype: torch.dtype

    @property
    def bytes(self) -> int:
        maps = 2 * math.prod(self.maps) * self.maps_dtype.itemsize if self.maps is not None else 0
        return sum(ring.bytes for ring in self.rings) + maps


def plan_cache(
    family: Family, model: nn.Module, sites: Sequence[Site], plan: Plan, arguments: Mapping[str, Any], dtype: torch.dtype
) -> CachePlan:
    """Plan the caches of a run from the arguments of its first call (their shapes count, not their values). Allocates nothing.

    dtype: of the sites' outputs. The maps of CFG-Cache are float32, or float64 for a float64 model.
    """
    rings = []
    for index, site in enumerate(sites):
        number = group_of(plan.groups, site.kind, site.layer)
        if number is None or not plan.groups[number].branches:
            continue
        group = plan.groups[number]
        for shape in family.site_shapes(model, site, arguments):
            rows = shape[0] * len(group.branches) // len(plan.branches)
            rings.append(RingPlan(index, number, group.branches, (group.slots, rows, *shape[1:]), dtype))
    maps = None
    if any(step.split for step in plan.steps):
        shape = family.prediction_shape(model, arguments)
        maps = (shape[0] // 2, *shape[1:])
    return CachePlan(tuple(rings), maps, ops.map_dtype(dtype))


class Cache:
    """The tensors of a `CachePlan` on a device."""

    def __init__(self, plan: CachePlan, order: BranchOrder, device: torch.device):
        self.order = order
        self._rings: dict[int, list[tuple[RingPlan, torch.Tensor]]] = {}
        for ring in plan.rings:
            self._rings.setdefault(ring.site, []).append((ring, torch.empty(ring.shape, dtype=ring.dtype, device=device)))
        shape = plan.maps if plan.maps is not None else (0,)
        self.low, self.high = (torch.empty(shape, dtype=plan.maps_dtype, device=device) for _ in range(2))

    def rings(self, site: int, branches: Sequence[Branch]) -> list[torch.Tensor]:
        """The rings of a site, one for each tensor it gives, narrowed to the rows of `branches`."""
        views = []
        for plan, tensor in self._rings[site]:
            order: BranchOrder = self.order if len(plan.branches) == 2 else "none"
            views.append(tensor[:, branch_rows(tensor.shape[1], order, branches)])
        return views

    @property
    def bytes(self) -> int:
        tensors = [*(tensor for rings in self._rings.values() for _, tensor in rings), self.low, self.high]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
