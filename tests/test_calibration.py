"""Calibration on small pipelines with random weights: what is fitted, found, kept and refused."""

from __future__ import annotations

import functools
import itertools
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    DPMSolverMultistepScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
)
from models import arguments, cogvideox
from PIL import Image
from test_video_pipelines import hunyuan15_image, wan, wan_experts
from torch._dynamo.testing import CompileCounter

import fastercache
from bench.graphs import DeviceReads
from fastercache import CalibrationError, Prediction, Schedule, Step
from fastercache.calibration.branches import Branches, CallNotes
from fastercache.calibration.calibrate import EFFORTS, Calibration, Candidate, Effort, divided
from fastercache.calibration.capture import DIFFERENCE, LATENTS, LOW, Capture, Reference
from fastercache.calibration.clips import CEILING, T_975, Example, clip_of, interval, psnr
from fastercache.calibration.costs import Costs
from fastercache.calibration.fit import LARGEST, RIDGES, Moments, fitted, solve
from fastercache.calibration.gains import Disturbed, importance
from fastercache.calibration.lockstep import Stage
from fastercache.calibration.rehearse import Options, Rehearsal, Rehearsals
from fastercache.calibration.residuals import FURTHEST, Residuals
from fastercache.calibration.search import Search, shown
from fastercache.calibration.store import Store, digest

pytestmark = pytest.mark.filterwarnings("ignore::fastercache.FasterCacheWarning")
STEPS = 14
SMALL = Effort(fitted=2, held=1, points=3, tried=2, few=1, finalists=1, moved=1)


def cogvideo():
    pipe = CogVideoXPipeline(
        None, None, None, cogvideox(torch.float32), CogVideoXDDIMScheduler(timestep_spacing="trailing")
    )
    return pipe, {"height": 80, "width": 48, "num_frames": 9, "guidance_scale": 4.0, "use_dynamic_cfg": True}


def flow_wan():
    pipe, arguments = wan(1)
    pipe.scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    return pipe, arguments


PIPELINES = {"cogvideox": cogvideo, "wan": flow_wan}


def made(name):
    pipe, arguments = PIPELINES[name]()
    pipe.set_progress_bar_config(disable=True)
    call = {key: value for key, value in arguments.items() if not key.endswith("_embeds")} | {"output_type": "latent"}
    return pipe, call


def prompts(count, name="cogvideox"):
    """Texts as embeddings, which pipelines without a text encoder take."""
    texts = []
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        names = ("prompt_embeds", "negative_prompt_embeds")
        texts.append({key: torch.randn((1, 5, 12), generator=generator) for key in names})
    return texts


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setitem(EFFORTS, "quick", SMALL)


def sampled(pipe, call, text, seed, steps=STEPS):
    generator = torch.Generator().manual_seed(seed)
    return clip_of(pipe(**call, **text, num_inference_steps=steps, generator=generator))


MIXED = tuple(["both"] * 3 + ["none", "cond", "none", "none", "both", "cond", "cond", "none", "both", "none", "both"])


# ---- what is captured ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PIPELINES)
def test_a_captured_generation_is_the_pipelines_own_and_its_products_are_those_of_its_predictions(name):
    pipe, call = made(name)
    stage = Stage(pipe, call | {"num_inference_steps": STEPS})
    text = prompts(1)[0]
    with stage.open():
        reference = Capture(stage).reference(Example.of(text, 3))
    assert np.array_equal(reference.clip, sampled(pipe, call, text, 3))
    assert reference.latents.shape[0] == STEPS + 1 and reference.guided.shape[0] == STEPS
    # The guided prediction of each step is what its weights make of the branches: so are its products.
    for step in (0, STEPS - 1):
        weights = np.asarray([*reference.weights[step], 0.0, 0.0])
        square = float(weights @ reference.products[step, :, step] @ weights)
        assert square == pytest.approx(float(reference.guided[step].double().square().sum()), rel=1e-4)


