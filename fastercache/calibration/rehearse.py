"""Closed-loop fits: the examples sample under the schedule itself, all at the same step, and each step's coefficients
are fitted so that the next latents meet those of the uncached generations.

What earlier stand-ins did wrong is thus part of what later ones are fitted to put right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from fastercache.calibration.branches import Branches, CallNotes, Predicted
from fastercache.calibration.capture import Reference
from fastercache.calibration.clips import psnr
from fastercache.calibration.fit import Moments, fitted
from fastercache.calibration.lockstep import Lane, Moment, Stage
from fastercache.schedule.schedule import Schedule
from fastercache.schedule.step import MAX_PREDICTIONS, Prediction, RunningBranches, Step


@dataclass(frozen=True)
class Options:
    """What is fitted. closed: to the next latents of the run itself, not to the uncached prediction. correct: full and
    conditional steps are corrected too, once a step has been skipped. terms: cached predictions that are summed up."""

    closed: bool = True
    correct: bool = True
    terms: int = 3
    latents: bool = True
    previous: bool = True
    divisor: int = 5


FITTED = Options()
"""What `fastercache.calibrate` fits."""


@dataclass(frozen=True)
class Rehearsal:
    """A schedule that was fitted, and how the examples fared.

    psnr: in dB, of each example's clip against the uncached one. drift: root-mean-square error of the latents after
    each step, over the examples.
    """

    schedule: Schedule
    psnr: tuple[float, ...]
    drift: tuple[float, ...]


@dataclass
class _Watch:
    reference: Reference
    calls: CallNotes = field(default_factory=CallNotes)
    known: list[Predicted] = field(default_factory=list)
    differences: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(default_factory=list)
    drift: list[float] = field(default_factory=list)


class Rehearsals:
    """Fits schedules to references on a stage that is open."""

    def __init__(self, stage: Stage, options: Options = FITTED):
        self.stage, self.options = stage, options
        self.branches = Branches(stage)

    def fit(
        self,
        name: str,
        running: Sequence[RunningBranches],
        references: Sequence[Reference],
        given: Schedule | None = None,
    ) -> Rehearsal:
        """Run the examples of the references with steps that run these branches, and fit every coefficient.

        given: a schedule of those branches whose coefficients are taken as they are.
        """
        self.running: Sequence[RunningBranches] = running
        steps: list[Step] = []
        with self.stage.lanes([one.example for one in references], self._conduct) as lanes:
            for lane, reference in zip(lanes, references, strict=True):
                lane.notes = _Watch(reference)
            moments = [lane.advance() for lane in lanes]
            for i, branches in enumerate(running):
                step, results = self._step(i, branches, lanes, moments, None if given is None else given.steps[i])
                steps.append(step)
                for number, (lane, result) in enumerate(zip(lanes, results, strict=True)):
                    self.branches.begin_step(lane.notes.calls)
                    moments[number] = lane.advance(result)
                    wanted = lane.notes.reference.latents[i + 1].float()
                    assert lane.latents is not None
                    lane.notes.drift.append(float((lane.latents.float().cpu() - wanted).square().mean()))
            reached = tuple(psnr(lane.result, lane.notes.reference.clip) for lane in lanes)
            drift = np.sqrt(np.mean([lane.notes.drift for lane in lanes], axis=0))
        return Rehearsal(
            Schedule(tuple(steps), name, self.options.divisor), reached, tuple(float(value) for value in drift)
        )

    def _conduct(self, lane: Lane, component: str, original: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        running = self.running[lane.step]
        return self.branches.call(lane, lane.notes.calls, running, component, original, arguments)

    # ---- one step ----------------------------------------------------------------------------------------------------

    def _step(
        self,
        i: int,
        branches: RunningBranches,
        lanes: Sequence[Lane],
        moments: Sequence[Moment | None],
        given: Step | None,
    ) -> tuple[Step, list[torch.Tensor | None]]:
        problems = [
            self._problem(i, branches, lane, moment)
            for lane, moment in zip(lanes, moments, strict=True)
            if moment is not None
        ]
        prior = problems[0].prior
        if given is not None:
            coefficients = problems[0].coefficients_of(given)
        elif len(prior):
            coefficients, _ = fitted([Moments.of(one.terms, one.target) for one in problems], prior)
        else:
            coefficients = prior
        # As float32, which the engine has them in.
        coefficients = np.asarray(coefficients, np.float32).astype(float)
        step = problems[0].step(branches, coefficients)
        results: list[torch.Tensor | None] = []
        for lane, problem in zip(lanes, problems, strict=True):
            results.append(problem.result(coefficients) if branches != "both" or len(prior) else None)
            self._remember(lane, branches, problem, coefficients)
        return step, results

    def _problem(self, i: int, branches: RunningBranches, lane: Lane, moment: Moment) -> _Problem:
        watch: _Watch = lane.notes
        reference, calls, options = watch.reference, watch.calls, self.options
        of_cond, of_difference = (float(value) for value in reference.weights[i])
        assert calls.latents is not None
        latents = calls.latents.float()

        def guided(one: Predicted) -> torch.Tensor:
            difference = one.difference
            return of_cond * one.cond if difference is None else of_cond * one.cond + of_difference * difference

        target = reference.guided[i].to(moment.prediction).float()
        response = float(reference.response[i])
        if options.closed and np.isfinite(response) and abs(response) > 1e-8:
            placeholder = moment.prediction
            wanted = reference.latents[i + 1].to(placeholder.device)
            target = placeholder.float() + (wanted.float() - moment.respond(placeholder).float()) / response

        problem = _Problem()
        first = next(t for t in range(i, -1, -1) if t == 0 or reference.experts[t - 1] != reference.experts[i])
        if i == first:  # another expert knows nothing of what this one computed
            watch.known, watch.differences = [], []
        skipped_before = "none" in self.running[first:i]
        if branches == "none":
            problem.base = torch.zeros_like(target)
        elif branches == "cond" and calls.layout.guided:
            problem.base = of_cond * calls.now["cond"]
            low, high, _ = watch.differences[0]
            problem.add("low", of_difference * low, 1.0)
            problem.add("high", of_difference * high, 1.0)
            if options.previous and len(watch.differences) > 1:
                problem.add("previous", of_difference * watch.differences[1][2], 0.0)
        else:
            problem.base = guided(self._now(watch))
            if options.correct and skipped_before and watch.known:
                problem.add("fresh", problem.base, 0.0)
        skipped = branches == "none"
        if skipped or (options.correct and skipped_before):
            for number, one in enumerate(watch.known[: options.terms]):
                problem.add(f"tap{number}", guided(one), float(skipped and number == 0))
            if options.latents and watch.known:
                # What the two branches are given is the same, so that guidance leaves it as it is, but for its sum.
                problem.add("now", of_cond * latents, 0.0)
                problem.add("newest", of_cond * watch.known[0].latents, 0.0)
        problem.target = target - problem.base
        return problem

    def _now(self, watch: _Watch) -> Predicted:
        calls = watch.calls
        assert calls.latents is not None
        return Predicted(calls.now["cond"], calls.now.get("uncond"), calls.latents.float())

    def _remember(self, lane: Lane, branches: RunningBranches, problem: _Problem, coefficients: np.ndarray) -> None:
        """What later steps read of this one: its own prediction, before any correction."""
        watch: _Watch = lane.notes
        calls = watch.calls
        if branches == "none":
            return
        now = self._now(watch)
        if branches == "cond" and calls.layout.guided:
            values = dict(zip(problem.names, coefficients, strict=True))
            low, high, _ = watch.differences[0]
            rebuilt = now.cond + values["low"] * low + values["high"] * high
            if "previous" in values:
                rebuilt = rebuilt + values["previous"] * watch.differences[1][2]
            now.uncond = rebuilt
        elif calls.layout.guided:
            assert now.uncond is not None and now.difference is not None
            low, high = self.branches.bands(calls, now.uncond, now.cond, self.options.divisor)
            watch.differences = [(low, high, now.difference), *watch.differences[:1]]
        watch.known = [now, *watch.known[: MAX_PREDICTIONS - 1]]


class _Problem:
    """One example's least squares of one step: `target` (the guided prediction that is wanted, less `base`) as a sum of
    terms."""

    base: torch.Tensor
    target: torch.Tensor

    def __init__(self) -> None:
        self.names: list[str] = []
        self.terms: list[torch.Tensor] = []
        self.priors: list[float] = []

    def add(self, name: str, term: torch.Tensor, prior: float) -> None:
        self.names.append(name)
        self.terms.append(term)
        self.priors.append(prior)

    @property
    def prior(self) -> np.ndarray:
        return np.asarray(self.priors)

    def result(self, coefficients: np.ndarray) -> torch.Tensor:
        total = self.base.clone()
        for coefficient, term in zip(coefficients, self.terms, strict=True):
            total += float(coefficient) * term
        return total

    def step(self, branches: RunningBranches, coefficients: np.ndarray) -> Step:
        """The step of a schedule with these coefficients."""
        values = dict(zip(self.names, (float(value) for value in coefficients), strict=True))
        taps = tuple(values[name] for name in self.names if name.startswith("tap"))
        prediction = None
        if taps:
            fresh = 1.0 + values.get("fresh", 0.0)
            prediction = Prediction(taps, values.get("now", 0.0), values.get("newest", 0.0), fresh)
        return Step(
            branches,
            low=values.get("low", 1.0),
            high=values.get("high", 1.0),
            previous=values.get("previous", 0.0),
            prediction=prediction,
        )

    def coefficients_of(self, step: Step) -> np.ndarray:
        """The coefficients of a given step, in this problem's order."""
        terms = step.terms or Prediction(())
        known = {"low": step.low, "high": step.high, "previous": step.previous, "fresh": terms.fresh - 1.0}
        known |= {"now": terms.now, "newest": terms.newest}
        known |= {f"tap{k}": tap for k, tap in enumerate(terms.taps)}
        return np.asarray([known.get(name, 0.0) for name in self.names])
