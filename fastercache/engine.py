"""Runs a schedule on a model: patches its `forward` and its sites, and carries the state of one run at a time.

Nothing is decided here while sampling. A run begins with the first call of the denoiser, when the shapes are known: the schedule becomes
a plan, the caches are allocated, the table of coefficients is uploaded. Step i copies row i of the table into a fixed tensor, sets the
modes of the groups and runs the model, as it is or as the compiled graph of the step's phase.
"""

from __future__ import annotations

import inspect
import logging
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NoReturn

import torch
from torch import nn

from fastercache import flops, ops
from fastercache.attention import Attention
from fastercache.errors import CompileError, FasterCacheWarning, RunError, ScheduleError
from fastercache.families import BranchOrder, Family, Site
from fastercache.gates import Gate, GroupState
from fastercache.graphs import GraphOptions, Graphs, PhaseGraphs, input_signature
from fastercache.integrations import modules_of
from fastercache.labels import CallLabels
from fastercache.memory import Cache, CacheBudget, CachePlan, Shapes, branch_rows, plan_cache
from fastercache.patching import ForwardPatch
from fastercache.plan import Branch, Phase, Plan, PlannedStep, group_of, make_plan
from fastercache.policies import Policy
from fastercache.report import Summary, count_sites
from fastercache.schedule import Schedule
from fastercache.skeleton import on_meta
from fastercache.two_calls import BATCH_ORDER, BothCalls, TwoCalls

logger = logging.getLogger("fastercache")


class WarmedUp(Exception):
    """Leaves the pipeline's call that `Engine.warming_up` began, once every phase has run."""


@dataclass(frozen=True)
class RunSpec:
    """How many steps a run has, how its calls are made of branches, and which of the steps are this model's (from, to; default: all).

    frames: latent frames of the whole video, where a pipeline tells.
    """

    steps: int
    order: BranchOrder
    part: tuple[int, int] | None = None
    frames: int | None = None


