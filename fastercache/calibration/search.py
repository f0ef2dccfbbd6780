"""Which steps run: shortest paths through the steps that are computed, each weighed by what it costs and by the error
that what lies between them leaves at the end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from fastercache.calibration.costs import Costs
from fastercache.calibration.residuals import FURTHEST, LONGEST_GAP, Residuals
from fastercache.schedule.step import RunningBranches

WIDTH = 60
"""Paths that are followed further from each step."""
HALVINGS = 14

Running = tuple[RunningBranches, ...]


class _Path(NamedTuple):
    """A path to a computed step.

    newest, before: the newest computed steps; full, full_before: the newest that ran both branches; -1 for none.
    rebuilt: the error added up by rebuilt branches since `full`. kind: what the newest step runs. parent: the path
    without it.
    """

    total: float
    newest: int
    before: int
    full: int
    full_before: int
    rebuilt: float
    kind: RunningBranches
    parent: _Path | None

    @property
    def running(self) -> Running:
        """All steps up to the newest."""
        steps: list[RunningBranches] = []
        path: _Path | None = self
        while path is not None:
            steps.append(path.kind)
            if path.parent is not None:
                steps += ["none"] * (path.newest - path.parent.newest - 1)
            path = path.parent
        return tuple(reversed(steps))


_START = _Path(0.0, 0, -1, 0, -1, 0.0, "both", None)


class Search:
    """Finds the steps to run. errors are residuals times what they come to at the end of the run.

    importance: float64 `[steps]`, the error of the last latents for an error of one in a step's guided prediction.
    conditional: whether steps may run the conditional branch alone. coherent: errors of steps in a row add up as they
    are, as they point the same way; otherwise their squares do.
    """

    def __init__(
        self,
        residuals: Residuals,
        importance: np.ndarray,
        costs: Costs,
        *,
        conditional: bool = True,
        coherent: bool = True,
    ):
        self.residuals, self.costs, self.coherent = residuals, costs, coherent
        self.conditional = conditional and residuals.guided
        self.rebuilt = (residuals.rebuilt * importance[:, None, None]).tolist()
        self.gaps = self._gaps(residuals.skipped * importance[:, None, None])
        experts = residuals.experts
        self.firsts = [t for t in range(residuals.steps) if t == 0 or experts[t] != experts[t - 1]]

    def best(self, speedup: float, whole: int = 2) -> Running:
        """The steps with the least error at the end among those that are at least so much faster.

        whole: the first steps, and those after a change of experts, which run both branches.
        """
        budget = self.costs.both * self.residuals.steps / speedup
        low, high = 0.0, 1e-12
        while self.costs.of(self._cheapest(high, whole)) > budget and high < 1e12:
            low, high = high, high * 10
        found = self._cheapest(high, whole)
        for _ in range(HALVINGS):
            middle = (low * high) ** 0.5 if low else high / 10
            tried = self._cheapest(middle, whole)
            if self.costs.of(tried) <= budget:
                high, found = middle, tried
            else:
                low = middle
            if self.costs.of(found) > budget * 0.985:
                break
        return found

    def fastest(self, whole: int = 2) -> Running:
        """The steps that cost the least, whatever the error."""
        return self._cheapest(1e12, whole)

    def error(self, running: Sequence[RunningBranches]) -> float:
        """What the search thinks of given steps: the square of the error at the end."""
        path: _Path | None = _START
        for t in [*(t for t, branches in enumerate(running) if t and branches != "none"), len(running)]:
            assert path is not None
            path = self._next(path, t, running[t] if t < len(running) else "both", 0.0)
            if path is None:
                return np.inf
        assert path is not None
        return path.total

    def _cheapest(self, price: float, whole: int) -> Running:
        """The steps with the least error plus price times cost."""
        steps = self.residuals.steps
        must = {t for first in self.firsts for t in range(first, min(first + whole, steps))}
        at: list[dict[tuple, _Path]] = [{} for _ in range(steps + 1)]
        at[0][_START[2:5]] = _START
        for t in range(steps):
            for path in sorted(at[t].values(), key=lambda one: one.total)[:WIDTH]:
                for following in range(t + 1, min(t + LONGEST_GAP + 2, steps + 1)):
                    kinds: tuple[RunningBranches, ...] = ("both", "cond")
                    if following == steps or following in must or not self.conditional:
                        kinds = ("both",)
                    for kind in kinds:
                        added = self._next(path, following, kind, price)
                        if added is None:
                            continue
                        known = at[following].get(added[2:5])
                        if known is None or known.total > added.total:
                            at[following][added[2:5]] = added
                    if following in must:
                        break
        last = min(at[steps].values(), key=lambda one: one.total)
        return last.running[:steps]

    def _next(self, path: _Path, t: int, kind: RunningBranches, price: float) -> _Path | None:
        """The path with the steps up to t skipped and step t computed, `None` where that cannot be; t past the end
        computes nothing."""
        newest, full, full_before, rebuilt = path.newest, path.full, path.full_before, path.rebuilt
        if t - newest > LONGEST_GAP + 1:
            return None
        distance = newest - path.before if path.before >= 0 else 0
        error = self.gaps[newest][distance if distance <= FURTHEST else 0][t - newest - 1]
        cost = self.costs.none * (t - newest - 1)
        if t < self.residuals.steps:
            if kind == "both":
                cost += self.costs.both
                full, full_before, rebuilt = t, full, 0.0
            else:
                cost += self.costs.cond
                distance = full - full_before if full_before >= 0 else 0
                if t - full > FURTHEST:
                    return None
                own = self.rebuilt[t][t - full][distance if distance <= FURTHEST else 0]
                error += own * (2 * rebuilt + own) if self.coherent else own * own
                rebuilt += own
        if not math.isfinite(error):
            return None
        return _Path(path.total + error + price * cost, t, newest, full, full_before, rebuilt, kind, path)

    def _gaps(self, skipped: np.ndarray) -> list[list[list[float]]]:
        """The error of so many skipped steps after a computed one: `[newest][distance to the one before][skipped]`."""
        steps = self.residuals.steps
        gaps = np.full((steps, FURTHEST + 1, LONGEST_GAP + 1), np.inf)
        gaps[:, :, 0] = 0.0
        for newest in range(steps):
            for distance in range(FURTHEST + 1):
                for count in range(1, min(LONGEST_GAP, steps - newest - 1) + 1):
                    errors = [float(skipped[newest + a, a, distance]) for a in range(1, count + 1)]
                    gaps[newest, distance, count] = (
                        sum(errors) ** 2 if self.coherent else sum(one * one for one in errors)
                    )
        return gaps.tolist()

    def neighbours(self, running: Running, speedup: float, whole: int = 2) -> list[Running]:
        """Steps that differ from the given ones at two places and are at least so much faster than running all, those
        with the least error first."""
        budget = self.costs.both * len(running) / speedup
        must = {t for first in self.firsts for t in range(first, first + whole)}
        free = [t for t in range(len(running)) if t not in must]
        kinds: tuple[RunningBranches, ...] = ("both", "cond", "none") if self.conditional else ("both", "none")
        found: dict[Running, float] = {}
        for number, one in enumerate(free):
            for other in free[number + 1 :]:
                for first in kinds:
                    for second in kinds:
                        if first == running[one] or second == running[other]:
                            continue
                        moved = list(running)
                        moved[one], moved[other] = first, second
                        cost = self.costs.of(moved)
                        if budget * 0.97 <= cost <= budget and tuple(moved) not in found:
                            found[tuple(moved)] = self.error(moved)
        return sorted((key for key, error in found.items() if error < np.inf), key=found.__getitem__)


def shown(running: Sequence[RunningBranches]) -> str:
    """One character for each step: `#` both branches, `c` the conditional one, `.` none."""
    return "".join({"both": "#", "cond": "c", "none": "."}[branches] for branches in running)
