"""How much an error at a step matters at the end: measured by making one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from fastercache.calibration.branches import Branches, CallNotes
from fastercache.calibration.capture import Reference
from fastercache.calibration.lockstep import Lane, Stage
from fastercache.schedule.step import RunningBranches


class Disturbed:
    """Runs of which one step is disturbed. The steps before it are taken from the reference, without a call of the
    model."""

    def __init__(self, stage: Stage):
        self.stage, self.branches = stage, Branches(stage)

    def gain(self, reference: Reference, step: int, disturbance: torch.Tensor) -> float:
        """The root-mean-square error of the last latents over that of the disturbed step's guided prediction."""
        self._from = step
        steps = len(reference.guided)
        with self.stage.lanes([reference.example], self._conduct) as (lane,):
            lane.notes = CallNotes()
            moment = lane.advance()
            while moment is not None and lane.step < steps:
                given = None
                if lane.step <= step:
                    given = reference.guided[lane.step].to(moment.prediction)
                    if lane.step == step:
                        given = given + disturbance.to(given)
                self.branches.begin_step(lane.notes)
                last = lane.step == steps - 1
                moment = lane.advance(given)
                if last:
                    break
            assert lane.latents is not None
            off = (lane.latents.float().cpu() - reference.latents[-1].float()).square().mean().sqrt()
        return float(off / disturbance.float().square().mean().sqrt())

    def _conduct(self, lane: Lane, component: str, original: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        # The first step runs, so that there is an output to give in place of others.
        running: RunningBranches = "both" if lane.step == 0 or lane.step > self._from else "none"
        return self.branches.call(lane, lane.notes, running, component, original, arguments)


def importance(disturbed: Disturbed, references: Sequence[Reference], points: int) -> np.ndarray:
    """The error of the last latents for an error of one in each step's guided prediction: float64 `[steps]`, a smooth
    curve through so many measured points."""
    steps = len(references[0].guided)
    at = sorted({round(1 + (steps - 2) * (k / (points - 1)) ** 1.3) for k in range(points)})
    measured = []
    for number, step in enumerate(at):
        reference = references[number % len(references)]
        # What a skipped step does wrong: it lags behind.
        lag = reference.guided[step].float() - reference.guided[step - 1].float()
        measured.append(disturbed.gain(reference, step, lag))
    return np.exp(np.interp(range(steps), at, np.log(np.maximum(measured, 1e-12))))
