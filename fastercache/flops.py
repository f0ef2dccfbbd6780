"""What a schedule saves, counted on the model itself: no weights are read and nothing is computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from fastercache.families import BranchOrder, Family, Site
from fastercache.integrations import empty_like, on_shapes
from fastercache.memory import branch_rows
from fastercache.plan import Plan, group_of
from fastercache.two_calls import BATCH_ORDER


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
    return empty_like(arguments, torch.device("meta"))


class _AllTokensCount(TorchFunctionMode):
    """Masks have no values here: where a model picks the tokens of one with `nonzero`, as Mochi does, it gets them all."""

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if function is torch.nonzero and args[0].dim() == 1:
            return torch.arange(len(args[0]), device=args[0].device)[:, None]
        return function(*args, **(kwargs or {}))


def _count(
    model: nn.Module, forward: Callable[..., Any], sites: Sequence[Site], arguments: Mapping[str, Any]
) -> tuple[int, dict[str, int]]:
    """Operations of one call, in all and inside each site (by path)."""
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
        with on_shapes(model) as device, torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter, _AllTokensCount():
            forward(**empty_like(arguments, device))
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
    arguments = family.countable(arguments)
    full = _count(model, forward, sites, arguments)
    single = full
    if order in BATCH_ORDER:
        full = 2 * single[0], {path: 2 * count for path, count in single[1].items()}
    elif plan.guidance:
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