@pytest.mark.parametrize("name", PIPELINES)
def test_the_response_foretells_the_next_latents(name):
    """`response` is by how much the next latents move with the prediction: the first step, disturbed by hand."""
    pipe, call = made(name)
    stage, text = Stage(pipe, call | {"num_inference_steps": STEPS}), prompts(1)[0]
    with stage.open():
        reference = Capture(stage).reference(Example.of(text, 3))
        branches = Branches(stage)

        def conduct(lane, component, original, arguments):
            return branches.call(lane, lane.notes, "both", component, original, arguments)

        with stage.lanes([Example.of(text, 3)], conduct) as (lane,):
            lane.notes = CallNotes()
            moment = lane.advance()
            branches.begin_step(lane.notes)
            lane.advance(moment.prediction + 0.5)
            moved = lane.latents - reference.latents[1]
    assert np.isfinite(reference.response).all()
    torch.testing.assert_close(moved, torch.full_like(moved, 0.5 * reference.response[0]), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", PIPELINES)
def test_costs_are_those_of_the_branches_that_run(name):
    """Of a model that takes 10 ms for each row."""
    pipe, call = made(name)
    pipe.transformer.proj_out.register_forward_hook(lambda module, args, output: time.sleep(0.01 * len(output)))
    stage = Stage(pipe, call | {"num_inference_steps": STEPS})
    with stage.open():
        costs = Capture(stage).costs(Example.of(prompts(1)[0], 3))
    assert 20 <= costs.both < 30 and 10 <= costs.cond < 20 and 0 < costs.none < 5


@pytest.mark.parametrize("name", PIPELINES)
def test_a_gain_is_what_an_error_at_one_step_comes_to_at_the_end(name, monkeypatch):
    """Against the pipeline itself, whose scheduler is handed the error."""
    pipe, call = made(name)
    stage, text = Stage(pipe, call | {"num_inference_steps": STEPS}), prompts(1)[0]
    with stage.open():
        reference = Capture(stage).reference(Example.of(text, 3))
        error = 0.1 * torch.randn(reference.guided[5].shape, generator=torch.Generator().manual_seed(0))
        gain = Disturbed(stage).gain(reference, 5, error)
    step, number = pipe.scheduler.step, itertools.count()

    @functools.wraps(step)
    def disturbed(prediction, *args, **options):
        return step(prediction + error if next(number) == 5 else prediction, *args, **options)

    monkeypatch.setattr(pipe.scheduler, "step", disturbed)
    off = sampled(pipe, call, text, 3) - reference.clip
    assert gain == pytest.approx(float(np.sqrt(np.mean(off**2)) / error.square().mean().sqrt()), rel=1e-3)


def synthetic(seed, steps=12, size=40):
    """A reference of random predictions: itself, and these `[steps, 4, size]`."""
    random = np.random.default_rng(seed)
    weights = np.random.default_rng(0).uniform(0.5, 3, (steps, 2))
    parts = random.normal(size=(steps, 4, size))
    products = np.einsum("ikn,jln->ikjl", parts, parts)
    guided = torch.from_numpy(np.einsum("ik,ikn->in", weights, parts[:, :2]))
    latents, response = torch.zeros(steps + 1, size), np.ones(steps)
    experts = ("model",) * steps
    return Reference(Example("", seed), latents, guided, np.zeros(1), products, weights, response, experts, 1.0), parts


def test_importance_is_a_smooth_curve_through_what_an_error_is_measured_to_come_to():
    references, measured = [synthetic(seed)[0] for seed in range(2)], []

    class Doubling:
        """An error comes to twice as much at each later step."""

        def gain(self, reference, step, error):
            measured.append((reference, step))
            assert torch.equal(error, reference.guided[step].float() - reference.guided[step - 1].float())
            return 2.0**step

    curve = importance(Doubling(), references, 4)
    np.testing.assert_allclose(curve, [2.0, *2.0 ** np.arange(1, 12)])
    assert [step for _, step in measured] == [1, 3, 7, 11]
    assert [reference is references[number % 2] for number, (reference, _) in enumerate(measured)] == [True] * 4


def test_residuals_are_those_of_least_squares_on_the_predictions_themselves():
    (one, of_one), (two, of_two) = synthetic(0), synthetic(1)
    residuals, parts, weights = Residuals([one, two]), np.concatenate([of_one, of_two], 2), one.weights

    def least(target, *terms):
        basis = np.stack(terms, 1)
        rest = target - basis @ np.linalg.lstsq(basis, target, rcond=None)[0]
        return pytest.approx(float(np.sqrt(np.mean(rest**2))), rel=1e-4)

    for t, a, b in ((5, 1, 0), (5, 2, 1), (9, 7, 2), (11, 1, 9), (11, 6, 5)):
        newest, before = parts[t - a], parts[t - a - b]
        now, held, earlier = (weights[t] @ part[:2] for part in (parts[t], newest, before))
        terms = [held, parts[t, LATENTS], newest[LATENTS]] + ([earlier] if b else [])
        assert residuals.skipped[t, a, b] == least(now, *terms)
        bands = [newest[LOW], newest[DIFFERENCE] - newest[LOW]] + ([before[DIFFERENCE]] if b else [])
        assert residuals.rebuilt[t, a, b] / weights[t, 1] == least(parts[t, DIFFERENCE], *bands)
    assert not np.isfinite([residuals.skipped[3, 4, 0], residuals.skipped[3, 2, 2], residuals.rebuilt[3, 2, 2]]).any()
    experts = Residuals([replace(one, experts=("first",) * 6 + ("second",) * 6)])
    assert np.isfinite(experts.skipped[7, 1, 0])
    assert not np.isfinite([experts.skipped[7, 2, 0], experts.skipped[7, 1, 1]]).any()


# ---- fits ------------------------------------------------------------------------------------------------------------


def test_a_fit_finds_known_coefficients_and_keeps_to_the_prior_where_nothing_tells():
    generator = torch.Generator().manual_seed(0)
    terms = [torch.randn(200, generator=generator) for _ in range(3)]
    target = 2 * terms[0] - 0.5 * terms[1]
    examples = [Moments.of([a[:100] for a in terms], target[:100]), Moments.of([a[100:] for a in terms], target[100:])]
    found, error = fitted(examples, np.zeros(3))
    np.testing.assert_allclose(found, [2.0, -0.5, 0.0], atol=1e-4)
    assert error < 1e-3
    same = [Moments.of([terms[0], terms[0]], terms[0])]  # two equal terms: nothing tells them apart
    np.testing.assert_allclose(solve(same, np.asarray([1.0, 0.0]), 1e-3), [1.0, 0.0], atol=1e-9)


def test_the_ridge_is_chosen_by_examples_that_are_left_out():
    """Noise that differs between examples is not fitted: the coefficient stays with the prior."""
    generator = torch.Generator().manual_seed(1)
    examples = [
        Moments.of([torch.randn(4, generator=generator)], torch.randn(4, generator=generator)) for _ in range(4)
    ]
    found, _ = fitted(examples, np.zeros(1))
    np.testing.assert_array_equal(found, solve(examples, np.zeros(1), max(RIDGES)))
    same = torch.randn(4, generator=generator)
    found, _ = fitted([Moments.of([same], 2 * same)] * 4, np.zeros(1))
    np.testing.assert_array_equal(found, solve([Moments.of([same], 2 * same)] * 4, np.zeros(1), min(RIDGES)))


def test_coefficients_are_never_so_large_that_rounding_spoils_their_sum():
    """Two terms that differ by a hundred-thousandth, whose difference is the target."""
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(200, generator=generator) for _ in range(2))
    examples = [
        Moments.of([one[half], one[half] + 1e-5 * other[half]], other[half]) for half in (slice(100), slice(100, 200))
    ]
    assert np.abs(solve(examples, np.zeros(2), 1e-12)).max() > 1e4
    found, _ = fitted(examples, np.zeros(2))
    assert np.abs(found).max() <= LARGEST


