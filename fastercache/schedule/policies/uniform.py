"""Steps skipped at equal distances: no method of its own, but what every choice of steps is measured against."""

from __future__ import annotations

from fastercache.schedule.policies.arguments import whole_number
from fastercache.schedule.policies.given import given
from fastercache.schedule.schedule import Schedule


def uniform(
    steps: int,
    guidance: bool = True,
    *,
    interval: int = 2,
    first: int = 2,
    reuse: str = "hold",
    name: str = "uniform",
) -> Schedule:
    """Run the first steps, and every `interval`-th step after them.

    first: steps at the beginning that all run. reuse: what stands in for the others, as `given` has it: "hold" (the
    newest prediction), "change" (that moved as the latents) or "stack" (the residual of all blocks).
    """
    whole_number("steps", steps)
    whole_number("interval", interval)
    whole_number("first", first)
    computed = [number for number in range(1, steps + 1) if number <= first or (number - first) % interval == 0]
    return given(steps, guidance, computed=computed, reuse=reuse, name=name)
