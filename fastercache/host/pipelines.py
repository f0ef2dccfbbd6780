"""Pipelines: which of their parts are denoisers, and where one of their runs begins, ends, and how long it is."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from fastercache.errors import CompileError, UnsupportedModelError
from fastercache.host import signature
from fastercache.models.registry import FAMILIES, class_names
from fastercache.runtime.engine import Engine
from fastercache.runtime.run import Caller, RunSpec

EXPERTS = ("transformer", "transformer_2")
"""The components of which the first runs the steps from `boundary_ratio` of the training timesteps up, the second those
below."""

_ENGINES = "_fastercache_engines"


def is_pipeline(target: Any) -> bool:
    """A pipeline in diffusers' sense: named components, and a call that samples."""
    return (
        not isinstance(target, nn.Module) and isinstance(getattr(target, "components", None), dict) and callable(target)
    )


def denoisers_of(pipeline: Any) -> dict[str, nn.Module]:
    """The components that belong to a known family, by name: one, or the two experts that share a run's steps (Wan
    2.2)."""
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


def attached(pipeline: Any) -> dict[str, Engine]:
    """The engines that calls of this pipeline are runs of, by the names of the components they were compiled for."""
    return vars(type(pipeline)).get(_ENGINES, {})


def attach(pipeline: Any, engines: Mapping[str, Engine]) -> None:
    """Make every call of the pipeline one run of its denoisers' engines, given by the names of their components.

    Python looks `__call__` up on the class, so the pipeline gets a class of its own with the same name. A run thus
    begins and ends with the call, whatever happens inside it: an exception or an interrupt leaves nothing behind.
    """
    original, several = _own_class(pipeline), len(engines) > 1
    engines = dict(engines)
    parameters = inspect.signature(original.__call__)

    @functools.wraps(original.__call__)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = parameters.bind(self, *args, **kwargs)
        given.apply_defaults()
        with ExitStack() as scopes:
            for component, engine in engines.items():
                if getattr(self, component, None) is not engine.model:
                    name = f"{original.__name__}.{component}"
                    raise CompileError(
                        f"{name} was replaced after fastercache.compile; call fastercache.restore and compile again"
                    )
                describe = functools.partial(_spec_of, self, component, engine, given.arguments, several)
                what = (
                    f"{original.__name__}'s call with num_inference_steps={given.arguments.get('num_inference_steps')}"
                )
                scopes.enter_context(engine.scope(describe, what, may_be_idle=several))
            if engines:
                scopes.enter_context(_timesteps_of_this_call(self))
            return original.__call__(self, *args, **kwargs)

    def refuse_pickling(self: Any, protocol: Any) -> Any:
        raise CompileError(
            "a compiled pipeline cannot be pickled; call fastercache.restore first, or use save_pretrained"
        )

    def copied(self: Any) -> Any:
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def refuse_deep_copy(self: Any, memo: Any) -> Any:
        raise CompileError(
            "a compiled pipeline cannot be copied: the copy would share its caches; call fastercache.restore first"
        )

    namespace = {
        "__call__": call,
        "__module__": original.__module__,
        "__doc__": original.__doc__,
        _ENGINES: engines,
        "__reduce_ex__": refuse_pickling,
        "__copy__": copied,
        "__deepcopy__": refuse_deep_copy,
    }
    pipeline.__class__ = type(original.__name__, (original,), namespace)
    for engine in engines.values():
        engine.pipelines.append(weakref.ref(pipeline))


def detach(engine: Engine) -> None:
    """Calls of pipelines are no runs of this engine any more; those that have none left get their own class back.

    A pipeline made of another by the class of that one (`type(pipe).from_pipe`) shares its engines; its calls become
    plain ones.
    """
    for pipeline in (reference() for reference in engine.pipelines):
        if pipeline is None:
            continue
        engines = attached(pipeline)
        for component in [name for name, one in engines.items() if one is engine]:
            del engines[component]
        if not engines:
            pipeline.__class__ = _own_class(pipeline)
    engine.pipelines.clear()


def _own_class(pipeline: Any) -> type:
    """The pipeline's class without what `attach` put there."""
    cls = type(pipeline)
    return cls.__mro__[1] if _ENGINES in vars(cls) else cls


@contextmanager
def _timesteps_of_this_call(pipeline: Any) -> Iterator[None]:
    """Inside, the pipeline's number of timesteps is not that of the call before."""
    before = dict(vars(pipeline))
    pipeline._num_timesteps = None
    try:
        yield
    finally:
        if pipeline._num_timesteps is None:  # not set: this class of pipeline keeps none, or the call failed before
            del pipeline._num_timesteps
            if "_num_timesteps" in before:
                pipeline._num_timesteps = before["_num_timesteps"]


def _spec_of(pipeline: Any, component: str, engine: Engine, call: Mapping[str, Any], experts: bool) -> RunSpec:
    """Read at the first call of the denoiser, when the pipeline has set its timesteps (cut already, for a partial run)
    and guidance."""
    steps = getattr(pipeline, "num_timesteps", None)
    if steps is None:
        steps = len(pipeline.scheduler.timesteps) - (getattr(pipeline.scheduler, "begin_index", None) or 0)
    part = None
    if experts:
        boundary = pipeline.config.boundary_ratio * pipeline.scheduler.config.num_train_timesteps
        first = int((pipeline.scheduler.timesteps >= boundary).sum())
        part = (0, first) if component == EXPERTS[0] else (first, steps)
    layout = engine.family.layout_in(pipeline, call, engine.host.label)
    models = [one.model for one in attached(pipeline).values()] if experts else [engine.model]
    caller = Caller(
        type(pipeline).__name__,
        component,
        call.get("num_inference_steps"),
        _latent_frames(pipeline, call),
        functools.partial(signature.of_call, pipeline, models, call),
    )
    scheduler = getattr(pipeline, "scheduler", None)
    return RunSpec(steps, layout, part, None if scheduler is None else type(scheduler).__name__, caller)


def _latent_frames(pipeline: Any, call: Mapping[str, Any]) -> int | None:
    """Latent frames of the video that a call asks for."""
    frames, ratio = call.get("num_frames"), getattr(pipeline, "vae_scale_factor_temporal", None)
    return (frames - 1) // ratio + 1 if isinstance(frames, int) and isinstance(ratio, int) else None