@pytest.mark.parametrize("name", PIPELINES)
def test_a_rehearsal_is_what_the_engine_does(name):
    """Fitted in lockstep, without the engine; run by the engine on its rings: the same latents."""
    pipe, call = made(name)
    stage, texts = Stage(pipe, call | {"num_inference_steps": STEPS}), prompts(2)
    with stage.open():
        stage_references = [Capture(stage).reference(Example.of(text, seed)) for seed, text in enumerate(texts)]
        rehearsal = Rehearsals(stage).fit("fitted", MIXED, stage_references)
    assert [step.branches for step in rehearsal.schedule.steps] == list(MIXED)
    fastercache.compile(pipe, rehearsal.schedule)
    for seed, (text, reference, expected) in enumerate(zip(texts, stage_references, rehearsal.psnr, strict=True)):
        assert psnr(sampled(pipe, call, text, seed), reference.clip) == pytest.approx(expected, abs=0.02)
    summary = fastercache.summary(pipe)
    assert summary.steps_done == STEPS


@pytest.mark.parametrize("name", PIPELINES)
def test_coefficients_that_are_given_mean_in_a_rehearsal_what_they_mean_to_the_engine(name):
    """Each of another size, as no fit would have them."""
    pipe, call = made(name)
    stage, text = Stage(pipe, call | {"num_inference_steps": STEPS}), prompts(1)[0]
    sums = {
        "both": Prediction((0.3, -0.2, 0.1), 0.3, -0.2, 0.8),
        "cond": Prediction((0.2, 0.1, -0.15), -0.2, 0.3),
        "none": Prediction((1.5, -0.8, 0.2), 0.2, -0.3),
    }
    steps = [
        Step(branches, low=0.8, high=1.3, previous=0.4) if branches == "cond" else Step(branches) for branches in MIXED
    ]
    steps = [*steps[:3], *(replace(step, prediction=sums[step.branches]) for step in steps[3:])]
    schedule = Schedule(tuple(steps))
    with stage.open():
        reference = Capture(stage).reference(Example.of(text, 0))
        rehearsal = Rehearsals(stage).fit("given", MIXED, [reference], schedule)
    fastercache.compile(pipe, schedule)
    assert psnr(sampled(pipe, call, text, 0), reference.clip) == pytest.approx(rehearsal.psnr[0], abs=1e-3)


