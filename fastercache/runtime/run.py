"""One run: a plan carried out on a model, call by call, from the first step of a video to its last."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fastercache.cache.cache import Cache
from fastercache.errors import RunError
from fastercache.runtime.gated import GatedModel
from fastercache.runtime.guidance import guidance_of
from fastercache.runtime.host import Host
from fastercache.runtime.outputs import Outputs
from fastercache.schedule.branches import Branch, BranchLayout
from fastercache.schedule.plan import Plan, PlannedStep
from fastercache.schedule.signature import Signature

logger = logging.getLogger("fastercache")

InputKey = tuple[torch.Size, torch.dtype, torch.device]
"""What stays the same in all calls of a run: of the latents."""


@dataclass(frozen=True)
class Caller:
    """The pipeline whose call is a run: its class, which component the denoiser is, the step count asked for, the
    latent frames of the whole video, where it tells, and what adds to a run's signature what the pipeline knows."""

    pipeline: str
    component: str
    asked: Any = None
    frames: int | None = None
    signed: Callable[[Signature], Signature] | None = None

    def without(self, steps: int | str, cfg: str) -> str:
        """A remedy where the calls are not what the pipeline's own state says: its denoiser counts them itself."""
        return (
            f"Without {self.pipeline}, its denoiser counts its calls itself: fastercache.restore(pipe), then "
            f"fastercache.compile(pipe.{self.component}, steps={steps}, cfg={cfg!r})"
        )


@dataclass(frozen=True)
class RunSpec:
    """How many steps a run has, how its calls are made of branches, which of the steps are this model's (from, to;
    default: all), and the class of the pipeline's scheduler, where it has one."""

    steps: int
    layout: BranchLayout
    part: tuple[int, int] | None = None
    scheduler: str | None = None
    caller: Caller | None = field(default=None, compare=False)


