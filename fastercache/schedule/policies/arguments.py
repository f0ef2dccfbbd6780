"""Checks of what a policy is called with."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

from fastercache.errors import ScheduleError
from fastercache.schedule.sites import Selector
from fastercache.schedule.step import shown

MOST = 1e30
"""Numbers are smaller than this: sums of them stay finite."""


def whole_number(name: str, value: int, instead: str = "") -> int:
    """The value itself if it is a whole number from 1 on; otherwise a `ScheduleError` that names the argument and what
    to pass.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ScheduleError(
            f"{name} is {value!r}; it must be a whole number of at least 1{f', {instead}' if instead else ''}"
        )
    return value


def finite(name: str, value: float, least: float = -math.inf, most: float = math.inf) -> float:
    """The value as a float if it is a finite number from `least` to `most`; otherwise a `ScheduleError` that names the
    argument.
    """
    known = isinstance(value, Real) and not isinstance(value, bool) and least <= value <= most and abs(value) < MOST
    if not known:
        bounds = (
            f"of at least {least:g}" if least > -math.inf else "",
            f"of at most {most:g}" if most < math.inf else "",
        )
        wanted = " and ".join(bound for bound in bounds if bound)
        raise ScheduleError(f"{name} is {shown(value)}; it must be a finite number{f' {wanted}' if wanted else ''}")
    return float(value)


def one_a_step(name: str, values: Sequence[float], steps: int, least: float = -math.inf) -> tuple[float, ...]:
    """The values as a tuple if they are one finite number of at least `least` for each step; otherwise a
    `ScheduleError`.
    """
    try:
        found = tuple(values)
    except TypeError as error:
        raise ScheduleError(f"{name} is {shown(values)}; pass a list of {steps} numbers, one for each step") from error
    if len(found) != steps:
        raise ScheduleError(
            f"{name} has {len(found)} values for {steps} steps; give one for each step, or interpolate them first"
        )
    return tuple(finite(f"{name}[{index}]", value, least) for index, value in enumerate(found))


def selectors(name: str, values: Sequence[str]) -> tuple[str, ...]:
    """The values as a tuple if they are selectors of sites, at least one; otherwise a `ScheduleError`."""
    wanted: Any = values
    if isinstance(wanted, str) or not isinstance(wanted, Sequence) or not wanted:
        instead = f"({wanted!r},)" if isinstance(wanted, str) else "('attention', 'mlp')"
        raise ScheduleError(f"{name} is {shown(wanted)}; pass selectors of sites, as in {instead}")
    for text in wanted:
        Selector.parse(text)
    return tuple(wanted)
