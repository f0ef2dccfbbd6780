"""The engine against the simulator, and the rules of a run, on models without a pipeline."""

from __future__ import annotations

import copy
import pickle
import threading
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import MODELS, arguments, cogvideox, latte
from simulator import Simulator

import fastercache
from fastercache import (
    CompileError,
    FasterCacheWarning,
    RunError,
    Schedule,
    ScheduleError,
    Step,
    UnsupportedModelError,
    policies,
)

pytestmark = pytest.mark.filterwarnings("ignore::fastercache.FasterCacheWarning")


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@st.composite
def schedules(draw, selectors):
    """Any valid schedule of 3 to 8 steps over some of the selectors."""
    chosen = draw(st.sampled_from(selectors))
    weights = st.floats(-1.5, 1.5)
    steps, computed, single = [], dict.fromkeys(chosen, 0), False
    for number in range(draw(st.integers(3, 8))):
        branches = draw(st.sampled_from(["both", "cond"])) if number else "both"
        single = single or branches == "cond"
        taps = draw(st.lists(weights, min_size=1, max_size=4))
        allowed = [name for name in chosen if computed[name] >= len(taps)] if branches == "cond" or not single else []
        reuse = tuple(name for name in allowed if draw(st.booleans()))
        own = ((reuse[-1], tuple(taps[:1])),) if reuse and draw(st.booleans()) else ()
        steps.append(Step(branches, reuse, tuple(taps) if reuse else (), draw(weights), draw(weights), own))
        for name in chosen:
            computed[name] += name not in reuse
    return Schedule(tuple(steps), name="drawn")


SELECTORS = {
    "latte": [("attention",), ("spatial", "temporal[1:]"), ("mlp[1:3]", "attention"), ("temporal",)],
    "cogvideox": [("attention",), ("joint[0:1]", "mlp"), ("mlp[1:]",)],
}


def sample(call, model, schedule, rows, order, seed=0):
    """A closed loop, so that an error of one step reaches the next: returns the prediction of every step."""
    inputs = arguments(model, rows, seed)
    outputs = []
    for _ in schedule.steps:
        prediction = call(inputs)
        outputs.append(prediction)
        channels = inputs["hidden_states"].shape[1] if prediction.shape[1] != inputs["hidden_states"].shape[1] else None
        inputs = inputs | {
            "hidden_states": inputs["hidden_states"]
            - 0.1 * (prediction if channels is None else prediction[:, :channels])
        }
    return torch.stack(outputs)


@pytest.mark.parametrize("family", MODELS)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_engine_equals_the_simulator(family, data):
    model = MODELS[family]()
    schedule = data.draw(schedules(SELECTORS[family]))
    order = data.draw(st.sampled_from(["uncond-first", "cond-first", "none"]))
    rows = data.draw(st.integers(1, 3)) * (1 if order == "none" else 2)
    simulator = Simulator(MODELS[family](), schedule, order)
    expected = sample(simulator, model, schedule, rows, order)
    fastercache.compile(model, schedule, steps=len(schedule), cfg=order)
    actual = sample(lambda inputs: model(**inputs)[0], model, schedule, rows, order)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)
    summary = fastercache.summary(model)
    assert summary.cache_bytes == summary.cache_bytes_planned


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("order", ["uncond-first", "cond-first", "none"])
def test_paper_schedule_equals_the_simulator(family, order):
    model, schedule = MODELS[family](), policies.paper(20, order != "none")
    expected = sample(Simulator(MODELS[family](), schedule, order), model, schedule, 4, order)
    fastercache.compile(model, steps=20, cfg=order)
    torch.testing.assert_close(
        sample(lambda inputs: model(**inputs)[0], model, schedule, 4, order), expected, rtol=1e-9, atol=1e-10
    )


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_schedule_that_skips_nothing_is_bit_identical(family, dtype):
    model, schedule = MODELS[family](dtype), policies.none(4)
    expected = sample(lambda inputs: MODELS[family](dtype)(**inputs)[0], model, schedule, 2, "uncond-first")
    fastercache.compile(model, "none", steps=4, cfg="uncond-first")
    assert torch.equal(sample(lambda inputs: model(**inputs)[0], model, schedule, 2, "uncond-first"), expected)
    assert fastercache.summary(model).cache_bytes == 0


