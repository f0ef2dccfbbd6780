"""Several calls of one pipeline at once, one step of each after the other.

A fit needs all prompts at the same step. Each call runs in a thread of its own, on a copy of the pipeline with a
scheduler of its own, and waits wherever it is about to hand a guided prediction to that scheduler. Only one thread runs
at any time.
"""

from __future__ import annotations

import copy
import functools
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from fastercache.calibration.clips import Example, clip_of
from fastercache.errors import CalibrationError
from fastercache.host import pipelines
from fastercache.host.labels import CallLabels
from fastercache.models.patching import ForwardPatch


class Left(BaseException):
    """Ends a call that is not needed any more."""


class Conduct(Protocol):
    """What is done in place of a call of the denoiser."""

    def __call__(self, lane: Lane, component: str, original: Callable[..., Any], arguments: dict[str, Any]) -> Any: ...


@dataclass(frozen=True)
class Moment:
    """A call that is about to hand its guided prediction to the scheduler.

    prediction: as the pipeline has made it. latents: the scheduler's sample. respond: the latents that the scheduler
    would make of another prediction; it changes nothing.
    """

    prediction: torch.Tensor
    latents: torch.Tensor
    respond: Callable[[torch.Tensor], torch.Tensor]


class Lane:
    """One call of a pipeline, made step by step.

    step: the step it is in, from 0. clip: what `clip_of` makes of the call's result, once it has ended. latents: those
        after the last step that was made. notes: whatever a conduct keeps of this call.
    """

    def __init__(self, pipe: Any, example: Example, call: Mapping[str, Any], conduct: Conduct, parameters: Any):
        self.example, self.conduct, self._parameters = example, conduct, parameters
        self.step = 0
        self.latents: torch.Tensor | None = None
        self.clip: np.ndarray | None = None
        self.notes: Any = None
        self.pipe = copy.copy(pipe)
        self.pipe.scheduler = copy.deepcopy(pipe.scheduler)
        generator = torch.Generator().manual_seed(example.seed)
        self.call = {"output_type": "np"} | dict(call) | dict(example.arguments) | {"generator": generator}
        given = inspect.signature(type(pipe).__call__).bind(self.pipe, **self.call)
        given.apply_defaults()
        self.arguments: Mapping[str, Any] = given.arguments
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._moment: Moment | None = None
        self._given: torch.Tensor | None = None
        self._error: BaseException | None = None
        self._leaving = False
        self._follow(self.pipe.scheduler)
        self._thread = threading.Thread(target=self._run, name=f"calibration of {example.name!r}", daemon=True)
        self._thread.start()

    @property
    def steps(self) -> int:
        """Steps that the call will make, once it has begun."""
        known = getattr(self.pipe, "num_timesteps", None)
        scheduler = self.pipe.scheduler
        return known or len(scheduler.timesteps) - (getattr(scheduler, "begin_index", None) or 0)

    def advance(self, prediction: torch.Tensor | None = None) -> Moment | None:
        """Go on to the next step's prediction; `None` when the call has ended.

        prediction: what the scheduler gets in place of the prediction that the call stands at; `None` leaves it.
        """
        self._given, self._moment = prediction, None
        self._go.release()
        self._back.acquire()
        if self._error is not None:
            raise self._error
        return self._moment

    @property
    def result(self) -> np.ndarray:
        """The clip of a call that has ended."""
        assert self.clip is not None
        return self.clip

    def leave(self) -> None:
        """End the call where it stands."""
        self._leaving = True
        self._go.release()
        self._thread.join()

    def parameters(self, component: str, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call of the denoiser, by name."""
        return dict(zip(self._parameters[component], args, strict=False)) | dict(kwargs)

    def _run(self) -> None:
        _CURRENT.lane = self
        self._go.acquire()
        try:
            if not self._leaving:
                self.clip = clip_of(self.pipe(**self.call))
        except Left:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self._moment = None
            self._back.release()

    def _follow(self, scheduler: Any) -> None:
        """Make the scheduler's `step` a place where this call waits."""
        original = scheduler.step
        signature = inspect.signature(original)
        if not {"model_output", "sample"} <= set(signature.parameters):
            raise CalibrationError(
                f"{type(scheduler).__name__}.step takes no model_output and sample, so what it makes of a prediction "
                "cannot be followed; use one of diffusers' schedulers"
            )

        @functools.wraps(original)
        def step(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs)

            def respond(prediction: torch.Tensor) -> torch.Tensor:
                twin = copy.deepcopy(scheduler)
                probe = signature.bind(*args, **kwargs)
                probe.arguments["model_output"] = prediction.to(given.arguments["model_output"].dtype)
                if probe.arguments.get("generator") is not None:
                    probe.arguments["generator"] = copy_of(probe.arguments["generator"])
                return stepped(type(scheduler).step(twin, *probe.args, **probe.kwargs))

            self._moment = Moment(given.arguments["model_output"], given.arguments["sample"], respond)
            self._back.release()
            self._go.acquire()
            if self._leaving:
                raise Left
            if self._given is not None:
                given.arguments["model_output"] = self._given.to(given.arguments["model_output"].dtype)
            result = original(*given.args, **given.kwargs)
            self.latents = stepped(result)
            self.step += 1
            return result

        scheduler.step = step


_CURRENT = threading.local()


def copy_of(generator: torch.Generator) -> torch.Generator:
    """A generator in the same state."""
    twin = torch.Generator(generator.device)
    twin.set_state(generator.get_state())
    return twin


def stepped(result: Any) -> torch.Tensor:
    """The latents in what a scheduler's `step` gave."""
    return result[0] if isinstance(result, tuple) else result.prev_sample


class Stage:
    """A pipeline whose denoisers are followed: the place where lanes run.

    labels: what the pipeline says of each call of a denoiser, by component.
    """

    def __init__(self, pipe: Any, call: Mapping[str, Any]):
        self.pipe, self.call_arguments = pipe, dict(call)
        self.denoisers: dict[str, nn.Module] = pipelines.denoisers_of(pipe)
        self.labels: dict[str, CallLabels] = {}
        self._parameters = {
            name: tuple(inspect.signature(type(model).forward).parameters)[1:] for name, model in self.denoisers.items()
        }

    @contextmanager
    def open(self) -> Iterator[Stage]:
        """Inside, lanes can run; the pipeline is the untouched one afterwards."""
        with ExitStack() as undo:
            for component, model in self.denoisers.items():
                self.labels[component] = CallLabels(model)
                undo.callback(self.labels[component].detach)
                patch = ForwardPatch(model, functools.partial(self._at_model, component))
                undo.callback(patch.remove)
            yield self

    def _at_model(self, component: str, original: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        lane = getattr(_CURRENT, "lane", None)
        if lane is None:
            return original(*args, **kwargs)
        return lane.conduct(lane, component, original, lane.parameters(component, args, kwargs))

    @contextmanager
    def lanes(self, examples: Sequence[Example], conduct: Conduct) -> Iterator[list[Lane]]:
        """A call for each example, none of which has begun; they are left when the block is."""
        lanes: list[Lane] = []
        try:
            for example in examples:
                lanes.append(Lane(self.pipe, example, self.call_arguments, conduct, self._parameters))
            yield lanes
        finally:
            for lane in lanes:
                lane.leave()
