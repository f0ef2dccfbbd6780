"""Tells a run that was left from one that goes on, by the timesteps of its calls, where nothing else says where a run
begins.

The timesteps of a sampler move one way. One that moves back against a run's direction is the first of another run. It
is read where that costs nothing: a number, or a tensor on the host. On a device it is not read, as the host would wait;
but a loop over `scheduler.timesteps` hands out elements of one table, and their positions in it move one way too.

What this cannot tell, and `fastercache.run` can: timesteps that are new tensors on a device, are constant, or are not
passed; a run left at its first step before any has been finished; and a run that takes up, further on, where another
was left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

FEW = 16
"""Elements up to which a list is quicker than an array."""


class Reading(NamedTuple):
    """What is known of one call's timestep without waiting. `table`: the address of the larger storage that it is an
    element of."""

    value: float | None = None
    shape: tuple[int, ...] = ()
    table: int | None = None
    position: int = 0
    kept: torch.Tensor | None = None  # so that no other table gets its address


def read(timestep: Any) -> Reading:
    if type(timestep) is not torch.Tensor:
        return Reading(float(timestep)) if isinstance(timestep, (int, float)) else Reading()
    if timestep.layout is not torch.strided or timestep.dtype.is_complex or not (count := timestep.numel()):
        return Reading()
    # Timesteps of many tokens or frames move one way, each of them, and so does their sum.
    if not timestep.is_cpu:
        return place_of(timestep)
    if count <= FEW and (dims := timestep.dim()) <= 1:
        listed: Any = timestep.tolist()
        return Reading(float(sum(listed)), (count,)) if dims else Reading(float(listed))
    return Reading(float(timestep.detach().double().numpy().sum()), timestep.shape)


def place_of(timestep: torch.Tensor) -> Reading:
    """Where a tensor lies in a larger storage, without a look at what it holds."""
    shape = timestep.shape
    storage = timestep.untyped_storage()
    span = 1 + sum((size - 1) * stride for size, stride in zip(shape, timestep.stride(), strict=True))
    if storage.nbytes() <= span * timestep.itemsize:
        return Reading(None, shape)
    return Reading(None, shape, storage.data_ptr(), int(timestep.storage_offset()), timestep)


def _sign(difference: float) -> int:
    return (difference > 0) - (difference < 0)


def _move_of_value(before: Reading, now: Reading, direction: int) -> int | None:
    if before.value is None or now.value is None or before.shape != now.shape:
        return None
    return _sign(now.value - before.value)


def _move_in_table(before: Reading, now: Reading, direction: int) -> int | None:
    if before.table is None or now.table is None:
        return None
    move = _sign(now.position - before.position)
    if before.table == now.table:
        return move
    # Another table, from which a run that has moved along its own reads no earlier element.
    return None if not direction else direction if move == direction else -direction


MOVES: dict[str, Callable[[Reading, Reading, int], int | None]] = {"value": _move_of_value, "table": _move_in_table}
"""The ways of telling how a timestep has moved, the surest first: 1, -1, 0, or `None` where it is not known."""


@dataclass
class Habits:
    """What the last finished run of a model has shown: for each way of telling, its direction, and whether its second
    step moved."""

    directions: dict[str, int] = field(default_factory=dict)
    second_moves: set[str] = field(default_factory=set)


class Timesteps:
    """Follows the timesteps of one run."""

    def __init__(self, habits: Habits):
        self._habits = habits
        self._last: Reading | None = None
        self._directions: dict[str, int] = {}
        self._second_moves: set[str] = set()

    def takes(self, now: Reading, steps_done: int, between: bool) -> bool:
        """Whether a call with this timestep belongs to the run; then it is followed. `between`: it would be the second
        call of a step."""
        last = self._last
        if last is not None:
            value, before = now.value, last.value
            if value is not None and before is not None and steps_done > 1 and now.shape == last.shape:
                # What nearly all calls are: one that stays, or moves as those before.
                own = self._directions.get("value", 0)
                if value == before or (own and (value > before) == (own > 0)):
                    self._last = now
                    return True
            if self.goes_back(now, steps_done, between):
                return False
        self.follow(now, steps_done)
        return True

    def goes_back(self, now: Reading, steps_done: int, between: bool) -> bool:
        """Whether a call with this timestep is the first of another run. `between`: it would be the second call of a
        step."""
        if self._last is None:
            return False
        for way, move_of in MOVES.items():
            own = self._directions.get(way, 0)
            move = move_of(self._last, now, own)
            if move is None:
                continue
            # What another sampler does, too: then its next step shall not look so again.
            if move and not own and move == -self._habits.directions.get(way, 0):
                del self._habits.directions[way]
                return True
            if not move and steps_done == 1 and not between and way in self._habits.second_moves:
                self._habits.second_moves.remove(way)
                return True
            return bool(move and move == -own)
        return False

    def follow(self, now: Reading, steps_done: int) -> None:
        """A call with this timestep belongs to the run."""
        for way, move_of in MOVES.items():
            own = self._directions.get(way, 0)
            if self._last is not None and (move := move_of(self._last, now, own)):
                self._directions.setdefault(way, move)
                if steps_done == 1:
                    self._second_moves.add(way)
        self._last = now

    def finish(self, steps: int) -> None:
        """The run has made the last of its steps."""
        self._habits.directions.update(self._directions)
        if steps > 1:
            self._habits.second_moves = self._second_moves
