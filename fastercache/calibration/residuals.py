"""How wrong a stand-in will be, before anything is run with it: from the inner products of the captured predictions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from fastercache.calibration.capture import COND, DIFFERENCE, LATENTS, LOW, WINDOW, Reference

LONGEST_GAP = 7
"""Steps in a row that run nothing, at most."""
FURTHEST = 9
"""Steps between the two predictions, or the two differences, that a stand-in is made of, at most."""
RIDGE = 1e-7


class Residuals:
    """Root-mean-square errors of the best stand-ins for the guided prediction of each step, over all references.

    skipped: float64 `[steps, LONGEST_GAP + 1, FURTHEST + 1]`: of step t made of the predictions of t - a and t - a - b
    (b = 0: of the first alone). rebuilt: `[steps, FURTHEST + 1, FURTHEST + 1]`: of step t with the difference of the
    branches of step t - a in two bands, and of step t - a - b. Infinite where there is no such step, or where a step is
    another expert's.
    """

    def __init__(self, references: Sequence[Reference]):
        self.steps = len(references[0].guided)
        size = references[0].guided[0].numel()
        self._products = np.nansum(np.stack([one.products for one in references]), axis=0) / (size * len(references))
        self._weights = references[0].weights
        self.experts = references[0].experts
        self.guided = any(one.weights[:, 1].any() for one in references)
        self.skipped = np.full((self.steps, LONGEST_GAP + 1, FURTHEST + 1), np.inf)
        self.rebuilt = np.full((self.steps, FURTHEST + 1, FURTHEST + 1), np.inf)
        for t in range(self.steps):
            for a in range(1, FURTHEST + 1):
                for b in range(FURTHEST + 1):
                    first = t - a - b
                    if first < 0 or a + b >= WINDOW or self.experts[first] != self.experts[t]:
                        continue
                    if a <= LONGEST_GAP:
                        self.skipped[t, a, b] = self._skipped(t, t - a, first)
                    if self.guided:
                        self.rebuilt[t, a, b] = self._rebuilt(t, t - a, first)

    def _guided(self, t: int, step: int) -> list[tuple[int, int, float]]:
        """The prediction of a step with the guidance of step t, as (step, kind, weight)."""
        return [(step, COND, self._weights[t, 0]), (step, DIFFERENCE, self._weights[t, 1])]

    def _skipped(self, t: int, newest: int, before: int) -> float:
        of = self._weights[t, 0]
        terms = [self._guided(t, newest), [(t, LATENTS, of)], [(newest, LATENTS, of)]]
        if before != newest:
            terms.append(self._guided(t, before))
        return self._least(self._guided(t, t), terms)

    def _rebuilt(self, t: int, newest: int, before: int) -> float:
        of = self._weights[t, 1]
        terms = [[(newest, LOW, of)], [(newest, DIFFERENCE, of), (newest, LOW, -of)]]
        if before != newest:
            terms.append([(before, DIFFERENCE, of)])
        return self._least([(t, DIFFERENCE, of)], terms)

    def _product(self, one: list, other: list) -> float:
        return math.fsum(
            weight * factor * self._products[step, kind, at, of]
            for step, kind, weight in one
            for at, of, factor in other
        )

    def _least(self, target: list, terms: list[list]) -> float:
        """Root of the least mean squared error of a sum of terms."""
        square = np.array([[self._product(one, other) for other in terms] for one in terms])
        both = np.array([self._product(one, target) for one in terms])
        square = square + RIDGE * np.diag(np.maximum(np.diag(square), 1e-30))
        found = np.linalg.solve(square, both)
        return math.sqrt(max(self._product(target, target) - float(both @ found), 0.0))
