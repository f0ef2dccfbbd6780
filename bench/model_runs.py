"""The runs of `bench.models`: one model, its schedule, and what a configuration of it takes."""

from __future__ import annotations

import gc
import re
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

import fastercache
from bench import published
from fastercache import policies
from fastercache.cache.budget import FORMATS
from fastercache.models.registry import family_of
from fastercache.report.published import SYSTEMS
from fastercache.schedule.branches import LayoutName, layout_of
from fastercache.schedule.plan import Phase, Plan, PlannedStep, make_plan
from fastercache.schedule.policies import Policy
from fastercache.schedule.schedule import Schedule
from fastercache.schedule.sites import SiteTree

ERROR_FACTOR = 3.0
"""A prediction may differ from the eager one by this many times what the eager one differs from a computation in higher
precision."""
GUIDANCE_SCALE = 6.0
GPU_BYTES = 80_000_000_000
"""What a larger GPU is taken for, when the cache's format is chosen."""
UNCACHED_STEPS = 8
"""Steps timed of an uncached configuration, all of which do the same."""
REPEATS = 3
"""Steps of each phase in the part of a schedule that is timed, at least."""
HIGHER = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float64}
PEER_PREFIX = "diffusers "
WHOLE_EVERY = 3
"""Of the schedule "whole steps": after the first fifth of the steps, which run, one in so many runs."""
ATTENTIONS = ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION")

Row = dict[str, Any]


@dataclass(frozen=True)
class Configuration:
    """attention: "default", or "fastest" of what PyTorch has. whole: timed over whole runs. schedule: "paper" or "whole
    steps"; `None` for the one that the command names. peer: one of diffusers' hooks in place of this package.
    """

    name: str
    cached: bool
    compiled: bool = True
    attention: str = "default"
    cache_format: str = "model"
    mode: str | None = None
    whole: bool = False
    schedule: str | None = None
    peer: str | None = None


CONFIGURATIONS = (
    Configuration("eager uncached", cached=False, compiled=False),
    Configuration("eager cached", cached=True, compiled=False),
    Configuration("compiled uncached", cached=False, whole=True),
    Configuration("compiled cached", cached=True, whole=True),
    Configuration("compiled uncached, fastest attention", cached=False, attention="fastest"),
    Configuration("compiled cached, fastest attention", cached=True, attention="fastest", whole=True),
    Configuration("compiled cached, int8", cached=True, cache_format="int8"),
    Configuration("compiled cached, CUDA graphs", cached=True, mode="reduce-overhead"),
    *(
        Configuration(f"{mode} cached, {schedule}", cached=True, compiled=mode == "compiled", schedule=schedule)
        for schedule in ("paper", "whole steps")
        for mode in ("eager", "compiled")
    ),
    *(
        Configuration(f"{mode} {PEER_PREFIX}{peer}", cached=False, compiled=mode == "compiled", peer=peer)
        for peer in ("FasterCache", "MagCache", "FirstBlockCache")
        for mode in ("eager", "compiled")
    ),
)
"""The most important first, as time may run out."""


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Root mean square of the difference, over that of `expected`. Values that are not finite make it infinite."""
    error = float(
        (found.double() - expected.double()).square().mean().sqrt() / expected.double().square().mean().sqrt()
    )
    return error if np.isfinite(error) else float("inf")


# ---- schedules -------------------------------------------------------------------------------------------------------


def phase_name(plan: Plan, step: PlannedStep) -> str:
    """What a step of the plan does, for people: the branches that run, and whether anything is blended."""
    if step.phase is None:
        return "none"
    blended = any(mode.action == "blend" for mode in plan.phases[step.phase].modes)
    return ("both" if len(step.branches) > 1 else "cond") + (", blended" if blended else "")


def _phases(plan: Plan) -> list[Phase | None]:
    """The phase of each step, `None` where the model is not called."""
    return [None if step.phase is None else plan.phases[step.phase] for step in plan.steps]


def _kept(plan: Plan) -> tuple[Any, ...]:
    """What the caches of a run are made of."""
    return plan.cadences, plan.cadence_of, plan.maps, plan.predictions, plan.keeps_latents


def part_with_all(schedule: Schedule, guided: bool, sites: SiteTree, repeats: int = 1, least: int = 4) -> Schedule:
    """The shortest part of a schedule that has each of its phases so many times (as often as it has itself), with the
    same caches."""
    plan = make_plan(schedule, guided, sites)
    phases = _phases(plan)
    wanted = {phase: min(repeats, phases.count(phase)) for phase in phases}
    for length in range(least, len(schedule) + 1):
        for start in range(len(schedule) - length + 1):
            if any(phases[start : start + length].count(phase) < count for phase, count in wanted.items()):
                continue
            part = schedule.part(start, start + length)
            other = make_plan(part, guided, sites)
            found = _phases(other)
            enough = all(found.count(phase) >= count for phase, count in wanted.items())
            if enough and set(found) == set(phases) and _kept(other) == _kept(plan):
                return part
    return schedule


def whole_steps(steps: int) -> tuple[int, ...]:
    """Numbers of the steps that run in the schedule "whole steps", from 1."""
    first = max(steps // 5, 1)
    return tuple(number for number in range(1, steps + 1) if number <= first or (number - first) % WHOLE_EVERY == 0)


# ---- a model and its runs --------------------------------------------------------------------------------------------


class Stopwatch:
    """Seconds between laps: of the GPU's own events where there is one, so that no lap waits for it."""

    def __init__(self, device: str):
        self.cuda = device == "cuda"
        self.marks: list[Any] = []

    def lap(self) -> None:
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        if not self.cuda:
            return [float(x) for x in np.diff(self.marks)]
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in zip(self.marks, self.marks[1:], strict=False)]


