"""Least squares of a few coefficients, shrunk towards known ones, from inner products alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fastercache.calibration.capture import products

LARGEST = 300.0
"""Coefficients are at most this large: a sum of larger ones is a small difference of large numbers, which rounding
spoils."""
RIDGES = tuple(10.0**-k for k in range(9, 1, -1))
"""Strengths that are tried, relative to each term's own size."""


@dataclass(frozen=True)
class Moments:
    """What one example says of a fit of m terms: `terms` float64 `[m, m]` (their inner products), `both` `[m]` (with
    the target), `target` (the target's with itself)."""

    terms: np.ndarray
    both: np.ndarray
    target: float

    @staticmethod
    def of(terms: Sequence[torch.Tensor], target: torch.Tensor) -> Moments:
        """From the tensors themselves, all of one shape."""
        stacked = torch.stack([one.float().flatten() for one in (*terms, target)])
        found = products(stacked, stacked)
        return Moments(found[:-1, :-1], found[:-1, -1], float(found[-1, -1]))

    def error(self, coefficients: np.ndarray) -> float:
        """Squared error of the sum with these coefficients."""
        return float(self.target - 2 * coefficients @ self.both + coefficients @ self.terms @ coefficients)


def solve(moments: Sequence[Moments], prior: np.ndarray, ridge: float) -> np.ndarray:
    """The coefficients with the least squared error over all examples, plus `ridge` times their distance from `prior`
    in units of each term's own size."""
    terms, both = sum(one.terms for one in moments), sum(one.both for one in moments)
    penalty = ridge * np.diag(np.maximum(np.diag(terms), 1e-30))
    return prior + np.linalg.solve(terms + penalty, both - terms @ prior)


def fitted(moments: Sequence[Moments], prior: np.ndarray) -> tuple[np.ndarray, float]:
    """The coefficients, with the ridge under which each example is served best by the fit of the others, and their
    squared error.

    prior: the coefficients to shrink towards: those of a method that needs no fit.
    """
    prior = np.asarray(prior, float)
    if len(moments) == 1:
        ridge = RIDGES[len(RIDGES) // 2]
    else:

        def left_out(ridge: float) -> float:
            return sum(
                one.error(solve([*moments[:i], *moments[i + 1 :]], prior, ridge)) for i, one in enumerate(moments)
            )

        ridge = min(RIDGES, key=left_out)
    coefficients = solve(moments, prior, ridge)
    for stronger in (one for one in (*RIDGES, 0.1, 1.0, 10.0) if one > ridge):
        if np.abs(coefficients).max() <= LARGEST:
            break
        coefficients = solve(moments, prior, stronger)
    return coefficients, sum(one.error(coefficients) for one in moments)
