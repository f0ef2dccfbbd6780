"""Guidance in two calls a step: against the simulator, in both orders, and what must not be taken for it."""

from __future__ import annotations

import pytest
import torch
from models import TWO_CALLS, call
from simulator import Simulator

import fastercache
from bench.graphs import DeviceReads
from fastercache import RunError, policies
from fastercache.models.registry import family_of
from fastercache.runtime.guidance import same

pytestmark = pytest.mark.filterwarnings("ignore::fastercache.FasterCacheWarning")
STEPS = 12
ORDERS = ["cond-then-uncond", "uncond-then-cond"]


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def branches(model, rows):
    """The arguments of the unconditional and the conditional call: other texts, the same latents in tensors of their
    own."""
    uncond, cond = call(model, rows, seed=1), call(model, rows, seed=2)
    return uncond | {"hidden_states": cond["hidden_states"].clone()}, cond


def trajectory(pair, model, rows, steps=STEPS, texts=None):
    """A closed loop with guidance 3: the latents after every step."""
    uncond, cond = branches(model, rows)
    latents, path = cond["hidden_states"], []
    for number in range(steps):
        if texts is not None:
            cond = cond | {"encoder_hidden_states": texts[number]}
        e_u, e_c = pair(uncond | {"hidden_states": latents.clone()}, cond | {"hidden_states": latents.clone()})
        latents = latents - 0.1 * (e_u + 3.0 * (e_c - e_u)).reshape(latents.shape)
        path.append(latents)
    return torch.stack(path)


def sampler(model, order):
    """The two calls of a step as a pipeline of that order makes them."""

    def pair(uncond, cond):
        if order == "cond-then-uncond":
            e_c = model(**cond)[0]
            return model(**uncond)[0], e_c
        e_u = model(**uncond)[0]
        return e_u, model(**cond)[0]

    return pair