class _Attentions(TorchFunctionMode):
    """Keeps the shapes, strides and dtype of the largest attention that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.largest: list[torch.Tensor] = []
        self.calls = 0

    def __torch_function__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is F.scaled_dot_product_attention:
            tensors = [*args[:3], *(kwargs[name] for name in ("query", "key", "value") if kwargs and name in kwargs)]
            self.calls += 1
            if (
                not self.largest
                or tensors[0].numel() * tensors[1].shape[-2] > self.largest[0].numel() * self.largest[1].shape[-2]
            ):
                self.largest = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") for x in tensors]
        return function(*args, **(kwargs or {}))


class Case:
    """A system with random weights on a device, its schedule, and what its eager model gives, which the others are held
    against.

    layout: how the branches make up a step; `None` for what the family's own pipelines do.
    """

    def __init__(
        self,
        system: str,
        scale: str,
        device: str,
        dtype: torch.dtype,
        steps: int,
        schedule: str,
        layout: LayoutName | None = None,
    ):
        self.system, self.scale, self.device, self.dtype, self.steps = system, scale, device, dtype, steps
        self.model, self.arguments = published.build(system, scale, device, dtype)
        self.family = family_of(self.model)
        self.layout = layout_of(layout or self.family.layout)
        self.sites = self.family.sites(self.model)
        self.tree = tuple(site.node for site in self.sites)
        self.follow(policies.get(schedule)(steps, self.layout.guided))
        self.attentions: dict[str, SDPBackend | None] = {"default": None, "fastest": None}
        latents = self.family.latents(self.arguments)
        self.latents_name = next(name for name, value in self.arguments.items() if value is latents)
        self.videos = latents.shape[0] // (2 if self.layout.guided and not self.layout.two_calls else 1)
        self.first = latents[: self.videos].float()
        text = next(name for name in ("encoder_hidden_states", "y") if name in self.arguments)
        self.other_text = {text: torch.randn_like(self.arguments[text])}

    def follow(self, schedule: Schedule) -> None:
        """Take a schedule for the case's own."""
        self.schedule = schedule
        self.plan = self.plan_of(schedule)
        self.part = part_with_all(schedule, self.layout.guided, self.tree, REPEATS)
        self.part_plan = self.plan_of(self.part)
        self._recorded: dict[str, list[Any]] = {}

    def following(self, name: str) -> Case:
        """The same model with another schedule: "paper" or "whole steps"."""
        other = copy(self)
        computed = whole_steps(self.steps)
        known: dict[str, Policy] = {"paper": policies.paper, "whole steps": partial(policies.given, computed=computed)}
        other.follow(known[name](self.steps, self.layout.guided))
        return other

    def plan_of(self, schedule: Schedule) -> Plan:
        """What a schedule means for this model."""
        return make_plan(schedule, self.layout.guided, self.tree)

    def described_plan(self) -> Plan:
        """What the case's schedule means for the published size, whatever the scale of the model is."""
        return make_plan(self.schedule, self.layout.guided, SYSTEMS[self.system].tree)

    def rule(self, steps: int, guidance: bool) -> Schedule:
        """The schedule as a policy: the part where a run is as long as that."""
        return self.part if steps == len(self.part) else self.schedule

    def attention(self, name: str) -> Any:
        """What every forward and compilation of a configuration is under: graphs keep the backend they were traced
        with."""
        backend = self.attentions[name]
        return nullcontext() if backend is None else sdpa_kernel(backend)

    def calls(self, latents: torch.Tensor, index: int, steps: int) -> list[dict[str, Any]]:
        """Arguments of the calls of a step."""
        time_now = torch.full_like(self.arguments[self.family.time], round(999 * (1 - index / steps)))
        rows = len(self.arguments[self.latents_name]) // self.videos
        batch = torch.cat([latents.to(self.arguments[self.latents_name].dtype)] * rows)
        call = self.arguments | {self.latents_name: batch, self.family.time: time_now}
        if not self.layout.two_calls:
            return [call]
        return [call if branch == "cond" else call | self.other_text for branch in self.layout.order]

    def predictions(self, calls: Sequence[dict[str, Any]]) -> torch.Tensor:
        """What the calls of a step predict, in one tensor."""
        return torch.cat([self.family.prediction(self.model(**call)) for call in calls])

    def guided(self, predictions: torch.Tensor) -> torch.Tensor:
        """One prediction in the shape of the latents."""
        x = predictions.float()
        if self.layout.guided:
            of = dict(zip(self.layout.order, x.chunk(2), strict=True))
            x = of["uncond"] + GUIDANCE_SCALE * (of["cond"] - of["uncond"])
        if x.dim() < self.first.dim():  # a row for each frame
            x = x.unflatten(0, self.first.shape[:2])
        for dim, extent in enumerate(self.first.shape):  # some predict a variance, too
            x = x.narrow(dim, 0, extent)
        return x

    def denoise(
        self, steps: int, count: int | None = None, keep: list[Any] | None = None
    ) -> tuple[torch.Tensor, list[float]]:
        """Latents after `count` steps of a run (default: all), and the seconds of each; `keep` gets each step's calls,
        predictions."""
        latents, watch = self.first, Stopwatch(self.device)
        watch.lap()
        for index in range(steps if count is None else count):
            calls = self.calls(latents, index, steps)
            found = self.predictions(calls)
            if keep is not None:
                keep.append((calls, found))
            latents = latents - self.guided(found) / steps
            watch.lap()
        return latents, watch.seconds()

    def part_run(self, keep: list[Any] | None = None) -> list[float]:
        """A run of the part of the schedule on a model that has it; seconds of each step."""
        with fastercache.run(self.model, steps=len(self.part), cfg=self.layout.name):
            return self.denoise(len(self.part), keep=keep)[1]

    # ---- what the eager model gives ----

    @cached_property
    def first_calls(self) -> list[dict[str, Any]]:
        return self.calls(self.first, 0, self.steps)

    @cached_property
    def exact(self) -> torch.Tensor:
        """The eager model's first prediction."""
        with self.attention("default"):
            return self.predictions(self.first_calls)

    @cached_property
    def eager_error(self) -> float:
        """Difference of the eager model's first prediction from the same in higher precision."""
        higher = HIGHER[self.dtype]

        def up(value: Any) -> Any:
            return value.to(higher) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

        exact = self.exact
        torch.nn.Module.to(self.model, higher)
        try:
            return difference(
                exact,
                self.predictions([{name: up(value) for name, value in call.items()} for call in self.first_calls]),
            )
        finally:
            torch.nn.Module.to(self.model, self.dtype)
            free()

    def recorded(self, cache_format: str) -> list[Any]:
        """Each step's calls and predictions of an eager cached run of the part."""
        if cache_format not in self._recorded:
            keep: list[Any] = []
            with (
                self.attention("default"),
                compiled_by(self, Configuration("", True, False, cache_format=cache_format), "eager"),
            ):
                self.part_run(keep)
            self._recorded[cache_format] = keep
        return self._recorded[cache_format]


