"""Pipelines: which of their parts is the denoiser, and where one of their runs begins, ends, and how long it is."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from fastercache.engine import Engine, RunSpec
from fastercache.errors import CompileError, UnsupportedModelError
from fastercache.families import FAMILIES, class_names


def is_pipeline(target: Any) -> bool:
    """A pipeline in diffusers' sense: named components, and a call that samples."""
    return not isinstance(target, nn.Module) and isinstance(getattr(target, "components", None), dict) and callable(target)


def denoiser_of(pipeline: Any) -> tuple[str, nn.Module]:
    """Name and module of the one component that belongs to a known family."""
    known = {name for family in FAMILIES for name in family.model_classes}
    modules = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    found = {name: part for name, part in modules.items() if known & class_names(getattr(part, "_orig_mod", part))}
    if len(found) != 1:
        parts = ", ".join(f"{name}: {type(part).__name__}" for name, part in modules.items())
        raise UnsupportedModelError(
            f"{type(pipeline).__name__} has {len(found)} denoisers of a known family, not one; it has {parts}; "
            f"known are {', '.join(sorted(known))}"
        )
    return next(iter(found.items()))


def attach(pipeline: Any, component: str, engine: Engine) -> None:
    """Make every call of the pipeline one run of the engine.

    Python looks `__call__` up on the class, so the pipeline gets a class of its own with the same name. A run thus begins and ends with
    the call, whatever happens inside it: an exception or an interrupt leaves nothing behind.
    """
    original = type(pipeline)

    @functools.wraps(original.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(self, component) is not engine.model:
            raise CompileError(
                f"{original.__name__}.{component} was replaced after fastercache.compile; call fastercache.restore and compile again"
            )
        with engine.scope(lambda: _spec_of(self, engine)):
            self._num_timesteps = None
            return original.__call__(self, *args, **kwargs)

    namespace = {"__call__": call, "__module__": original.__module__, "__doc__": original.__doc__}
    pipeline.__class__ = type(original.__name__, (original,), namespace)


def detach(pipeline: Any) -> None:
    """Give the pipeline its own class back."""
    pipeline.__class__ = type(pipeline).__mro__[1]


def _spec_of(pipeline: Any, engine: Engine) -> RunSpec:
    """Read at the first call of the denoiser, when the pipeline has set its timesteps (cut already, for a partial run) and guidance."""
    steps = getattr(pipeline, "num_timesteps", None)
    if steps is None:
        steps = len(pipeline.scheduler.timesteps) - (getattr(pipeline.scheduler, "begin_index", None) or 0)
    guided = getattr(pipeline, "do_classifier_free_guidance", None)  # CogVideoX has the scale alone
    if guided is None:
        guided = pipeline.guidance_scale > 1
    return RunSpec(steps, engine.family.order if guided else "none")