class Engine:
    """The accelerated state of one model. Made by `fastercache.compile`; `detach` leaves the model as it was."""

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        schedule: Schedule | Policy,
        default: RunSpec | None,
        budget: CacheBudget,
        options: GraphOptions | None,
    ):
        self.model, self.family, self.schedule, self.default, self.budget = model, family, schedule, default, budget
        self.enabled = True
        self.last: Summary | None = None
        self._run: Run | None = None
        self._owner: int | None = None
        self._in_scope = False
        self._said_uncached = False
        self.on_phase: Callable[[int, int], None] | None = None
        self.sites: list[Site] = family.sites(model)
        self._blocks: dict[str, list[int]] = {}
        for index, site in enumerate(self.sites):
            self._blocks.setdefault(family.block_of(site), []).append(index)
        blocks = (model.get_submodule(path) for path in self._blocks)
        self.graphs = PhaseGraphs(model, options, blocks) if options is not None else None
        self._parameters = tuple(inspect.signature(type(model).forward).parameters)[1:]
        self.gates = [Gate() for _ in self.sites]
        self._site_patches = [ForwardPatch(site.module, gate, traced=True) for site, gate in zip(self.sites, self.gates, strict=True)]
        self._model_patch = ForwardPatch(model, self._at_model)
        self.labels = CallLabels(model)
        self.attention = Attention(model)
        # 120 steps are enough for any policy that skips at all to do so.
        longest = schedule if isinstance(schedule, Schedule) else schedule(120, True)
        self._meant_to_skip = not longest.skips_nothing
        self._plans: dict[RunSpec, Plan] = {}
        self._tables: dict[tuple[int, torch.device], tuple[torch.Tensor, ...]] = {}
        self._kept: Cache | None = None

    def detach(self) -> None:
        """Take every patch out and free the caches. Refused while a run is under way in a scope."""
        if self._in_scope:
            raise RunError("a run is under way; restore the model after it has ended")
        for patch in (self._model_patch, *self._site_patches):
            patch.remove()
        self.labels.detach()
        self.attention.restore()
        if self.graphs is not None:
            self.graphs.detach()
        self._run = self._kept = None
        self._tables.clear()

    def release(self) -> None:
        """Free the caches: of a run that was left before its last step, and those that graphs keep. Refused while a run is under way."""
        if self._in_scope:
            raise RunError("a run is under way, and needs its caches; release them after it has ended")
        self._end("released before its last step")
        self._kept = None

    def cache_for(self, planned: CachePlan, groups: int, device: torch.device) -> Cache:
        """The caches of a run. Those of a compiled model stay from run to run, at the addresses that CUDA graphs have recorded."""
        if self._kept is not None and (self._kept.plan, len(self._kept.group_rows), self._kept.device) == (planned, groups, device):
            return self._kept
        self._kept = None  # before the next is allocated
        cache = Cache(planned, groups, device)
        if self.graphs is not None:
            self._kept = cache
        return cache

    def check_model(self) -> str | None:
        """Before a run: `CompileError` if the model is not one that was compiled any more, a note if it is one that costs new graphs."""
        modules = modules_of(self.model)
        present = set(map(id, modules))
        for site in self.sites:
            if id(site.module) not in present:
                raise CompileError(
                    f"{site.path} of {type(self.model).__name__} was replaced after fastercache.compile, perhaps by an adapter around it, "
                    "and what is cached would miss that; call fastercache.restore and compile again"
                )
        return self.graphs.begin_run(modules) if self.graphs is not None else None

    def table_for(self, plan: Plan, device: torch.device) -> tuple[torch.Tensor, ...]:
        """The coefficients of each step on the device, `[groups + 1, ROW_SIZE]`; uploaded once."""
        if (id(plan), device) not in self._tables:  # the plan itself stays in `_plans`
            table = torch.tensor(plan.table(), dtype=torch.float32)
            # From pinned memory, as the host would wait for any other copy.
            uploaded = table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table.to(device)
            self._tables[id(plan), device] = uploaded.unbind()
        return self._tables[id(plan), device]

    def open_gates(self, plan: Plan, cache: Cache, states: Sequence[GroupState]) -> None:
        """Let the sites act by the states of their groups. `ScheduleError` if the schedule reuses what the model does not have."""
        found = [group_of(plan.groups, site.kind, site.layer) for site in self.sites]
        for number, group in enumerate(plan.groups):
            if number not in found:
                kinds = ", ".join(dict.fromkeys(site.kind for site in self.sites))
                raise ScheduleError(
                    f"schedule {plan.schedule.name!r} reuses {group.selector!r}, but {self.family.name} has no such site; it has {kinds}"
                )
        for index, (gate, group_number) in enumerate(zip(self.gates, found, strict=True)):
            gate.group, gate.rings = (None, ()) if group_number is None else (states[group_number], cache.rings(index))
        if self.graphs is not None:
            self.graphs.set_kinds(tuple((self.sites[i].kind, found[i]) for i in indices) for indices in self._blocks.values())

    def close_gates(self) -> None:
        """Let the sites compute, and hold no cache."""
        for gate in self.gates:
            gate.group, gate.rings = None, ()

    # ---- runs -----------------------------------------------------------------------------------------------------------------------

    @contextmanager
    def scope(self, describe: Callable[[], RunSpec], may_be_idle: bool = False) -> Iterator[None]:
        """All calls of the model inside belong to one run, whose spec is asked for at the first of them. Without a call, it warns."""
        if self._in_scope:
            where = "this thread" if self._owner == threading.get_ident() else "another thread"
            raise RunError(
                f"a run of this {type(self.model).__name__} is already under way in {where}; let it end first, or compile a second "
                "copy of the model for a second run at the same time"
            )
        if not self.enabled:
            yield
            return
        self._in_scope, self._owner = True, threading.get_ident()
        self._run = Run(self, describe)
        try:
            yield
        except BaseException:
            self._end(f"ended by an error after {self._run.position} steps")
            raise
        else:
            self._end("idle" if may_be_idle and self._run.plan is None else None)
        finally:
            self._in_scope, self._owner = False, None

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Calls inside go straight to the model. Refused inside a run, whose steps would no longer add up."""
        if self._in_scope:
            raise RunError("a run is under way; disable caching before it begins or after it has ended")
        self.enabled, before = False, self.enabled
        try:
            yield
        finally:
            self.enabled = before

    @contextmanager
    def warming_up(self, on_phase: Callable[[int, int], None]) -> Iterator[None]:
        """The first call of the denoiser inside runs each phase once, after `on_phase(number, phases)`, and ends the block."""
        last, self.on_phase = self.last, on_phase
        try:
            yield
        except WarmedUp:
            pass
        finally:
            self.on_phase, self.last = None, last

    @property
    def calls_to_warm_up(self) -> int:
        """Calls until a phase has nothing left to prepare: CUDA graphs run once as they are, are recorded, and then replayed."""
        return 3 if self.graphs is not None and self.graphs.options.cuda_graphs else 1

    def _end(self, note: str | None) -> None:
        run, self._run = self._run, None
        self.close_gates()
        if run is None:
            return
        if run.plan is None:
            if note is None:
                self._warn("the run ended without a call of the denoiser that fastercache saw: something replaced its forward since "
                           "fastercache.compile; call fastercache.restore and compile again")  # fmt: skip
            return
        self.last = run.summary(note)
        meant = not run.plan.skips_nothing
        if meant and note is None and run.position == len(run.plan.steps) and not self.last.skipped_anything:
            self._warn(f"schedule {run.plan.schedule.name!r} was meant to skip work, but nothing was skipped")

    def _warn(self, message: str) -> None:
        warnings.warn(message, FasterCacheWarning, stacklevel=6)

    # ---- patched calls ----------------------------------------------------------------------------------------------------------------

    def _at_model(self, original: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        if not self.enabled:
            return original(*args, **kwargs)
        if self._in_scope and self._owner != threading.get_ident():
            raise RunError(f"this {type(self.model).__name__} is in a run of another thread; a run owns its model until it ends")
        run = self._run
        arguments = dict(zip(self._parameters, args, strict=False)) | kwargs
        if len(arguments) != len(args) + len(kwargs):
            inspect.signature(original).bind(*args, **kwargs)  # says what is given twice, or is one too many
        if not self._in_scope:
            run = self._implicit_run(run, arguments)
            if run is None:
                return original(*args, **kwargs)
        assert run is not None
        try:
            output = run.call(original, arguments)
        except BaseException:
            if not self._in_scope:
                self._end(f"ended by an error after {run.position} steps")
            raise
        if not self._in_scope and run.position == len(run):
            self._end(None)
        return output

    def _implicit_run(self, run: Run | None, arguments: dict[str, Any]) -> Run | None:
        """The run a call outside any scope belongs to: every `steps` calls are one, and a changed shape begins a new one."""
        if self.default is None:
            if not self._said_uncached:
                self._said_uncached = True
                self._warn(f"{type(self.model).__name__} was called outside a run, so it ran uncached: call its pipeline, enter "
                           "fastercache.run(model, steps=..., cfg=...), or compile with steps= and cfg=")  # fmt: skip
            return None
        if run is not None and not run.fits(arguments):
            logger.warning("inputs changed after %d of %d steps; a new run begins", run.position, len(run))
            self._end(f"replaced by a run of other shapes after {run.position} steps")
            run = None
        if run is None:
            default = self.default
            run = self._run = Run(self, lambda: default)
        return run

    def plan_for(self, spec: RunSpec) -> Plan:
        """The plan of a run; `ScheduleError` if a fixed schedule has another length."""
        if spec not in self._plans:
            self._plans[spec] = self._make_plan(spec)
        plan = self._plans[spec]
        if self._meant_to_skip and plan.skips_nothing and self._others_skip_nothing(spec):
            short = f"a run of {spec.steps} steps is too short for it"
            why = "this run has no guidance" if not plan.guidance and spec.steps >= 6 else short
            self._warn(f"schedule {plan.schedule.name!r} skips nothing here: {why}; the run gains no speed")
        return plan

    def _others_skip_nothing(self, spec: RunSpec) -> bool:
        """Whether the models that share a run's steps with this one skip nothing either."""
        if spec.part is None:
            return True
        others = [(start, stop) for start, stop in ((0, spec.part[0]), (spec.part[1], spec.steps)) if start < stop]
        return all(self._make_plan(replace(spec, part=part)).skips_nothing for part in others)

    def _make_plan(self, spec: RunSpec) -> Plan:
        guidance = spec.order != "none"
        schedule = self.schedule if isinstance(self.schedule, Schedule) else self.schedule(spec.steps, guidance)
        if len(schedule) != spec.steps:
            raise ScheduleError(
                f"schedule {schedule.name!r} has {len(schedule)} steps, but this run has {spec.steps}; set the run's step count to "
                f"{len(schedule)}, or compile with a policy, which fits any step count"
            )
        return make_plan(schedule if spec.part is None else schedule.part(*spec.part), guidance)