@pytest.mark.parametrize("name", TWO_CALLS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("prompts", [1, 3])
@pytest.mark.parametrize("policy", [policies.paper, policies.dynamic_only, policies.get("vchitect-2.0/released")])
def test_cached_runs_equal_the_simulator(name, order, prompts, policy):
    model, schedule = TWO_CALLS[name](torch.float32), policy(STEPS, True)
    expected = trajectory(Simulator(TWO_CALLS[name](torch.float32), schedule, order).pair, model, prompts)
    fastercache.compile(model, schedule, steps=STEPS, cfg=order)
    torch.testing.assert_close(trajectory(sampler(model, order), model, prompts), expected, rtol=1e-4, atol=1e-5)
    summary = fastercache.summary(model)
    assert (summary.steps_done, summary.guidance) == (STEPS, order)
    assert summary.cache_bytes == summary.cache_bytes_planned > 0


@pytest.mark.parametrize("name", TWO_CALLS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("prompts", [1, 3])
def test_cached_runs_in_bfloat16_are_as_near_as_the_simulator(name, order, prompts):
    """To within twice the rounding error of the simulator itself in that precision."""

    def build():
        return TWO_CALLS[name](torch.bfloat16)

    model, schedule = build(), policies.paper(STEPS, True)
    in_double = Simulator(build().double(), schedule, order)
    exact = trajectory(lambda *calls: in_double.pair(*map(doubled, calls)), model, prompts).double()
    rounded = trajectory(Simulator(build(), schedule, order).pair, model, prompts)
    fastercache.compile(model, schedule, steps=STEPS, cfg=order)
    actual = trajectory(sampler(model, order), model, prompts)
    assert (actual - exact).norm() <= 2 * (rounded - exact).norm()


def doubled(inputs):
    return {
        name: value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }


@pytest.mark.parametrize("name", TWO_CALLS)
@pytest.mark.parametrize("order", ORDERS)
def test_the_unconditional_call_is_saved_and_the_conditional_made_once(name, order):
    model, seen = TWO_CALLS[name](torch.float32), []
    first = family_of(model).block_paths(model)[0]
    model.get_submodule(first).register_forward_pre_hook(lambda *_: seen.append(1))
    fastercache.compile(model, steps=STEPS, cfg=order)
    trajectory(sampler(model, order), model, 1)
    single = sum(step.branches == "cond" for step in policies.paper(STEPS).steps)
    assert single > 0 and len(seen) == 2 * STEPS - single
    assert fastercache.summary(model).flops.ratio > 1.1


@pytest.mark.parametrize("name", TWO_CALLS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_schedule_that_skips_nothing_is_bit_identical(name, order, dtype):
    model = TWO_CALLS[name](dtype)
    before = trajectory(sampler(model, order), model, 3, 3)
    fastercache.compile(model, "none", steps=3, cfg=order)
    assert torch.equal(trajectory(sampler(model, order), model, 3, 3), before)


@pytest.mark.parametrize("name", TWO_CALLS)
@pytest.mark.parametrize("order", ORDERS)
def test_nothing_of_the_unconditional_branch_reaches_the_conditional(name, order):
    model = TWO_CALLS[name](torch.float32)
    outputs = []
    for planted in (0.0, 1e4):
        fastercache.compile(model, policies.dynamic_only, steps=STEPS, cfg=order)
        uncond, cond = branches(model, 1)
        uncond["encoder_hidden_states"] = uncond["encoder_hidden_states"] + planted
        outputs.append([sampler(model, order)(uncond, cond)[1] for _ in range(STEPS)])
        fastercache.restore(model)
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


def test_a_text_that_changes_between_steps_is_computed_with():
    """With the unconditional call first the conditional one is run ahead with the last text; the call itself has the
    last word."""
    model, order = TWO_CALLS["vchitect"](torch.float32), "uncond-then-cond"
    fastercache.compile(model, policies.cfg_only, steps=STEPS, cfg=order)
    calls = []

    def pair(uncond, cond):
        e_u, e_c = sampler(model, order)(uncond, cond)
        calls.append((cond, e_c))
        return e_u, e_c

    trajectory(pair, model, 1, texts=[torch.full((1, 5, 12), float(number)) for number in range(STEPS)])
    fastercache.restore(model)
    assert all(torch.equal(e_c, model(**cond)[0]) for cond, e_c in calls)


@pytest.mark.parametrize("order", ORDERS)
def test_a_pipeline_that_passes_the_same_tensors_is_never_waited_for(order):
    """Texts made before the first step, latents and timestep shared by the two calls: as diffusers' pipelines have
    them."""
    model = TWO_CALLS["wan"](torch.float32)
    fastercache.compile(model, steps=STEPS, cfg=order)
    uncond, cond = branches(model, 1)
    pair, latents = sampler(model, order), cond["hidden_states"]
    with DeviceReads() as mode:
        for number in range(STEPS):
            shared = {"hidden_states": latents, "timestep": torch.full((1,), 900.0 - number)}
            e_u, e_c = pair(uncond | shared, cond | shared)
            latents = latents - 0.1 * (e_u + 3.0 * (e_c - e_u))
    assert mode.reads == 0 and fastercache.summary(model).skipped_anything


def test_an_argument_that_is_rewritten_in_place_is_not_taken_for_text():
    """The timesteps of the two calls lie in buffers of their own; at the unconditional call the conditional one's holds
    the last step's."""
    model, order = TWO_CALLS["wan"](torch.float32), "uncond-then-cond"
    runs = []
    for buffers in (False, True):
        fastercache.compile(model, steps=STEPS, cfg=order)
        uncond, cond = branches(model, 1)
        times, latents = [torch.zeros(1), torch.zeros(1)], cond["hidden_states"]
        for number in range(STEPS):
            predictions = []
            for inputs, time in zip((uncond, cond), times, strict=True):
                time.fill_(900.0 - 50 * number)
                inputs = inputs | {"hidden_states": latents, "timestep": time if buffers else time.clone()}
                predictions.append(model(**inputs)[0])
            latents = latents - 0.1 * (predictions[0] + 3.0 * (predictions[1] - predictions[0]))
        fastercache.restore(model)
        runs.append(latents)
    assert torch.equal(*runs)


def test_arguments_are_compared_by_what_they_hold():
    text = torch.ones(2, 3)
    assert same({"a": [text, 1]}, {"a": [text.clone(), 1]}) and same(None, None) and same(text[:1], text[:1])
    for one, other in [
        (text, text + 1),
        (text, text.double()),
        (text, text[:1]),
        ([text], (text,)),
        ({"a": 1}, {"b": 1}),
        (1, 1.0),
        (text, None),
        (text[:, :1], text.T[:1].T.contiguous() + 1),
    ]:
        assert not same(one, other)


@pytest.mark.parametrize("order", ORDERS)
def test_guidance_switched_off_in_the_middle_is_an_error(order):
    model = TWO_CALLS["wan"](torch.float32)
    fastercache.compile(model)
    uncond, cond = branches(model, 1)
    with (
        pytest.raises(RunError, match=r"step 4 have different latents.*guidance was"),
        fastercache.run(model, steps=STEPS, cfg=order),
    ):
        for _ in range(3):
            sampler(model, order)(uncond, cond)
        model(**cond)
        model(**cond | {"hidden_states": cond["hidden_states"] + 1})


def test_two_rows_of_a_call_are_two_prompts_and_never_two_branches():
    """Each prompt comes out as it does alone."""
    model, order = TWO_CALLS["wan"](torch.float32), "cond-then-uncond"
    uncond, cond = branches(model, 2)

    def run(rows):
        fastercache.compile(model, steps=STEPS, cfg=order)
        first, second = (
            {key: value if key == "return_dict" else value[rows] for key, value in one.items()}
            for one in (uncond, cond)
        )
        latents = second["hidden_states"]
        for _ in range(STEPS):
            e_u, e_c = sampler(model, order)(first | {"hidden_states": latents}, second | {"hidden_states": latents})
            latents = latents - 0.1 * (e_u + 3.0 * (e_c - e_u))
        fastercache.restore(model)
        return latents

    alone = torch.cat([run(slice(0, 1)), run(slice(1, 2))])
    torch.testing.assert_close(run(slice(0, 2)), alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", ORDERS)
def test_compiled_phases_give_the_same(order):
    """A branch of a step is a graph of its own: the unconditional one, the conditional one, and that with its sites
    blended."""
    runs = []
    for options in ({}, {"backend": "eager"}):
        model = TWO_CALLS["wan"](torch.float32)
        fastercache.compile(model, steps=STEPS, cfg=order, **options)
        runs.append(trajectory(sampler(model, order), model, 1))
    assert torch.equal(*runs) and "3 graphs" in fastercache.summary(model).compiled