@pytest.mark.parametrize("name", PIPELINES)
def test_fitted_schedules_are_nearer_than_the_same_steps_held(name):
    pipe, call = made(name)
    stage, texts = Stage(pipe, call | {"num_inference_steps": STEPS}), prompts(3)
    held = Schedule(tuple(Step(branches) for branches in MIXED))
    with stage.open():
        found = [Capture(stage).reference(Example.of(text, seed)) for seed, text in enumerate(texts)]
        fit = Rehearsals(stage).fit("fitted", MIXED, found[:2]).schedule
        # On a text and a seed that nothing was fitted to.
        fitted_psnr, held_psnr = (
            Rehearsals(stage).fit("given", MIXED, found[2:], schedule).psnr[0] for schedule in (fit, held)
        )
    assert fitted_psnr > held_psnr + 1.0


def test_a_fitted_schedule_has_a_graph_for_each_phase_that_calls_the_model_and_reads_nothing():
    pipe, call = made("cogvideox")
    stage, texts = Stage(pipe, call | {"num_inference_steps": STEPS}), prompts(2)
    with stage.open():
        found = [Capture(stage).reference(Example.of(text, seed)) for seed, text in enumerate(texts)]
        schedule = Rehearsals(stage).fit("fitted", MIXED, found).schedule
    fastercache.compile(pipe, schedule)
    eager = [sampled(pipe, call, text, seed) for seed, text in enumerate(texts)]
    fastercache.restore(pipe)
    model = fastercache.compile(cogvideox(), replace(schedule, made_for=None), steps=STEPS, cfg="uncond-first")
    inputs = arguments(model, 4)
    with DeviceReads() as watched, torch.no_grad():
        for _ in range(STEPS):
            model(**inputs)
    assert watched.reads == 0
    fastercache.compile(pipe, schedule, backend=(counter := CompileCounter()))
    for seed, (text, expected) in enumerate(zip(texts, eager, strict=True)):
        np.testing.assert_allclose(sampled(pipe, call, text, seed), expected, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 2  # both branches, and the conditional one


def test_channels_beside_the_latents_are_left_out_of_a_fit_as_of_a_run():
    """HunyuanVideo 1.5 is given an image's latents and a mask behind its own, and predicts neither."""
    pipe, given = hunyuan15_image(1)
    pipe.set_progress_bar_config(disable=True)
    text = {key: value for key, value in given.items() if "_embeds" in key}
    call = {key: value for key, value in given.items() if key not in text} | {"output_type": "latent"}
    stage = Stage(pipe, call | {"num_inference_steps": STEPS})
    with stage.open():
        found = [Capture(stage).reference(Example.of(text, seed)) for seed in range(2)]
        rehearsal = Rehearsals(stage).fit("fitted", MIXED, found)
    assert any(step.terms is not None and step.terms.now for step in rehearsal.schedule.steps)
    fastercache.compile(pipe, rehearsal.schedule)
    assert psnr(sampled(pipe, call, text, 0), found[0].clip) == pytest.approx(rehearsal.psnr[0], abs=0.02)


def test_corrections_and_the_closed_loop_are_switched_by_the_options():
    pipe, call = made("cogvideox")
    stage = Stage(pipe, call | {"num_inference_steps": STEPS})
    with stage.open():
        found = [Capture(stage).reference(Example.of(text, seed)) for seed, text in enumerate(prompts(2))]
        plain = Rehearsals(stage, Options(correct=False)).fit("plain", MIXED, found)
        bare = Rehearsals(stage, Options(latents=False, terms=1, previous=False)).fit("bare", MIXED, found)
        best = Rehearsals(stage).fit("best", MIXED, found)
    assert all(step.prediction is None for step in plain.schedule.steps if step.branches != "none")
    assert any(step.prediction is not None for step in best.schedule.steps if step.branches == "both")
    assert all(not step.previous for step in bare.schedule.steps)
    assert all(len(step.terms.taps) == 1 and not step.terms.now for step in bare.schedule.steps if not step.runs)
    assert np.mean(best.psnr) > np.mean(bare.psnr)


# ---- the search ------------------------------------------------------------------------------------------------------


class Toy:
    """Residuals by a rule: a skipped step costs the distance to the newest computed one."""

    def __init__(self, steps, guided=True):
        self.steps, self.guided, self.experts = steps, guided, ("model",) * steps
        self.skipped = np.full((steps, 8, 10), np.inf)
        self.rebuilt = np.full((steps, 10, 10), np.inf)
        for t, a, b in itertools.product(range(steps), range(1, 10), range(10)):
            if t - a - b >= 0:
                if a < 8:
                    self.skipped[t, a, b] = a * (0.5 if b else 1.0)
                self.rebuilt[t, a, b] = 0.1 * a


def test_the_search_finds_the_best_of_all_schedules():
    """Against every choice of branches for seven steps."""
    costs, importance = Costs(2.0, 1.1, 0.01), np.linspace(2, 1, 7)
    search = Search(Toy(7), importance, costs)
    for speedup in (1.3, 1.7, 2.2):
        found = search.best(speedup)
        assert costs.speedup(found) >= speedup and found[:2] == ("both", "both")
        every = [("both", "both", *rest) for rest in itertools.product(("both", "cond", "none"), repeat=5)]
        within = [one for one in every if costs.speedup(one) >= speedup]
        best = min(map(search.error, within))
        # One price for all steps reaches the convex hull of the best alone: between its corners others are better.
        hull = [one for one in within if search.error(one) <= best * 1.5]
        assert search.error(found) in [pytest.approx(search.error(one)) for one in hull], (shown(found), best)


def error_by_hand(running, residuals, importance, coherent):
    """Of each gap of skipped steps, and of the branches that are rebuilt between two full steps."""
    groups, computed, full, rebuilt = [], [], [], []
    for t, kind in enumerate(running):
        known = computed if kind == "none" else full
        if t and kind != "both":
            table = residuals.skipped if kind == "none" else residuals.rebuilt
            apart = known[-1] - known[-2] if len(known) > 1 else 0
            error = importance[t] * table[t, t - known[-1], apart if apart <= FURTHEST else 0]
            if kind == "cond":
                rebuilt.append(error)
            elif running[t - 1] == "none":
                groups[-1].append(error)
            else:
                groups.append([error])
        if kind != "none":
            computed.append(t)
        if kind == "both":
            full.append(t)
            groups.append(rebuilt)
            rebuilt = []
    return sum(sum(one) ** 2 if coherent else sum(error**2 for error in one) for one in [*groups, rebuilt])


@pytest.mark.parametrize("coherent", [True, False])
def test_the_error_of_steps_is_that_of_their_gaps_and_of_the_branches_rebuilt_since_a_full_step(coherent):
    random, toy = np.random.default_rng(0), Toy(24)
    toy.skipped, toy.rebuilt = (table * random.uniform(0.5, 2, table.shape) for table in (toy.skipped, toy.rebuilt))
    importance = random.uniform(0.5, 2, 24)
    search = Search(toy, importance, Costs(2.0, 1.0, 0.0), coherent=coherent)
    for _ in range(20):
        kinds = random.choice(["both", "cond", "none"], 22)
        running = ("both", "both", *map(str, kinds))
        assert search.error(running) == pytest.approx(error_by_hand(running, toy, importance, coherent)), running
    assert search.error(("both", *["none"] * 8, *["both"] * 15)) == np.inf
    assert search.error(("both", *["cond"] * 10, *["both"] * 13)) == np.inf


def test_neighbours_keep_the_speed_and_the_first_steps():
    costs = Costs(2.0, 1.0, 0.0)
    search = Search(Toy(12), np.ones(12), costs)
    running = search.best(2.0)
    near = search.neighbours(running, 2.0)
    assert near and running not in near
    for one in near:
        assert costs.speedup(one) >= 2.0 and one[:2] == ("both", "both")
        assert 1 <= sum(a != b for a, b in zip(one, running, strict=True)) <= 2
    assert [search.error(one) for one in near] == sorted(search.error(one) for one in near)


def test_experts_begin_whole_and_read_nothing_of_each_other():
    pipe, arguments = wan_experts(1)
    pipe.set_progress_bar_config(disable=True)
    call = {key: value for key, value in arguments.items() if not key.endswith("_embeds")} | {"output_type": "latent"}
    stage, texts = Stage(pipe, call | {"num_inference_steps": STEPS}), prompts(2)
    with stage.open():
        found = [Capture(stage).reference(Example.of(text, seed)) for seed, text in enumerate(texts)]
        change = next(t for t in range(STEPS) if found[0].experts[t] != found[0].experts[0])
        search = Search(Residuals(found), np.ones(STEPS), Costs(2.0, 1.0, 0.0))
        running = search.best(2.0)
        assert running[change : change + 2] == ("both", "both")
        # Of the second expert one prediction alone is known where the first step is left out.
        later = itertools.islice(itertools.cycle(("both", "none", "cond", "none")), STEPS - change)
        rehearsal = Rehearsals(stage).fit("experts", (*running[:change], *later), found)
    assert len(rehearsal.schedule.steps[change + 1].terms.taps) == 1
    fastercache.compile(pipe, rehearsal.schedule)
    assert psnr(sampled(pipe, call, texts[0], 0), found[0].clip) == pytest.approx(rehearsal.psnr[0], abs=0.02)


# ---- the whole -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PIPELINES)
def test_calibrate_from_prompts_to_a_schedule_that_says_what_it_is(name, small, tmp_path):
    pipe, call = made(name)
    schedule = fastercache.calibrate(
        pipe, prompts(3), num_inference_steps=STEPS, speedup=1.6, effort="quick", call=call, progress=False
    )
    assert len(schedule) == STEPS and schedule.measured.speedup >= 1.6 and schedule.measured.pairs == SMALL.held
    assert schedule.made_for.steps == STEPS and schedule.made_for.scheduler == type(pipe.scheduler).__name__
    path = tmp_path / "schedule.json"
    schedule.to_json(path)
    assert Schedule.from_json(path) == schedule
    (held,) = divided(prompts(3), SMALL, 0)[1]
    uncached = sampled(pipe, call, held.arguments, held.seed)
    fastercache.compile(pipe, path)
    reached = psnr(sampled(pipe, call, held.arguments, held.seed), uncached)
    assert schedule.measured.psnr == schedule.measured.psnr_least == pytest.approx(reached, abs=1e-3)
    assert fastercache.summary(pipe).flops.ratio == pytest.approx(schedule.measured.flops_ratio)


def test_guidance_off_skips_whole_steps_alone(small):
    pipe, call = made("wan")
    schedule = fastercache.calibrate(
        pipe,
        prompts(2),
        num_inference_steps=STEPS,
        speedup=1.5,
        effort="quick",
        call=call | {"guidance_scale": 1.0},
        progress=False,
    )
    assert {step.branches for step in schedule.steps} == {"both", "none"}


def test_an_interrupted_calibration_goes_on_and_the_same_findings_give_the_same_schedule(small, tmp_path, monkeypatch):
    pipe, call = made("cogvideox")
    calls = 0

    def calibrate(texts=3):
        nonlocal calls
        calls = 0
        hook = pipe.transformer.register_forward_pre_hook(lambda *_: counted())
        options = {"num_inference_steps": STEPS, "speedup": 1.6, "effort": "quick", "call": call, "progress": False}
        try:
            return fastercache.calibrate(pipe, prompts(texts), out=tmp_path, **options)
        finally:
            hook.remove()

    def counted():
        nonlocal calls
        calls += 1
        if calls == stop:
            raise KeyboardInterrupt

    stop = 3 * STEPS  # in the third generation, as costs take less than one
    with pytest.raises(KeyboardInterrupt):
        calibrate()
    assert len(list((tmp_path / "captured").glob("uncached-*.npz"))) == 2
    assert (tmp_path / "captured" / "signature.json").exists()  # for which nothing is captured again
    stop = None
    first = calibrate()
    assert calls > STEPS
    again = calibrate()
    assert again.steps == first.steps
    assert again.measured.seconds > 0.5 * first.measured.seconds  # what was found before took its time, too
    assert calls <= STEPS * SMALL.held  # the held-out pairs alone are sampled again
    with pytest.raises(CalibrationError, match="another calibration, with other prompts"):
        calibrate(texts=2)


def test_an_interrupt_leaves_an_untouched_pipeline():
    pipe, call = made("cogvideox")
    forward, step = pipe.transformer.forward, pipe.scheduler.step

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = pipe.transformer.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        fastercache.calibrate(pipe, prompts(2), num_inference_steps=STEPS, speedup=2.0, call=call, progress=False)
    hook.remove()
    assert pipe.transformer.forward == forward and pipe.scheduler.step == step
    assert not any("calibration" in thread.name for thread in threading.enumerate())
    fastercache.compile(pipe, "none")


def test_a_target_of_quality_gives_the_fastest_schedule_that_has_it(monkeypatch):
    """Where 10 dB are lost for each time that a run is faster."""
    pipe, call = made("cogvideox")
    calibration = Calibration(pipe, prompts(3), STEPS, "quick", call, progress=False)
    calibration.fitted, costs = [], Costs(2.0, 1.0, 0.01)
    calibration.costs, calibration.residuals, calibration.importance = costs, Toy(STEPS), np.ones(STEPS)

    def rehearsed(running, references):
        faster = costs.speedup(running)
        return Candidate(Rehearsal(Schedule((Step(),)), (60 - 10 * faster,), ()), running, faster)

    monkeypatch.setattr(calibration, "_rehearsed", rehearsed)
    found = calibration._for_quality(35.0)
    assert 35.0 <= found.score <= 38.0 and 2.2 < found.speedup < 2.5


def test_the_best_of_those_that_are_fitted_to_all_pairs_is_taken(monkeypatch):
    """Candidates are told apart by their clips on a few pairs, and the finalists by those on all."""
    pipe, call = made("cogvideox")
    calibration = Calibration(pipe, prompts(3), STEPS, "full", call, progress=False)
    calibration.fitted, calibration.costs = list(range(8)), Costs(2.0, 1.0, 0.0)
    calibration.residuals, calibration.importance = Toy(STEPS), np.linspace(2, 1, STEPS)
    calibration.effort = replace(EFFORTS["full"], tried=8, moved=2, finalists=2)
    made_of = {3: [], 8: []}

    def rehearsed(running, references):
        reached = float(int(digest(running, len(references)), 16) % 1000)
        found = Candidate(Rehearsal(Schedule((Step(),)), (reached,), ()), running, calibration.costs.speedup(running))
        made_of[len(references)].append(found)
        return found

    monkeypatch.setattr(calibration, "_rehearsed", rehearsed)
    best, tried = calibration._best(2.5), made_of[3]
    assert 4 <= len({one.running for one in tried}) == len(tried) <= 12
    assert all(one.speedup >= 2.5 and one.running[:2] == ("both", "both") for one in tried)
    ranked = sorted(tried, key=lambda one: one.score, reverse=True)
    assert [one.running for one in made_of[8]] == [one.running for one in ranked[:2]]
    assert best.score == max(one.score for one in made_of[8])


def test_a_score_is_between_the_mean_and_the_worst_quarter():
    reached = (40.0, 10.0, 20.0, 30.0, 35.0, 45.0, 50.0, 60.0)
    candidate = Candidate(Rehearsal(Schedule((Step(),)), reached, ()), ("both",), 1.0)
    assert candidate.score == (np.mean(reached) + 15.0) / 2


def test_what_is_stored_of_a_candidate_is_found_for_the_same_pairs_and_options_alone(tmp_path, monkeypatch):
    class Counting:
        def __init__(self, stage, options):
            self.terms = options.terms

        def fit(self, name, running, references):
            return Rehearsal(Schedule((Step(),)), (float(self.terms),) * len(references), (0.0,))

    monkeypatch.setattr("fastercache.calibration.calibrate.Rehearsals", Counting)
    pipe, call = made("cogvideox")
    calibration = Calibration(pipe, prompts(3), STEPS, "quick", call, out=tmp_path, progress=False)
    calibration.costs, references = Costs(2.0, 1.0, 0.01), [synthetic(seed)[0] for seed in range(2)]
    for _ in range(2):
        for count, terms in ((1, 3), (2, 3), (2, 1)):
            calibration.options = Options(terms=terms)
            assert calibration._rehearsed(("both", "none"), references[:count]).rehearsal.psnr == (terms,) * count


def test_means_have_the_t_interval_and_clips_the_psnr_of_their_range():
    assert interval([5.0]) is None
    assert interval([1.0, 3.0]) == pytest.approx((2 - 12.706, 2 + 12.706))
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5))
    assert len(T_975) >= EFFORTS["full"].held - 1
    frames, latents = np.asarray([0.0, 0.5, 1.0]), np.asarray([-2.0, 0.0, 2.0])
    assert psnr(frames + 0.1, frames) == pytest.approx(20) and psnr(frames, frames) == CEILING
    assert psnr(latents + 0.4, latents) == pytest.approx(20)


