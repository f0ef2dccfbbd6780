"""One denoising step of a schedule: what runs, what is reused, and the coefficients of everything that stands in for a
computation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

from fastercache.errors import ScheduleError
from fastercache.schedule.branches import Branch
from fastercache.schedule.sites import ATTENTION_KINDS, Selector, SiteNode
from fastercache.triton_kernels.coefficients import MAX_TAPS

RunningBranches = Literal["both", "cond", "none"]
MAX_PREDICTIONS = 3
"""Predictions of the denoiser that a run keeps at most."""
MAX_COEFFICIENT = 1e4
"""Coefficients are at most this large: published and fitted ones stay under 100, and larger ones multiply rounding
errors."""


@dataclass(frozen=True)
class Prediction:
    """The denoiser's output as a sum of cached tensors: the output of a step that runs nothing, or the correction of
    one that runs.

        fresh * (this step's own prediction) + sum_k taps[k] * (the k-th newest prediction before it) + now * (this
        step's latents) + newest * (the latents that the newest of those predictions was made from)

    All rows of a call get the same coefficients, those of both branches of guidance.

    taps: at most 3, the newest prediction first; `(1.0,)` holds it. now, newest: of latents, as the denoiser is given
    them. fresh: of the step's own prediction; a step that runs nothing has none and leaves it at 1.
    """

    taps: tuple[float, ...] = (1.0,)
    now: float = 0.0
    newest: float = 0.0
    fresh: float = 1.0


@dataclass(frozen=True)
class Step:
    """One step of the sampler.

    branches: `both` runs the conditional and the unconditional branch; `cond` runs the conditional one and rebuilds the
        other from the last step that ran both (CFG-Cache, Eq. 11); `none` runs nothing, and `prediction` stands in for
        the denoiser. A run without guidance has one branch, and `cond` means the same as `both` there.
    reuse: selectors of the sites that are not computed but blended from cached results (Eq. 5).
    taps: coefficients of those sites' newest computed results, newest first: `(1 + w, -w)` for FasterCache, `(1,)` for
        plain reuse.
    low, high: weights w1 and w2 of the newest difference of the branches, in its low and its high frequencies, on a
        `cond` step.
    previous: weight of the difference before that one, of the second-newest step that ran both branches, on a `cond`
        step.
    own_taps: pairs of a selector and its coefficients, for reused sites that are not blended with `taps`. A selector
        may end in `@cond` or `@uncond`, for one branch. Where several name a site, the last one counts.
    prediction: on a `none` step, what stands in for the denoiser's output (by default the newest prediction); on
        another step, a correction of it.
    """

    branches: RunningBranches = "both"
    reuse: tuple[str, ...] = ()
    taps: tuple[float, ...] = ()
    low: float = 1.0
    high: float = 1.0
    own_taps: tuple[tuple[str, tuple[float, ...]], ...] = ()
    previous: float = 0.0
    prediction: Prediction | None = None

    @property
    def runs(self) -> bool:
        """Whether the denoiser is called at all."""
        return self.branches != "none"

    @property
    def terms(self) -> Prediction | None:
        """The terms of the prediction this step gives, `None` where it is the denoiser's own."""
        return self.prediction if self.runs or self.prediction is not None else Prediction()

    def reuses(self, site: SiteNode) -> bool:
        """Whether the site is one of those that this step blends."""
        return any(Selector.parse(text).matches(site) for text in self.reuse)

    def taps_of(self, site: SiteNode, branch: Branch) -> tuple[float, ...]:
        """The coefficients that a reused site is blended with, in one branch."""
        for text, taps in reversed(self.own_taps):
            selector, _, only = text.partition("@")
            if only in ("", branch) and Selector.parse(selector).matches(site):
                return taps
        return self.taps

    def coefficients(self) -> Iterator[tuple[str, Any]]:
        """Every number of the step, each with the name that an error calls it by."""
        yield from (("low", self.low), ("high", self.high), ("previous", self.previous))
        yield from ((f"taps[{k}]", tap) for k, tap in enumerate(self.taps))
        for selector, taps in self.own_taps:
            yield from ((f"own_taps of {selector!r}[{k}]", tap) for k, tap in enumerate(taps))
        if self.prediction is not None:
            yield from ((f"prediction.{name}", getattr(self.prediction, name)) for name in ("now", "newest", "fresh"))
            yield from ((f"prediction.taps[{k}]", tap) for k, tap in enumerate(self.prediction.taps))


def shown(value: Any) -> str:
    """A wrong value for an error message, cut where it is long."""
    text = repr(value)
    return text if len(text) < 40 else f"{text[:20]}..."


def check_step(step: Step, where: str) -> None:
    """`ScheduleError` if the step by itself cannot be run; `where` begins its message."""
    if step.branches not in get_args(RunningBranches):
        raise ScheduleError(f"{where}: branches is {step.branches!r}; it must be 'both', 'cond' or 'none'")
    for selector in step.reuse:
        Selector.parse(selector)
    if len(set(step.reuse)) < len(step.reuse):
        raise ScheduleError(f"{where}: reuse {list(step.reuse)} names a selector twice")
    _check_own_taps(step, where)
    for label, value in step.coefficients():
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= MAX_COEFFICIENT:
            raise ScheduleError(
                f"{where}: {label} is {shown(value)}; coefficients must be finite numbers, of at most "
                f"{MAX_COEFFICIENT:g} in size"
            )
    if bool(step.reuse) != bool(step.taps):
        raise ScheduleError(f"{where}: reuse {list(step.reuse)} with taps {list(step.taps)}; give both or neither")
    for label, taps in (
        ("taps", step.taps),
        *((f"own_taps of {selector!r}", taps) for selector, taps in step.own_taps),
    ):
        if len(taps) > MAX_TAPS:
            raise ScheduleError(
                f"{where}: {label} has {len(taps)} coefficients; at most {MAX_TAPS} outputs can be blended"
            )
        if label != "taps" and not taps:
            raise ScheduleError(
                f"{where}: {label} is empty; give at least one coefficient, or leave the selector out of own_taps"
            )
    if not step.runs and step.reuse:
        raise ScheduleError(
            f"{where} runs nothing (branches 'none') and reuses {list(step.reuse)}; leave out reuse: no site runs"
        )
    if not step.runs and (step.low, step.high, step.previous) != (1.0, 1.0, 0.0):
        raise ScheduleError(f"{where} runs nothing, so there is no branch to rebuild; leave out low, high and previous")
    if step.prediction is not None:
        _check_prediction(step, step.prediction, where)


def _check_own_taps(step: Step, where: str) -> None:
    for text, _ in step.own_taps:
        selector, at, branch = text.partition("@") if isinstance(text, str) else (text, "", "")
        own = Selector.parse(selector)
        if at and branch not in ("cond", "uncond"):
            raise ScheduleError(f"{where}: own_taps for {text!r}; after the @ comes a branch, 'cond' or 'uncond'")
        if not any(_overlap(own, Selector.parse(other)) for other in step.reuse):
            raise ScheduleError(
                f"{where}: own_taps for {text!r}, which is not among its reused sites {list(step.reuse)}"
            )


def _overlap(one: Selector, other: Selector) -> bool:
    """Whether two selectors may name the same site."""
    kinds = [set(ATTENTION_KINDS) if selector.kind == "attention" else {selector.kind} for selector in (one, other)]
    ends = [math.inf if selector.stop is None else selector.stop for selector in (one, other)]
    return bool(kinds[0] & kinds[1]) and max(one.first, other.first) < min(ends)


def _check_prediction(step: Step, terms: Prediction, where: str) -> None:
    if not 1 <= len(terms.taps) <= MAX_PREDICTIONS and (terms.taps or not step.runs):
        raise ScheduleError(
            f"{where}: prediction.taps has {len(terms.taps)} coefficients; a prediction is made of 1 to "
            f"{MAX_PREDICTIONS} cached ones"
        )
    if not step.runs and terms.fresh != 1.0:
        raise ScheduleError(f"{where} runs nothing, so it has no fresh prediction; leave out prediction.fresh")
