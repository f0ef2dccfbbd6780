"""CogVideoX and Mochi in the code they were released with, as far as their parts and their calls go."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from models import ready
from released import (
    AsymmDiTJoint,
    AsymmetricAttention,
    DiffusionTransformer,
    SelfAttention,
    mochi_calls,
    sat_call,
)
from simulator import Simulator
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import fastercache
from fastercache import CompileError, Family, Schedule, Step, UnsupportedModelError, policies
from fastercache.models.registry import family_of

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


BLOCKS = Schedule((Step(), Step("both", ("block[1:]",), (1.0,)), Step("both", ("stack",), (1.0,))))


def of_sat(schedule=BLOCKS, **options):
    """Compiled, after a run."""
    model = build(DiffusionTransformer)
    fastercache.compile(model, schedule, steps=len(schedule), cfg="uncond-first", **options)
    run_sat(model)
    return model


def run_sat(model):
    return [model(**sat_call(2)) for _ in BLOCKS.steps]


def parts_of(model):
    """Everything that is kept in the modules, and in which order."""
    return {path: [*vars(module)] for path, module in model.named_modules()}, [*model.hooks.items()]


def test_restore_gives_the_layers_and_hooks_of_sat_back():
    untouched = build(DiffusionTransformer)
    expected, model = untouched(**sat_call(2)), of_sat()
    assert fastercache.summary(model).skipped_anything
    with fastercache.disabled(model):
        assert torch.equal(model(**sat_call(2)), expected)
    assert "forward" in vars(model.transformer.layers[0])
    fastercache.restore(model)
    layer_forward = model.mixins["adaln_layer"].layer_forward
    assert parts_of(model)[0] == parts_of(untouched)[0]
    assert model.hooks == model.transformer.hooks == {"layer_forward": layer_forward}
    assert torch.equal(model(**sat_call(2)), expected)
    copy.deepcopy(model)


def add_mixin(model):
    model.add_mixin("other", torch.nn.Module())


def wrap(model):
    function = model.hooks["layer_forward"]
    model.hooks["layer_forward"] = lambda *args, **kwargs: function(*args, **kwargs)


def remove(model):
    del model.hooks["layer_forward"]


@pytest.mark.parametrize("change", [add_mixin, wrap, remove])
def test_layers_that_a_changed_hook_would_pass_by_are_refused(change):
    """The model would sample on uncached."""
    model, expected = of_sat(), build(DiffusionTransformer)(**sat_call(2))
    change(model)
    with pytest.raises(CompileError, match=r"hook 'layer_forward' of DiffusionTransformer was replaced .*restore"):
        model(**sat_call(2))
    fastercache.restore(model)
    if change is remove:
        with pytest.raises(UnsupportedModelError, match="DiffusionTransformer has no hook 'layer_forward'"):
            fastercache.compile(model)
        return
    assert torch.equal(model(**sat_call(2)), expected)
    fastercache.compile(model, BLOCKS, steps=len(BLOCKS), cfg="uncond-first")
    again = run_sat(model)
    assert all(map(torch.equal, again, run_sat(of_sat())))


def test_hooks_may_change_where_no_layer_is_a_site_of_the_schedule():
    schedule = Schedule((Step(), Step("both", ("joint",), (1.0,)), Step()))
    model = of_sat(schedule)
    assert parts_of(model)[1] == [("layer_forward", model.mixins["adaln_layer"].layer_forward)]
    add_mixin(model)
    assert all(map(torch.equal, run_sat(model), run_sat(of_sat(schedule))))


@pytest.mark.parametrize("restored", [False, True])
def test_operations_of_layers_that_a_hook_stands_for_are_counted(restored):
    """By hand, and on a run; a summary is asked for its count when somebody reads it."""
    model = of_sat()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run_sat(model)
    summary = fastercache.summary(model)
    if restored:
        fastercache.restore(model)
    rows, tokens, width = 2, 5 + 3 * 4 * 3, 16
    layer = rows * 2 * (tokens * (3 + 1 + 1) * width**2 + 2 * tokens**2 * width + width)
    assert summary.flops.uncached - summary.flops.cached == 3 * layer
    assert summary.flops.cached == counter.get_total_flops()


def test_a_count_leaves_hooks_that_cannot_be_copied_as_they_are():
    """The copy on which it is made shares them."""
    model = build(DiffusionTransformer)
    model.hooks["lock"] = threading.Lock()
    fastercache.compile(model, BLOCKS, steps=len(BLOCKS), cfg="uncond-first")
    first, hooks = run_sat(model), dict(model.hooks)
    assert fastercache.summary(model).flops.ratio > 1
    assert model.hooks == hooks and all(map(torch.equal, run_sat(model), first))


def test_observed_shapes_of_sats_layers_are_those_it_says():
    model, call = build(DiffusionTransformer), sat_call(2)
    family = family_of(model)
    sites = family.sites(model)
    assert [site.kind for site in sites] == ["stack", *2 * ["block", "joint", "mlp"]]
    for site in sites:
        assert Family.site_shapes(family, model, site, call) == family.site_shapes(model, site, call)


@pytest.mark.parametrize("schedule", [policies.paper(STEPS, True), BLOCKS])
def test_blocks_whose_own_forward_is_bypassed_do_not_compile_regionally(schedule):
    """SAT calls the attention and the MLP of a layer from a hook, which finds the layer by its number."""
    model = build(DiffusionTransformer)
    fastercache.compile(model, schedule, steps=len(schedule), cfg="uncond-first", backend="eager", regional=True)
    with pytest.raises(
        CompileError, match=r"regional=True compiles nothing here: DiffusionTransformer .* pass regional=False"
    ):
        model(**sat_call(2))
    fastercache.restore(model)
    assert parts_of(model)[0] == parts_of(build(DiffusionTransformer))[0]


def test_layers_that_a_hook_stands_for_compile_with_the_whole_model(monkeypatch):
    """Where the attention branches on no value of its mask, as SAT's own does."""

    def unmasked(self, hidden_states, mask):
        return self.dense(F.scaled_dot_product_attention(*self.query_key_value(hidden_states).chunk(3, dim=-1)))

    with pytest.raises(CompileError, match="DiffusionTransformer does not compile as one graph: 'Data-dependent"):
        of_sat(backend="eager")
    monkeypatch.setattr(SelfAttention, "forward", unmasked)
    torch._dynamo.reset()
    counter = CompileCounter()
    model = build(DiffusionTransformer)
    model(**sat_call(2))  # which fills the hooks of its layers
    with torch._dynamo.config.patch(error_on_recompile=True):
        fastercache.compile(model, BLOCKS, steps=len(BLOCKS), cfg="uncond-first", backend=counter)
        run_sat(model)
        again = run_sat(model)
    assert all(map(torch.equal, again, run_sat(of_sat())))
    assert counter.frame_count == len(BLOCKS)
    fastercache.restore(model)
    assert model.hooks == model.transformer.hooks == {"layer_forward": model.mixins["adaln_layer"].layer_forward}
    torch._dynamo.reset()


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