def test_a_pair_is_known_again_by_its_image():
    """In another process, too: by what it shows."""
    shades = [Image.new("RGB", (4, 4), shade) for shade in ("red", "red", "blue")]
    keys = [Example.of({"prompt": "a dog", "image": image}, 0).key for image in shades]
    assert keys[0] == keys[1] != keys[2]
    pipe, call = made("cogvideox")
    first, again, other = (
        Calibration(pipe, prompts(2), STEPS, "quick", call | {"image": image}, progress=False).identity["call"]
        for image in shades
    )
    assert first == again != other and first["height"] == "80"


def test_pairs_are_divided_by_prompts():
    effort = EFFORTS["full"]
    fit, held = divided([f"prompt {i}" for i in range(8)], effort, 100)
    assert len(fit) == effort.fitted and len(held) == effort.held
    assert not {one.name for one in fit} & {one.name for one in held}
    assert len({one.seed for one in fit + held}) == effort.fitted + effort.held
    fit, held = divided(["only"], effort, 0)
    assert {one.name for one in fit + held} == {"only"}
    assert not {one.seed for one in fit} & {one.seed for one in held}


# ---- what is refused -------------------------------------------------------------------------------------------------


def refused(message, pipe=None, texts=None, target=None, **changes):
    if pipe is None:
        pipe, call = made("cogvideox")
        changes["call"] = call | changes.get("call", {})
    options = {"num_inference_steps": STEPS, "progress": False} | (target or {"speedup": 2.0}) | changes
    with pytest.raises(CalibrationError, match=message):
        fastercache.calibrate(pipe, prompts(2) if texts is None else texts, **options)


