"""One video over several processes: setting a model up for it, and what the processes of a group agree on before a run.

The work of a call is divided by `fastercache.models.parallel`. While a run lasts caching adds no communication: every
process has the same schedule, and an output is the same on all of them. So what could differ is compared once, when a
run begins, and an error on one process is raised on all.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from fastercache.cache.budget import CacheBudget, Limit
from fastercache.cache.cache import CachePlan
from fastercache.cache.formats import format_of
from fastercache.errors import CompileError, RunError, ScheduleError, UnsupportedModelError
from fastercache.host import pipelines
from fastercache.models.parallel import Division, Group, Shapes, division_of
from fastercache.models.patching import ForwardPatch
from fastercache.models.registry import family_of
from fastercache.models.site import Site
from fastercache.report.summary import Kept, Share
from fastercache.schedule.branches import BranchLayout
from fastercache.schedule.plan import Plan

logger = logging.getLogger("fastercache")

T = TypeVar("T")
KINDS = ("ulysses", "ring")
LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun tells each process by its environment."""
_DIVISION = "_fastercache_division"
_ROOT_HOOK = "cp_input---"
"""diffusers' hook that splits arguments of the model itself."""


# ---- setting up ------------------------------------------------------------------------------------------------------


def join_group() -> None:
    """Join the processes that a launcher has started, unless torch.distributed is initialized already.

    Raises:
        CompileError: no launcher has started this process, or it has started one alone.
    """
    dist = torch.distributed
    if not dist.is_available():
        raise CompileError("this torch is built without torch.distributed, so one process makes a video alone")
    if not dist.is_initialized():
        missing = [name for name in LAUNCHER if name not in os.environ]
        if missing:
            raise CompileError(
                f"several processes need a launcher, and {', '.join(missing)} is not set here; start with torchrun: "
                "torchrun --nproc-per-node 2 -m fastercache sample ... --context-parallel ulysses"
            )
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local < torch.cuda.device_count():
            torch.cuda.set_device(local)
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    if dist.get_world_size() < 2:
        raise CompileError(
            "one process has nobody to divide a video with; start at least two (torchrun --nproc-per-node 2), or leave "
            "context parallelism out"
        )


def refuse_shared_gpu() -> None:
    """`CompileError` if the launcher has started more processes on this machine than it has GPUs."""
    local, found = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= found:
        raise CompileError(
            f"process {local} of this machine has no GPU of its own, as there are {found}; start as many processes on "
            "it as it has GPUs, or give --device cpu"
        )


def parallelize(target: T, kind: str = "ulysses") -> T:
    """Divide each call of a pipeline's denoiser, or of a denoiser, between all processes that a launcher such as
    torchrun started; returns the same object. Before `fastercache.compile`; every process calls it.

    kind: "ulysses" exchanges tokens for heads around an attention, or frames for patches around one over time. "ring"
        sends the keys around instead, for the models of which diffusers has a plan, on GPUs alone (not measured).

    The result is the same on every process, and a pipeline gives the video on each. The noise has to be the same, too:
    give all of them a generator with one seed.

    Raises:
        CompileError: no launcher, one process alone, an unknown kind, a model that is compiled or divided already.
        UnsupportedModelError: there is no plan for the model, or its heads do not divide.
    """
    if kind not in KINDS:
        raise CompileError(f"there is no context parallelism of kind {kind!r}; choose {' or '.join(map(repr, KINDS))}")
    parts = list(pipelines.denoisers_of(target).values()) if pipelines.is_pipeline(target) else [target]
    models = [part for part in parts if isinstance(part, nn.Module)]
    if len(models) != len(parts):
        raise UnsupportedModelError(f"cannot divide a {type(target).__name__}; pass a diffusers pipeline or a denoiser")
    join_group()
    size = torch.distributed.get_world_size()
    for model in models:
        _refuse(model, kind, size)
    for model in models:
        _divide(model, kind, size)
    return target


def _refuse(model: nn.Module, kind: str, size: int) -> None:
    name, division = type(model).__name__, division_of(model)
    if hasattr(model, "_fastercache_engine"):
        raise CompileError(f"this {name} is compiled by fastercache already; divide it between processes before that")
    if _config_of(model) is not None:
        raise CompileError(f"the calls of this {name} are divided between processes already")
    division.refuse_model(model, family_of(model), size, kind == "ulysses")
    if kind == "ring":
        if not division.native:
            raise UnsupportedModelError(f"diffusers has no plan for {name}, and 'ring' is its own; use 'ulysses'")
        _refuse_ring_without_gpu(_device_type(model))