def marked(model, rows, poisoned):
    """Arguments whose poisoned rows hold a marker that would be seen anywhere it went."""
    inputs = arguments(model, rows)
    inputs["hidden_states"][poisoned] = 1e30
    inputs["encoder_hidden_states"][poisoned] = 1e30
    return inputs


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("order", ["uncond-first", "cond-first"])
@pytest.mark.parametrize("policy", [policies.paper, policies.dynamic_only, policies.plain])
def test_nothing_of_one_branch_reaches_the_other(family, order, policy):
    """The conditional rows are the same, bit for bit, whatever is in the unconditional ones."""
    model = MODELS[family]()
    fastercache.compile(model, policy, steps=12, cfg=order)
    uncond, cond = (slice(0, 2), slice(2, 4)) if order == "uncond-first" else (slice(2, 4), slice(0, 2))
    clean, dirty = arguments(model, 4), marked(model, 4, uncond)
    predictions = [[model(**inputs)[0][cond] for _ in range(12)] for inputs in (clean, dirty)]
    assert all(torch.equal(a, b) for a, b in zip(*predictions, strict=True))


def test_the_conditional_row_runs_alone_whatever_the_order():
    """Authors' defect: their CogVideoX runs row 0, the unconditional branch, on single-branch steps."""
    for order, cond in (("uncond-first", slice(2, 4)), ("cond-first", slice(0, 2))):
        model, seen = cogvideox(), []
        model.patch_embed.register_forward_hook(lambda module, args, output, seen=seen: seen.append(args[1]))
        fastercache.compile(model, "cfg-only", steps=6, cfg=order)
        inputs = arguments(model, 4)
        for _ in range(6):
            model(**inputs)
        single = [latents for latents in seen if latents.shape[0] == 2]
        assert len(single) == 3 and all(torch.equal(latents, inputs["hidden_states"][cond]) for latents in single)


def test_only_what_a_later_step_reads_is_cached():
    """After single-branch steps begin the unconditional features are never read, so the paper's schedule caches one
    branch of two."""
    sizes = {}
    for name in ("paper", "dynamic-only"):
        model = cogvideox()
        fastercache.compile(model, name, steps=12, cfg="uncond-first")
        inputs = arguments(model, 4)
        for _ in range(12):
            model(**inputs)
        sizes[name] = fastercache.summary(model).cache_bytes
    tokens = 3 * 5 * 3 + 5  # three frames of 5 x 3 patches, and 5 text tokens
    channels, layers, slots, size = 16, 2, 2, 8
    ring = 2 * tokens * channels * layers * slots * size
    maps = 2 * (2 * 3 * 2 * 10 * 6) * size
    assert sizes == {"paper": ring + maps, "dynamic-only": 2 * ring}


def test_summary_counts_steps_by_branch_and_site():
    model = latte()
    fastercache.compile(model, steps=20, cfg="uncond-first")
    for _ in range(20):
        model(**arguments(model, 2))
    summary = fastercache.summary(model)
    chart = policies.paper(20).chart().split()
    for row in summary.sites:
        line = chart[1] if row.branch == "cond" else chart[3]
        blended = line.count("~") if row.kind not in ("mlp", "cross") else 0
        assert (row.computed, row.blended, row.skipped) == (20 - line.count(".") - blended, blended, line.count("."))
    assert set(summary.implementations) == {"ring_push", "ring_blend", "cfg_split", "cfg_reconstruct"}
    assert "spatial" in str(summary)


def test_flops_are_those_of_the_published_arithmetic():
    """Counted by hand: projections and score products of each attention that is not computed, and half the batch where
    one branch runs."""
    model = latte()
    fastercache.compile(model, steps=20, cfg="uncond-first")
    for _ in range(20):
        model(**arguments(model, 2))
    frames, tokens, width = 3, 16, 16
    projections = 4 * 2 * frames * tokens * width * width
    attention = 2 * (
        2 * projections + 4 * width * (frames * tokens**2 + tokens * frames**2)
    )  # two layers, spatial and temporal
    chart = policies.paper(20).chart().split()
    single, blended = chart[3].count("."), chart[1].count("~")
    flops = fastercache.summary(model).flops
    branch = flops.uncached / 40
    assert flops.cached == pytest.approx(flops.uncached - single * branch - blended * attention, rel=1e-3)


