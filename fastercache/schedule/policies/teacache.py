"""TeaCache (arXiv 2411.19108): steps are skipped until the accumulated change of the model's input is large enough."""

from __future__ import annotations

from collections.abc import Sequence

from fastercache.schedule.policies.arguments import finite, one_a_step, whole_number
from fastercache.schedule.policies.given import given
from fastercache.schedule.schedule import Schedule


def teacache(
    steps: int, guidance: bool = True, *, changes: Sequence[float], threshold: float = 0.2, name: str = "teacache"
) -> Schedule:
    """TeaCache with its list of changes given, so that its decisions are known before the run.

    The first and the last step run. Between them the changes are summed up, and a step runs when the sum reaches
    `threshold`, which sets the sum to 0; the residual of all blocks is reused on the others.

    changes: one a step, the relative L1 change of the timestep-modulated input since the step before, rescaled by the
        model's polynomial (the first is not read). Where that input is the time embedding alone, as on CogVideoX and
        Wan, no prompt changes them.
    """
    whole_number("steps", steps)
    changes = one_a_step("changes", changes, steps)
    finite("threshold", threshold, 0.0)
    computed, total = [1], 0.0
    for number in range(2, steps + 1):
        total += changes[number - 1]
        if total >= threshold or number == steps:
            computed.append(number)
            total = 0.0
    return given(steps, guidance, computed=computed, name=name)
