"""The accelerated state of one model, and what a run of it begins with.

Nothing is decided here while sampling. A run begins with the first call of the denoiser, when the shapes are known: the
schedule becomes a plan, the caches are allocated, the table of coefficients is uploaded.
"""

from __future__ import annotations

import inspect
import logging
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache, partial
from typing import Any, NoReturn

import torch
from torch import nn

from fastercache import ops
from fastercache.cache.budget import CacheBudget, Caches, Limit
from fastercache.cache.cache import Cache, CachePlan, ordinary_tensors, plan_cache
from fastercache.cache.formats import format_of
from fastercache.errors import RunError, ScheduleError, UnsupportedModelError, warn
from fastercache.models.family import Family
from fastercache.models.hooks import comes_and_goes, devices_of, modules_of, refuse_others_at_work
from fastercache.models.patching import ForwardPatch
from fastercache.report.summary import Summary, ops_called
from fastercache.runtime.gated import GatedModel
from fastercache.runtime.graphs import GraphOptions, input_signature
from fastercache.runtime.host import Host
from fastercache.runtime.run import Run, RunSpec, input_key
from fastercache.runtime.scopes import Scope, Scopes
from fastercache.runtime.summary import summary_of
from fastercache.schedule.branches import BranchLayout
from fastercache.schedule.carried import Carried
from fastercache.schedule.plan import Plan, make_plan
from fastercache.schedule.policies import Policy, built, means_to_skip
from fastercache.schedule.schedule import Schedule
from fastercache.schedule.signature import Signature

logger = logging.getLogger("fastercache")

MOST_PLANNED = 16
"""Kinds of calls whose plans of caches are kept: planning them again takes longer than all that a run does else."""


class WarmedUp(Exception):
    """Leaves the pipeline's call that `Engine.warming_up` began, once every phase has run."""