def test_summary_tells_the_layers_that_are_reused_from_the_others():
    model = latte()
    fastercache.compile(model, Schedule((Step(), Step("both", ("mlp[1:3]",), (1.0,)))), steps=2, cfg="none")
    for _ in range(2):
        model(**arguments(model, 2))
    assert [(row.kind, row.blended) for row in fastercache.summary(model).sites] == [
        ("spatial", 0),
        ("cross", 0),
        ("mlp[0:1,3:4]", 0),
        ("temporal", 0),
        ("mlp[1:3]", 1),
    ]


# ---- one run at a time, and nothing left of the last -----------------------------------------------------------------


def run_once(model, steps=8, rows=4, seed=0):
    inputs = arguments(model, rows, seed)
    return torch.stack([model(**inputs)[0] for _ in range(steps)])


@pytest.mark.parametrize("family", MODELS)
def test_an_exception_leaves_nothing_behind(family):
    model = MODELS[family]()
    fastercache.compile(model)
    with fastercache.run(model, steps=8, cfg="uncond-first"):
        fresh = run_once(model)
    with pytest.raises(RuntimeError, match="boom"), fastercache.run(model, steps=8, cfg="uncond-first"):
        run_once(model, 5, seed=1)
        handle = model.transformer_blocks[1].register_forward_pre_hook(
            lambda *_: (_ for _ in ()).throw(RuntimeError("boom"))
        )
        try:
            run_once(model, 1)
        finally:
            handle.remove()
    with fastercache.run(model, steps=8, cfg="uncond-first"):
        assert torch.equal(run_once(model), fresh)
    with fastercache.run(model, steps=8, cfg="uncond-first"):
        run_once(model, 5, seed=2)  # left early, as after an interrupt
    assert "stopped after 5 of 8 steps" in str(fastercache.summary(model))
    with fastercache.run(model, steps=8, cfg="uncond-first"):
        assert torch.equal(run_once(model), fresh)


def test_a_failed_step_ends_its_run():
    model = latte()
    fastercache.compile(model)
    with pytest.raises(RunError, match="ended by an error"), fastercache.run(model, steps=8, cfg="uncond-first"):
        with pytest.raises(RunError, match="batch of 3"):
            run_once(model, 1, rows=3)
        run_once(model, 1)


def test_implicit_runs_repeat_and_begin_anew_after_an_error_or_another_shape():
    model = latte()
    fastercache.compile(model, steps=8, cfg="uncond-first")
    fresh = run_once(model)
    assert torch.equal(run_once(model), fresh)
    run_once(model, 5, seed=1)
    two_rows = run_once(model, rows=2)
    run_once(model, 5, seed=1)
    with pytest.raises(RunError, match="batch of 3 cannot be split"):
        run_once(model, 1, rows=3)
    assert torch.equal(run_once(model), fresh)
    assert torch.equal(run_once(model, rows=2), two_rows)


def test_a_run_inside_a_run_is_an_error_and_the_outer_one_goes_on():
    model = latte()
    fastercache.compile(model)
    with fastercache.run(model, steps=8, cfg="uncond-first"):
        fresh = run_once(model)
    with fastercache.run(model, steps=8, cfg="uncond-first"):
        first = run_once(model, 4)
        with pytest.raises(RunError, match="already under way"), fastercache.run(model, steps=3, cfg="none"):
            pass
        assert torch.equal(torch.cat([first, run_once(model, 4)]), fresh)


def test_another_thread_cannot_step_into_a_run():
    model, errors = latte(), []
    fastercache.compile(model)

    def intrude():
        try:
            with torch.no_grad():
                run_once(model, 1)
        except RunError as error:
            errors.append(str(error))

    with fastercache.run(model, steps=8, cfg="uncond-first"):
        fresh = run_once(model, 4)
        thread = threading.Thread(target=intrude)
        thread.start()
        thread.join()
        fresh = torch.cat([fresh, run_once(model, 4)])
    assert errors and "another thread" in errors[0]
    with fastercache.run(model, steps=8, cfg="uncond-first"):
        assert torch.equal(run_once(model), fresh)


def test_two_models_run_side_by_side():
    models = [latte(seed=0), latte(seed=1)]
    alone = []
    for model in models:
        fastercache.compile(model, steps=8, cfg="uncond-first")
        alone.append(run_once(model))
    inputs = arguments(models[0], 4)
    together = [
        torch.stack(outputs)
        for outputs in zip(*[[model(**inputs)[0] for model in models] for _ in range(8)], strict=True)
    ]
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


# ---- compile and restore ---------------------------------------------------------------------------------------------