@pytest.mark.parametrize("texts", ["a dog", [], [""], [3]])
def test_no_prompts(texts):
    refused("pass a list of at least one prompt", texts=texts)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"speedup": 2.0, "psnr": 40.0}, "give one target"),
        ({"speedup": 1.0}, "give numbers over 1"),
        ({"frontier": ()}, "give numbers over 1"),
        ({"psnr": -3}, "between 0 and 100"),
        ({"speedup": 2.0, "effort": "much"}, "must be one of"),
    ],
)
def test_targets_that_are_none(target, message):
    refused(message, target=target)


def test_few_steps_are_refused_with_the_reason():
    refused("made 8 steps; of so few none can be left out", num_inference_steps=8)


def test_a_speed_that_cannot_be_reached_says_what_can_after_one_generation(small):
    pipe, call = made("cogvideox")
    calls = []
    pipe.transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    refused(
        r"cannot be reached: of 14 steps, the fastest schedule that is searched gives \d",
        pipe,
        target={"speedup": 50.0},
        effort="quick",
        call=call,
    )
    assert len(calls) < 2 * STEPS


def test_a_quality_that_cannot_be_reached_says_what_can(small):
    refused(r"times as fast gives \d+\.\d dB", target={"psnr": 99.5}, effort="quick")


