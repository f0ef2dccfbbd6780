"""A caching method from outside the package: every other step of a run's second half runs nothing, and goes on in a
straight line."""

from __future__ import annotations

import fastercache
from fastercache import Prediction, Schedule, Step

AHEAD = Step("none", prediction=Prediction((2.0, -1.0)))


def every_other(steps: int, guidance: bool = True, *, after: int | None = None) -> Schedule:
    """Run the first `after` steps (at least 2, by default half of all) and every other one behind them."""
    first = max(2, steps // 2 if after is None else after)
    skipped = [number > first and (number - first) % 2 == 1 for number in range(1, steps + 1)]
    return Schedule(tuple(AHEAD if skip else Step() for skip in skipped), name="every-other")


fastercache.register_policy("every-other", every_other)