def test_restore_gives_the_untouched_model_back():
    model = latte()
    before = run_once(model, 2)
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    assert fastercache.compile(model, steps=4, cfg="uncond-first") is model
    run_once(model, 4)
    with fastercache.disabled(model):
        assert torch.equal(run_once(model, 2), before)
    assert fastercache.restore(model) is model
    assert attributes == {name: set(vars(module)) for name, module in model.named_modules()}
    assert torch.equal(run_once(model, 2), before)
    pickle.loads(pickle.dumps(model))
    copy.deepcopy(model)


@pytest.mark.parametrize("hooked_first", [True, False])
def test_accelerate_hooks_may_come_and_go(hooked_first):
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    model = latte()
    plain = run_once(model, 2)
    if hooked_first:
        add_hook_to_module(model, ModelHook())
    fastercache.compile(model, steps=8, cfg="uncond-first")
    if not hooked_first:
        add_hook_to_module(model, ModelHook())
    cached = run_once(model)
    remove_hook_from_module(model)  # diffusers does this after every call of an offloaded pipeline
    add_hook_to_module(model, ModelHook())
    assert torch.equal(run_once(model), cached)
    assert fastercache.summary(model).skipped_anything
    fastercache.restore(model)
    remove_hook_from_module(model)
    assert torch.equal(run_once(model, 2), plain) and not hasattr(model, "_old_forward")


def test_what_compile_refuses_is_left_as_it_was():
    model = latte()
    before = set(vars(model))
    for wrong, error, message in [
        (
            lambda: fastercache.compile(torch.nn.Linear(2, 2)),
            UnsupportedModelError,
            "Linear is of no known model family.*Latte",
        ),
        (lambda: fastercache.compile(3), UnsupportedModelError, "cannot compile a int"),
        (lambda: fastercache.compile(model, steps=8), CompileError, "give both"),
        (lambda: fastercache.compile(model, steps=0, cfg="none"), RunError, "steps is 0"),
        (lambda: fastercache.compile(model, steps=8, cfg="both"), RunError, "cfg is 'both'.*'uncond-first'"),
        (lambda: fastercache.compile(model, "papr"), ScheduleError, "unknown policy 'papr'.*paper"),
        (lambda: fastercache.compile(model, "nowhere.json"), ScheduleError, "'nowhere.json' cannot be read"),
        (lambda: fastercache.compile(model, 3.5), ScheduleError, "schedule is a float"),
        (lambda: fastercache.compile(torch.compile(latte())), CompileError, "compiled by torch already"),
        (lambda: fastercache.restore(model), CompileError, "not compiled"),
        (lambda: fastercache.summary(model), CompileError, "not compiled"),
    ]:
        with pytest.raises(error, match=message):
            wrong()
        assert set(vars(model)) == before
    fastercache.compile(model)
    with pytest.raises(CompileError, match="already"):
        fastercache.compile(model)
    with pytest.raises(CompileError, match="cannot be copied"):
        copy.deepcopy(model)
    fastercache.restore(model)
    del model.transformer_blocks[1]
    with pytest.raises(UnsupportedModelError, match=r"has no module 'transformer_blocks\.1\.attn1'"):
        fastercache.compile(model)
    assert set(vars(model)) == before and "forward" not in vars(model.transformer_blocks[0].attn1)


def test_a_schedule_that_does_not_fit_the_run_is_refused_at_its_first_step():
    model = latte()
    fastercache.compile(model, Schedule((Step(), Step("cond", ("joint",), (1.0,)))))
    no_site = pytest.raises(
        ScheduleError, match=r"reuses 'joint', but Latte has no such site; it has stack, block .*, spatial"
    )
    with no_site, fastercache.run(model, steps=2, cfg="uncond-first"):
        run_once(model, 1)
    with (
        pytest.raises(ScheduleError, match="has 2 steps, but this run has 3"),
        fastercache.run(model, steps=3, cfg="uncond-first"),
    ):
        run_once(model, 1)


def test_autograd_is_refused_but_not_outside_a_run():
    model = latte().requires_grad_(True)
    fastercache.compile(model)
    with torch.enable_grad():
        with pytest.raises(RunError, match="no_grad"), fastercache.run(model, steps=8, cfg="uncond-first"):
            run_once(model, 1)
        with fastercache.disabled(model):
            assert run_once(model, 1).requires_grad


