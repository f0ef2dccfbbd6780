"""The uncached generations that everything is fitted to, and what is known from them without another call of the model.

Kept of each: the latents and the guided prediction of each step and the clip, on the host; the inner products of the
predictions, their differences and the latents of steps that are close to each other. Every least-squares fit of a
skipped step or a rebuilt branch is made of these products.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from fastercache.calibration.branches import Branches, CallNotes, wait
from fastercache.calibration.clips import Example
from fastercache.calibration.costs import Costs
from fastercache.calibration.lockstep import Lane, Moment, Stage
from fastercache.errors import CalibrationError
from fastercache.host.signature import signature_of
from fastercache.schedule.signature import Signature
from fastercache.schedule.step import RunningBranches

WINDOW = 20
"""Steps over which inner products are kept: no schedule that is searched reads from further back."""
CHUNK = 1 << 18
"""Elements that are multiplied in float64 at a time."""
LEAST_STEPS = 9
COND, DIFFERENCE, LATENTS, LOW = range(4)
"""What the inner products are of, in each step: the conditional prediction, the difference of the branches, the
latents that the denoiser was given, and the low frequencies of the difference."""


@dataclass
class Reference:
    """One uncached generation.

    latents: `[steps + 1, ...]`, the scheduler's sample before each step and after the last. guided: `[steps, ...]`,
    what the scheduler was given. clip: as `clip_of` gives it. products: float64 `[steps, 4, steps, 4]`,
    inner products as `COND` to `LOW` number them, NaN for steps further apart than `WINDOW`. weights: float64
    `[steps, 2]`, the guided prediction as a sum of the conditional prediction and the difference of the branches.
    response: float64 `[steps]`, by how much the next latents change with the guided prediction; NaN where not in
    proportion. experts: the component that each step called. seconds: of the whole generation.
    """

    example: Example
    latents: torch.Tensor
    guided: torch.Tensor
    clip: np.ndarray
    products: np.ndarray
    weights: np.ndarray
    response: np.ndarray
    experts: tuple[str, ...]
    seconds: float


@dataclass
class _Watch:
    calls: CallNotes = field(default_factory=CallNotes)
    window: deque = field(default_factory=lambda: deque(maxlen=WINDOW))
    latents: list[torch.Tensor] = field(default_factory=list)
    guided: list[torch.Tensor] = field(default_factory=list)
    products: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)
    weights: list[tuple[float, float]] = field(default_factory=list)
    response: list[float] = field(default_factory=list)
    experts: list[str] = field(default_factory=list)


class Capture:
    """Makes references. divisor: of the low-pass's radius, as in `Schedule.radius_divisor`.

    signature: of the runs, once the first was made.
    """

    def __init__(self, stage: Stage, divisor: int = 5):
        self.stage, self.divisor = stage, divisor
        self.branches = Branches(stage)
        self.signature: Signature | None = None

    def reference(self, example: Example) -> Reference:
        """One uncached generation, watched."""
        start = time.perf_counter()
        with self.stage.lanes([example], self._conduct) as (lane,):
            watch = lane.notes = _Watch()
            moment = lane.advance()
            while moment is not None:
                self._watch(lane, watch, moment)
                self.branches.begin_step(watch.calls)
                moment = lane.advance()
                if lane.latents is not None:
                    watch.latents.append(lane.latents.detach().cpu().clone())
            steps = len(watch.guided)
            if steps < LEAST_STEPS:
                raise CalibrationError(
                    f"{type(lane.pipe).__name__} made {steps} steps; of so few none can be left out without a visible "
                    "loss (distilled models are made for few steps as they are), so ask for "
                    f"{LEAST_STEPS} or more"
                )
            assert lane.clip is not None
            products = np.full((steps, 4, steps, 4), np.nan)
            for (one, other), block in watch.products.items():
                products[one, :, other] = block
                products[other, :, one] = block.T
            return Reference(
                example,
                torch.stack(watch.latents),
                torch.stack(watch.guided),
                lane.clip,
                products,
                np.asarray(watch.weights),
                np.asarray(watch.response),
                tuple(watch.experts),
                time.perf_counter() - start,
            )

    def _conduct(self, lane: Lane, component: str, original: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        return self.branches.call(lane, lane.notes.calls, "both", component, original, arguments)

    def _watch(self, lane: Lane, watch: _Watch, moment: Moment) -> None:
        calls, where = watch.calls, f"step {lane.step + 1}"
        if "cond" not in calls.now or (calls.layout.guided and "uncond" not in calls.now):
            raise CalibrationError(
                f"{type(lane.pipe).__name__} takes {where} of its sampler without calling the denoiser once for each "
                "branch; use a sampler with one evaluation a step"
            )
        cond, latents = calls.now["cond"], calls.latents
        assert latents is not None
        guided = calls.layout.guided
        difference = calls.now["uncond"] - cond if guided else torch.zeros_like(cond)
        if not all(bool(torch.isfinite(one).all()) for one in (cond, difference, moment.prediction)):
            raise CalibrationError(
                f"the prediction of {where} for the prompt {lane.example.name!r} is not finite; leave that prompt "
                "out, or see whether the pipeline makes a video of it at all"
            )
        if not watch.latents:
            self.signature = self._signature(lane, calls, moment)
            watch.latents.append(moment.latents.detach().cpu().clone())
        watch.guided.append(moment.prediction.detach().cpu().clone())
        watch.weights.append(self._weights(lane, moment, cond, difference, guided))
        watch.response.append(self._response(lane, moment))
        watch.experts.append(calls.component)
        low = self.branches.bands(calls, calls.now["uncond"], cond, self.divisor)[0] if guided else difference
        watch.window.append(torch.stack([one.float().flatten() for one in (cond, difference, latents, low)]))
        for back, earlier in enumerate(reversed(watch.window)):
            watch.products[lane.step, lane.step - back] = products(watch.window[-1], earlier)

    def _signature(self, lane: Lane, calls: CallNotes, moment: Moment) -> Signature:
        pipe, family = lane.pipe, self.branches.families[calls.component]
        model = self.stage.denoisers[calls.component]
        return signature_of(
            pipe,
            list(self.stage.denoisers.values()),
            lane.arguments,
            steps=lane.steps,
            shape=family.latents(calls.arguments).shape[1:],
            dtype=family.dtype(model, calls.arguments),
            guided=calls.layout.guided,
        )

    def costs(self, example: Example, calls: int = 5) -> Costs:
        """What a step takes, measured in the first steps of a generation: calls of both branches and of the conditional
        one in turn, and sums of cached predictions; the least of each, as nothing makes a call faster than it is."""
        watched = Branches(self.stage)

        def conduct(lane: Lane, component: str, original: Callable[..., Any], arguments: dict[str, Any]) -> Any:
            running: RunningBranches = "cond" if lane.step and lane.step % 2 == 0 else "both"
            return watched.call(lane, lane.notes, running, component, original, arguments)

        with self.stage.lanes([example], conduct) as (lane,):
            notes = lane.notes = CallNotes()
            moment = lane.advance()
            while moment is not None and lane.step < 2 * calls:
                watched.begin_step(notes)
                prediction = moment.prediction
                moment = lane.advance()
            sums = []
            for _ in range(calls):
                wait(prediction.device)
                start = time.perf_counter()
                sum(0.5 * torch.cat([prediction, prediction]) for _ in range(4))
                wait(prediction.device)
                sums.append(time.perf_counter() - start)
        least = {kind: 1000 * min(seconds) for kind, seconds in watched.seconds.items() if seconds}
        if notes.layout.two_calls:
            return Costs(2 * least["cond"], least["cond"], 1000 * min(sums))
        return Costs(least["both"], min(least.get("cond", np.inf), least["both"]), 1000 * min(sums))

    def _weights(
        self, lane: Lane, moment: Moment, cond: torch.Tensor, difference: torch.Tensor, guided: bool
    ) -> tuple[float, float]:
        if moment.prediction.shape != cond.shape:
            raise CalibrationError(
                f"{type(lane.pipe).__name__} hands its scheduler predictions of shape "
                f"{list(moment.prediction.shape)}, made of the denoiser's of {list(cond.shape)}; a schedule can be "
                "fitted where both are laid out alike"
            )
        basis = torch.stack([cond, difference] if guided else [cond]).flatten(1).double()
        target = moment.prediction.flatten().double()
        found = torch.linalg.lstsq(basis.T.cpu(), target[:, None].cpu()).solution[:, 0]
        rest = target.cpu() - found @ basis.cpu()
        if rest.norm() > 0.05 * target.cpu().norm():
            raise CalibrationError(
                f"the guided prediction of step {lane.step + 1} is no weighted sum of the two branches "
                f"({100 * float(rest.norm() / target.cpu().norm()):.0f} % is something else), so no schedule can be "
                "fitted; switch off what the pipeline does to guidance"
            )
        values = found.tolist()
        return (values[0], values[1] if guided else 0.0)

    def _response(self, lane: Lane, moment: Moment) -> float:
        """The next latents' change for a change of the prediction, where it is in proportion; NaN elsewhere."""
        base = moment.prediction
        noise = torch.randn(base.shape, generator=torch.Generator().manual_seed(lane.step))
        nudge = noise.to(base) * base.float().std()
        here, again = moment.respond(base), moment.respond(base)
        if not torch.equal(here, again):
            raise CalibrationError(
                f"{type(lane.pipe.scheduler).__name__} adds noise of its own at each step, so no two generations are "
                "alike; use a deterministic sampler (eta=0, or another scheduler)"
            )
        change = (moment.respond(base + nudge).double() - here.double()).flatten()
        given = nudge.double().flatten()
        factor = float(change @ given / (given @ given))
        rest = float((change - factor * given).norm() / change.norm().clamp(min=1e-30))
        return factor if rest < 0.02 else float("nan")


def products(one: torch.Tensor, other: torch.Tensor) -> np.ndarray:
    """Inner products of the rows of two `[4, n]`, in float64: `[4, 4]`."""
    total = torch.zeros(len(one), len(other), dtype=torch.float64, device=one.device)
    for start in range(0, one.shape[1], CHUNK):
        total += one[:, start : start + CHUNK].double() @ other[:, start : start + CHUNK].double().T
    return total.cpu().numpy()