class Run:
    """The state of one run, complete from the start, and dropped whole when the run ends.

    position: steps done. shapes: the arguments of the first call, on the meta device. notes: what the summary says of
        it.
    """

    def __init__(
        self,
        gated: GatedModel,
        host: Host,
        plan: Plan,
        spec: RunSpec,
        cache: Cache,
        table: tuple[torch.Tensor, ...],
        arguments: Mapping[str, Any],
        batch: int,
        notes: list[str],
    ):
        from fastercache.models.skeleton import on_meta  # it needs private names of torch's

        self.gated, self.host, self.plan, self.layout = gated, host, plan, spec.layout
        self.caller, self.notes = spec.caller, notes
        self.key, self.shapes = input_key(gated, arguments), on_meta(arguments)
        device = self.key[2].type
        self.autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        self.cache_format, self.planned_bytes, self.cache_bytes = cache.plan.format, cache.plan.bytes, cache.bytes
        self.position = 0
        self._steps, self._length = plan.steps, len(plan.steps)
        self._finite: torch.Tensor | None = None
        self._cache: Cache | None = cache
        self._table = table
        self._latents = gated.family.latents
        self._context = host.attention_backends
        self._original: Callable[..., Any] | None = None
        outputs = Outputs(gated.family, plan, self.layout, cache)
        self.guidance = guidance_of(self.layout)(gated.family, self.layout, outputs, self._forward, batch)
        gated.open(plan, cache, self.layout)

    def __len__(self) -> int:
        return self._length

    @property
    def done(self) -> bool:
        return self.position == self._length

    def fits(self, arguments: Mapping[str, Any]) -> bool:
        """Whether the latents of a call are as those of the first."""
        latents, (shape, dtype, device) = self._latents(arguments), self.key
        return latents.shape == shape and latents.dtype is dtype and latents.device == device

    def check(self, arguments: Mapping[str, Any]) -> None:
        """`RunError` if a call that is to be of this run cannot be."""
        if self.done:
            call, caller = f"call {self.position + 1} in a run of {len(self)} steps", self.caller
            raise RunError(
                f"{call}; a run ends when its `with fastercache.run(...)` block does"
                if caller is None
                else f"{call}: {caller.pipeline} samples in several loops, as for long videos, or "
                f"calls {caller.component} more often than its num_timesteps says. "
                f"{caller.without(len(self), self.layout.name)}"
            )
        if not self.fits(arguments):
            (now, *kind), (shape, dtype, device) = input_key(self.gated, arguments), self.key
            raise RunError(
                f"step {self.position + 1} has latents {list(now)} ({kind[0]}, {kind[1]}), but the run began with "
                f"{list(shape)} ({dtype}, {device}); guidance and shapes stay the same within a run, so begin a new "
                "one"
            )

    def call(self, original: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """One call of the denoiser, which `check` accepts: run what the plan names and give back what the untouched
        model would, rows of all branches included."""
        guidance = self.guidance
        if self.host.label is not None:
            remedy = None if self.caller is None else self.caller.without(len(self), "none")
            self.host.check_label(self.layout, guidance.next_branch, remedy)
        if guidance.between_calls:
            self._check_lengths(arguments)
        output = self._step(original, arguments, self.position)
        if not guidance.between_calls:
            self.position += 1
            if self.position == self._length:
                self._finite = torch.isfinite(self.gated.family.prediction(output)).all()
                self.close()
        return output

    def finite_at_the_end(self, may_wait: bool) -> bool:
        """Whether the last step's prediction is finite; where the run was left before it, or the host would have to
        wait and may not, it counts as finite."""
        if self._finite is None or (self._finite.device.type != "cpu" and not may_wait):
            return True
        return bool(self._finite.cpu().numpy())

    def close(self) -> None:
        """Let go of the caches: what follows in a pipeline, the decoder above all, may need the memory."""
        self.gated.close()
        self.guidance.close()
        self._cache = self._original = None

    def rehearse(self, original: Callable[..., Any], arguments: dict[str, Any], phase: int, times: int) -> None:
        """Run a phase on these inputs `times` times, which compiles it, without counting a step."""
        index = next(index for index, step in enumerate(self.plan.steps) if step.phase == phase)
        for _ in range(times * self.guidance.calls):
            self._step(original, arguments, index)

    def _check_lengths(self, arguments: Mapping[str, Any]) -> None:
        """The caches are planned by the first call's shapes: `RunError` if they keep results of the second that have
        others."""
        names = [
            name
            for name, value in arguments.items()
            if isinstance(value, torch.Tensor)
            and isinstance(first := self.shapes.get(name), torch.Tensor)
            and value.shape != first.shape
        ]
        if not names:
            return
        family, model, branch = self.gated.family, self.gated.model, self.guidance.next_branch
        for site, number in zip(self.gated.sites, self.plan.cadence_of, strict=True):
            if branch not in self.plan.cadences[number].branches:
                continue
            if family.site_shapes(model, site, arguments) != family.site_shapes(model, site, self.shapes):
                shapes = " and ".join(str(list(call[names[0]].shape)) for call in (self.shapes, arguments))
                raise RunError(
                    f"argument {names[0]!r} has shapes {shapes} in the two calls of step {self.position + 1}, so the "
                    f"{site.node} gives results of two shapes, and both are to be cached; pad both texts to one "
                    "length, or use the policy 'cfg-only', which caches none"
                )

    def _step(self, original: Callable[..., Any], arguments: dict[str, Any], index: int) -> Any:
        assert self._cache is not None
        self._cache.coefficients.copy_(self._table[index])
        self._original = original
        return self.guidance.call(arguments, self._steps[index], index + 1)

    def _forward(self, arguments: dict[str, Any], step: PlannedStep, branches: tuple[Branch, ...]) -> Any:
        assert self._original is not None and step.phase is not None
        return self.gated.forward(self._original, arguments, step.phase, branches, self._context)


def input_key(gated: GatedModel, arguments: Mapping[str, Any]) -> InputKey:
    """What all calls of a run have in common."""
    latents = gated.family.latents(arguments)
    return latents.shape, latents.dtype, latents.device
