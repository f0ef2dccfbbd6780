"""The published systems, held against the models themselves: operations, sites, caches, parameters."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from test_presets import PUBLISHED as TFLOPS
from test_presets import plan_of

import fastercache
from bench import model_runs
from bench.published import PUBLISHED, build
from fastercache import Prediction, Schedule, Step
from fastercache.cache.budget import FORMATS
from fastercache.cache.cache import plan_cache
from fastercache.models.registry import family_of
from fastercache.report import flops
from fastercache.report.published import SYSTEMS
from fastercache.schedule.branches import LAYOUTS
from fastercache.schedule.plan import make_plan

STACK = Schedule((Step(), Step(), Step("both", ("stack",), (1.5, -0.5)), Step()))


@lru_cache
def published_model(system):
    """The model on the meta device, its family, its sites, and the arguments of a call."""
    model, arguments = build(system)
    family = family_of(model)
    return model, family, family.sites(model), arguments


def schedules_of(system):
    """One that reuses each kind of site, the stack and whole predictions among them."""
    kinds = list(dict.fromkeys(node.kind for node in SYSTEMS[system].tree))
    reuses = [*((kind,) for kind in kinds), tuple(kind for kind in kinds if kind not in ("block", "stack"))]
    found = [
        Schedule((Step(), Step(), Step("both", reuse, (1.5, -0.5)), Step("cond"), Step("cond", reuse, (1.0,))))
        for reuse in reuses
    ]
    last = Step("none", prediction=Prediction((1.5, -0.5), 0.1, -0.1))
    return [*found, Schedule((Step(), Step(), Step("cond", previous=0.3), Step("none"), last))]


@pytest.mark.parametrize("system", PUBLISHED)
def test_the_tree_of_sites_and_what_each_keeps(system):
    model, family, sites, arguments = published_model(system)
    described = SYSTEMS[system]
    nodes = [(site.kind, site.layer, site.node.parent) for site in sites]
    assert nodes == [(node.kind, node.layer, node.parent) for node in described.tree]
    rows = len(family.latents(arguments))
    for site, own in zip(sites, described.sites, strict=True):
        shapes = family.site_shapes(model, site, arguments)
        assert [(shape.numel() // shape[-1] // rows, shape[-1]) for shape in shapes] == list(own.outputs), site.node
    assert family.prediction_shape(model, arguments).numel() // rows == described.prediction
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(described.parameters, rel=0.005)


@pytest.mark.parametrize("system", PUBLISHED)
def test_the_operations_of_every_site_and_of_whole_runs(system, monkeypatch):
    """Each site by itself; then schedules, in which a blended site saves what lies inside it once."""
    model, family, sites, arguments = published_model(system)
    described, layout = SYSTEMS[system], LAYOUTS[family.layout]
    rows = len(family.latents(arguments))
    counts = {}
    count = flops._count

    def count_once(model, family, sites, arguments, autocast):
        """A call of the published size takes a second to count, and many schedules ask for it."""
        batch = len(family.latents(arguments))
        if batch not in counts:
            counts[batch] = count(model, family, sites, arguments, autocast)
        return counts[batch]

    monkeypatch.setattr(flops, "_count", count_once)
    total, inside = count_once(model, family, sites, family.countable(arguments), None)
    for site, own in zip(sites, described.sites, strict=True):
        counted = flops._of_site(site, sites, inside)
        assert counted / rows == pytest.approx(2 * own.macs, rel=0.01), site.node
    assert total / rows == pytest.approx(2 * described.macs, rel=0.01)

    preset = f"{system}/released" if f"{system}/released" in TFLOPS else f"{system}/paper"
    schedules = {"preset": None, "stack": STACK} | {str(i): one for i, one in enumerate(schedules_of(system))}
    for name, schedule in schedules.items():
        plan = plan_of(preset)[1] if schedule is None else make_plan(schedule, described.guided, described.tree)
        counted = flops.count_run(model, family, sites, plan, layout, arguments)
        if schedule is None and preset in TFLOPS:
            assert (counted.uncached / 1e12, counted.cached / 1e12) == pytest.approx(TFLOPS[preset], rel=0.02)
        expected = 2 * described.uncached_macs(plan), 2 * described.cached_macs(plan)
        assert (counted.uncached, counted.cached) == pytest.approx(expected, rel=0.01), name


@pytest.mark.parametrize("system", PUBLISHED)
def test_the_bytes_of_every_kind_of_cache(system):
    model, family, sites, arguments = published_model(system)
    described = SYSTEMS[system]
    branches = 2 if described.guided and LAYOUTS[family.layout].two_calls else 1

    def whole(shape):
        return (branches * shape[0], *shape[1:])

    for schedule in schedules_of(system):
        plan = make_plan(schedule, described.guided, tuple(site.node for site in sites))
        for storage in FORMATS:
            planned = plan_cache(
                plan,
                lambda i: [whole(shape) for shape in family.site_shapes(model, sites[i], arguments)],
                lambda: whole(family.prediction_shape(model, arguments)),
                lambda: whole(family.planes_shape(model, arguments)),
                torch.bfloat16,
                storage,
            )
            assert planned.bytes == described.cache_bytes(
                make_plan(schedule, described.guided, described.tree), storage
            )


@pytest.mark.parametrize("taps", [(1.0,), (1.5, -0.5), (2.0, -1.5, 0.5)])
@pytest.mark.parametrize("branches", ["both", "cond"])
@pytest.mark.parametrize("system", SYSTEMS)
def test_reusing_the_stack_keeps_one_tensor_for_each_branch_and_tap(system, branches, taps):
    """Of the streams, the video's alone is read after the last block."""
    described = SYSTEMS[system]
    tokens, channels = described.sites[1].outputs[0]
    schedule = Schedule((Step(), Step(), Step(), Step(branches, ("stack",), taps)))
    plan = make_plan(schedule, described.guided, described.tree)
    kept = 2 if described.guided and branches == "both" else 1
    maps = 2 * 4 * described.prediction if described.guided and branches == "cond" else 0
    assert described.cache_bytes(plan, "model") == kept * len(taps) * tokens * channels * 2 + maps


@pytest.mark.parametrize("system", SYSTEMS)
def test_a_run_that_reuses_the_stack_allocates_that(system):
    """The small model runs; the video's stream is seen at the last block."""
    with torch.no_grad():
        case = model_runs.Case(system, "small", "cpu", torch.float32, 50, f"{system}/paper")
        seen = []
        block = case.sites[0].block
        handle = block.module.register_forward_hook(
            lambda _, __, output: seen.append(block.streams_out(output)[0].numel())
        )
        case.predictions(case.first_calls)
        handle.remove()
        plan = case.plan_of(STACK)
        fastercache.compile(case.model, STACK, steps=len(STACK), cfg=case.layout.name)
        case.denoise(len(STACK))
    summary = fastercache.summary(case.model)
    elements = 2 * sum(seen)  # two taps; both branches, in one call or in two
    assert summary.steps_done == len(STACK)
    assert summary.cache_bytes == summary.cache_bytes_planned == elements * 4
    counted = flops.count_run(case.model, case.family, case.sites, plan, case.layout, case.arguments)
    assert summary.flops == counted and counted.ratio > 1.2