def described_failure(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


def free() -> None:
    """Give memory back to the GPU."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()


@contextmanager
def compiled_by(case: Case, configuration: Configuration, backend: str) -> Iterator[None]:
    """The model as a configuration has it: accelerated, or its blocks compiled as they are, or untouched."""
    model = case.model
    paths = case.family.block_paths(model)
    blocks = (
        [model.get_submodule(path) for path in paths] if configuration.compiled and not configuration.cached else []
    )
    try:
        if configuration.cached:
            options: dict[str, Any] = {}
            if configuration.compiled:
                options = {"backend": backend, "mode": configuration.mode, "regional": configuration.mode is None}
            storage = configuration.cache_format
            fastercache.compile(
                model, case.rule, steps=case.steps, cfg=case.layout.name, cache_format=storage, **options
            )
        for block in blocks:
            block.compile(backend=backend, fullgraph=True, dynamic=False)
        yield
    finally:
        if hasattr(model, "_fastercache_engine"):
            fastercache.restore(model)
        for block in blocks:
            block._compiled_call_impl = None
        torch._dynamo.reset()
        free()


# ---- one configuration -----------------------------------------------------------------------------------------------


def kernels_of(call: Callable[[], Any], device: str) -> list[str]:
    """Names of the kernels that compute attention, the longest-running first."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU]) as found:
        call()
        if device == "cuda":
            torch.cuda.synchronize()
    attribute = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    events = [
        event for event in found.key_averages() if re.search("flash|fmha|attention|sdpa", event.key, re.IGNORECASE)
    ]
    events = [event for event in events if not event.key.startswith("fastercache::") and getattr(event, attribute) > 0]
    return [event.key[:100] for event in sorted(events, key=lambda event: -getattr(event, attribute))[:2]]


def by_phase(plan: Plan, seconds: Sequence[float]) -> dict[str, float]:
    """Median seconds of a step of each phase."""
    found: dict[str, list[float]] = {}
    for step, spent in zip(plan.steps, seconds, strict=False):
        found.setdefault(phase_name(plan, step), []).append(spent)
    return {name: float(np.median(values)) for name, values in found.items()}


def composed(plan: Plan, phases: dict[str, float]) -> float:
    """Seconds of a whole run whose steps take what the median of their phase takes."""
    return sum(phases[phase_name(plan, step)] for step in plan.steps)


def measure(case: Case, configuration: Configuration, backend: str, left: Callable[[], float], row: Row) -> None:
    """Fill a row. What was found before an error, or before the time was up, stays in it."""
    row["error_limit"] = ERROR_FACTOR * case.eager_error
    recorded = case.recorded(configuration.cache_format) if configuration.cached else []
    chosen = case.attentions[configuration.attention]
    row["attention"] = chosen.name if chosen is not None else "PyTorch's choice"
    # AOTAutograd's cache does not tell attention backends apart, and would give the graph of another one.
    caches = torch._functorch.config.patch(enable_autograd_cache=False)
    with case.attention(configuration.attention), caches, compiled_by(case, configuration, backend):
        start = time.perf_counter()
        if configuration.cached and configuration.compiled:
            fastercache.warmup(case.model, progress=False, **case.arguments)
        for _ in range(1 if configuration.cached else 3 if configuration.compiled else 1):
            first = partial_run(case, configuration, lambda: case.predictions(case.first_calls))
        synchronize(case)
        if configuration.compiled:
            row["compile_s"] = time.perf_counter() - start
        counters = torch._dynamo.utils.counters["stats"]
        graphs = counters["unique_graphs"]
        errors = [difference(first, case.exact)]
        if configuration.cached:
            with fastercache.run(case.model, steps=len(case.part), cfg=case.layout.name):
                errors += [difference(case.predictions(calls), expected) for calls, expected in recorded]
        row["error"] = max(errors)
        row["correct"] = row["error"] <= row["error_limit"]
        try:
            look = partial(partial_run, case, configuration, lambda: case.predictions(case.first_calls))
            row["attention_kernels"] = kernels_of(look, case.device)
        except Exception as error:  # a machine may forbid profiling
            row["attention_kernels"] = [f"{type(error).__name__}: {error}"[:100]]

        if case.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        plan = case.part_plan if configuration.cached else case.plan_of(policies.none(UNCACHED_STEPS))
        spent = (
            case.part_run() if configuration.cached else case.denoise(case.steps, min(UNCACHED_STEPS, case.steps))[1]
        )
        whole_plan = case.plan if configuration.cached else case.plan_of(policies.none(case.steps))
        row["phase_s"] = by_phase(plan, spent)
        row["composed_s"] = row["seconds"] = composed(whole_plan, row["phase_s"])
        if configuration.whole and 1.1 * row["composed_s"] > left():
            row["notes"].append("no time was left for a whole run")
        elif configuration.whole:
            scope = (
                fastercache.run(case.model, steps=case.steps, cfg=case.layout.name)
                if configuration.cached
                else nullcontext()
            )
            synchronize(case)
            start = time.perf_counter()
            with scope:
                latents, spent = case.denoise(case.steps)
            synchronize(case)
            row["seconds"], row["whole"] = time.perf_counter() - start, True
            row["whole_phase_s"] = by_phase(whole_plan, spent)
            row["latents"] = latents
        if case.device == "cuda":
            row["peak_bytes"] = torch.cuda.max_memory_allocated()
        row["recompiles"] = counters["unique_graphs"] - graphs
        if row["recompiles"]:
            row["notes"].append(f"{row['recompiles']} recompilations after the warm-up")
        if configuration.cached:
            summary = fastercache.summary(case.model)
            row |= {"cache_bytes_planned": summary.cache_bytes_planned, "cache_bytes": summary.cache_bytes}
            row |= {"ops": summary.implementations, "graphs": summary.compiled or None}
            row["notes"] += summary.notes
    row["outcome"] = "measured" if row["correct"] else "WRONG: the error is over its limit"


def partial_run(case: Case, configuration: Configuration, call: Callable[[], Any]) -> Any:
    """The first step of a run, which is then left."""
    if not configuration.cached:
        return call()
    with fastercache.run(case.model, steps=len(case.part), cfg=case.layout.name):
        return call()


def synchronize(case: Case) -> None:
    if case.device == "cuda":
        torch.cuda.synchronize()


def attention_rows(case: Case, seconds: float = 0.5) -> list[Row]:
    """Each backend of `scaled_dot_product_attention` at the model's largest attention; sets the default and the fastest
    of the case."""
    mode = _Attentions()
    with mode:
        case.predictions(case.first_calls)
    query, key, value = (
        torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=case.device).normal_() for x in mode.largest
    )
    operations = 4 * query.numel() * key.shape[-2]
    default = SDPBackend(torch._fused_sdp_choice(query, key, value))
    names = dict.fromkeys([default.name, *ATTENTIONS])
    rows: list[Row] = []
    expected: torch.Tensor | None = None
    for name in names:
        row: Row = {
            "backend": name,
            "default": name == default.name,
            "shape": list(query.shape),
            "calls": mode.calls,
            "seconds": None,
        }
        rows.append(row)
        try:
            with warnings.catch_warnings(), sdpa_kernel(getattr(SDPBackend, name)):
                warnings.simplefilter("ignore")  # on what is not available, which the error says
                found = F.scaled_dot_product_attention(query, key, value)
                expected = found if expected is None else expected
                row["difference"] = difference(found, expected)
                spent: list[float] = []
                while sum(spent) < seconds and len(spent) < 20:
                    watch = Stopwatch(case.device)
                    watch.lap()
                    F.scaled_dot_product_attention(query, key, value)
                    watch.lap()
                    spent += watch.seconds()
            row["seconds"] = float(np.median(spent))
            row["tflops"] = operations / row["seconds"] / 1e12
        except RuntimeError as error:
            row["outcome"] = str(error).strip().splitlines()[0][:160]
    served = [row for row in rows if row["seconds"] is not None and row["difference"] < 0.02]
    fastest = min(served, key=lambda row: row["seconds"])["backend"] if served else default.name
    for row in rows:
        row["fastest"] = row["backend"] == fastest
    case.attentions = {"default": default, "fastest": getattr(SDPBackend, fastest)}
    del query, key, value, expected
    free()
    return rows


