"""The intervals and verdicts of the reports: 95 %, two-sided."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
Interval = tuple[float, float]


def wilson(successes: int, n: int) -> Interval:
    """Wilson's score interval of a proportion (0 to 1)."""
    interval = stats.binomtest(int(successes), int(n)).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def paired_proportions(first: Sequence[bool], second: Sequence[bool]) -> tuple[float, Interval, float]:
    """Difference first - second of two proportions over the same pairs, its interval, and the exact McNemar p-value.

    The interval is Newcombe's score interval for paired data (1998, method 10). It stays honest where few or no pairs
    disagree; a bootstrap would there give an interval of no width.
    """
    a, b = np.asarray(first, bool), np.asarray(second, bool)
    if a.shape != b.shape or not a.size:
        raise ValueError(f"{a.size} and {b.size} outcomes cannot be paired")
    n = a.size
    both, only_a, only_b, neither = (int(x.sum()) for x in (a & b, a & ~b, ~a & b, ~a & ~b))
    p_a, p_b = (both + only_a) / n, (both + only_b) / n
    (low_a, high_a), (low_b, high_b) = wilson(both + only_a, n), wilson(both + only_b, n)
    margins = (both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither)
    agreement = both * neither - only_a * only_b
    phi = 0.0
    if margins:
        phi = (max(agreement - n / 2, 0.0) if agreement > 0 else agreement) / math.sqrt(margins)

    def reach(x: float, y: float) -> float:
        return math.sqrt(max(x * x - 2 * phi * x * y + y * y, 0.0))

    difference = p_a - p_b
    interval = (difference - reach(p_a - low_a, high_b - p_b), difference + reach(high_a - p_a, p_b - low_b))
    p_value = float(stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0
    return difference, interval, p_value


def mean_interval(values: Sequence[float]) -> tuple[float, Interval]:
    """Mean and its t interval. One value has no interval: both ends are infinite."""
    x = np.asarray(values, float)
    mean = float(x.mean())
    if x.size < 2:
        return mean, (-math.inf, math.inf)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, x.size - 1) * x.std(ddof=1) / math.sqrt(x.size))
    return mean, (mean - half, mean + half)


def order_verdict(interval: Interval, published: float) -> str:
    """Whether a difference with that interval has the sign of the published difference."""
    low, high = interval
    if low <= 0 <= high:
        return "interval includes 0: cannot tell"
    return "agrees with the paper" if (low > 0) == (published > 0) else "differs"


def bar_verdict(value: float, interval: Interval, bar: float, at_least: bool) -> str:
    """Whether `value` meets the bar (>= bar, or <= bar), and whether the interval leaves that open."""
    holds = value >= bar if at_least else value <= bar
    low, high = interval
    return ("holds" if holds else "does not hold") + (", but the interval includes the bar" if low < bar < high else "")