def test_guidance_switched_off_in_the_middle_is_an_error():
    model = latte()
    fastercache.compile(model)
    with pytest.raises(RunError, match="began with"), fastercache.run(model, steps=8, cfg="uncond-first"):
        run_once(model, 4)
        run_once(model, 1, rows=2)


@pytest.mark.filterwarnings("error::fastercache.FasterCacheWarning")
class TestNeverSilent:
    def test_a_call_outside_any_run_says_so_once_and_is_uncached(self):
        model = latte()
        before = run_once(model, 1)
        fastercache.compile(model)
        with pytest.warns(FasterCacheWarning, match="ran uncached"):
            assert torch.equal(run_once(model, 1), before)
        run_once(model, 1)

    def test_a_run_too_short_to_gain_warns(self):
        model = latte()
        fastercache.compile(model, steps=1, cfg="uncond-first")
        with pytest.warns(FasterCacheWarning, match="a run of 1 steps is too short"):
            run_once(model, 1)

    def test_cfg_cache_without_guidance_warns(self):
        model = latte()
        fastercache.compile(model, "cfg-only", steps=8, cfg="none")
        with pytest.warns(FasterCacheWarning, match="this run has no guidance"):
            run_once(model, 8)

    def test_a_replaced_forward_warns(self):
        model = latte()
        fastercache.compile(model)
        model.forward = lambda **_: (torch.zeros(1),)
        with (
            pytest.warns(FasterCacheWarning, match="something replaced its forward"),
            fastercache.run(model, steps=2, cfg="none"),
        ):
            model(**arguments(model, 2))

    def test_an_ordinary_run_does_not_warn(self):
        model = latte()
        fastercache.compile(model, steps=8, cfg="uncond-first")
        run_once(model)


# ---- what is refused, and what is said at the end --------------------------------------------------------------------


@pytest.mark.parametrize("backend", [None, "eager"])
@pytest.mark.parametrize("scope", [True, False])
def test_a_prediction_that_is_not_finite_is_said_at_the_end(backend, scope):
    """Coefficients are bounded, so only a model or its weights give such predictions."""
    model = latte(torch.float32)
    model.proj_out.weight[0, 0] = float("nan")
    fastercache.compile(model, steps=None if scope else 6, cfg=None if scope else "uncond-first", backend=backend)
    inputs = arguments(model, 4)
    with (
        pytest.warns(
            FasterCacheWarning, match="the prediction of the last step of LatteTransformer3DModel is not finite"
        ),
        fastercache.run(model, steps=6, cfg="uncond-first") if scope else nullcontext(),
    ):
        for _ in range(6):
            model(**inputs)
    assert "is not finite" in str(fastercache.summary(model))


def test_a_run_that_is_finite_says_nothing_of_it(recwarn):
    model = latte(torch.float32)
    fastercache.compile(model, steps=6, cfg="uncond-first")
    for _ in range(6):
        model(**arguments(model, 4))
    assert not any("finite" in str(warning.message) for warning in recwarn) and "finite" not in str(
        fastercache.summary(model)
    )


@pytest.mark.parametrize("steps", [True, 0, -3, 2.5, "8"])
def test_a_step_count_that_is_no_whole_number_is_refused(steps):
    with pytest.raises(RunError, match=r"steps is .*whole number of at least 1"):
        fastercache.compile(latte(), steps=steps, cfg="none")


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("order", ["uncond-first", "none"])
@pytest.mark.parametrize("backend", [None, "eager"])
def test_sites_and_branches_may_have_coefficients_of_their_own(family, order, backend):
    """One graph serves them all: only numbers differ from site to site, and from branch to branch."""
    own = (("attention[1:]", (0.75,)), ("mlp[:1]", (1.25, -0.5)), ("mlp[1:]@uncond", (0.5, 0.25)))
    blend = Step("both", ("attention", "mlp"), (1.5, -0.5), own_taps=own)
    schedule = Schedule((Step(), Step(), blend, Step(), blend if order == "none" else Step("cond")))
    model = MODELS[family]()
    expected = sample(Simulator(MODELS[family](), schedule, order), model, schedule, 4, order)
    fastercache.compile(model, schedule, steps=len(schedule), cfg=order, backend=backend)
    actual = sample(lambda inputs: model(**inputs)[0], model, schedule, 4, order)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-10)
    if backend is not None:
        assert fastercache.summary(model).compiled.startswith("2 graphs" if order == "none" else "3 graphs")