# ---- from end to end -------------------------------------------------------------------------------------------------


def end_to_end(case: Case, row: Row) -> None:
    """A part of the schedule, eager, with the best cache that fits the device."""
    total = torch.cuda.get_device_properties(0).total_memory if case.device == "cuda" else GPU_BYTES
    best = SYSTEMS[case.system].fitting_format(case.described_plan(), min(total, GPU_BYTES))
    if best is None:
        row["outcome"] = f"no cache format fits {total / 1e9:.0f} GB"
        return
    case.part = part_with_all(case.schedule, case.layout.guided, case.tree)
    for cache_format in FORMATS[FORMATS.index(best) :]:
        try:
            run_part(case, cache_format, row)
            return
        except torch.OutOfMemoryError as error:
            row["outcome"] = described_failure(error)
            row["notes"].append(f"out of memory with caches as {cache_format}")
        free()


def run_part(case: Case, cache_format: str, row: Row) -> None:
    exact = case.exact
    keep: list[Any] = []
    if case.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    with compiled_by(case, Configuration("", True, False, cache_format=cache_format), "eager"):
        seconds = case.part_run(keep)
        summary = fastercache.summary(case.model)
    predictions = [found for _, found in keep]
    row |= {
        "cache_format": cache_format,
        "phase_s": by_phase(case.plan_of(case.part), seconds),
        "chart": case.part.chart(),
    }
    row |= {"steps_done": summary.steps_done, "ops": summary.implementations}
    row |= {"cache_bytes_planned": summary.cache_bytes_planned, "cache_bytes": summary.cache_bytes}
    row["finite"] = all(bool(x.isfinite().all()) for x in predictions)
    row["error"] = difference(predictions[0], exact)  # the first step computes everything
    if case.device == "cuda":
        row["peak_bytes"] = torch.cuda.max_memory_allocated()
    described = summary.cache_bytes
    if case.scale == "published":
        described = SYSTEMS[case.system].cache_bytes(case.described_plan(), cache_format)
    as_described = described == summary.cache_bytes_planned == summary.cache_bytes
    row["correct"] = as_described and row["finite"] and row["error"] == 0 and summary.steps_done == len(case.part)
    row["notes"] += summary.notes + ([] if as_described else [f"the cache is described with {described} bytes"])
    row["outcome"] = "ran" if row["correct"] else "WRONG"