def test_predictions_that_are_not_finite():
    pipe, call = made("cogvideox")
    pipe.transformer.proj_out.bias.data.fill_(float("nan"))
    refused("step 1 for the prompt .* is not finite", pipe, call=call)


def test_a_stochastic_sampler():
    pipe, call = made("wan")
    pipe.scheduler = DPMSolverMultistepScheduler(
        algorithm_type="sde-dpmsolver++", prediction_type="flow_prediction", use_flow_sigmas=True
    )
    refused("adds noise of its own", pipe, call=call)


def test_a_sampler_that_evaluates_the_model_more_than_once_a_step():
    class Twice(WanPipeline):
        def __call__(self, *args, **kwargs):
            forward = self.transformer.forward
            self.scheduler.step = functools.partial(self._step, self.scheduler.step, forward, kwargs["prompt_embeds"])
            return super().__call__(*args, **kwargs)

        def _step(self, step, forward, text, model_output, timestep, sample, **options):
            forward(hidden_states=sample, timestep=timestep.expand(1), encoder_hidden_states=text)
            return step(model_output, timestep, sample, **options)

    pipe, call = made("wan")
    pipe.__class__ = Twice
    refused("calls its denoiser 3 times in step 1|without calling the denoiser", pipe, call=call)


def test_a_compiled_pipeline():
    pipe, call = made("cogvideox")
    fastercache.compile(pipe)
    refused("call fastercache.restore first", pipe, call=call)


def test_references_of_one_prompt_and_two_seeds_are_stored_apart(tmp_path):
    references, store = [synthetic(seed)[0] for seed in range(2)], Store(tmp_path, {})
    for make in (lambda example: references[example.seed], None):
        for one in references:
            found = store.reference(one.example, make)
            assert torch.equal(found.guided, one.guided) and np.array_equal(found.products, one.products)


def test_a_full_disk_keeps_what_was_captured(small, tmp_path, monkeypatch):
    write, files = Path.write_bytes, []

    def full(self, data):
        if self.name.startswith("uncached-") and len(files) == 1:
            raise OSError(28, "No space left on device")
        if self.name.startswith("uncached-"):
            files.append(self)
        return write(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    refused("make room or give another folder", effort="quick", out=tmp_path)
    assert len(list((tmp_path / "captured").glob("uncached-*.npz"))) == 1
    assert not list(tmp_path.rglob("*.part"))
