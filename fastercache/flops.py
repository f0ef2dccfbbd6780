"""What a schedule saves, counted on the model itself: no weights are read and nothing is computed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from fastercache.errors import UnsupportedModelError
from fastercache.families import BranchOrder, Family, Site
from fastercache.memory import branch_rows
from fastercache.plan import Plan, group_of
from fastercache.skeleton import on_shapes
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


class _AllTokensCount(TorchFunctionMode):
    """Masks have no values here: where a model picks the tokens of one with `nonzero`, as Mochi does, it gets them all."""

    def __torch_function__(self, function: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if function is torch.nonzero and args[0].dim() == 1:
            return torch.arange(len(args[0]), device=args[0].device)[:, None]
        return function(*args, **(kwargs or {}))


def _count(
    model: nn.Module, sites: Sequence[Site], arguments: Mapping[str, Any], autocast: torch.dtype | None
) -> tuple[int, dict[str, int]]:
    """Operations of one call, in all and inside each site (by path)."""
    counter = FlopCounterMode(display=False)
    inside: dict[str, int] = {}

    def enter(path: str) -> None:
        inside[path] = inside.get(path, 0) - counter.get_total_flops()

    def leave(path: str) -> None:
        inside[path] += counter.get_total_flops()

    # The math backend decomposes into matrix products, which are counted on every device.
    with on_shapes(model) as (hollow, shapes_of), torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        for site in sites:
            module = hollow.get_submodule(site.path)
            module.register_forward_pre_hook(lambda *_, path=site.path: enter(path))
            module.register_forward_hook(lambda *_, path=site.path: leave(path))
        shapes = shapes_of(arguments)
        kind = next(leaf.device.type for leaf in tree_leaves(shapes) if isinstance(leaf, torch.Tensor))
        casting = torch.autocast(kind, autocast, enabled=autocast is not None) if torch.amp.is_autocast_available(kind) else nullcontext()
        with casting, counter, _AllTokensCount():
            hollow(**shapes)
    return counter.get_total_flops(), inside


def count_run(
    model: nn.Module,
    family: Family,
    sites: Sequence[Site],
    plan: Plan,
    order: BranchOrder,
    arguments: Mapping[str, Any],
    autocast: torch.dtype | None = None,
) -> RunFlops:
    """Count a run of `plan` on `model`, of calls with `arguments` (shapes count, not values), under autocast to a dtype or without.

    Raises:
        UnsupportedModelError: the model reads a value that is not known before it is computed, or runs what has no shapes.
    """
    try:
        return _count_run(model, family, sites, plan, order, arguments, autocast)
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UnsupportedModelError(
            f"the operations of {type(model).__name__} cannot be counted: it cannot be called on shapes alone ({reason[0]})"
        ) from error


def _count_run(
    model: nn.Module,
    family: Family,
    sites: Sequence[Site],
    plan: Plan,
    order: BranchOrder,
    arguments: Mapping[str, Any],
    autocast: torch.dtype | None,
) -> RunFlops:
    batch = family.latents(arguments).shape[0]
    arguments = family.countable(arguments)
    full = _count(model, sites, arguments, autocast)
    single = full
    if order in BATCH_ORDER:
        full = 2 * single[0], {path: 2 * count for path, count in single[1].items()}
    elif plan.guidance:
        single = _count(model, sites, family.narrow(arguments, batch, branch_rows(batch, order, ("cond",))), autocast)
    cached = 0
    for step in plan.steps:
        total, inside = full if step.branches == plan.branches else single
        cached += total
        for site in sites:
            group = group_of(plan.groups, site.kind, site.layer)
            if group is not None and step.groups[group].blend:
                cached -= inside[site.path]
    return RunFlops(full[0] * len(plan.steps), cached)