class Run:
    """The state of one run: plan, caches, position. Dropped whole when the run ends."""

    def __init__(self, engine: Engine, describe: Callable[[], RunSpec]):
        self.engine = engine
        self.position = 0
        self.plan: Plan | None = None
        self.two_calls: TwoCalls | None = None
        self._describe = describe
        self._done: list[PlannedStep] = []
        self._failed: str | None = None
        self._notes: list[str] = []
        self._graphs: dict[tuple[Phase, Branch | None], Graphs] = {}

    def __len__(self) -> int:
        return len(self.plan.steps) if self.plan is not None else 0

    def fits(self, arguments: dict[str, Any]) -> bool:
        return self.plan is None or self._key(arguments) == self._first_key

    def _key(self, arguments: dict[str, Any]) -> tuple:
        latents = self.engine.family.latents(arguments)
        return latents.shape, latents.dtype, latents.device

    def _note(self, note: str | None) -> None:
        if note:
            self._notes.append(note)

    def _begin(self, arguments: dict[str, Any]) -> None:
        engine, family = self.engine, self.engine.family
        self._note(engine.check_model())
        spec = self._describe()
        self._first_key, self.shapes = self._key(arguments), on_meta(arguments)
        self._check_frames(spec, family.latents(arguments))
        order = BATCH_ORDER.get(spec.order, spec.order)
        shapes: Shapes = family
        batch, device = family.latents(arguments).shape[0], self._first_key[2]
        if spec.order in BATCH_ORDER:
            self.two_calls, shapes, batch = TwoCalls(self, spec.order), BothCalls(family), 2 * batch
        if spec.order != "none" and batch % 2:
            raise RunError(
                f"a batch of {batch} cannot be split in two branches: with guidance ({spec.order}) a call holds one row of each branch for "
                "every prompt; pass an even batch, or cfg='none' for a model without guidance"
            )
        plan = engine.plan_for(spec)
        if self.two_calls is None and any(step.rebuild for step in plan.steps):
            family.narrow(arguments, batch, branch_rows(batch, order, ("cond",)))  # what cannot be split is said now
        self.autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
        dtype = self.autocast or family.dtype(engine.model, arguments)
        self.planned, note = engine.budget.choose(partial(plan_cache, shapes, engine.model, engine.sites, plan, arguments, dtype), device)
        self._note(note)
        if note:
            logger.info(note)
        self.cache: Cache | None = engine.cache_for(self.planned, len(plan.groups), device)
        self.cache_bytes = self.cache.bytes
        self.table = engine.table_for(plan, device)
        self.groups = [GroupState(row) for row in self.cache.group_rows]
        engine.open_gates(plan, self.cache, self.groups)
        self.attention = engine.attention.backends
        self.order, self.batch, self.guidance, self.plan = order, batch, spec.order, plan

    def _check_frames(self, spec: RunSpec, latents: torch.Tensor) -> None:
        """`RunError` for a pipeline that samples a video in several loops, each of as many calls as a run has."""
        channels = getattr(getattr(self.engine.model, "config", None), "in_channels", None)
        if spec.frames is None or latents.dim() != 5 or channels not in latents.shape[1:3]:
            return
        frames = latents.shape[2 if latents.shape[1] == channels else 1]
        if frames < spec.frames:
            raise RunError(
                f"the video has {spec.frames} latent frames, but this call {frames}: the pipeline samples it in several loops, and a call "
                "of a pipeline is one run of the schedule; ask for fewer frames, or run inside fastercache.disabled"
            )

    def call(self, original: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        """One step: run the branches that the plan names and give back what the untouched model would, rows of both branches included."""
        if self._failed is not None:
            raise RunError(f"this run was ended by an error ({self._failed}); begin a new one")
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.engine.model.parameters()):
            raise RunError(
                "a cached run keeps no graph, so gradients would be wrong: call the model under torch.no_grad(), or inside "
                "fastercache.disabled"
            )
        try:
            if self.plan is None:
                graphs = self.engine.graphs
                self.engine.attention.settle(original, arguments, None if graphs is None else graphs.options.backend)
                self._begin(arguments)
            assert self.plan is not None
            if self.position >= len(self.plan.steps):
                raise RunError(
                    f"call {self.position + 1} in a run of {len(self.plan.steps)} steps; a run ends when its pipeline call or its "
                    "`with fastercache.run(...)` block does, and a pipeline that samples in several loops is not supported"
                )
            if self._key(arguments) != self._first_key:
                shape, dtype, device = self._first_key
                now = self._key(arguments)
                raise RunError(
                    f"step {self.position + 1} has latents {list(now[0])} ({now[1]}, {now[2]}), but the run began with {list(shape)} "
                    f"({dtype}, {device}); guidance and shapes stay the same within a run, so begin a new one"
                )
            self.engine.labels.check(self.guidance, None if self.two_calls is None else self.two_calls.branch)
            if self.engine.on_phase is not None:
                self._warm_up(original, arguments, self.engine.on_phase)
            output = self._step(original, arguments, self.position)
        except BaseException as error:
            self._failed = f"{type(error).__name__}: {error}"
            self._finish()
            refusal = self.engine.attention.refusal(error)
            if refusal is not None:
                raise refusal from error
            raise
        if self.two_calls is None or not self.two_calls.between:
            self._done.append(self.plan.steps[self.position])
            self.position += 1
            if self.position == len(self.plan.steps):
                self._finish()
        return output

    def _warm_up(self, original: Callable[..., Any], arguments: dict[str, Any], on_phase: Callable[[int, int], None]) -> NoReturn:
        """Run each phase on the first call's inputs, which compiles it, and leave the run."""
        assert self.plan is not None
        phases = [step.phase for step in self.plan.steps]
        for number, phase in enumerate(self.plan.phases):
            on_phase(number, len(self.plan.phases))
            for _ in range(self.engine.calls_to_warm_up * (1 if self.two_calls is None else 2)):
                self._step(original, arguments, phases.index(phase))
        raise WarmedUp

    def _step(self, original: Callable[..., Any], arguments: dict[str, Any], index: int) -> Any:
        assert self.plan is not None and self.cache is not None
        step = self.plan.steps[index]
        self.cache.rows.copy_(self.table[index])
        if self.two_calls is not None:
            return self.two_calls.call(original, arguments, step)
        return self._rebuild(original, arguments, step) if step.rebuild else self._full(original, arguments, step)

    def _finish(self) -> None:
        """Let go of the caches: what follows in a pipeline, the decoder above all, may need the memory."""
        self.engine.close_gates()
        self.cache = None

    def _full(self, original: Callable[..., Any], arguments: dict[str, Any], step: PlannedStep) -> Any:
        output = self.forward(original, arguments, step)
        if step.split:
            family = self.engine.family
            prediction = family.planes(family.prediction(output), arguments)
            self.split(*(prediction[branch_rows(self.batch, self.order, (branch,))] for branch in ("uncond", "cond")))
        return output

    def forward(self, original: Callable[..., Any], arguments: dict[str, Any], step: PlannedStep, branch: Branch | None = None) -> Any:
        """Call the model with its sites acting as the step says; `branch`: the one this call runs, where the step is two calls."""
        assert self.plan is not None
        for state, group, planned in zip(self.groups, self.plan.groups, step.groups, strict=True):
            if branch is None:
                state.set(group, planned, step.branches, self.order)
            else:
                kept = replace(planned, push=(branch,) if branch in planned.push else ())
                state.set(group, kept, (branch,), self.order)
        compiled = self.engine.graphs
        if compiled is None:
            return original(**arguments)
        graphs = self._graphs.get((step.phase, branch))
        if graphs is None:
            pushed = tuple(planned.push for planned in step.groups)  # of two runs, one may need what the other does not
            phase = (self.order, self.planned.format, self.plan.groups, step.phase, pushed, branch)
            graphs = self._graphs[step.phase, branch] = compiled.of((self.attention, *input_signature(arguments)), phase)
        return compiled.call(original, graphs, arguments)

    def _rebuild(self, original: Callable[..., Any], arguments: dict[str, Any], step: PlannedStep) -> Any:
        family = self.engine.family
        rows = branch_rows(self.batch, self.order, ("cond",))
        output = self.forward(original, family.narrow(arguments, self.batch, rows), step)
        cond = family.planes(family.prediction(output), arguments)
        return family.with_prediction(output, family.unplaned(self.reconstruct(cond), arguments))

    def split(self, uncond: torch.Tensor, cond: torch.Tensor) -> None:
        """Store the difference of the two branches' predictions in its two bands (Eq. 6, 7)."""
        assert self.plan is not None and self.cache is not None
        radius = min(cond.shape[-2:]) // self.plan.schedule.radius_divisor
        ops.cfg_split(self.cache.low, self.cache.high, uncond, cond, radius)

    def reconstruct(self, cond: torch.Tensor) -> torch.Tensor:
        """Both branches' predictions, in the order of the run, from the conditional one and the stored difference (Eq. 11)."""
        assert self.cache is not None
        both = torch.empty((2 * len(cond), *cond.shape[1:]), dtype=cond.dtype, device=cond.device)
        ops.cfg_reconstruct(both, cond, self.cache.low, self.cache.high, self.cache.guidance_row, int(self.order == "uncond-first"))
        return both

    def _ops_run(self) -> set[str]:
        """Names of the ops that the steps made so far have called."""
        kind = "ring" if self.planned.format == "model" else "packed"
        ran = set()
        for step in self._done:
            ran |= {f"{kind}_blend" for group in step.groups if group.blend} | {f"{kind}_push" for group in step.groups if group.push}
            ran |= ({"cfg_split"} if step.split else set()) | ({"cfg_reconstruct"} if step.rebuild else set())
        return ran

    def summary(self, note: str | None) -> Summary:
        assert self.plan is not None
        engine, device = self.engine, self._first_key[-1]
        implementations = {op: ops.implementations()[op][device.type] for op in sorted(self._ops_run())}
        notes = [note] if note else []
        self._note(engine.graphs.end_run() if engine.graphs is not None else None)
        notes += self._notes + engine.attention.notes
        compiled = "" if engine.graphs is None else engine.graphs.describe()
        if self.position < len(self.plan.steps) and note is None:
            notes.append(f"stopped after {self.position} of {len(self.plan.steps)} steps")
        notes += ops.fallback_reasons()
        plan = self.plan

        def count() -> flops.RunFlops:
            with engine.attention.natively():  # the operations of other kernels are not known to torch's counter
                return flops.count_run(engine.model, engine.family, engine.sites, plan, self.guidance, self.shapes, self.autocast)

        return Summary(
            model=type(engine.model).__name__, family=engine.family.name, schedule=self.plan.schedule.name, guidance=self.guidance,
            steps=len(self.plan.steps), steps_done=self.position, sites=count_sites(self.plan, engine.sites, self._done),
            cache_format=self.planned.format, cache_bytes_planned=self.planned.bytes, cache_bytes=self.cache_bytes,
            implementations=implementations, compiled=compiled, notes=notes,
            chart=self.plan.schedule.chart() if self.plan.guidance else self.plan.schedule.chart().splitlines()[0], _count_flops=count,
        )  # fmt: skip
