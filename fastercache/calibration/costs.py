"""What the steps of a schedule take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fastercache.schedule.step import RunningBranches


@dataclass(frozen=True)
class Costs:
    """Milliseconds of the denoiser in a step that runs both branches, the conditional one, or nothing."""

    both: float
    cond: float
    none: float

    def of(self, running: Sequence[RunningBranches]) -> float:
        return sum(getattr(self, branches) for branches in running)

    def speedup(self, running: Sequence[RunningBranches]) -> float:
        return self.both * len(running) / self.of(running)
