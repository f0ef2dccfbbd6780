"""The public functions: compile, warmup, run, disabled, release, restore, summary."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from rich.progress import Progress, TaskID
from torch import nn

from fastercache.cache.budget import CacheBudget
from fastercache.errors import CompileError, RunError, UnsupportedModelError
from fastercache.host import carried, pipelines
from fastercache.host.diffusers import DiffusersHost
from fastercache.host.processes import is_divided
from fastercache.models.hooks import refuse_others_at_work
from fastercache.models.registry import family_of
from fastercache.report.summary import Summary, combined
from fastercache.runtime.engine import Engine
from fastercache.runtime.graphs import GraphOptions
from fastercache.runtime.run import RunSpec
from fastercache.schedule.branches import LayoutName, layout_of
from fastercache.schedule.policies import Policy
from fastercache.schedule.schedule import Schedule

T = TypeVar("T")
_ENGINE = "_fastercache_engine"


def compile(
    target: T,
    schedule: Schedule | Policy | str | Path | None = None,
    *,
    steps: int | None = None,
    cfg: LayoutName | None = None,
    cache_format: str | None = None,
    max_cache_bytes: int | None = None,
    backend: str | Callable[..., Any] | None = None,
    mode: str | None = None,
    regional: bool = False,
    attention_backend: str | None = None,
    download: bool = False,
) -> T:
    """Make a pipeline or a denoiser run a caching schedule; returns the same object.

    target: a diffusers pipeline, whose calls then are runs, or a denoiser (`nn.Module` of a known family).
    schedule: a policy's name (see `fastercache.policies`), a policy, a `Schedule`, the path of its JSON file, or a
        repository on the Hugging Face hub or a file in one ("user/name", "user/name/file.json"). None: of the schedules
        that the pipeline's own directory carries, in a folder `schedules`, the one that fits a run's step count,
        guidance and scheduler; where none does, "paper".
    steps, cfg: for a denoiser without a pipeline only: every `steps` steps are one run, with guidance as `cfg` says:
        the two halves of a batch ("uncond-first", "cond-first"), two calls a step ("uncond-then-cond",
        "cond-then-uncond"), or "none". A run that was left before its last step is known by the next call's shape, or
        by its timestep, if that goes back (`fastercache.runtime.timesteps` says when it cannot be known);
        `fastercache.run` tells for certain. Without steps and cfg the model runs uncached, and says so, until
        `fastercache.run` tells.
    cache_format: how the cached outputs are stored: "model" (the model's dtype, lossless), "int8" (half of bfloat16's
        bytes) or "int8-int4" (0.4 of them). None takes the best that fits: "model" wherever it does.
    max_cache_bytes: the most bytes the caches may take, on the denoiser's device. None: what is free there when a run
        begins, less what a step takes, counted on its shapes, and a margin. A run whose caches would not fit raises
        `CacheError` before its first step, which says what would.
    backend, mode: compile the model too, one full graph for each phase of the schedule; as torch.compile has them, such
        as backend="inductor", mode="reduce-overhead". The first run compiles, unless `fastercache.warmup` has.
    regional: compile the repeated block, once for all layers, instead of the whole model: much faster to compile.
    attention_backend: one of diffusers' attention backends by name, such as "flash" or "_native_cudnn", until
        `restore`. "auto" times, at the first call and once, the installed ones that are exact (none that is quantized,
        as SageAttention, or would be downloaded) on the model's shapes, and takes the fastest: the summary tells the
        times. None leaves what `set_attention_backend` has set.
    download: fetch a schedule's repository from the hub, where it is not on this machine.

    Errors leave the target as it was: `UnsupportedModelError`, `ScheduleError`, `CompileError` (compiled already, by
    this or by torch; an attention backend that is not there), `CacheError`.
    """
    budget = CacheBudget(cache_format, max_cache_bytes)
    if backend is None and (mode is not None or regional):
        raise CompileError(f"mode={mode!r}, regional={regional!r} without a backend; pass backend='inductor' too")
    options = GraphOptions(backend, mode, regional) if backend is not None else None
    is_pipeline = pipelines.is_pipeline(target)
    rule = carried.resolve(schedule, target if is_pipeline else None, download=download)
    if is_pipeline:
        if steps is not None or cfg is not None:
            raise CompileError("a pipeline tells its own step count and guidance; leave out steps= and cfg=")
        if pipelines.attached(target):
            raise CompileError(
                f"this {type(target).__name__} is compiled by fastercache already; call fastercache.restore first"
            )
        engines: dict[str, Engine] = {}
        try:
            for component, model in pipelines.denoisers_of(target).items():
                engines[component] = _install(model, rule, None, budget, options, attention_backend)
            pipelines.attach(target, engines)
        except BaseException:
            for engine in engines.values():
                _remove(engine)
            raise
        return target
    if not isinstance(target, nn.Module):
        raise UnsupportedModelError(
            f"cannot compile a {type(target).__name__}; pass a diffusers pipeline or a denoiser (nn.Module)"
        )
    if (steps is None) != (cfg is None):
        raise CompileError(
            f"steps={steps!r} with cfg={cfg!r}: give both, or neither and enter fastercache.run(model, steps=..., "
            "cfg=...)"
        )
    default = None if steps is None or cfg is None else _spec(steps, cfg)
    _install(target, rule, default, budget, options, attention_backend)
    return target


def _spec(steps: int, cfg: LayoutName) -> RunSpec:
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise RunError(f"steps is {steps!r}; it must be the number of steps in a run, a whole number of at least 1")
    return RunSpec(steps, layout_of(cfg))


def _install(
    model: nn.Module,
    schedule: Schedule | Policy,
    default: RunSpec | None,
    budget: CacheBudget,
    options: GraphOptions | None,
    attention_backend: str | None,
) -> Engine:
    refuse_others_at_work(model)
    if hasattr(model, _ENGINE):
        raise CompileError(
            f"this {type(model).__name__} is compiled by fastercache already; call fastercache.restore first"
        )
    if options is not None and not options.regional and is_divided(model):
        raise CompileError(
            f"the calls of this {type(model).__name__} are divided between processes, and what splits and gathers "
            "them cannot be traced in a graph of the whole model; pass regional=True, which compiles its blocks"
        )
    engine = Engine(
        model, family_of(model), schedule, default, budget, options, partial(DiffusersHost, attention_backend)
    )
    setattr(model, _ENGINE, engine)
    return engine


def _remove(engine: Engine) -> None:
    engine.detach()
    if hasattr(engine.model, _ENGINE):
        delattr(engine.model, _ENGINE)
    pipelines.detach(engine)


def _engines(target: Any, action: Callable[..., Any]) -> list[Engine]:
    found: list[Engine] = []
    if pipelines.is_pipeline(target):
        found += pipelines.attached(target).values()  # of parts, too, that the pipeline has no more
    for part in target.components.values() if pipelines.is_pipeline(target) else [target]:
        if hasattr(part, _ENGINE) and getattr(part, _ENGINE) not in found:
            found.append(getattr(part, _ENGINE))
    if not found:
        raise CompileError(
            f"fastercache.{action.__name__}: this {type(target).__name__} is not compiled; call fastercache.compile "
            "first"
        )
    return found


def restore(target: T) -> T:
    """Give back the original pipeline or denoiser, untouched, and free the caches; returns the same object.

    target: the pipeline that was compiled, its denoiser, or another pipeline that shares it: each gives back all of
        them.
    """
    engines = _engines(target, restore)
    for engine in engines:
        engine.scopes.refuse_under_way("restore the model")
    for engine in engines:
        _remove(engine)
    return target


def warmup(target: T, *args: Any, progress: bool = True, **kwargs: Any) -> T:
    """Compile every phase of the schedule before the first request; returns the same object.

    target: compiled with a backend. For a pipeline, args and kwargs are those of the calls to come (shapes, step count
        and guidance count, the prompt does not): it runs up to its first call of the denoiser, and there each phase
        once. For a denoiser compiled with steps= and cfg=, they are its own, as tensors.
    progress: show a bar.

    What was compiled before, by another process too, comes from torch's caches on disk (TORCHINDUCTOR_CACHE_DIR).
    """
    engines = _engines(target, warmup)
    if engines[0].gated.graphs is None:
        raise CompileError(
            "there is nothing to warm up: compile with a backend, as in fastercache.compile(pipe, backend='inductor')"
        )
    if any(engine.scopes.is_disabled for engine in engines):
        raise CompileError(
            "fastercache.warmup inside fastercache.disabled would compile nothing; leave that block first"
        )
    if not pipelines.is_pipeline(target) and not engines[0].scopes.knows_its_runs:
        raise CompileError(
            "fastercache.warmup would compile nothing: this denoiser does not know how long its runs are; compile it "
            "with steps= and cfg=, or warm it up inside a block of its own: with fastercache.run(model, steps=..., "
            "cfg=...): fastercache.warmup(model, ...)"
        )
    with Progress(disable=not progress, transient=True) as bar:
        for engine in engines:
            task = bar.add_task("compiling phases", total=None)
            with engine.warming_up(partial(_show, bar, task)):
                target(*args, **kwargs)  # type: ignore[operator]
    if not any(engine.warmed_up for engine in engines):
        raise CompileError(
            f"fastercache.warmup compiled nothing: the call of this {type(target).__name__} ended before any of its "
            "denoiser; give it the arguments of the calls to come, at least one step among them"
        )
    return target


def _show(bar: Progress, task: TaskID, done: int, phases: int) -> None:
    bar.update(task, completed=done, total=phases)


def release(target: T) -> T:
    """Free the caches of a run that was left before its last step (a finished run has freed its own), and those that
    CUDA graphs keep at fixed addresses from run to run; returns the same object."""
    for engine in _engines(target, release):
        engine.release()
    return target


@contextmanager
def disabled(target: Any) -> Iterator[None]:
    """Run uncached inside this block, for comparison. It is about this thread's calls (in asyncio, this task's); runs
    of others go on."""
    with ExitStack() as stack:
        for engine in _engines(target, disabled):
            stack.enter_context(engine.scopes.disabled())
        yield


@contextmanager
def run(model: nn.Module, *, steps: int, cfg: LayoutName) -> Iterator[None]:
    """All calls of a compiled denoiser inside are one run of `steps` steps, with guidance laid out as `cfg` says (see
    `compile`)."""
    spec = _spec(steps, cfg)
    with _engines(model, run)[0].scope(lambda: spec, "the block of fastercache.run"):
        yield


def summary(target: Any) -> Summary:
    """What the last run did: steps computed, blended and skipped, the cache's bytes, the ops' implementations, and
    every fallback."""
    engines = _engines(target, summary)
    ran = [engine.last for engine in engines if engine.last is not None]
    if ran:
        return ran[0] if len(ran) == 1 else combined(ran)
    engine = engines[0]
    return Summary(
        type(engine.model).__name__,
        engine.family.name,
        getattr(engine.schedule, "name", getattr(engine.schedule, "__name__", "policy")),
        "not known yet",
        0,
        notes=["no run has ended yet"],
    )
