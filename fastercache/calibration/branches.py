"""What a call of the denoiser says of the two branches, and a stand-in for it: the part of a calibration that knows how
pipelines make their calls."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fastercache import ops
from fastercache.calibration.lockstep import Lane, Stage
from fastercache.errors import CalibrationError, UnsupportedModelError
from fastercache.models.registry import family_of
from fastercache.schedule.branches import Branch
from fastercache.schedule.step import RunningBranches


@dataclass
class Predicted:
    """A step's predictions, cut to the channels of the latents, float32 in their shape.

    cond, uncond: of the branches; `uncond` is `None` without guidance. latents: what the denoiser was given.
    """

    cond: torch.Tensor
    uncond: torch.Tensor | None
    latents: torch.Tensor

    @property
    def difference(self) -> torch.Tensor | None:
        return None if self.uncond is None else self.uncond - self.cond


@dataclass
class CallNotes:
    """What a lane keeps of its calls of the denoiser.

    now: the predictions of the step it is in, as far as they were computed. component: the denoiser that this step
    called. latents: what it was given, cut to the channels of the predictions. outputs: the newest whole prediction of
    each call of a step, to be given where nothing is computed.
    """

    layout: Any = None
    calls: int = 0
    component: str = ""
    now: dict[Branch, torch.Tensor] = field(default_factory=dict)
    latents: torch.Tensor | None = None
    outputs: dict[int, torch.Tensor] = field(default_factory=dict)
    form: Any = None
    arguments: Mapping[str, Any] = field(default_factory=dict)


class Branches:
    """Carries out what a step says of the branches, in calls that a pipeline makes.

    seconds: what calls of the denoiser took, by the branches that they ran: "both" is a call of two branches, or two
    calls.
    """

    def __init__(self, stage: Stage):
        self.stage = stage
        self.families = {name: family_of(model) for name, model in stage.denoisers.items()}
        self.seconds: dict[str, list[float]] = {"both": [], "cond": []}

    def begin_step(self, notes: CallNotes) -> None:
        notes.calls, notes.now, notes.component = 0, {}, ""

    def call(
        self,
        lane: Lane,
        notes: CallNotes,
        running: RunningBranches,
        component: str,
        original: Callable[..., Any],
        arguments: dict[str, Any],
    ) -> Any:
        """One call of the denoiser in a step that runs these branches."""
        family = self.families[component]
        if notes.layout is None:
            notes.layout = family.layout_in(lane.pipe, lane.arguments, self.stage.labels[component].current)
        expected = 2 if notes.layout.two_calls else 1
        notes.calls += 1
        if notes.calls > expected or notes.component not in ("", component):
            raise CalibrationError(
                f"{type(lane.pipe).__name__} calls its denoiser {notes.calls} times in step {lane.step + 1}, where "
                f"{expected} {'calls make' if expected > 1 else 'call makes'} a step: its sampler evaluates the model "
                "more than once a step, or it samples in several loops; use a sampler with one evaluation a step, and "
                "ask for no more frames than one loop makes"
            )
        notes.component, notes.arguments = component, arguments
        if notes.layout.two_calls:
            return self._half(notes, running, family, original, arguments)
        return self._whole(notes, running, family, original, arguments)

    def _whole(self, notes: CallNotes, running: RunningBranches, family: Any, original: Any, arguments: Any) -> Any:
        guided, latents = notes.layout.guided, family.latents(arguments)
        batch = len(latents)
        rows = {b: notes.layout.rows(batch, (b,)) if guided else slice(0, batch) for b in notes.layout.order}
        given = latents[rows["cond"]]
        if running == "none":
            notes.latents = self._cut(family, notes.outputs[0][rows["cond"]], given)[1]
            return family.with_prediction(notes.form, notes.outputs[0])
        if running == "cond" and guided:
            output = self._timed("cond", original, family.narrow(arguments, batch, rows["cond"]))
            whole = notes.outputs[0].clone()
            whole[rows["cond"]] = family.prediction(output)
            notes.now["cond"], notes.latents = self._cut(family, family.prediction(output), given)
            return family.with_prediction(notes.form, whole)
        output = self._timed("both", original, arguments)
        whole = family.prediction(output)
        self._keep(notes, family, output, 0)
        for branch, which in rows.items():
            notes.now[branch], notes.latents = self._cut(family, whole[which], given)
        return output

    def _half(self, notes: CallNotes, running: RunningBranches, family: Any, original: Any, arguments: Any) -> Any:
        number = notes.calls - 1
        branch = notes.layout.order[number]
        given = family.latents(arguments)
        if running == "none" or (running == "cond" and branch == "uncond"):
            notes.latents = self._cut(family, notes.outputs[number], given)[1]
            return family.with_prediction(notes.form, notes.outputs[number])
        output = self._timed("cond", original, arguments)
        self._keep(notes, family, output, number)
        notes.now[branch], notes.latents = self._cut(family, family.prediction(output), given)
        return output

    def _keep(self, notes: CallNotes, family: Any, output: Any, number: int) -> None:
        if notes.form is None:
            notes.form = family.without_prediction(output)
        notes.outputs[number] = family.prediction(output)

    def _cut(self, family: Any, prediction: torch.Tensor, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A prediction without a learned variance behind it, and latents without an image's behind them: the first
        channels, which both have."""
        sizes = list(zip(prediction.shape, latents.shape, strict=False))
        different = [dim for dim, (one, other) in enumerate(sizes) if one != other]
        if prediction.dim() != latents.dim() or len(different) > 1:
            raise UnsupportedModelError(
                f"a prediction of shape {list(prediction.shape)} and latents of {list(latents.shape)} do not add up, "
                f"so no schedule can be fitted to {family.name} here"
            )
        for dim in different:
            prediction, latents = (one.narrow(dim, 0, min(sizes[dim])) for one in (prediction, latents))
        return prediction.float(), latents

    def _timed(self, kind: str, original: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
        device = next(value.device for value in arguments.values() if isinstance(value, torch.Tensor))
        wait(device)
        start = time.perf_counter()
        output = original(**arguments)
        wait(device)
        self.seconds[kind].append(time.perf_counter() - start)
        return output

    def bands(
        self, notes: CallNotes, uncond: torch.Tensor, cond: torch.Tensor, divisor: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The difference of the branches in its low and its high frequencies, as CFG-Cache takes them."""
        family = self.families[notes.component]
        of_uncond, of_cond = (family.planes(one, notes.arguments) for one in (uncond, cond))
        low, high = (torch.empty_like(of_cond, memory_format=torch.contiguous_format) for _ in range(2))
        ops.cfg_split(low, high, of_uncond, of_cond, min(low.shape[-2:]) // divisor)
        return family.unplaned(low, notes.arguments), family.unplaned(high, notes.arguments)


def wait(device: torch.device) -> None:
    """Wait for what was launched on a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
