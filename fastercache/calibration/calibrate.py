"""`fastercache.calibrate`: schedules fitted to a pipeline on a few of its prompts."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from fastercache import api
from fastercache.calibration.capture import Capture, Reference
from fastercache.calibration.clips import Example, clip_of, described, interval, psnr
from fastercache.calibration.costs import Costs
from fastercache.calibration.gains import Disturbed, importance
from fastercache.calibration.lockstep import Stage
from fastercache.calibration.rehearse import FITTED, Options, Rehearsal, Rehearsals
from fastercache.calibration.residuals import Residuals
from fastercache.calibration.search import Running, Search
from fastercache.calibration.store import Store, digest
from fastercache.errors import CalibrationError
from fastercache.host import environment, pipelines
from fastercache.host.signature import signature_of
from fastercache.report.calibration import CalibrationReport, write_report
from fastercache.schedule.measured import Measured
from fastercache.schedule.schedule import Schedule
from fastercache.schedule.signature import Signature

LADDER = (1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0)
"""Speed-ups that are tried for a target of quality, before those between them."""
MARGIN = 0.25
"""In dB, above a target of quality: the held-out pairs differ from those that a schedule is chosen on."""


@dataclass(frozen=True)
class Effort:
    """What a calibration spends.

    fitted: pairs of a prompt and a seed that coefficients are fitted to. held: pairs that the result is measured on.
    points: steps that are disturbed to learn what an error there comes to. tried: candidates, each on `few` pairs.
    finalists: candidates that are fitted to all pairs. moved: neighbours of the best that are tried, twice.
    """

    fitted: int
    held: int
    points: int
    tried: int
    few: int
    finalists: int
    moved: int

    def generations(self, speedup: float) -> float:
        """Whole generations that a calibration for one speed-up takes, as multiples of uncached ones."""
        rehearsed = self.few * (self.tried + 2 * self.moved) + self.fitted * self.finalists + self.held
        return self.fitted + self.held + 0.6 * self.points + rehearsed / speedup


EFFORTS = {
    "full": Effort(fitted=8, held=4, points=8, tried=6, few=3, finalists=3, moved=4),
    "quick": Effort(fitted=3, held=1, points=4, tried=2, few=2, finalists=1, moved=0),
}


@dataclass(frozen=True)
class Candidate:
    """A schedule that was tried: what it costs, and the PSNR of its clips in dB on the pairs that it was fitted to."""

    rehearsal: Rehearsal
    running: Running
    speedup: float

    @property
    def score(self) -> float:
        """Mean and worst quarter, so that no prompt is given up for the others."""
        psnr = sorted(self.rehearsal.psnr)
        worst = psnr[: max(1, len(psnr) // 4)]
        return (float(np.mean(psnr)) + float(np.mean(worst))) / 2


@dataclass(frozen=True)
class Found:
    """A calibrated schedule, and what its report shows.

    tried: speed-up and mean PSNR of every candidate on the pairs it was fitted to. drift: root-mean-square error of the
    latents after each step, on the pairs that the schedule was fitted to.
    """

    schedule: Schedule
    tried: tuple[tuple[float, float], ...]
    drift: tuple[float, ...]


def calibrate(
    pipe: Any,
    prompts: Sequence[str | Mapping[str, Any]],
    *,
    num_inference_steps: int = 50,
    speedup: float | None = None,
    psnr: float | None = None,
    frontier: Sequence[float] | None = None,
    effort: Literal["full", "quick"] = "full",
    call: Mapping[str, Any] | None = None,
    seed: int = 0,
    out: str | Path | None = None,
    progress: bool = True,
) -> Schedule | list[Schedule]:
    """Fit a schedule to a pipeline: which steps run, and with which coefficients the others are made up.

    The prompts are sampled uncached once, each with a seed of its own; what skipped steps and rebuilt branches need is
    fitted by least squares to what the model predicted there, the steps are chosen by the error that they leave at the
    end, and the best candidates are sampled with. A part of the prompts is held out, and the result is measured on them
    alone (`schedule.measured`). `schedule.made_for` says which runs it is for.

    pipe: a diffusers pipeline that is not compiled, on its device. prompts: as its users write them; 12 and more serve
        best, fewer are sampled with several seeds each. One may be a mapping: the arguments of its call, such as
        `prompt_embeds` or `image`. num_inference_steps: 9 or more.
    speedup, psnr, frontier: one of them. How much faster than uncached the denoiser shall be, by the milliseconds that
        its calls are measured to take; or the least mean PSNR in dB of clips against uncached ones, as fast as that
        allows; or several speed-ups, which gives a list of schedules.
    effort: "full", or "quick" for pipelines whose generations take minutes: fewer pairs and candidates.
    call: further arguments of every call, such as `guidance_scale`, `height` or `negative_prompt`. seed: of the first
        pair; the others follow.
    out: a folder for schedules and report, and for what is captured, so that an interrupted calibration goes on from
        there. progress: show a bar.

    Raises:
        CalibrationError: no prompts, a pipeline whose calls are not its steps, a stochastic sampler, predictions that
        are not finite, a target that cannot be reached: it says what can.
    """
    found = Calibration(pipe, prompts, num_inference_steps, effort, call or {}, seed, out, progress)
    schedules = [one.schedule for one in found.run(speedup, psnr, frontier)]
    return schedules if frontier is not None else schedules[0]


class Calibration:
    """One calibration. Made cheaply; `run` does the work, and leaves in `results` what a report shows."""

    def __init__(
        self,
        pipe: Any,
        prompts: Sequence[str | Mapping[str, Any]],
        steps: int,
        effort: str,
        call: Mapping[str, Any],
        seed: int = 0,
        out: str | Path | None = None,
        progress: bool = True,
        options: Options = FITTED,
    ):
        _check(pipe, prompts, steps, effort)
        self.effort, self.options = EFFORTS[effort], options
        self.fitted_examples, self.held_examples = divided(prompts, self.effort, seed)
        call = dict(call) | {"num_inference_steps": steps}
        self.pipe, self.stage = pipe, Stage(pipe, call)
        models = list(self.stage.denoisers.values())
        known = signature_of(None, models, steps=steps, shape=(1,), dtype=torch.float32, guided=True)
        self.identity = {
            "model": [known.model, known.config, known.weights, known.adapters],
            "pipeline": type(pipe).__name__,
            "call": {name: str(value) if _is_text(value) else described(value) for name, value in call.items()},
            "prompts": [one.key for one in (*self.fitted_examples, *self.held_examples)],
            "effort": asdict(self.effort),
            "options": asdict(options),
            "scheduler": [type(pipe.scheduler).__name__, dict(pipe.scheduler.config)],
        }
        self.out = None if out is None else Path(out)
        self.store = Store(None if self.out is None else self.out / "captured", self.identity)
        self.results: list[Found] = []
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn(), disable=not progress, transient=True
        )
        self._task = self._bar.add_task("calibrating", total=None)
        self._spent = 0.0

    # ---- the whole ---------------------------------------------------------------------------------------------------

    def run(
        self, speedup: float | None = None, psnr: float | None = None, frontier: Sequence[float] | None = None
    ) -> list[Found]:
        """Schedules for one target; see `calibrate`."""
        targets = _targets(speedup, psnr, frontier)
        planned = sum(self.effort.generations(target) for target in targets) - (len(targets) - 1) * (
            self.effort.fitted + self.effort.held + 0.6 * self.effort.points
        )
        self._bar.update(self._task, total=planned, description=f"calibrating, about {planned:.0f} generations")
        with self._bar:
            start = self._clock()
            with self.stage.open():
                self.prepare(max(targets) if psnr is None else None)
            prepared = self._clock() - start
            for target in targets:
                start = self._clock() - prepared
                with self.stage.open():
                    candidate = self._best(target) if psnr is None else self._for_quality(psnr)
                name = f"calibrated-{target:g}x" if psnr is None else f"calibrated-{psnr:g}dB"
                self.results.append(self._measured(candidate, name, start))
        if self.out is not None:
            write_report(self._report(), self.out)
        return self.results

    def _report(self) -> CalibrationReport:
        facts = {
            "pipeline": type(self.pipe).__name__,
            "fitted to": "; ".join(f"{one.name} (seed {one.seed})" for one in self.fitted_examples),
            "measured on": "; ".join(f"{one.name} (seed {one.seed})" for one in self.held_examples),
            "milliseconds of a step": f"both branches {self.costs.both:.4g}, the conditional one "
            f"{self.costs.cond:.4g}, none {self.costs.none:.4g}",
        }
        return CalibrationReport(
            [one.schedule for one in self.results],
            [pair for one in self.results for pair in one.tried],
            [one.drift for one in self.results],
            facts | environment.versions(),
        )

    def prepare(self, speedup: float | None = None) -> None:
        """Uncached generations, and what follows from them; on a stage that is open.

        speedup: the most that is asked for, which is refused after the first generation where no steps reach it.
        """
        capture = Capture(self.stage, self.options.divisor)

        def signature() -> dict[str, Any]:
            if capture.signature is None:
                capture.reference(self.fitted_examples[0])
            assert capture.signature is not None
            return capture.signature.as_dict()

        def captured(example: Example) -> Reference:
            reference = capture.reference(example)
            self.store.found("signature", signature)  # before the reference, which would not be captured again for it
            return reference

        def made(example: Example) -> Reference:
            reference = self.store.reference(example, captured)
            self._advance(1.0)
            return reference

        first, *others = self.fitted_examples
        self.fitted = [made(first)]
        self.costs = Costs(**self.store.found("costs", lambda: asdict(capture.costs(first))))
        if speedup is not None:
            self._check_reached(speedup)
        self.fitted += [made(example) for example in others]
        self.held = [made(example) for example in self.held_examples]
        self.signature = Signature.from_dict(self.store.found("signature", signature), "the stored signature")
        disturbed = Disturbed(self.stage)
        curve = self.store.found(
            "importance", lambda: importance(disturbed, self.fitted[:2], self.effort.points).tolist()
        )
        self._advance(0.6 * self.effort.points)
        self.importance = np.asarray(curve)
        self.residuals = Residuals(self.fitted)
        self.seconds_uncached = float(np.median([one.seconds for one in self.fitted]))

    def _check_reached(self, speedup: float) -> None:
        """`CalibrationError` where the first reference's steps and costs allow no schedule that is so much faster."""
        residuals = Residuals(self.fitted[:1])
        fastest = self.costs.speedup(Search(residuals, np.ones(residuals.steps), self.costs).fastest())
        if speedup > fastest:
            raise CalibrationError(
                f"a speed-up of {speedup:g} cannot be reached: of {residuals.steps} steps, the fastest schedule that "
                f"is searched gives {fastest:.2f}; ask for less, or for fewer steps in num_inference_steps too"
            )

    # ---- candidates --------------------------------------------------------------------------------------------------

    def searches(self) -> Iterator[tuple[Search, int]]:
        """Views of what an error at a step matters, the most plausible first, and how many first steps stay whole."""
        steps = np.arange(self.residuals.steps) / self.residuals.steps
        level = np.exp(np.mean(np.log(self.importance)))
        for weight, coherent, whole in (
            (self.importance, True, 2),
            (self.importance * (1 + 2 * (1 - steps)), True, 2),
            (self.importance, False, 2),
            (np.sqrt(self.importance * level), True, 2),
            (self.importance * (1 + 2 * steps), True, 2),
            (self.importance, True, 6),
            (np.sqrt(self.importance * level), False, 2),
            (self.importance * (1 + 6 * (1 - steps)), True, 2),
        ):
            yield Search(self.residuals, weight, self.costs, coherent=coherent), whole

    def _best(self, speedup: float) -> Candidate:
        """The best schedule that is at least so much faster."""
        first = next(self.searches())[0]
        runs: dict[Running, None] = {}
        for search, whole in self.searches():
            running = search.best(speedup, whole)
            if len(runs) < self.effort.tried and self.costs.speedup(running) >= speedup:
                runs.setdefault(running)
        few = self.fitted[: self.effort.few]
        tried = [self._rehearsed(running, few) for running in runs]
        for _ in range(2 if self.effort.moved else 0):
            best = max(tried, key=lambda one: one.score)
            known = {one.running for one in tried}
            near = [running for running in first.neighbours(best.running, speedup) if running not in known]
            tried += [self._rehearsed(running, few) for running in near[: self.effort.moved]]
        finalists = sorted(tried, key=lambda one: one.score, reverse=True)[: self.effort.finalists]
        final = [self._rehearsed(one.running, self.fitted) for one in finalists]
        self._tried = [(one.speedup, float(np.mean(one.rehearsal.psnr))) for one in tried]
        return max(final, key=lambda one: one.score)

    def _for_quality(self, psnr: float) -> Candidate:
        """The fastest schedule whose clips have that mean PSNR."""
        few, search = self.fitted[: self.effort.few], next(self.searches())[0]
        fastest = self.costs.speedup(search.fastest())
        wanted, reached, best = psnr + MARGIN, None, -math.inf
        for target in LADDER:
            if target > fastest:
                break
            mean = float(np.mean(self._rehearsed(search.best(target), few).rehearsal.psnr))
            best = max(best, mean)
            if mean < wanted:
                break
            reached = target
        if reached is None:
            raise CalibrationError(
                f"a mean PSNR of {psnr:g} dB cannot be reached: {LADDER[0]:g} times as fast gives {best:.1f} dB; ask "
                "for less, or for a speed-up"
            )
        above = next((target for target in LADDER if target > reached), fastest)
        for target in np.linspace(above, reached, 5)[1:]:
            candidate = self._best(min(float(target), fastest))
            if float(np.mean(candidate.rehearsal.psnr)) >= wanted:
                return candidate
        return candidate

    def _rehearsed(self, running: Running, references: Sequence[Reference]) -> Candidate:
        """A candidate, fitted to these references."""
        name = f"rehearsal-{digest(running, [one.example.key for one in references], asdict(self.options))}"

        def rehearse() -> dict[str, Any]:
            found = Rehearsals(self.stage, self.options).fit("calibrated", running, references)
            return {"schedule": found.schedule.to_json(), "psnr": found.psnr, "drift": found.drift}

        data = self.store.found(name, rehearse)
        speedup = self.costs.speedup(running)
        self._advance(len(references) / speedup)
        rehearsal = Rehearsal(Schedule.from_json(data["schedule"]), tuple(data["psnr"]), tuple(data["drift"]))
        return Candidate(rehearsal, running, speedup)

    # ---- the result --------------------------------------------------------------------------------------------------

    def _measured(self, candidate: Candidate, name: str, start: float) -> Found:
        """Sample the held-out pairs with the engine itself."""
        schedule = replace(candidate.rehearsal.schedule, name=name, made_for=self.signature)
        api.compile(self.pipe, schedule)
        try:
            clips = []
            for reference in self.held:
                generator = torch.Generator().manual_seed(reference.example.seed)
                settings = {"output_type": "np"} | self.stage.call_arguments | dict(reference.example.arguments)
                clips.append(clip_of(self.pipe(**settings, generator=generator)))
            flops = api.summary(self.pipe).flops
        finally:
            api.restore(self.pipe)
        reached = [psnr(made, one.clip) for made, one in zip(clips, self.held, strict=True)]
        seconds = self._clock() - start
        measured = Measured(
            speedup=candidate.speedup,
            flops_ratio=flops.ratio,
            psnr=float(np.mean(reached)),
            psnr_interval=interval(reached),
            psnr_least=min(reached),
            pairs=len(reached),
            calibration=seconds / self.seconds_uncached,
            seconds=seconds,
        )
        return Found(replace(schedule, measured=measured), tuple(self._tried), candidate.rehearsal.drift)

    def _clock(self) -> float:
        """Seconds that go on while something is found, and by as much where it was found before."""
        return time.perf_counter() + self.store.saved

    def _advance(self, generations: float) -> None:
        self._spent += generations
        self._bar.update(self._task, completed=self._spent)


