"""CogVideoX and Mochi in the code they were released with, as far as their parts and their calls go."""

from __future__ import annotations

import pytest
import torch
from models import ready
from released import AsymmDiTJoint, AsymmetricAttention, DiffusionTransformer, mochi_calls, sat_call
from simulator import Simulator

import fastercache
from fastercache import CompileError, UnsupportedModelError, policies

STEPS = 9


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def build(cls, **sizes):
    torch.manual_seed(0)
    return ready(cls(**sizes), torch.float32)


@pytest.mark.parametrize("site", ["attention", "mlp"])
@pytest.mark.parametrize("prompts", [1, 3])
@pytest.mark.parametrize("patch_size", [2, (1, 2, 2)])
def test_cogvideox_of_sat_equals_the_simulator(site, prompts, patch_size):
    """Version 1.0 has the patch size as a number, 1.5 as three."""
    model, schedule = build(DiffusionTransformer, patch_size=patch_size), policies.paper(STEPS, True, site=site)

    def run(call):
        inputs, outputs = sat_call(2 * prompts), []
        for _ in range(STEPS):
            outputs.append(call(inputs))
            inputs = inputs | {"x": inputs["x"] - 0.1 * outputs[-1]}
        return torch.stack(outputs)

    expected = run(Simulator(build(DiffusionTransformer), schedule, "uncond-first"))
    fastercache.compile(model, schedule, steps=STEPS, cfg="uncond-first")
    torch.testing.assert_close(run(lambda inputs: model(**inputs)), expected, rtol=1e-4, atol=1e-5)
    summary = fastercache.summary(model)
    assert summary.cache_bytes == summary.cache_bytes_planned > 0 and summary.flops.ratio > 1


@pytest.mark.parametrize("site", ["attention", "mlp"])
@pytest.mark.parametrize("prompts", [1, 3])
def test_mochi_as_released_equals_the_simulator(site, prompts):
    model, schedule = build(AsymmDiTJoint), policies.paper(STEPS, True, site=site)

    def run(pair):
        calls, path = mochi_calls(prompts), []
        latents = calls.cond["x"]
        for _ in range(STEPS):
            e_u, e_c = pair(calls.uncond | {"x": latents}, calls.cond | {"x": latents})
            latents = latents - 0.1 * (e_u + 4.5 * (e_c - e_u))
            path.append(latents)
        return torch.stack(path)

    def pair(uncond, cond):
        e_c = model(**cond)
        return model(**uncond), e_c

    expected = run(Simulator(build(AsymmDiTJoint), schedule, "cond-then-uncond").pair)
    fastercache.compile(model, schedule, steps=STEPS, cfg="cond-then-uncond")
    torch.testing.assert_close(run(pair), expected, rtol=1e-4, atol=1e-5)
    summary = fastercache.summary(model)
    assert summary.cache_bytes == summary.cache_bytes_planned > 0


def test_blocks_whose_own_forward_is_bypassed_do_not_compile_regionally():
    """SAT calls the attention and the MLP of a layer from a hook of its own."""
    model = build(DiffusionTransformer)
    fastercache.compile(model, steps=STEPS, cfg="uncond-first", backend="eager", regional=True)
    with pytest.raises(
        CompileError, match=r"regional=True compiles nothing here: DiffusionTransformer .* pass regional=False"
    ):
        model(**sat_call(2))


def test_operations_are_counted_under_the_autocast_of_the_run(monkeypatch):
    """Mochi as released asserts what autocast makes of its tensors."""
    monkeypatch.setattr(AsymmetricAttention, "computed_in", torch.bfloat16)
    model, calls = build(AsymmDiTJoint), mochi_calls(1)
    fastercache.compile(model, steps=STEPS, cfg="cond-then-uncond")
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(STEPS):
            model(**calls.cond)
            model(**calls.uncond)
    assert fastercache.summary(model).flops.ratio > 1
    monkeypatch.setattr(AsymmetricAttention, "computed_in", torch.float32)
    fastercache.restore(model)
    fastercache.compile(model, steps=STEPS, cfg="cond-then-uncond")
    for _ in range(STEPS):
        model(**calls.cond)
        model(**calls.uncond)
    with torch.autocast("cpu", torch.bfloat16):
        assert fastercache.summary(model).flops.ratio > 1


def test_another_class_of_the_same_name_is_refused():
    """Several projects have a DiffusionTransformer."""
    other = type("DiffusionTransformer", (torch.nn.Module,), {})()
    with pytest.raises(UnsupportedModelError, match=r"DiffusionTransformer has no module 'transformer\.layers'"):
        fastercache.compile(other)