class Engine:
    """Made by `fastercache.compile`; `detach` leaves the model as it was.

    scopes: which call belongs to which run. pipelines: those whose calls are runs of this engine. last: the summary of
    the last run. warmed_up: whether the last `warming_up` came to compile anything.
    """

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        schedule: Schedule | Policy,
        default: RunSpec | None,
        budget: CacheBudget,
        options: GraphOptions | None,
        host: Callable[[nn.Module], Host],
    ):
        self.model, self.family, self.schedule, self.default = model, family, schedule, default
        # Whatever may refuse the model or the schedule comes first; patches are put in last.
        self._meant_to_skip = means_to_skip(schedule)
        self.last: Summary | None = None
        self.pipelines: list[weakref.ref[Any]] = []
        self.warmed_up = False
        self._on_phase: Callable[[int, int], None] | None = None
        self._said_doubtful = False
        self.scopes = Scopes(type(model).__name__, family.time, default, self._at_end)
        self._parameters = tuple(inspect.signature(type(model).forward).parameters)[1:]
        self._plans: dict[RunSpec, Plan] = {}
        self._tables: dict[tuple[int, torch.device], tuple[torch.Tensor, ...]] = {}
        self._caches = Caches(budget)
        self._activations: dict[Hashable, tuple[int, str]] = {}
        self._planners: dict[Hashable, Callable[[str], CachePlan]] = {}
        self.gated = GatedModel(model, family, options)
        self._patch: ForwardPatch | None = None
        try:
            self.host = host(model)
        except BaseException:
            self.gated.detach()
            raise
        try:
            self._patch = ForwardPatch(model, self._at_model)
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Take every patch out and free the caches. Refused while a run is under way in a block."""
        self.scopes.refuse_under_way("restore the model")
        if self._patch is not None:
            self._patch.remove()
        self.gated.detach()
        self.host.detach()
        self.scopes.current = None
        self._caches.free()
        self._tables.clear()

    def release(self) -> None:
        """Free the caches: of a run that was left before its last step, and those that graphs keep. Refused while a run
        is under way."""
        self.scopes.refuse_under_way("release its caches, which it needs,")
        self.scopes.end("released before its last step")
        self._caches.free()

    # ---- what a run begins with --------------------------------------------------------------------------------------

    def _begin(self, spec: RunSpec, arguments: dict[str, Any]) -> Run:
        """The run whose first call has these arguments."""
        family, layout = self.family, spec.layout
        notes = [note for note in (self._check_model(),) if note]
        _, _, device = input_key(self.gated, arguments)
        batch = len(family.latents(arguments)) * (2 if layout.two_calls else 1)
        _check_frames(spec, self.model, family.latents(arguments))
        if layout.guided and batch % 2:
            raise RunError(
                f"a batch of {batch} cannot be split in two branches: with guidance ({layout.name}) a call holds one "
                "row of each branch for every prompt; pass an even batch, or cfg='none' for a model without guidance"
            )
        plan = self.plan_for(spec)
        if isinstance(self.schedule, Carried):
            notes.append(self.schedule.choice(spec.steps, layout.guided, spec.scheduler)[1])
        if layout.guided and not layout.two_calls and plan.maps:
            # What cannot be split is said now.
            family.refuse_nested(arguments, batch)
            family.narrow(arguments, batch, layout.rows(batch, ("cond",)))
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else family.dtype(self.model, arguments)
        signature = None if plan.schedule.made_for is None else self._signature(plan, spec, arguments, dtype)
        if (processes := self.host.processes) is not None:
            processes.agree(plan, layout, self._caches.budget, arguments, any(step.rebuild for step in plan.steps))
        plan_in = self._planner(plan, layout, arguments, dtype)
        cache, cache_notes = self._cache_for(plan_in, device, arguments)
        if device.type == "cuda" and not self._prepare(
            plan, cache.plan, dtype, device
        ):  # its format is no choice any more
            cache, cache_notes = self._cache_for(plan_in, device, arguments)
            self._prepare(plan, cache.plan, dtype, device)
        if processes is not None:
            processes.keeps(cache.plan, self.gated.sites, arguments)
        for note in cache_notes:
            logger.info(note)
        if signature is not None:
            notes += self._doubts(plan.schedule, replace(signature, cache_format=cache.plan.format))
        table = self._table_for(plan, device)
        return Run(self.gated, self.host, plan, spec, cache, table, arguments, batch, notes + cache_notes)

    def _signature(self, plan: Plan, spec: RunSpec, arguments: Mapping[str, Any], dtype: torch.dtype) -> Signature:
        """The signature of a run whose schedule says what it was made for; `ScheduleError` if its coefficients would be
        wrong here."""
        schedule, shape = plan.schedule, self.family.latents(arguments).shape[1:]
        signature = self.host.signature(spec.steps, shape, dtype, plan.guided)
        if spec.caller is not None and spec.caller.signed is not None:
            signature = spec.caller.signed(signature)
        assert schedule.made_for is not None
        wrong = schedule.made_for.differences(signature).wrong
        if wrong:
            raise ScheduleError(
                f"schedule {schedule.name!r} was made for other runs than this: {'; '.join(wrong)}; make one for this "
                "run with fastercache.calibrate, or compile with a policy, such as 'paper', which fits any run"
            )
        return signature

    def _doubts(self, schedule: Schedule, signature: Signature) -> list[str]:
        """A note for the summary on what a run has that the schedule was not made for; the first is warned of, too."""
        assert schedule.made_for is not None
        if not schedule.selectors:  # no result of a site is stored in any format
            signature = replace(signature, cache_format=None)
        doubtful = schedule.made_for.differences(signature).doubtful
        if not doubtful:
            return []
        note = f"schedule {schedule.name!r} was made for other runs than this: {'; '.join(doubtful)}"
        if not self._said_doubtful:
            self._said_doubtful = True
            warn(f"{note}; what was measured of it need not hold here. fastercache.calibrate makes one for such runs")
        return [note]

    def _planner(
        self, plan: Plan, layout: BranchLayout, arguments: Mapping[str, Any], dtype: torch.dtype
    ) -> Callable[[str], CachePlan]:
        """Plans the caches in a format, for calls with such arguments: two calls of a step are two halves of what is
        kept."""
        key = id(plan), layout, dtype, input_signature(arguments)
        if key in self._planners:
            return self._planners[key]
        if len(self._planners) >= MOST_PLANNED:
            self._planners.clear()
        family, model = self.family, self.model

        def whole(shape: torch.Size) -> torch.Size:
            return torch.Size((2 * shape[0], *shape[1:])) if layout.two_calls else shape

        kept = [index for index, number in enumerate(plan.cadence_of) if plan.cadences[number].slots]
        shapes = {index: [whole(shape) for shape in self._shapes_of(index, plan, arguments)] for index in kept}
        from fastercache.models.skeleton import on_meta  # it needs private names of torch's

        # Asked for later, and kept longer than the tensors of this call should be.
        without_memory = on_meta(arguments)
        prediction, planes = (
            partial(family.prediction_shape, model, without_memory),
            partial(family.planes_shape, model, without_memory),
        )
        plan_in = partial(
            plan_cache, plan, shapes.__getitem__, lambda: whole(prediction()), lambda: whole(planes()), dtype
        )
        self._planners[key] = cache(plan_in)
        return self._planners[key]

    def _shapes_of(self, index: int, plan: Plan, arguments: Mapping[str, Any]) -> tuple[torch.Size, ...]:
        """What is kept of a site; where it cannot be, the error says at which step it is first reused."""
        site = self.gated.sites[index]
        try:
            shapes = self.family.site_shapes(self.model, site, arguments)
        except UnsupportedModelError as error:
            step = next(number for number in range(len(plan.steps)) if plan.action(index, number) == "blend")
            raise UnsupportedModelError(
                f"schedule {plan.schedule.name!r}, step {step + 1} reuses the {site.node} of "
                f"{type(self.model).__name__}, which is not possible: {error}"
            ) from error
        processes = self.host.processes
        return shapes if processes is None else processes.local_shapes(site, arguments, shapes)

    def _prepare(self, plan: Plan, planned: CachePlan, dtype: torch.dtype, device: torch.device) -> bool:
        """Launch each op of the run once; whether what the caches need can be had."""
        form = format_of(planned.format)
        lines = {(ring.shape[-1], form.bits(ring)) for ring in planned.rings if form.ops}
        shape = planned.map_shape
        planes = (shape[-2], shape[-1], min(shape[-2:]) // plan.schedule.radius_divisor) if shape else None
        called = ops_called(plan, len(plan.steps), form.ops)
        return ops.prepare(called, device, dtype, lines, planes, planned.prediction_shape or None)

    def _cache_for(
        self, plan_in: Callable[[str], CachePlan], device: torch.device, arguments: dict[str, Any]
    ) -> tuple[Cache, list[str]]:
        """The caches of a run and notes on them: the run's own, but where CUDA graphs have recorded their addresses.

        arguments: of the first call, from which what a step takes is counted where it matters.
        """

        from fastercache.cache import room  # it needs private names of torch's

        def room_on_device(wanted: int, kept: int) -> Limit | None:
            limit = room.room(device, wanted, kept, lambda: self._activations_of(arguments, device))
            return limit if self.host.processes is None else self.host.processes.least(limit)

        graphs = self.gated.graphs
        keep = graphs is not None and graphs.cuda_graphs and not comes_and_goes(self.model)
        return self._caches.for_run(plan_in, device, keep, room_on_device)

    def _activations_of(self, arguments: dict[str, Any], device: torch.device) -> tuple[int, str]:
        """Bytes that a step takes beside weights and caches, and how they were found."""
        from fastercache.cache import room

        key = device, torch.is_autocast_enabled(device.type), input_signature(arguments)
        if key not in self._activations:
            try:
                with self.host.natively():  # no count knows what other kernels give
                    counted = room.activation_bytes(self.model, self.family.countable(arguments))
                self._activations[key] = counted, "counted on its shapes"
            except Exception as error:  # whatever a model raises that reads the values of its inputs
                found = room.memory_of(device)
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                self._activations[key] = (
                    (found[1] // 4 if found else 0),
                    f"a quarter of all, as it cannot be counted ({reason})",
                )
        return self._activations[key]

    def _check_model(self) -> str | None:
        """`CompileError` if the model is not one that was compiled any more, `RunError` if it is on several devices; a
        note if it is one that costs new graphs."""
        modules = modules_of(self.model)
        refuse_others_at_work(self.model, modules)
        devices = devices_of(self.model, modules)
        if len(devices) > 1:
            raise RunError(
                f"this {type(self.model).__name__} is spread over {len(devices)} devices ({', '.join(devices)}), and "
                "the caches of a run lie on one; load it without a device_map, on one device, or offload what does "
                "not fit (enable_model_cpu_offload)"
            )
        return self.gated.check(modules)

    def _table_for(self, plan: Plan, device: torch.device) -> tuple[torch.Tensor, ...]:
        """The coefficients of each step on the device; uploaded once."""
        if (id(plan), device) not in self._tables:  # the plan itself stays in `_plans`
            with ordinary_tensors():
                table = torch.tensor(plan.table, dtype=torch.float32)
                # From pinned memory, as the host would wait for any other copy.
                uploaded = (
                    table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table.to(device)
                )
                self._tables[id(plan), device] = uploaded.unbind()
        return self._tables[id(plan), device]

    def plan_for(self, spec: RunSpec) -> Plan:
        """The plan of a run; `ScheduleError` if a fixed schedule has another length, or does not fit the model."""
        if spec not in self._plans:  # the caller is left out, as it holds the arguments of the pipeline's call
            self._plans[replace(spec, caller=None)] = self._make_plan(spec)
        plan = self._plans[spec]
        if self._meant_to_skip and plan.skips_nothing and self._skips_elsewhere_nothing(spec):
            why = f"a run of {spec.steps} steps is too short for it"
            if not plan.guided and not self._schedule_of(spec, with_guidance=True).skips_nothing:
                why = "it skips unconditional calls alone, and this run has no guidance"
            warn(f"schedule {plan.schedule.name!r} skips nothing here: {why}; the run gains no speed")
        return plan

    def _skips_elsewhere_nothing(self, spec: RunSpec) -> bool:
        """Whether the steps that are not this model's, where it has a part of them, skip nothing as a part of their own
        either."""
        if spec.part is None:
            return True
        schedule, (start, stop) = self._schedule_of(spec), spec.part
        others = [schedule.part(*part) for part in ((0, start), (stop, spec.steps)) if part[0] < part[1]]
        return all(make_plan(other, spec.layout.guided, self.gated.tree).skips_nothing for other in others)

    def _schedule_of(self, spec: RunSpec, with_guidance: bool = False) -> Schedule:
        """The schedule of a run. with_guidance: the policy's for the same run with guidance; a carried one is what it
        is."""
        guided = spec.layout.guided or (with_guidance and not isinstance(self.schedule, Carried))
        return built(self.schedule, spec.steps, guided, spec.scheduler)

    def _make_plan(self, spec: RunSpec) -> Plan:
        schedule = self._schedule_of(spec)
        if len(schedule) != spec.steps:
            asked = None if spec.caller is None else spec.caller.asked
            calls = (
                "" if asked in (None, spec.steps) else f" (its sampler makes as many of num_inference_steps={asked})"
            )
            remedies = [] if calls else [f"set the run's step count to {len(schedule)}"]
            if schedule.made_for is not None:
                remedies.append(f"make one for {spec.steps} steps with fastercache.calibrate")
            remedies.append("compile with a policy, which fits any step count")
            if calls:
                remedies.append(f"with a schedule of {spec.steps} steps")
            raise ScheduleError(
                f"schedule {schedule.name!r} has {len(schedule)} steps, but this run has {spec.steps}{calls}; "
                f"{', or '.join(remedies)}"
            )
        schedule = schedule if spec.part is None else schedule.part(*spec.part)
        return make_plan(schedule, spec.layout.guided, self.gated.tree, self.family.name)

    # ---- from the first call to the last -----------------------------------------------------------------------------

    @contextmanager
    def scope(self, describe: Callable[[], RunSpec], what: str, may_be_idle: bool = False) -> Iterator[None]:
        """All calls of the model inside belong to one run, whose spec is asked for at the first of them. Without a
        call, it warns.

        what: the block, for that warning.
        """
        if self.scopes.is_disabled:
            yield
            return
        refuse_others_at_work(self.model)
        with self.scopes.block(describe, what, may_be_idle):
            yield

    @contextmanager
    def warming_up(self, on_phase: Callable[[int, int], None]) -> Iterator[None]:
        """The first call of the denoiser inside runs each phase once, after `on_phase(number, phases)`, and ends the
        block."""
        last, self._on_phase, self.warmed_up = self.last, on_phase, False
        try:
            yield
        except WarmedUp:
            self.warmed_up = True
        finally:
            self._on_phase, self.last = None, last

    def _warm_up(self, run: Run, original: Callable[..., Any], arguments: dict[str, Any]) -> NoReturn:
        """Run each phase on the first call's inputs, which compiles it, and leave the run."""
        assert self._on_phase is not None
        graphs = self.gated.graphs
        # CUDA graphs run once as they are, are recorded, and then replayed.
        times = 3 if graphs is not None and graphs.cuda_graphs else 1
        for number in range(len(run.plan.phases)):
            self._on_phase(number, len(run.plan.phases))
            run.rehearse(original, arguments, number, times)
        raise WarmedUp

    def _at_end(self, scope: Scope, note: str | None) -> None:
        """A scope has ended. note: how, where that was not after its last step."""
        self.gated.close()
        run = scope.run
        if run is None:
            if note is None:
                name = type(self.model).__name__
                if self._patch is not None and self._patch.in_place:
                    warn(f"{scope.what} made no call of {name}, so there was nothing to cache")
                else:
                    warn(
                        f"{scope.what} made no call of the denoiser that fastercache saw: something replaced its "
                        "forward since fastercache.compile; call fastercache.restore and compile again"
                    )
            return
        if not run.finite_at_the_end(may_wait=bool(scope.what)):
            why = f"the prediction of the last step of {type(self.model).__name__} is not finite, so the video is none"
            run.notes.append(why)
            warn(
                f"{why}; see whether the uncached model gives one (fastercache.disabled), then look at the schedule's "
                "coefficients"
            )
        self.last = summary_of(run, note)
        if not run.plan.skips_nothing and note is None and run.done and not self.last.skipped_anything:
            warn(f"schedule {run.plan.schedule.name!r} was meant to skip work, but nothing was skipped")

    def _at_model(self, original: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        scopes, arguments = self.scopes, kwargs
        if scopes.is_disabled:
            return original(*args, **kwargs)
        if args:
            arguments = dict(zip(self._parameters, args, strict=False)) | kwargs
            if len(arguments) != len(args) + len(kwargs):
                inspect.signature(original).bind(*args, **kwargs)  # says what is given twice, or is one too many
        scope = scopes.enter(arguments)
        if scope is None:
            return original(*args, **kwargs)
        try:
            output = self._call(scope, original, arguments)
        except BaseException:
            scopes.leave(scope, failed=True)
            raise
        scopes.leave(scope, failed=False)
        return output

    def _call(self, scope: Scope, original: Callable[..., Any], arguments: dict[str, Any]) -> Any:
        # Asked first: asking all parameters takes longer than the rest of a step's work.
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.model.parameters()):
            raise RunError(
                "a cached run keeps no graph, so gradients would be wrong: call the model under torch.no_grad(), or "
                "inside fastercache.disabled"
            )
        if scope.failed is not None:
            raise RunError(f"this run was ended by an error ({scope.failed}); begin a new one")
        try:
            if scope.run is None:
                self.host.settle(
                    original, arguments, None if self.gated.graphs is None else self.gated.graphs.options.backend
                )
                processes = self.host.processes
                with nullcontext() if processes is None else processes.beginning():
                    scope.run = self._begin(scope.describe(), arguments)
            elif scope.what:  # outside of any block the call was looked at to find its run
                scope.run.check(arguments)
            if self._on_phase is not None:
                self._warm_up(scope.run, original, arguments)
            return scope.run.call(original, arguments)
        except BaseException as error:
            scope.failed = f"{type(error).__name__}: {error}"
            if scope.run is not None:
                scope.run.close()
            self.gated.close()
            refusal = self.host.refusal(error)
            if refusal is not None:
                raise refusal from error
            raise


def _check_frames(spec: RunSpec, model: nn.Module, latents: torch.Tensor) -> None:
    """`RunError` for a pipeline that samples a video in several loops, each of as many calls as a run has."""
    caller, channels = spec.caller, getattr(getattr(model, "config", None), "in_channels", None)
    if caller is None or caller.frames is None or latents.dim() != 5 or channels not in latents.shape[1:3]:
        return
    frames = latents.shape[2 if latents.shape[1] == channels else 1]
    if frames < caller.frames:
        raise RunError(
            f"the video has {caller.frames} latent frames, but this call {frames}: the pipeline samples it in several "
            "loops, and a call of a pipeline is one run of the schedule; ask for fewer frames, or run inside "
            f"fastercache.disabled. {caller.without(spec.steps, spec.layout.name)}"
        )
