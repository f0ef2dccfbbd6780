"""Pyramid Attention Broadcast (arXiv 2408.12588): each kind of attention is repeated at an interval of its own in the
middle of a run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fastercache.errors import ScheduleError
from fastercache.schedule.policies.arguments import finite, one_a_step, selectors, whole_number
from fastercache.schedule.schedule import Schedule
from fastercache.schedule.step import Step

OPEN_SORA: Mapping[str, int] = {"spatial": 2, "temporal": 4, "cross": 6}
"""The intervals released for Open-Sora 1.2. For CogVideoX {"joint": 2} was, from timestep 850 to 100."""


def pab(
    steps: int,
    guidance: bool = True,
    *,
    intervals: Mapping[str, int] = OPEN_SORA,
    earliest: float = 930.0,
    latest: float = 450.0,
    timesteps: Sequence[float] | None = None,
    name: str = "pab",
) -> Schedule:
    """Repeat the newest output of each kind of attention, computing it on steps 1, 1 + `intervals[kind]`, ...

    MLPs are computed on every step; what was released for Open-Sora 1.2 also repeats those of its first blocks at three
    timesteps.

    earliest, latest: timesteps out of 1000 between which outputs are repeated (at these and outside, everything is
        computed); the released ones of Open-Sora 1.2. timesteps: the sampler's own, one for each step; 1000 (1 - i / N)
        for step i + 1 of N if not given, as evenly spaced samplers have it (Open-Sora's moves them with the size of the
        video).
    """
    whole_number("steps", steps)
    if not isinstance(intervals, Mapping):
        raise ScheduleError(
            f"intervals is {intervals!r}; pass a kind of site and its interval, as in {{'spatial': 2, 'cross': 6}}"
        )
    for kind, interval in zip(selectors("intervals", tuple(intervals)), intervals.values(), strict=True):
        whole_number(f"intervals[{kind!r}]", interval)
    earliest, latest = finite("earliest", earliest, 0.0, 1000.0), finite("latest", latest, 0.0, 1000.0)
    if latest >= earliest:
        raise ScheduleError(
            f"earliest is {earliest:g} and latest {latest:g}; timesteps go down from 1000 to 0, so pass earliest > "
            "latest"
        )
    times = (
        [1000 * (1 - i / steps) for i in range(steps)]
        if timesteps is None
        else one_a_step("timesteps", timesteps, steps)
    )
    result = []
    for i, time in enumerate(times):
        reuse = tuple(kind for kind, interval in intervals.items() if latest < time < earliest and i % interval != 0)
        result.append(Step("both", reuse, (1.0,)) if reuse else Step())
    return Schedule(tuple(result), name=name)
