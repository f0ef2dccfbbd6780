"""The published systems, counted on the models themselves: operations, sites, parameters."""

from __future__ import annotations

import pytest
import torch
from test_presets import PUBLISHED as TFLOPS
from test_presets import plan_of

from bench.published import PUBLISHED, build
from fastercache import flops
from fastercache.families import family_of
from fastercache.memory import FORMATS, plan_cache
from fastercache.two_calls import BATCH_ORDER, BothCalls


@pytest.mark.parametrize("system", PUBLISHED)
def test_operations_sites_and_parameters_of_the_published_models(system):
    preset = f"{system}/released" if f"{system}/released" in TFLOPS else f"{system}/paper"
    (model, arguments), (described, plan) = build(system), plan_of(preset)
    family = family_of(model)
    sites = family.sites(model)
    counted = flops.count_run(model, family, sites, plan, family.order, arguments)
    if preset in TFLOPS:
        assert (counted.uncached / 1e12, counted.cached / 1e12) == pytest.approx(TFLOPS[preset], rel=0.02)
    described_flops = 2 * described.uncached_macs(plan), 2 * described.cached_macs(plan)
    assert (counted.uncached, counted.cached) == pytest.approx(described_flops, rel=0.01)

    rows = len(family.latents(arguments))
    elements = [sum(shape.numel() for shape in family.site_shapes(model, site, arguments)) // rows for site in sites]
    expected = [sum(tokens * channels for tokens, channels in site.outputs) for site in described.sites]
    assert sorted(zip((site.kind for site in sites), (site.layer for site in sites), elements, strict=True)) == sorted(
        zip((site.kind for site in described.sites), (site.layer for site in described.sites), expected, strict=True)
    )
    shapes = BothCalls(family) if family.order in BATCH_ORDER else family
    for storage in FORMATS:
        planned = plan_cache(shapes, model, sites, plan, arguments, torch.bfloat16, storage)
        assert planned.bytes == described.cache_bytes(plan, storage)
    assert family.prediction_shape(model, arguments).numel() // rows == described.prediction
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(described.parameters, rel=0.005)
