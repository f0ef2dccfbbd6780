"""TaylorSeer (arXiv 2503.06923): features are extrapolated by a Taylor series whose derivatives are differences of
computed ones.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastercache.errors import ScheduleError
from fastercache.schedule.policies.arguments import selectors, whole_number
from fastercache.schedule.schedule import Schedule
from fastercache.schedule.step import Step


def taylorseer(
    steps: int,
    guidance: bool = True,
    *,
    interval: int = 4,
    order: int = 1,
    first: int = 3,
    sites: Sequence[str] = ("attention", "mlp"),
    name: str = "taylorseer",
) -> Schedule:
    """Compute `sites` on the first `first` steps and then on every `interval`-th; extrapolate them in between.

    order: of the series, 1 or 2 (0 repeats the newest output). The derivatives are differences of the newest computed
        outputs, and differences of those, each divided by the number of steps between the two newest. As in the
        authors' code they are made of the last two of the first steps and those computed later, so that the first gap
        has no second derivative.
    sites: the authors' are the attentions and MLPs, with "cross" where a model has it.
    """
    whole_number("steps", steps)
    whole_number("interval", interval)
    whole_number("first", first)
    reused = selectors("sites", sites)
    if isinstance(order, bool) or order not in (0, 1, 2):
        raise ScheduleError(f"order is {order!r}; it must be 0, 1 or 2")
    result: list[Step] = []
    computed: list[int] = []
    for number in range(1, steps + 1):
        if number <= first or (number - first) % interval == 0:
            if number >= first - 1:
                computed.append(number)
            result.append(Step())
        else:
            result.append(Step("both", reused, series(number, computed[::-1], order)))
    return Schedule(tuple(result), name=name)


def series(number: int, computed: Sequence[int], order: int) -> tuple[float, ...]:
    """Coefficients of the outputs computed at the steps of `computed`, newest first, in the series at step `number`."""
    order = min(order, len(computed) - 1)
    distance = number - computed[0]
    if order == 0:
        return (1.0,)
    newest = 1 / (computed[0] - computed[1])  # the first derivative is newest * (A - B)
    if order == 1:
        return 1 + distance * newest, -distance * newest
    before = 1 / (computed[1] - computed[2])  # the one at the step before is before * (B - C)
    second = distance**2 / 2 * newest  # times the difference of the two first derivatives
    return (
        1 + distance * newest + second * newest,
        -distance * newest - second * (newest + before),
        second * before,
    )