def _refuse_ring_without_gpu(device: str) -> None:
    if device == "cpu":
        raise CompileError(
            "context parallelism of kind 'ring' needs attention kernels that return their log-sum-exp, which run on "
            "GPUs alone; use 'ulysses' on the CPU"
        )


def _device_type(model: nn.Module) -> str:
    return next(model.parameters()).device.type


def _divide(model: nn.Module, kind: str, size: int) -> None:
    from diffusers import ContextParallelConfig

    division, family = division_of(model), family_of(model)
    degrees = (size, 1) if kind == "ring" else (1, size)
    mesh = torch.distributed.device_mesh.init_device_mesh(
        _device_type(model), degrees, mesh_dim_names=("ring", "ulysses")
    )
    config = ContextParallelConfig(ring_degree=degrees[0], ulysses_degree=degrees[1], mesh=mesh)
    hooks = division.hooks(model)
    with _counted_devices():
        if hasattr(model, "enable_parallelism"):
            model.enable_parallelism(config=config, cp_plan=hooks)  # type: ignore[operator]
        else:
            _enable_parallelism(model, config, mesh, hooks or {})
    setattr(model, _DIVISION, division)
    division.patches(model, family, _group_of(config))


def _enable_parallelism(model: nn.Module, config: Any, mesh: Any, hooks: Mapping[str, Any]) -> None:
    """What diffusers' models have as a method, for one that is not diffusers'."""
    from diffusers import ParallelConfig
    from diffusers.hooks.context_parallel import apply_context_parallel

    whole = ParallelConfig(context_parallel_config=config)
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    whole.setup(rank, size, torch.device(_device_type(model)), mesh=mesh)
    model._parallel_config = whole  # type: ignore[assignment]
    apply_context_parallel(model, config, dict(hooks))


@contextmanager
def _counted_devices() -> Iterator[None]:
    """diffusers divides by the number of accelerators, which is 0 where there is none."""
    accelerator = torch.accelerator
    original = accelerator.device_count
    if original() == 0:
        accelerator.device_count = lambda: 1
    try:
        yield
    finally:
        accelerator.device_count = original


def _config_of(model: nn.Module) -> Any:
    """diffusers' configuration of context parallelism, `None` where a process makes its videos alone."""
    config = getattr(getattr(model, "_parallel_config", None), "context_parallel_config", None)
    return config if config is not None and config._flattened_mesh.size() > 1 else None


def is_divided(model: nn.Module) -> bool:
    """Whether several processes share each call of a model."""
    return _config_of(model) is not None


def _group_of(config: Any) -> Group:
    mesh = config._flattened_mesh
    return Group(mesh.get_group(), torch.distributed.get_rank(mesh.get_group()), mesh.size())


def is_of_another(error: BaseException) -> bool:
    """Whether an error says that another process of the group is gone."""
    lost = ("gloo", "Connection closed by peer", "Connection reset by peer", "NCCL")
    return torch.distributed.is_initialized() and any(word in str(error) for word in lost)


# ---- runs ------------------------------------------------------------------------------------------------------------


def processes_of(model: nn.Module) -> Processes | None:
    """The processes that a model's calls are divided between, `None` where there is one."""
    config = _config_of(model)
    return None if config is None else Processes(model, config)


class OtherProcessError(RunError):
    """An error of another process, which all of them know of."""


