"""The caches of one run: planned to the byte before the first step, allocated once, freed after the last.

A site's outputs lie in a *ring*. In the format "model" it has a slot for each tap, in the model's dtype, and loses nothing. The packed
formats hold two taps: "int8" the newest output and its difference to the one before in 8 bits each, "int8-int4" the difference in 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import torch
from torch import nn

from fastercache import ops
from fastercache.errors import CacheError
from fastercache.families import BranchOrder, Site
from fastercache.layout import RingLayout
from fastercache.plan import Branch, Plan, group_of

CacheFormat = Literal["model", "int8", "int8-int4"]
FORMATS: tuple[CacheFormat, ...] = get_args(CacheFormat)
"""Best first: of those that fit a budget, the first is taken."""
DIFFERENCE_BITS = {"int8": 8, "int8-int4": 4}
PACKED_TAPS = 2


def branch_half(order: BranchOrder, have: Sequence[Branch], wanted: Sequence[Branch]) -> int | None:
    """Which half of rows that belong to `have`, in the order of the batch, belongs to `wanted`; `None` where all do."""
    if len(wanted) == len(have):
        return None
    return int((wanted[0] == "cond") == (order == "uncond-first"))


def half(tensor: torch.Tensor, which: int | None, dim: int = 0) -> torch.Tensor:
    """That half of a dimension, as a view; all of it for `None`."""
    if which is None:
        return tensor
    size = tensor.shape[dim] // 2
    return tensor.narrow(dim, which * size, size)


def branch_rows(rows: int, order: BranchOrder, branches: Sequence[Branch]) -> slice:
    """Which of `rows` of the whole batch, or a multiple of it, belong to the given branches."""
    which = None if order == "none" else branch_half(order, ("cond", "uncond"), branches)
    return slice(0, rows) if which is None else slice(which * (rows // 2), (which + 1) * (rows // 2))


@dataclass(frozen=True)
class RingPlan:
    """The cache of one tensor of one site: `slots` outputs of `shape`, for the rows of `branches`, in the order of the batch."""

    site: int
    group: int
    branches: tuple[Branch, ...]
    slots: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    format: CacheFormat = "model"

    @property
    def bits(self) -> int:
        """Of a packed difference; 0 where one tap needs none."""
        return DIFFERENCE_BITS[self.format] if self.slots > 1 else 0

    @property
    def layout(self) -> RingLayout:
        if self.format == "model":
            return RingLayout(self.slots, self.shape[0], math.prod(self.shape[1:]) * self.dtype.itemsize)
        return RingLayout(1, math.prod(self.shape[:-1]), ops.PackedRow(self.shape[-1], self.bits).bytes)

    @property
    def bytes(self) -> int:
        return self.layout.bytes

    def refusal(self, device: torch.device) -> str | None:
        """Why the ring cannot be kept in its format, or `None`."""
        if self.format == "model":
            return None
        if self.slots > PACKED_TAPS:
            return f"it holds {PACKED_TAPS} taps, and the schedule blends {self.slots}"
        if self.dtype not in ops.PACKED_DTYPES:
            return f"it holds {', '.join(str(dtype) for dtype in ops.PACKED_DTYPES)}, and the model is {self.dtype}"
        return ops.packed_missing(device)


@dataclass(frozen=True)
class CachePlan:
    """All that a run keeps. `maps` is the shape of each of the two difference maps of CFG-Cache, or `None` where it is not used."""

    rings: tuple[RingPlan, ...]
    maps: tuple[int, ...] | None
    maps_dtype: torch.dtype
    format: CacheFormat = "model"

    @property
    def bytes(self) -> int:
        maps = 2 * math.prod(self.maps) * self.maps_dtype.itemsize if self.maps is not None else 0
        return sum(ring.bytes for ring in self.rings) + maps

    def refusal(self, device: torch.device) -> str | None:
        """Why the rings cannot be kept in the plan's format, or `None`."""
        return next((why for ring in self.rings if (why := ring.refusal(device))), None)


class Shapes(Protocol):
    """What the caches are planned from: a family, or two of its calls together (`fastercache.two_calls.BothCalls`)."""

    def site_shapes(self, model: nn.Module, site: Site, arguments: Mapping[str, Any]) -> tuple[torch.Size, ...]: ...

    def prediction_shape(self, model: nn.Module, arguments: Mapping[str, Any]) -> torch.Size: ...