def divided(prompts: Sequence[Any], effort: Effort, seed: int) -> tuple[list[Example], list[Example]]:
    """The pairs that are fitted to and those held out. Each has a seed of its own, and where there are two prompts or
    more, a quarter of them, at least one, is held out.

    Prompts are taken at equal distances, as lists of them are often sorted.
    """
    held = spread(range(len(prompts)), min(effort.held, max(1, len(prompts) // 4)))
    rest = [number for number in range(len(prompts)) if number not in held] or held
    rest = spread(rest, min(len(rest), effort.fitted))

    def pairs(numbers: Sequence[int], count: int, first: int) -> list[Example]:
        return [Example.of(prompts[numbers[i % len(numbers)]], first + i) for i in range(count)]

    return pairs(rest, effort.fitted, seed), pairs(held, effort.held, seed + effort.fitted)


def spread(numbers: Sequence[int], count: int) -> list[int]:
    """So many of the numbers, at equal distances."""
    return [numbers[(2 * i + 1) * len(numbers) // (2 * count)] for i in range(count)]


def _is_text(value: Any) -> bool:
    """Whether what `str` gives says all of a value."""
    return value is None or isinstance(value, str | int | float)


def _check(pipe: Any, prompts: Sequence[str | Mapping[str, Any]], steps: int, effort: str) -> None:
    if not pipelines.is_pipeline(pipe):
        raise CalibrationError(f"cannot calibrate a {type(pipe).__name__}; pass a diffusers pipeline")
    if pipelines.attached(pipe):
        raise CalibrationError(
            f"this {type(pipe).__name__} is compiled; call fastercache.restore first, as calibration samples it "
            "uncached"
        )
    if (
        isinstance(prompts, str)
        or not prompts
        or not all(one.strip() if isinstance(one, str) else isinstance(one, Mapping) for one in prompts)
    ):
        raise CalibrationError(f"prompts is {str(prompts)[:60]!r}; pass a list of at least one prompt, none empty")
    if effort not in EFFORTS:
        raise CalibrationError(f"effort is {effort!r}; it must be one of {', '.join(map(repr, EFFORTS))}")
    if getattr(pipe, "scheduler", None) is None:
        raise CalibrationError(f"{type(pipe).__name__} has no scheduler that could be followed")


def _targets(speedup: float | None, psnr: float | None, frontier: Sequence[float] | None) -> list[float]:
    given = {"speedup": speedup, "psnr": psnr, "frontier": frontier}
    if sum(value is not None for value in given.values()) != 1:
        raise CalibrationError("give one target: speedup=2.5, psnr=40.0, or frontier=(1.5, 2, 3)")
    if psnr is not None:
        if not 0 < psnr < 100:
            raise CalibrationError(f"psnr is {psnr!r}; it must be a number of dB between 0 and 100")
        return [2.5]
    targets = [speedup] if frontier is None else list(frontier)
    if not targets or not all(isinstance(one, int | float) and math.isfinite(one) and one > 1 for one in targets):
        raise CalibrationError(f"a speed-up of {targets} is none; give numbers over 1, such as 2.5")
    return [float(one) for one in targets if one is not None]