class Processes:
    """Those that make a video together, as one of them sees them; of one model.

    group: all of them.
    """

    latest: Processes | None = None
    """Whose model was called last: groups may be those of several models, as of two experts, whose calls are no
    other's."""

    def __init__(self, model: nn.Module, config: Any):
        self.model, self.family = model, family_of(model)
        self.group = _group_of(config)
        self._cfg = _branch_groups(config)
        if config.ring_degree > 1:
            _refuse_ring_without_gpu(_device_type(model))
        self.division = getattr(model, _DIVISION, None) or _division_by_diffusers(model)
        handles = (mesh.get_group() for mesh in (config._flattened_mesh, config._ulysses_mesh, config._ring_mesh))
        self._handles = {handle.group_name: handle for handle in handles}.values()
        processors: list[Any] = [getattr(module, "processor", None) for module in model.modules()]
        self._processors = [one for one in processors if getattr(one, "_parallel_config", None) is not None]
        self._calls = self._inside = self._outside = self._full = self._seen = 0
        self._kept = Kept()
        # diffusers splits arguments of the model outside of its forward. The run has to see them whole.
        self._registry: Any = model.__dict__.get("_diffusers_hook")
        self._hook: Any = None if self._registry is None else self._registry.get_hook(_ROOT_HOOK)
        if self._registry is not None and self._hook is not None:
            self._registry.remove_hook(_ROOT_HOOK, recurse=False)
        self._patch = ForwardPatch(model, self._at_model)

    def detach(self) -> None:
        """Give the model diffusers' hook back."""
        self._patch.remove()
        if self._registry is not None and self._hook is not None:
            self._registry.register_hook(self._hook, _ROOT_HOOK)

    def _at_model(self, original: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        if self._hook is not None:
            args, kwargs = self._hook.pre_forward(self.model, *args, **kwargs)
        self._look_outside()
        output = original(*args, **kwargs)
        made = self._collectives() - self._seen
        self._calls, self._inside, self._full = self._calls + 1, self._inside + made, max(self._full, made)
        self._seen += made
        return output

    def _look_outside(self) -> None:
        """Count what was begun since this model's last call, unless another's came in between."""
        now = self._collectives()
        if Processes.latest is self:
            self._outside += now - self._seen
        Processes.latest, self._seen = self, now

    def _collectives(self) -> int:
        """Collectives that this process has begun in the group, as torch counts them."""
        return sum(handle._get_sequence_number_for_group() for handle in self._handles)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, a call on shapes is that of one process."""
        configs = [processor._parallel_config for processor in self._processors]
        try:
            for processor in self._processors:
                processor._parallel_config = None
            yield
        finally:
            for processor, config in zip(self._processors, configs, strict=True):
                processor._parallel_config = config

    # ---- what is agreed on before a run ------------------------------------------------------------------------------

    @contextmanager
    def beginning(self) -> Iterator[None]:
        """Inside, a run begins: an error of one process is raised by all of them, here or in `agree` and `least`."""
        try:
            yield
            self._all("begun")
        except OtherProcessError:
            raise
        except ScheduleError as error:
            if not getattr(error, "told", False):
                self._tell(error)
            raise
        except Exception as error:
            self._tell(error)
            raise
        self._calls = self._inside = self._outside = self._full = 0
        Processes.latest, self._seen = self, self._collectives()

    def _tell(self, error: Exception) -> None:
        try:
            self._gather(("failed", f"{type(error).__name__}: {error}"))
        except Exception as lost:  # another process is gone, which its launcher says; this one's own error counts
            logger.info("the other processes could not be told: %s", lost)

    def _gather(self, mine: tuple[str, Any]) -> list[tuple[str, Any]]:
        found: list[Any] = [None] * self.group.size
        torch.distributed.all_gather_object(found, mine, group=self.group.handle)
        return found

    def _all(self, mine: Any) -> list[Any]:
        """What every process says; `OtherProcessError` where one of them has failed."""
        found = self._gather(("fine", mine))
        for rank, (state, said) in enumerate(found):
            if state == "failed":
                raise OtherProcessError(f"process {rank} of {self.group.size} could not begin the run: {said}")
        return [said for _, said in found]

    def agree(
        self, plan: Plan, layout: BranchLayout, budget: CacheBudget, arguments: Mapping[str, Any], two_bands: bool
    ) -> None:
        """`ScheduleError` on every process unless all have the same run before them; `RunError` where a call cannot be
        divided.

        two_bands: whether the run keeps the difference of the branches.
        """
        if self._cfg > 1 and two_bands:
            raise ScheduleError(
                f"schedule {plan.schedule.name!r} rebuilds the unconditional branch, and with a branch for each of "
                f"{self._cfg} groups of processes one group would have nothing to do meanwhile; divide the tokens "
                "between all processes instead, or use 'dynamic-only', which runs both branches"
            )
        self.division.refuse_call(self.model, self.family, arguments, self.group.size)
        latents = self.family.latents(arguments)
        content = plan.schedule.to_json()
        mine: dict[str, Any] = {
            "schedule": plan.schedule.name,
            "number of steps": len(plan.steps),
            "content of the schedule": hashlib.sha256(content.encode()).hexdigest()[:12],
            "layout of guidance": layout.name,
            "cache_format": budget.format,
            "max_cache_bytes": budget.max_bytes,
            "shape of the latents": list(latents.shape),
            "dtype": str(latents.dtype),
        }
        said = self._all((mine, json.loads(content)["steps"], _sample(latents)))
        for rank, (theirs, steps, noise) in enumerate(said):
            different = [name for name in mine if theirs[name] != said[0][0][name]]
            if different:
                name = different[0]
                where = f" (first at step {_first_difference(said[0][1], steps)})" if name.startswith("content") else ""
                raise _told(
                    f"the processes of a group make one video and have to run the same, but the {name} is "
                    f"{said[0][0][name]!r} on process 0 and {theirs[name]!r} on process {rank}{where}; call "
                    "fastercache.compile and the pipeline with the same arguments on all of them"
                )
            if not torch.allclose(torch.tensor(noise), torch.tensor(said[0][2]), rtol=1e-2, atol=1e-2, equal_nan=True):
                raise _told(
                    f"the latents of process {rank} are not those of process 0, and both make one video; give every "
                    "process a generator with the same seed"
                )

    def least(self, limit: Limit | None) -> Limit | None:
        """Of what the devices have room for, the least, which decides the format on all of them."""
        said = self._all(None if limit is None else (limit.bytes, limit.why))
        rank, least = min(
            ((rank, one) for rank, one in enumerate(said) if one is not None),
            key=lambda found: found[1][0],
            default=(0, None),
        )
        if least is None:
            return None
        where = "" if rank == self.group.rank else f", on process {rank}, which has the least"
        return Limit(least[0], f"{least[1]}{where}")

    # ---- caches ------------------------------------------------------------------------------------------------------

    def local_shapes(self, site: Site, arguments: Mapping[str, Any], shapes: Shapes) -> Shapes:
        """What this process has of a site whose tensors have `shapes` where one process makes the video."""
        return self.division.local_shapes(self.model, self.family, site, arguments, shapes, self.group.size)

    def keeps(self, planned: CachePlan, sites: Sequence[Site], arguments: Mapping[str, Any]) -> None:
        """Note what of a run's caches is a shard, and what every process has whole."""
        size, form = self.group.size, format_of(planned.format)
        tensors: dict[int, int] = {}
        shards = text = 0.0
        for ring in planned.rings:
            number = tensors[ring.site] = tensors.get(ring.site, -1) + 1
            site = sites[ring.site]
            whole = self.family.site_shapes(self.model, site, arguments)
            local = self.local_shapes(site, arguments, whole)
            there, here = whole[number].numel(), local[number].numel()
            # The shards that the other processes have are what is missing here.
            divided = (there - here) / (size - 1) if self.division.text_in_sites else here
            shards += form.bytes(ring) * divided / here
            text += form.bytes(ring) * (1 - divided / here)
        item = planned.dtype.itemsize
        maps = planned.maps * math.prod(planned.map_shape) * item
        outputs = (planned.predictions + planned.keeps_latents) * math.prod(planned.prediction_shape) * item
        self._kept = Kept(round(shards), round(text), maps, outputs)

    def share(self, steps: int, calls: int) -> Share:
        """What this process did and kept of a run of `steps` steps, each of `calls` calls where nothing is skipped."""
        made = self._inside
        if Processes.latest is self:
            self._look_outside()
        return Share(
            processes=self.group.size,
            rank=self.group.rank,
            collectives=made,
            saved_by_reuse=self._full * self._calls - made,
            saved_by_calls_not_made=self._full * (steps * calls - self._calls),
            added_by_caching=self._outside,
            kept=self._kept,
        )


def _told(message: str) -> ScheduleError:
    error = ScheduleError(message)
    error.told = True  # type: ignore[attr-defined]
    return error


def _sample(latents: torch.Tensor) -> list[float]:
    """Some elements, which tell one noise from another."""
    flat = latents.detach().flatten()
    places = torch.linspace(0, len(flat) - 1, min(len(flat), 64)).long()
    return flat[places.to(flat.device)].float().cpu().tolist()


def _first_difference(ours: Sequence[Any], theirs: Sequence[Any]) -> int:
    return 1 + next(number for number, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1])


def _branch_groups(config: Any) -> int:
    """Over how many groups the mesh that a user gave divides the branches of guidance."""
    mesh = config.mesh
    names = getattr(mesh, "mesh_dim_names", None) or ()
    return mesh.size(names.index("cfg")) if "cfg" in names else 1


def _division_by_diffusers(model: nn.Module) -> Division:
    """Of a model that was divided by diffusers' own method, with the plan of its class."""
    division, plan = division_of(model), getattr(type(model), "_cp_plan", None) or {}
    hooks = {
        name: hook
        for module in model.modules()
        for name, hook in getattr(module.__dict__.get("_diffusers_hook"), "hooks", {}).items()
        if name.startswith("cp_")
    }
    known = division.native and len(hooks) == len(plan)
    if not known or any(
        getattr(hooks.get(f"cp_{'input' if isinstance(entry, dict) else 'output'}---{path}"), "metadata", None)
        not in (entry, [entry])
        for path, entry in plan.items()
    ):
        raise UnsupportedModelError(
            f"the calls of this {type(model).__name__} are divided by a plan that fastercache does not know; load it "
            "again and call fastercache.parallelize on it"
        )
    return division