def plan_cache(
    family: Shapes,
    model: nn.Module,
    sites: Sequence[Site],
    plan: Plan,
    arguments: Mapping[str, Any],
    dtype: torch.dtype,
    format: CacheFormat = "model",
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
            rings.append(RingPlan(index, number, group.branches, group.slots, (rows, *shape[1:]), dtype, format))
    maps = None
    if any(step.split for step in plan.steps):
        shape = family.prediction_shape(model, arguments)
        maps = (shape[0] // 2, *shape[1:])
    return CachePlan(tuple(rings), maps, ops.map_dtype(dtype), format)


@dataclass(frozen=True)
class CacheBudget:
    """What the caches of a run may be.

    format: the storage format, or `None` for the best that fits (the first of `FORMATS`). max_bytes: the most they may take in all, on
    the denoiser's device, or `None` for no limit.
    """

    format: CacheFormat | None = None
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.format not in (None, *FORMATS):
            raise CacheError(f"cache_format is {self.format!r}; it must be one of {', '.join(map(repr, FORMATS))}, or None to choose")
        if self.max_bytes is not None and not (isinstance(self.max_bytes, int) and self.max_bytes >= 0):
            raise CacheError(f"max_cache_bytes is {self.max_bytes!r}; it must be a number of bytes (int), or None for no limit")

    def choose(self, plan_in: Callable[[CacheFormat], CachePlan], device: torch.device) -> tuple[CachePlan, str | None]:
        """The best plan within the budget, and a note where it is not the lossless one; `CacheError` says what would fit."""
        found = []
        for name in FORMATS if self.format is None else (self.format,):
            plan = plan_in(name)
            why = plan.refusal(device)
            if why is None and self.max_bytes is not None and plan.bytes > self.max_bytes:
                why = "over the limit"
            if why is None:
                chosen = self.format is None and name != FORMATS[0]
                return plan, f"caches are kept in {name}, to fit max_cache_bytes={self.max_bytes:,}" if chosen else None
            found.append(f"{name}: {plan.bytes:,} bytes, {why}" if why == "over the limit" else f"{name}: {why}")
        limit = f"max_cache_bytes={self.max_bytes:,}" if self.max_bytes is not None else f"cache_format={self.format!r}"
        raise CacheError(
            f"no cache fits {limit} ({'; '.join(found)}); raise the limit, choose another format, reuse fewer sites or layers (a "
            "schedule's selectors, as in 'attention[10:]'), or make the video smaller"
        )


class ModelRing:
    """Outputs in the model's dtype, lossless: `[slots, rows, ...]`. `which` half of the rows a call is about: see `half`."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor

    @classmethod
    def allocate(cls, plan: RingPlan, device: torch.device) -> ModelRing:
        layout = plan.layout
        slots = torch.empty(layout.bytes, dtype=torch.uint8, device=device).view(plan.dtype).view(plan.slots, -1)
        return cls(slots[:, : math.prod(plan.shape)].view(plan.slots, *plan.shape))

    def push(self, x: torch.Tensor, row: torch.Tensor, which: int | None) -> None:
        ops.ring_push(half(self.tensor, which, 1), x, row)

    def blend(self, row: torch.Tensor, which: int | None) -> torch.Tensor:
        return ops.ring_blend(half(self.tensor, which, 1), row)


class PackedRing:
    """The newest output in int8 and its difference to the one before in `bits` bits: uint8 `[rows, ..., row bytes]`."""

    def __init__(self, tensor: torch.Tensor, channels: int, bits: int, dtype: torch.dtype):
        self.tensor, self.channels, self.bits, self.dtype = tensor, channels, bits, dtype

    @classmethod
    def allocate(cls, plan: RingPlan, device: torch.device) -> PackedRing:
        *lines, channels = plan.shape
        row = ops.PackedRow(channels, plan.bits).bytes
        tensor = torch.empty(plan.layout.bytes, dtype=torch.uint8, device=device)
        return cls(tensor[: math.prod(lines) * row].view(*lines, row), channels, plan.bits, plan.dtype)

    def push(self, x: torch.Tensor, row: torch.Tensor, which: int | None) -> None:
        ops.packed_push(half(self.tensor, which), x, self.bits)

    def blend(self, row: torch.Tensor, which: int | None) -> torch.Tensor:
        ring = half(self.tensor, which)
        out = torch.empty((*ring.shape[:-1], self.channels), dtype=self.dtype, device=ring.device)
        return ops.packed_blend(ring, row, out, self.bits)


Ring = ModelRing | PackedRing


class Cache:
    """The tensors of a `CachePlan` on a device, and `rows` of coefficients, one for each of `groups` and a last one for guidance: what ops
    read and write while a run lasts."""

    def __init__(self, plan: CachePlan, groups: int, device: torch.device):
        self.plan, self.device = plan, device
        self.rows = torch.zeros((groups + 1, ops.ROW_SIZE), device=device)
        *self.group_rows, self.guidance_row = self.rows
        kind = ModelRing if plan.format == "model" else PackedRing
        self._rings: dict[int, list[Ring]] = {}
        for ring in plan.rings:
            self._rings.setdefault(ring.site, []).append(kind.allocate(ring, device))
        shape = plan.maps if plan.maps is not None else (0,)
        self.low, self.high = (torch.empty(shape, dtype=plan.maps_dtype, device=device) for _ in range(2))

    def rings(self, site: int) -> tuple[Ring, ...]:
        """The rings of a site, one for each tensor it gives; none where nothing of it is kept."""
        return tuple(self._rings.get(site, ()))

    @property
    def bytes(self) -> int:
        """As allocated."""
        rings = (ring.tensor for kept in self._rings.values() for ring in kept)
        return sum(tensor.untyped_storage().nbytes() for tensor in (*rings, self.low, self.high))
