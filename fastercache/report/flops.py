"""What a schedule saves, counted on the model itself: no weights are read and nothing is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from fastercache.errors import UnsupportedModelError
from fastercache.models.family import Family
from fastercache.models.site import Site
from fastercache.models.skeleton import AllTokensCount, on_shapes
from fastercache.report.run_flops import RunFlops
from fastercache.schedule.branches import BranchLayout
from fastercache.schedule.plan import Plan


def _count(
    model: nn.Module,
    family: Family,
    sites: Sequence[Site],
    arguments: Mapping[str, Any],
    autocast: torch.dtype | None,
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
        family.route(hollow)
        for site in (site for site in sites if site.kind != "stack"):
            module = hollow.get_submodule(site.path)
            module.register_forward_pre_hook(lambda *_, path=site.path: enter(path))
            module.register_forward_hook(lambda *_, path=site.path: leave(path))
        shapes = shapes_of(arguments)
        kind = next(leaf.device.type for leaf in tree_leaves(shapes) if isinstance(leaf, torch.Tensor))
        casting = (
            torch.autocast(kind, autocast, enabled=autocast is not None)
            if torch.amp.is_autocast_available(kind)
            else nullcontext()
        )
        with casting, counter, AllTokensCount():
            hollow(**shapes)
    return counter.get_total_flops(), inside


def count_run(
    model: nn.Module,
    family: Family,
    sites: Sequence[Site],
    plan: Plan,
    layout: BranchLayout,
    arguments: Mapping[str, Any],
    autocast: torch.dtype | None = None,
) -> RunFlops:
    """Count a run of `plan` on `model`, of calls with `arguments` (shapes count, not values), under autocast to a dtype
    or without.

    Raises:
        UnsupportedModelError: the model reads a value that is not known before it is computed, or runs what has no
            shapes.
    """
    try:
        return _count_run(model, family, sites, plan, layout, arguments, autocast)
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UnsupportedModelError(
            f"the operations of {type(model).__name__} cannot be counted: it cannot be called on shapes alone "
            f"({reason[0]})"
        ) from error


def _count_run(
    model: nn.Module,
    family: Family,
    sites: Sequence[Site],
    plan: Plan,
    layout: BranchLayout,
    arguments: Mapping[str, Any],
    autocast: torch.dtype | None,
) -> RunFlops:
    batch = family.latents(arguments).shape[0]
    arguments = family.countable(arguments)
    full = _count(model, family, sites, arguments, autocast)
    alone = full
    if layout.two_calls:
        full = 2 * alone[0], {path: 2 * count for path, count in alone[1].items()}
    elif layout.guided:
        alone = _count(model, family, sites, family.narrow(arguments, batch, layout.rows(batch, ("cond",))), autocast)
    by_phase = []
    for phase in plan.phases:
        total, inside = full if phase.branches == plan.branches else alone
        blended = (
            site for site, number in zip(sites, plan.cadence_of, strict=True) if phase.modes[number].action == "blend"
        )
        by_phase.append(total - sum(_of_site(site, sites, inside) for site in blended))
    return RunFlops(
        full[0] * len(plan.steps), sum(by_phase[step.phase] for step in plan.steps if step.phase is not None)
    )


def _of_site(site: Site, sites: Sequence[Site], inside: Mapping[str, int]) -> int:
    """Operations inside a site, those of the sites inside it included."""
    return (
        inside[site.path]
        if site.kind != "stack"
        else sum(inside[block.path] for block in sites if block.kind == "block")
    )
