"""Every family against the simulator: small models with upstream's structure, whole schedules, several prompts, two
precisions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from models import OTHERS, TWO_CALLS, call, latents_of
from simulator import Simulator

import fastercache
from fastercache import RunError, UnsupportedModelError, policies
from fastercache.models.registry import family_of
from fastercache.schedule.presets import OPEN_SORA_MLP

pytestmark = pytest.mark.filterwarnings("ignore::fastercache.FasterCacheWarning")
STEPS = 9


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def order_of(name):
    return family_of(OTHERS[name](torch.float32)).layout


def rows_of(name, prompts):
    return prompts * (1 if order_of(name) == "none" else 2)


def trajectory(run, inputs, steps=STEPS):
    """A closed loop, so that an error of one step reaches the next: the prediction of every step."""
    outputs, latents = [], latents_of(inputs)
    for _ in range(steps):
        prediction = run(inputs)
        prediction = prediction if isinstance(prediction, torch.Tensor) else prediction[0]
        outputs.append(prediction)
        channels = inputs[latents].shape[1]
        inputs = inputs | {latents: inputs[latents] - 0.1 * prediction[:, :channels].to(inputs[latents].dtype)}
    return torch.stack(outputs)


def error(actual, reference):
    return float((actual.double() - reference.double()).norm() / reference.double().norm())


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("prompts", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cached_runs_equal_the_simulator(name, prompts, dtype):
    """To within twice the rounding error of the simulator itself in that precision."""
    order, rows, model = order_of(name), rows_of(name, prompts), OTHERS[name](dtype)
    schedule = policies.paper(STEPS, order != "none", site="attention")
    exact = trajectory(Simulator(OTHERS[name](dtype).double(), schedule, order), in_double(call(model, rows)))
    rounded = trajectory(Simulator(OTHERS[name](dtype), schedule, order), call(model, rows))
    fastercache.compile(model, schedule, steps=STEPS, cfg=order)
    actual = trajectory(lambda inputs: model(**inputs), call(model, rows))
    assert error(actual, exact) <= 2 * error(rounded, exact)
    summary = fastercache.summary(model)
    assert summary.skipped_anything and summary.cache_bytes == summary.cache_bytes_planned > 0


def in_double(inputs):
    return {
        key: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for key, value in inputs.items()
    }


@pytest.mark.parametrize("name", OTHERS)
def test_mlp_sites_equal_the_simulator(name):
    order, rows, model = order_of(name), rows_of(name, 1), OTHERS[name](torch.float32)
    schedule = policies.paper(STEPS, order != "none", site="mlp")
    expected = trajectory(Simulator(OTHERS[name](torch.float32), schedule, order), call(model, rows))
    fastercache.compile(model, schedule, steps=STEPS, cfg=order)
    assert error(trajectory(lambda inputs: model(**inputs), call(model, rows)), expected) < 1e-5


def test_mlps_that_repeat_their_output_while_attention_is_extrapolated():
    """Open-Sora's script for several GPUs, on the four MLPs of this model in place of 56."""
    rule = replace(OPEN_SORA_MLP, plain_site="mlp[1:3]")
    schedule, model = policies.released(15, True, rule=rule), OTHERS["stdit3"](torch.float32)
    assert any(step.own_taps for step in schedule.steps)
    expected = trajectory(Simulator(OTHERS["stdit3"](torch.float32), schedule, "cond-first"), call(model, 2), 15)
    fastercache.compile(model, schedule, steps=15, cfg="cond-first")
    assert error(trajectory(lambda inputs: model(**inputs), call(model, 2), 15), expected) < 1e-5


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_schedule_that_skips_nothing_is_bit_identical(name, dtype):
    model, rows = OTHERS[name](dtype), rows_of(name, 3)
    before = trajectory(lambda inputs: model(**inputs), call(model, rows), 3)
    fastercache.compile(model, "none", steps=3, cfg=order_of(name))
    assert torch.equal(trajectory(lambda inputs: model(**inputs), call(model, rows), 3), before)


@pytest.mark.parametrize("name", [name for name in OTHERS if order_of(name) != "none"])
@pytest.mark.parametrize("planted", ["uncond", "cond"])
def test_nothing_of_one_branch_reaches_the_other(name, planted):
    """A marker planted in one branch's rows: the other branch's predictions stay the same, bit for bit."""
    model, order = OTHERS[name](torch.float32), order_of(name)
    first = planted == order.removesuffix("-first")
    with_it, without = (slice(0, 2), slice(2, 4)) if first else (slice(2, 4), slice(0, 2))
    clean, marked = call(model, 4), call(model, 4)
    marked[latents_of(marked)][with_it] = 1e4
    # On a single-branch step the unconditional prediction is made from the conditional one, so it follows a marker
    # there by design.
    for policy in (policies.dynamic_only, policies.paper)[: 1 + (planted == "uncond")]:
        fastercache.compile(model, policy, steps=STEPS, cfg=order)
        runs = []
        for inputs in (clean, marked):
            outputs = [model(**inputs) for _ in range(STEPS)]
            runs.append([(output if isinstance(output, torch.Tensor) else output[0])[without] for output in outputs])
        assert fastercache.summary(model).skipped_anything
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
        fastercache.restore(model)


@pytest.mark.parametrize("name", OTHERS)
def test_operations_are_counted_without_the_values_of_any_input(name):
    model, order = OTHERS[name](torch.float32), order_of(name)
    fastercache.compile(model, steps=STEPS, cfg=order)
    trajectory(lambda inputs: model(**inputs), call(model, rows_of(name, 1)))
    assert fastercache.summary(model).flops.ratio > 1.1


@pytest.mark.parametrize("name", OTHERS | TWO_CALLS)
def test_a_missing_or_renamed_part_is_named(name):
    model = (OTHERS | TWO_CALLS)[name](torch.float32)
    site = family_of(model).parts(model)[-1]
    block, _, part = site.path.rpartition(".")
    model.get_submodule(block).renamed = site.module
    delattr(model.get_submodule(block), part)
    with pytest.raises(UnsupportedModelError, match=f"{type(model).__name__} has no module '{site.path}'"):
        fastercache.compile(model)
    del model.get_submodule(block.rpartition(".")[0])[-1]
    with pytest.raises(UnsupportedModelError, match=f"{type(model).__name__} has no module '{block}"):
        fastercache.compile(model)


def test_packed_tokens_without_their_extents_are_refused_where_planes_are_needed():
    model = OTHERS["ltx"](torch.float32)
    inputs = call(model, 2) | {"height": 5}
    fastercache.compile(model)
    with (
        pytest.raises(RunError, match=r"60 packed tokens.* 2, 5, 5"),
        fastercache.run(model, steps=STEPS, cfg="uncond-first"),
    ):
        model(**inputs)


def test_open_sora_gives_masks_and_frame_rates_to_single_branch_calls_too():
    """Upstream gives them one row for each prompt, and repeats it for both branches."""
    model, seen = OTHERS["stdit3"](torch.float32), []
    model.y_embedder.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    fastercache.compile(model, "cfg-only", steps=STEPS, cfg="cond-first")
    for _ in range(STEPS):
        assert len(model(**call(model, 6))) == 6
    assert set(seen) == {3, 6}
