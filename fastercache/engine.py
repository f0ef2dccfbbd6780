"""Runs a schedule on a model: patches its `forward` and its sites, and carries the state of one run at a time.

Nothing is decided here while sampling. A run begins with the first call of the denoiser, when the shapes are known: the schedule becomes
a plan, the caches are allocated, the table of coefficients is uploaded. Step i copies row i of the table into a fixed tensor
and runs the model; at each site the gate either blends, or computes and stores.
"""

from __future__ import annotations

import inspect
import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from fastercache import flops, ops
from fastercache.errors import FasterCacheWarning, RunError, ScheduleError
from fastercache.families import BranchOrder, Family, Site
from fastercache.memory import Cache, CacheBudget, branch_rows, plan_cache
from fastercache.patching import ForwardPatch
from fastercache.plan import Plan, PlannedStep, group_of, make_plan
from fastercache.policies import Policy
from fastercache.report import Summary, count_sites
from fastercache.schedule import Schedule

logger = logging.getLogger("fastercache")


@dataclass(frozen=True)
class RunSpec:
    """How many calls of the denoiser a run has, and how a call's batch is made of branches."""

    steps: int
    order: BranchOrder


class Engine:
    """The accelerated state of one model. Made by `fastercache.compile`; `detach` leaves the model as it was."""

    def __init__(self, model: nn.Module, family: Family, schedule: Schedule | Policy, default: RunSpec | None, budget: CacheBudget):
        self.model, self.family, self.schedule, self.default, self.budget = model, family, schedule, default, budget
        self.enabled = True
        self.last: Summary | None = None
        self._run: Run | None = None
        self._owner: int | None = None
        self._in_scope = False
        self._said_uncached = False
        self.sites: list[Site] = family.sites(model)
        self._signature = inspect.signature(type(model).forward)
        self._site_patches = [ForwardPatch(site.module, partial(self._at_site, index)) for index, site in enumerate(self.sites)]
        self._model_patch = ForwardPatch(model, self._at_model)

    def detach(self) -> None:
        """Take every patch out and free the caches. Refused while a run is under way in a scope."""
        if self._in_scope:
            raise RunError("a run is under way; restore the model after it has ended")
        for patch in (self._model_patch, *self._site_patches):
            patch.remove()
        self._run = None

    def release(self) -> None:
        """Free the caches of a run that was left before its last step. Refused while a run is under way in a scope."""
        if self._in_scope:
            raise RunError("a run is under way, and needs its caches; release them after it has ended")
        self._end("released before its last step")

    # ---- runs -----------------------------------------------------------------------------------------------------------------------

    @contextmanager
    def scope(self, describe: Callable[[], RunSpec]) -> Iterator[None]:
        """All calls of the model inside belong to one run, whose spec is asked for at the first of them."""
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
            self._end(None)
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

    def _end(self, note: str | None) -> None:
        run, self._run = self._run, None
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
        bound = self._signature.bind(self.model, *args, **kwargs)
        arguments = dict(bound.arguments)
        arguments.pop(next(iter(self._signature.parameters)))
        for parameter in self._signature.parameters.values():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                arguments.update(arguments.pop(parameter.name, {}))
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

    def _at_site(self, index: int, original: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        run = self._run
        if run is None or run.current is None:
            return original(*args, **kwargs)
        return run.site(index, original, args, kwargs)

    def plan_for(self, spec: RunSpec) -> Plan:
        """The plan of a run; `ScheduleError` if a fixed schedule has another length."""
        guidance = spec.order != "none"
        if isinstance(self.schedule, Schedule):
            schedule, asked = self.schedule, not self.schedule.skips_nothing
            if len(schedule) != spec.steps:
                raise ScheduleError(
                    f"schedule {schedule.name!r} has {len(schedule)} steps, but this run has {spec.steps}; set the run's step count to "
                    f"{len(schedule)}, or compile with a policy, which fits any step count"
                )
        else:
            schedule = self.schedule(spec.steps, guidance)
            # Long enough for any policy that skips at all to do so.
            asked = not self.schedule(120, True).skips_nothing
        plan = make_plan(schedule, guidance)
        if asked and plan.skips_nothing:
            why = "this run has no guidance" if not guidance and spec.steps >= 6 else f"a run of {spec.steps} steps is too short for it"
            self._warn(f"schedule {schedule.name!r} skips nothing here: {why}; the run gains no speed")
        return plan


class Run:
    """The state of one run: plan, caches, position. Dropped whole when the run ends."""

    def __init__(self, engine: Engine, describe: Callable[[], RunSpec]):
        self.engine = engine
        self.position = 0
        self.plan: Plan | None = None
        self.current: PlannedStep | None = None
        self._describe = describe
        self._done: list[PlannedStep] = []
        self._failed: str | None = None
        self._used: set[str] = set()
        self._notes: list[str] = []

    def __len__(self) -> int:
        return len(self.plan.steps) if self.plan is not None else 0

    def fits(self, arguments: dict[str, Any]) -> bool:
        return self.plan is None or self._key(arguments) == self._first_key

    def _key(self, arguments: dict[str, Any]) -> tuple:
        latents = self.engine.family.latents(arguments)
        return tuple(latents.shape), latents.dtype, latents.device

    def _begin(self, arguments: dict[str, Any]) -> None:
        engine, family = self.engine, self.engine.family
        spec = self._describe()
        latents = family.latents(arguments)
        batch, device = latents.shape[0], latents.device
        if spec.order != "none" and batch % 2:
            raise RunError(
                f"a batch of {batch} cannot be split in two branches: with guidance ({spec.order}) a call holds one row of each branch for "
                "every prompt; pass an even batch, or cfg='none' for a model without guidance"
            )
        plan = engine.plan_for(spec)
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else latents.dtype
        self.planned, note = engine.budget.choose(partial(plan_cache, family, engine.model, engine.sites, plan, arguments, dtype), device)
        if note:
            self._notes.append(note)
            logger.info(note)
        self.cache: Cache | None = Cache(self.planned, spec.order, device)
        self.cache_bytes = self.cache.bytes
        self.site_group = [group_of(plan.groups, site.kind, site.layer) for site in engine.sites]
        for group_index, group in enumerate(plan.groups):
            if group_index not in self.site_group:
                kinds = ", ".join(dict.fromkeys(site.kind for site in engine.sites))
                raise ScheduleError(
                    f"schedule {plan.schedule.name!r} reuses {group.selector!r}, but {family.name} has no such site; it has {kinds}"
                )
        self.table = torch.tensor(plan.table(), dtype=torch.float32).to(device)
        self.rows = torch.zeros_like(self.table[0])
        self.order, self.batch, self._first_key = spec.order, batch, self._key(arguments)
        self.shapes = flops.shapes_only(arguments)
        self.plan = plan

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
                self._begin(arguments)
            assert self.plan is not None
            if self.position >= len(self.plan.steps):
                raise RunError(
                    f"call {self.position + 1} in a run of {len(self.plan.steps)} steps; a run ends when its pipeline call or its "
                    "`with fastercache.run(...)` block does"
                )
            if self._key(arguments) != self._first_key:
                shape, dtype, device = self._first_key
                now = self._key(arguments)
                raise RunError(
                    f"step {self.position + 1} has latents {list(now[0])} ({now[1]}, {now[2]}), but the run began with {list(shape)} "
                    f"({dtype}, {device}); guidance and shapes stay the same within a run, so begin a new one"
                )
            step = self.plan.steps[self.position]
            self.rows.copy_(self.table[self.position])
            self.current = step
            output = self._rebuild(original, arguments) if step.rebuild else self._full(original, arguments, step)
        except BaseException as error:
            self._failed = f"{type(error).__name__}: {error}"
            raise
        finally:
            self.current = None
        self._done.append(step)
        self.position += 1
        if self.position == len(self.plan.steps):
            self.cache = None  # what follows in a pipeline, the decoder above all, may need the memory
        return output

    def _full(self, original: Callable[..., Any], arguments: dict[str, Any], step: PlannedStep) -> Any:
        output = original(**arguments)
        if step.split:
            prediction = self.engine.family.prediction(output)
            uncond, cond = (prediction[branch_rows(self.batch, self.order, (branch,))] for branch in ("uncond", "cond"))
            assert self.plan is not None and self.cache is not None
            radius = min(prediction.shape[-2:]) // self.plan.schedule.radius_divisor
            self._op(ops.cfg_split, self.cache.low, self.cache.high, uncond, cond, radius)
        return output

    def _rebuild(self, original: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        family = self.engine.family
        rows = branch_rows(self.batch, self.order, ("cond",))
        output = original(**family.narrow(arguments, self.batch, rows))
        cond = family.prediction(output)
        assert self.cache is not None
        both = torch.empty((self.batch, *cond.shape[1:]), dtype=cond.dtype, device=cond.device)
        self._op(ops.cfg_reconstruct, both, cond, self.cache.low, self.cache.high, self.rows[-1], int(rows.start > 0))
        return family.with_prediction(output, both)

    def site(self, index: int, original: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """At a site: blend the cached outputs, or compute and store the rows that a later step will read."""
        group = self.site_group[index]
        if group is None:
            return original(*args, **kwargs)
        assert self.current is not None and self.cache is not None
        planned, row = self.current.groups[group], self.rows[group]
        if planned.blend:
            outputs = tuple(ring.blend(self._op, row) for ring in self.cache.rings(index, self.current.branches))
            return outputs if len(outputs) > 1 else outputs[0]
        output = original(*args, **kwargs)
        if planned.push:
            computed = output if isinstance(output, tuple) else (output,)
            for ring, tensor in zip(self.cache.rings(index, planned.push), computed, strict=True):
                ran = self.order if len(self.current.branches) == 2 else "none"
                ring.push(self._op, tensor[branch_rows(tensor.shape[0], ran, planned.push)], row)
        return output

    def _op(self, op: Callable[..., Any], *args: Any) -> Any:
        self._used.add(op.__name__)
        return op(*args)

    def summary(self, note: str | None) -> Summary:
        assert self.plan is not None
        engine, device = self.engine, self.rows.device
        implementations = {op: ops.implementations()[op][device.type] for op in sorted(self._used)}
        notes = [note] if note else []
        notes += self._notes
        if self.position < len(self.plan.steps) and note is None:
            notes.append(f"stopped after {self.position} of {len(self.plan.steps)} steps")
        notes += ops.fallback_reasons()
        forward = type(engine.model).forward.__get__(engine.model)
        count = partial(flops.count_run, engine.model, forward, engine.family, engine.sites, self.plan, self.order, self.shapes)
        return Summary(
            model=type(engine.model).__name__, family=engine.family.name, schedule=self.plan.schedule.name, guidance=self.order,
            steps=len(self.plan.steps), steps_done=self.position, sites=count_sites(self.plan, engine.sites, self._done),
            cache_format=self.planned.format, cache_bytes_planned=self.planned.bytes, cache_bytes=self.cache_bytes,
            implementations=implementations, notes=notes,
            chart=self.plan.schedule.chart() if self.plan.guidance else self.plan.schedule.chart().splitlines()[0], _count_flops=count,
        )  # fmt: skip
