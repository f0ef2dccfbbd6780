"""MagCache (arXiv 2506.09045): steps whose residual is known to change little in magnitude reuse the one before."""

from __future__ import annotations

from collections.abc import Sequence

from fastercache.schedule.policies.arguments import finite, one_a_step, whole_number
from fastercache.schedule.policies.given import given
from fastercache.schedule.schedule import Schedule


def magcache(
    steps: int,
    guidance: bool = True,
    *,
    ratios: Sequence[float],
    threshold: float = 0.12,
    most_skipped: int = 2,
    retention: float = 0.2,
    name: str = "magcache",
) -> Schedule:
    """MagCache with the magnitude ratios of a model given, so that its decisions are known before the run.

    The residual is that of all blocks. From the share `retention` of the steps on, a step is skipped while the errors
    |1 - product of the ratios since the last step that ran|, summed over the gap, stay under `threshold`, and at most
    `most_skipped` in a row. The defaults are those of the authors' script for Wan 2.1.

    ratios: one a step, the mean magnitude of a step's residual over that of the step before (the first is not read), as
        MagCache's calibration prints them for one branch. Both branches skip the same steps; MagCache decides for each
        by itself.
    """
    whole_number("steps", steps)
    ratios = one_a_step("ratios", ratios, steps, 0.0)
    finite("threshold", threshold, 0.0)
    whole_number("most_skipped", most_skipped)
    finite("retention", retention, 0.0, 1.0)
    computed, product, error, skipped = [1], 1.0, 0.0, 0
    for number in range(2, steps + 1):
        if number - 1 >= int(retention * steps):
            product *= ratios[number - 1]
            error += abs(1.0 - product)
            skipped += 1
            if error < threshold and skipped <= most_skipped:
                continue
        computed.append(number)
        product, error, skipped = 1.0, 0.0, 0
    return given(steps, guidance, computed=computed, name=name)
