"""Steps chosen elsewhere: a list of the steps that run, such as LeMiCa's (arXiv 2511.00090) or the step masks of
cache-dit.
"""

from __future__ import annotations

from collections.abc import Collection

from fastercache.errors import ScheduleError
from fastercache.schedule.policies.arguments import whole_number
from fastercache.schedule.schedule import Schedule
from fastercache.schedule.step import Prediction, Step

STACK = Step("both", ("stack",), (1.0,))
"""The blocks idle, and what they added to the residual stream at the last step that ran them is added again."""
CHANGE = Step("none", prediction=Prediction((1.0,), now=1.0, newest=-1.0))
"""Nothing runs: the newest prediction moves as the latents did since (EasyCache's form, arXiv 2507.02860)."""
HOLD = Step("none")
"""Nothing runs, and the newest prediction is given again."""
FORMS = {"stack": STACK, "change": CHANGE, "hold": HOLD}


def given(
    steps: int, guidance: bool = True, *, computed: Collection[int], reuse: str = "stack", name: str = "given"
) -> Schedule:
    """Run the whole model on the steps named, and stand in for it on the others.

    computed: numbers of the steps that run, from 1; step 1 must be among them. reuse: what stands in: "stack" (the
    residual of all blocks, as LeMiCa, TeaCache and MagCache have it), "change" (the newest prediction, moved as the
    latents) or "hold" (that prediction).
    """
    whole_number("steps", steps)
    if not isinstance(reuse, str) or reuse not in FORMS:
        raise ScheduleError(f"reuse is {reuse!r}; it must be one of {', '.join(map(repr, FORMS))}")
    try:
        chosen = list(computed)
    except TypeError as error:
        raise ScheduleError(
            f"computed is {computed!r}; pass the numbers of the steps that run, as in (1, 2, 5)"
        ) from error
    for number in chosen:
        if isinstance(number, bool) or not isinstance(number, int) or number not in range(1, steps + 1):
            raise ScheduleError(f"computed names step {number!r}, and the run has steps 1 to {steps}")
    if 1 not in chosen:
        raise ScheduleError("computed leaves out step 1, before which there is nothing to reuse; add it")
    return Schedule(tuple(Step() if number in chosen else FORMS[reuse] for number in range(1, steps + 1)), name=name)
