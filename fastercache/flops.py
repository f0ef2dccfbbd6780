"""What a schedule saves, counted on the model itself: no weights are read and nothing is computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from fastercache.families import BranchOrder, Family, Site
from fastercache.memory import branch_rows
from fastercache.plan import Plan, group_of


@dataclass(frozen=True)
class RunFlops:
    """Floating-point operations of one run of a denoiser (2 for each multiply-accumulate), without and with the schedule."""

    uncached: int
    cached: int

    @property
    def ratio(self) -> float:
        """Uncached over cached: the speed-up if time were proportional to operations."""
        return self.uncached / self.cached


def shapes_only(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments with every tensor replaced by one on the meta device, so that a call can be counted after its tensors are gone."""
    return _like(arguments, torch.device("meta"))


def _like(arguments: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    def empty(value: Any) -> Any:
        return torch.empty(value.shape, dtype=value.dtype, device=device) if isinstance(value, torch.Tensor) else value

    return tree_map(empty, dict(arguments))


def _count(
    model: nn.Module, forward: Callable[..., Any], sites: Sequence[Site], arguments: Mapping[str, Any]
) -> tuple[int, dict[str, int]]:
    """Operations of one call, in all and inside each site (by path)."""
    device = next(model.parameters()).device
    counter = FlopCounterMode(display=False)
    inside: dict[str, int] = {}

    def enter(path: str) -> None:
        inside[path] = inside.get(path, 0) - counter.get_total_flops()

    def leave(path: str) -> None:
        inside[path] += counter.get_total_flops()

    handles = []
    for site in sites:
        handles.append(site.module.register_forward_pre_hook(lambda *_, path=site.path: enter(path)))
        handles.append(site.module.register_forward_hook(lambda *_, path=site.path: leave(path)))
    try:
        # The math backend decomposes into matrix products, which are counted on every device.
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            forward(**_like(arguments, device))
    finally:
        for handle in handles:
            handle.remove()
    return counter.get_total_flops(), inside


def count_run(
    model: nn.Module,
    forward: Callable[..., Any],
    family: Family,
    sites: Sequence[Site],
    plan: Plan,
    order: BranchOrder,
    arguments: Mapping[str, Any],
) -> RunFlops:
    """Count a run of `plan` on `model`, whose original `forward` takes `arguments` (shapes count, not values)."""
    batch = family.latents(arguments).shape[0]
    full = _count(model, forward, sites, arguments)
    single = full
    if plan.guidance:
        single = _count(model, forward, sites, family.narrow(arguments, batch, branch_rows(batch, order, ("cond",))))
    cached = 0
    for step in plan.steps:
        total, inside = full if step.branches == plan.branches else single
        cached += total
        for site in sites:
            group = group_of(plan.groups, site.kind, site.layer)
            if group is not None and step.groups[group].blend:
                cached -= inside[site.path]
    return RunFlops(full[0] * len(plan.steps), cached)
