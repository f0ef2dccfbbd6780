"""FORA (arXiv 2407.01425) and plain block reuse: a site is computed on every few steps and repeated in between."""

from __future__ import annotations

from collections.abc import Sequence

from fastercache.schedule.policies.arguments import selectors, whole_number
from fastercache.schedule.schedule import Schedule
from fastercache.schedule.step import Step


def fora(
    steps: int,
    guidance: bool = True,
    *,
    interval: int = 3,
    sites: Sequence[str] = ("attention", "mlp"),
    name: str = "fora",
) -> Schedule:
    """Compute `sites` on step 1 and on every `interval`-th step, and repeat their newest results on the others.

    As in the authors' code the steps are counted down to 0, and those whose number the interval divides are computed:
    the last step always is, and step 1, which has nothing to repeat, whatever its number.

    sites: FORA's are the attentions and MLPs, with "cross" where a model has it; ("block",) repeats what whole blocks
        add, ("block[4:20]",) those of some layers.
    """
    whole_number("steps", steps)
    whole_number("interval", interval)
    reused = Step("both", selectors("sites", sites), (1.0,))
    computed = (number == 1 or (steps - number) % interval == 0 for number in range(1, steps + 1))
    return Schedule(tuple(Step() if runs else reused for runs in computed), name=name)
