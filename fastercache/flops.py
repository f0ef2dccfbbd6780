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


def _count(model: nn.Module, forward: Callable[..., Any], arguments: Mapping[str, Any]) -> dict[str, int]:
    """Operations of one call, in all (key "") and under each module's path."""
    device = next(model.parameters()).device
    counter = FlopCounterMode(display=False)
    # The math backend decomposes into matrix products, which are counted on every device.
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        forward(**_like(arguments, device))
    root = type(model).__name__
    counts = {"": counter.get_total_flops()}
    for path, operations in counter.get_flop_counts().items():
        counts[path.removeprefix(f"{root}.")] = sum(operations.values())
    return counts


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
    full = _count(model, forward, arguments)
    single = _count(model, forward, family.narrow(arguments, batch, branch_rows(batch, order, ("cond",)))) if plan.guidance else full
    cached = 0
    for step in plan.steps:
        counts = full if step.branches == plan.branches else single
        cached += counts[""]
        for site in sites:
            group = group_of(plan.groups, site.kind, site.layer)
            if group is not None and step.groups[group].blend:
                cached -= counts.get(site.path, 0)
    return RunFlops(full[""] * len(plan.steps), cached)
