"""Pipelines: which of their parts are denoisers, and where one of their runs begins, ends, and how long it is."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from torch import nn

from fastercache.engine import Engine, RunSpec
from fastercache.errors import CompileError, UnsupportedModelError
from fastercache.families import FAMILIES, class_names

EXPERTS = ("transformer", "transformer_2")
"""The components of which the first runs the steps from `boundary_ratio` of the training timesteps up, the second those below."""


def is_pipeline(target: Any) -> bool:
    """A pipeline in diffusers' sense: named components, and a call that samples."""
    return not isinstance(target, nn.Module) and isinstance(getattr(target, "components", None), dict) and callable(target)


def denoisers_of(pipeline: Any) -> dict[str, nn.Module]:
    """The components that belong to a known family, by name: one, or the two experts that share a run's steps (Wan 2.2)."""
    known = {name for family in FAMILIES for name in family.model_classes}
    modules = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    found = {name: part for name, part in modules.items() if known & class_names(getattr(part, "_orig_mod", part))}
    if set(found) == set(EXPERTS):
        # Without a boundary the pipeline never calls the second.
        return found if pipeline.config.boundary_ratio is not None else {EXPERTS[0]: found[EXPERTS[0]]}
    if not found and "ModelMixin" in class_names(modules.get(EXPERTS[0], nn.Identity())):
        return {EXPERTS[0]: modules[EXPERTS[0]]}
    if len(found) != 1:
        parts = ", ".join(f"{name}: {type(part).__name__}" for name, part in modules.items())
        raise UnsupportedModelError(
            f"{type(pipeline).__name__} has {len(found)} denoisers of a known family, not one; it has {parts}; "
            f"known are {', '.join(sorted(known))}"
        )
    return found


def attach(pipeline: Any, engines: Mapping[str, Engine]) -> None:
    """Make every call of the pipeline one run of its denoisers' engines, given by the names of their components.

    Python looks `__call__` up on the class, so the pipeline gets a class of its own with the same name. A run thus begins and ends with
    the call, whatever happens inside it: an exception or an interrupt leaves nothing behind.
    """
    original = type(pipeline)
    signature = inspect.signature(original.__call__)

    @functools.wraps(original.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs)
        given.apply_defaults()
        with ExitStack() as scopes:
            for component, engine in engines.items():
                if getattr(self, component) is not engine.model:
                    name = f"{original.__name__}.{component}"
                    raise CompileError(f"{name} was replaced after fastercache.compile; call fastercache.restore and compile again")
                describe = functools.partial(_spec_of, self, component, engine, given.arguments, len(engines) > 1)
                scopes.enter_context(engine.scope(describe, may_be_idle=len(engines) > 1))
            self._num_timesteps = None
            return original.__call__(self, *args, **kwargs)

    namespace = {"__call__": call, "__module__": original.__module__, "__doc__": original.__doc__}
    pipeline.__class__ = type(original.__name__, (original,), namespace)


def detach(pipeline: Any) -> None:
    """Give the pipeline its own class back."""
    pipeline.__class__ = type(pipeline).__mro__[1]


def _spec_of(pipeline: Any, component: str, engine: Engine, call: Mapping[str, Any], experts: bool) -> RunSpec:
    """Read at the first call of the denoiser, when the pipeline has set its timesteps (cut already, for a partial run) and guidance."""
    steps = getattr(pipeline, "num_timesteps", None)
    if steps is None:
        steps = len(pipeline.scheduler.timesteps) - (getattr(pipeline.scheduler, "begin_index", None) or 0)
    part = None
    if experts:
        boundary = pipeline.config.boundary_ratio * pipeline.scheduler.config.num_train_timesteps
        first = int((pipeline.scheduler.timesteps >= boundary).sum())
        part = (0, first) if component == EXPERTS[0] else (first, steps)
    return RunSpec(steps, engine.family.order_in(pipeline, call, engine.labels.current), part, _latent_frames(pipeline, call))


def _latent_frames(pipeline: Any, call: Mapping[str, Any]) -> int | None:
    """Latent frames of the video that a call asks for."""
    frames, ratio = call.get("num_frames"), getattr(pipeline, "vae_scale_factor_temporal", None)
    return (frames - 1) // ratio + 1 if isinstance(frames, int) and isinstance(ratio, int) else None
