"""How much the caches of a run may take, in which format they are kept, and which of them stay for the next run."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from fastercache.cache.cache import Cache, CachePlan
from fastercache.cache.formats import BUILT_IN, format_of
from fastercache.errors import CacheError

logger = logging.getLogger("fastercache")

FORMATS = tuple(format.name for format in BUILT_IN)
"""Of those that fit a budget, the first is taken."""


@dataclass(frozen=True)
class Limit:
    """The most bytes that the caches of a run may take. why: where that comes from, for people."""

    bytes: int
    why: str


RoomOf = Callable[[int, int], Limit | None]
"""What a device has room for (`fastercache.cache.room`), given the bytes wanted and those that could be freed for them;
`None`: not known."""


def unknown_room(wanted: int, kept: int) -> None:
    return None


@dataclass(frozen=True)
class CacheBudget:
    """What the caches of a run may be.

    format: the storage format, or `None` for the best that fits (the first of `FORMATS`). max_bytes: the most they may
    take in all, on the denoiser's device, or `None` for what the device has room for.
    """

    format: str | None = None
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.format is not None:
            format_of(self.format)
        whole = isinstance(self.max_bytes, int) and not isinstance(self.max_bytes, bool)
        if self.max_bytes is not None and not (whole and self.max_bytes >= 0):
            raise CacheError(
                f"max_cache_bytes is {self.max_bytes!r}; it must be a number of bytes (int), or None for what the "
                "device has room for"
            )

    def choose(
        self,
        plan_in: Callable[[str], CachePlan],
        device: torch.device,
        room: RoomOf = unknown_room,
        kept: Callable[[CachePlan], int | None] = lambda plan: 0,
    ) -> tuple[CachePlan, str | None, Limit | None]:
        """The best plan within the budget, a note where it is not the lossless one, and the limit, if it was asked for.

        kept: bytes of caches that could be freed for a plan; `None` where its own are there already, and are taken as
            they are.

        Raises:
            CacheError: no format fits; says what each would take.
        """
        limit: Limit | None = None
        found: list[str] = []
        for name in FORMATS if self.format is None else (self.format,):
            plan = plan_in(name)
            why = plan.refusal(device)
            if why is not None:
                found.append(f"{name}: {why}")
                continue
            held = kept(plan)
            if held is not None and limit is None:
                limit = self._limit(plan.bytes, held, room)
            if held is None or limit is None or plan.bytes <= limit.bytes:
                return plan, self._note(name, found, limit), limit
            found.append(f"{name}: {plan.bytes:,} bytes, over the limit")
        if limit is None:
            remedy, what = "", f"cache_format={self.format!r}"
        else:
            others = [] if self.format is None else [plan_in(name) for name in FORMATS if name != self.format]
            found += [
                f"{plan.format}: {plan.bytes:,} bytes would fit" for plan in others if self._fits(plan, device, limit)
            ]
            own = (
                "free memory of the device (offload the pipeline's other parts), set max_cache_bytes to decide "
                "yourself, "
            )
            remedy, what = own if self.max_bytes is None else "raise the limit, ", limit.why
        raise CacheError(
            f"no cache fits {what} ({'; '.join(found)}); {remedy}choose another format, reuse fewer sites or layers "
            "(a schedule's selectors, as in 'attention[10:]'), or make the video smaller"
        )

    def _limit(self, wanted: int, kept: int, room: RoomOf) -> Limit | None:
        if self.max_bytes is not None:
            return Limit(self.max_bytes, f"max_cache_bytes={self.max_bytes:,}")
        return room(wanted, kept)

    @staticmethod
    def _fits(plan: CachePlan, device: torch.device, limit: Limit) -> bool:
        return plan.refusal(device) is None and plan.bytes <= limit.bytes

    def _note(self, name: str, found: Sequence[str], limit: Limit | None) -> str | None:
        if self.format is not None or name == FORMATS[0]:
            return None
        return f"caches are kept in {name}, to fit {'the device' if limit is None else limit.why} ({'; '.join(found)})"


MOST_KEPT = 4
"""Kinds of runs whose caches are kept for CUDA graphs."""
KEPT_SHARE = 0.5
"""Of what the device has room for, the most that kept caches take in all, where no limit is given: a decoder needs the
rest."""


class Caches:
    """Gives the runs of one model their caches, in the best format that fits.

    A CUDA graph replays the addresses it has recorded. So where there are such graphs the caches stay from run to run,
    one for each kind of run, for as many kinds as fit the budget together; the oldest go first.
    """

    def __init__(self, budget: CacheBudget):
        self.budget = budget
        self._kept: OrderedDict[tuple[CachePlan, torch.device], Cache] = OrderedDict()

    @property
    def kept_bytes(self) -> int:
        """Of the caches that are kept between runs."""
        return sum(cache.bytes for cache in self._kept.values())

    def for_run(
        self, plan_in: Callable[[str], CachePlan], device: torch.device, keep: bool, room: RoomOf = unknown_room
    ) -> tuple[Cache, list[str]]:
        """The caches of a run and notes for its summary; `CacheError` if none fit. keep: at their addresses, for the
        runs to come."""
        if not keep:
            self.free()
        for key in [key for key in self._kept if key[-1] != device]:
            del self._kept[key]  # the model has moved, and its graphs with it
        plan, note, limit = self.budget.choose(
            plan_in, device, room, lambda plan: None if (plan, device) in self._kept else self.kept_bytes
        )
        notes = [note] if note else []
        key = (plan, device)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key], notes
        dropped = 0
        while self._kept and (len(self._kept) >= MOST_KEPT or not self._together(plan.bytes, limit)):
            self._kept.popitem(last=False)
            dropped += 1
        if dropped:
            notes.append(
                f"{dropped} kept cache{'s' * (dropped > 1)} of other kinds of runs made room for this one's: their "
                "CUDA graphs are recorded again when they come back "
                f"({'max_cache_bytes' if self.budget.max_bytes is not None else 'the memory'} allows "
                f"{len(self._kept) + 1} kind{'s' * bool(self._kept)} of runs at once)"
            )
            logger.warning(notes[-1])
        cache = Cache(plan, device)
        if keep:
            self._kept[key] = cache
        return cache, notes

    def _together(self, wanted: int, limit: Limit | None) -> bool:
        """Whether new caches fit beside those that are kept."""
        if limit is None:
            return True
        share = 1 if self.budget.max_bytes is not None else KEPT_SHARE
        return self.kept_bytes + wanted <= share * limit.bytes

    def free(self) -> None:
        """Let go of what is kept."""
        self._kept.clear()
