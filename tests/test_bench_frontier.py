"""The benchmark of speed-up against quality: a small part of it from the command to the files, the peers it runs, what
is found on calibration prompts, and what it says of made-up figures."""

import itertools
import json
import math
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("scipy")
pytest.importorskip("skimage")
pytest.importorskip("diffusers")

sys.path.insert(0, str(Path(__file__).parent.parent))  # `bench` is not installed

import fastercache
from bench import frontier, frontier_report, frontier_settings, peers, shapes
from fastercache import policies
from fastercache.shapes import PIPELINES

STEPS = 6


# ---- pairs and what clips depend on ----------------------------------------------------------------------------------


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_calibration_pairs_are_apart_and_have_every_word_as_often(pipeline):
    scenes = PIPELINES[pipeline].world.scenes
    prompts = shapes.calibration_prompts(pipeline)
    assert len(set(prompts)) == len(scenes) // 2
    words = [word for prompt in prompts for word in prompt.split()]
    every = [word for scene in scenes for word in scene.prompt.split()]
    assert all(2 * words.count(word) == every.count(word) for word in set(every))
    pairs = shapes.calibration(len(prompts), pipeline)
    assert {pair.prompt for pair in pairs} == set(prompts)
    held_out = shapes.held_out(64, pipeline)
    assert not {pair.seed for pair in pairs} & {pair.seed for pair in held_out}
    known = [pair.prompt in prompts for pair in held_out]
    assert 24 <= sum(known) <= 40


def test_what_does_not_run_the_engine_depends_on_no_code_of_it(monkeypatch):
    def fail():
        raise AssertionError("the engine's code was asked for")

    monkeypatch.setattr(shapes, "_code_hash", fail)
    peer = peers.setting("FirstBlockCache", threshold=0.1)
    variants = [
        shapes.Variant("uncached"),
        shapes.Variant("fewer", steps=4),
        shapes.Variant("other", sampler=frontier.OTHER_SAMPLER),
        shapes.Variant("peer", peer=peer),
        shapes.Variant("another", peer=peers.setting("FirstBlockCache", threshold=0.2)),
        shapes.Variant("cache-dit", peer=peers.setting(peers.CACHE_DIT)),
    ]
    found = [json.dumps(shapes.identity(variant, STEPS)) for variant in variants]
    assert len(set(found)) == len(found)
    assert shapes.identity(variants[0], 4) == shapes.identity(variants[1], STEPS)
    assert "cache-dit" in shapes.identity(variants[-1], STEPS)["versions"]
    with pytest.raises(AssertionError, match="the engine's code"):
        shapes.identity(shapes.cached("paper", policies.paper, STEPS), STEPS)


def test_schedules_beside_the_weights_do_not_cost_the_clips(monkeypatch, tmp_path):
    pipeline = tmp_path / "pipeline"
    (pipeline / "transformer").mkdir(parents=True)
    (pipeline / "transformer" / "config.json").write_text("{}")
    monkeypatch.setattr(shapes.shapes, "PIPELINES", {"made up": SimpleNamespace(path=pipeline)})
    hash_of = shapes._pipeline_hash.__wrapped__
    before = hash_of("made up")
    (pipeline / shapes.SCHEDULES).mkdir()
    (pipeline / shapes.SCHEDULES / "2x.json").write_text("{}")
    assert hash_of("made up") == before
    (pipeline / "transformer" / "config.json").write_text("{} ")
    assert hash_of("made up") != before


def test_a_peer_that_cannot_run_is_told_and_not_run_again(tmp_path):
    runs = []

    def make(variant, steps, pairs, with_facts):
        runs.append(variant.name)
        if variant.name == "broken":
            raise ValueError("no context\nand more")
        return shapes.Clips(np.zeros((len(pairs), 1, 8, 8, 3), np.float32), np.ones(len(pairs)), {})

    broken = shapes.Variant("broken", peer=peers.setting("FirstBlockCache", threshold=0.1))
    pairs = shapes.held_out(8)
    collect = partial(shapes.make_clips, work=tmp_path, processes=0, make=make)
    for _ in range(2):
        assert collect([shapes.UNCACHED, broken], pairs, STEPS) == (8, {"broken": "ValueError: no context"})
    assert runs == ["uncached", "broken", "uncached"]  # two chunks; the second of `broken` is not begun
    assert shapes.kept(shapes.UNCACHED, pairs, STEPS, tmp_path).frames.shape == (8, 1, 8, 8, 3)
    with pytest.raises(SystemExit, match="broken: ValueError: no context"):
        shapes.collect([shapes.UNCACHED, broken], pairs, STEPS, work=tmp_path, processes=0, make=make)
    ours = shapes.Variant("broken", schedule=policies.none(STEPS).to_json())
    with pytest.raises(ValueError, match="no context"):
        collect([ours], pairs, STEPS)


# ---- peers -----------------------------------------------------------------------------------------------------------


def settings_of(peer):
    step_mask = {"Fn_compute_blocks": 1, "mask_policy": "fast", "steps_computation_policy": "static"}
    return {
        "PyramidAttentionBroadcast": peers.setting("PyramidAttentionBroadcast", spatial_attention_block_skip_range=2),
        "FirstBlockCache": peers.setting("FirstBlockCache", threshold=0.5),
        "TaylorSeer": peers.setting("TaylorSeer", use_lite_mode=True, cache_interval=2, taylor_factors_dtype="float32"),
        "MagCache": peers.setting("MagCache", mag_ratios=[1.0] * 8, threshold=0.1),
        "cache-dit": peers.setting("cache-dit", Fn_compute_blocks=1, residual_diff_threshold=0.8, max_warmup_steps=2),
        "cache-dit step mask": peers.setting("cache-dit", **step_mask),
    }[peer]


@pytest.mark.parametrize(
    "peer",
    [
        "PyramidAttentionBroadcast",
        "FirstBlockCache",
        "TaylorSeer",
        "MagCache",
        "cache-dit",
        "cache-dit step mask",
    ],
)
def test_a_peer_skips_forgets_between_clips_and_leaves_the_pipeline_as_it_was(peer):
    if peer.startswith("cache-dit"):
        pytest.importorskip("cache_dit")
    pipe, (one, other) = shapes.pipeline("wan"), shapes.held_out(2, "wan")
    clip = partial(shapes.call, pipe, steps=8, guidance_scale=4.0, pipeline="wan")
    before = clip(one)
    with peers.enabled(pipe, settings_of(peer), 8):
        first = clip(one)
        clip(other)
        again = clip(one)
    assert np.array_equal(first, again) and np.isfinite(first).all()
    assert not np.array_equal(first, before)  # it did skip
    assert np.array_equal(clip(one), before)
    assert not any(hasattr(module, "_diffusers_hook") and module._diffusers_hook.hooks
                   for module in pipe.transformer.modules())  # fmt: skip


def test_operations_and_bytes_of_a_peer_are_counted_as_it_runs():
    pipe = shapes.pipeline("wan")
    variant = shapes.Variant("x", pipeline="wan", peer=settings_of("MagCache"))
    facts = shapes.generate(variant, 8, shapes.held_out(1, "wan"), True).facts
    # 8 steps of which MagCache computes the first two, and after every three skipped steps one more.
    assert 2.0 < facts["flops_ratio"] < 8 / 3
    tokens, channels = 3 * 8 * 8, 128
    assert facts["cache_bytes"] >= 2 * tokens * channels * 4  # one residual a branch
    uncached = peers.counted(pipe.transformer, lambda: shapes.call(pipe, shapes.held_out(1, "wan")[0], 2, 4.0, "wan"))
    with shapes.compiled(pipe, policies.given(2, computed=[1]).to_json()):
        shapes.call(pipe, shapes.held_out(1, "wan")[0], 2, 4.0, "wan")
        assert fastercache.summary(pipe).flops.uncached == uncached


def test_a_clip_that_is_not_finite_is_an_error(monkeypatch):
    monkeypatch.setattr(shapes, "pipeline", lambda name: None)
    monkeypatch.setattr(shapes, "call", lambda *_: np.full((1, 8, 8, 3), np.nan, np.float32))
    with pytest.raises(FloatingPointError, match="seed 10000, is not finite"):
        shapes.generate(shapes.UNCACHED, 2, shapes.held_out(1), False)


def test_a_peer_that_is_not_known_is_named():
    with (
        pytest.raises(ValueError, match="no peer is called 'TeaCache'; there are FasterCache"),
        peers.enabled(None, peers.setting("TeaCache"), 8),
    ):
        pass


def test_the_weight_of_the_papers_schedule_rises_from_its_first_step():
    now = [681.0]
    weight = peers.rising(lambda: now[0], 681.0)
    assert weight(None) == 0.0
    now[0] = 340.5
    assert weight(None) == 0.5
    now[0] = 999.0
    assert weight(None) == 0.0


# ---- what is found on calibration prompts ----------------------------------------------------------------------------


def test_the_shortest_path_is_the_best_of_all():
    generator = np.random.default_rng(0)
    distances = np.triu(generator.random((7, 7)), 1)

    def worst(path):
        ends = [*path[1:], 8]
        gaps = [sum(distances[a - 1][a : b - 1]) for a, b in zip(path, ends, strict=True)]
        return max(gaps), sum(gaps)

    every = [(1, *rest) for rest in itertools.combinations(range(2, 8), 3)]
    assert frontier_settings.shortest_path(distances.tolist(), 4) == min(every, key=worst)


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_lists_are_measured_and_give_schedules_of_the_ratio(pipeline, tmp_path):
    found = frontier_settings.Found(tmp_path / "found.json")
    chosen = frontier_settings.schedules(found, pipeline, 8, 1, 2.0)
    measured = found.values["changes"]
    assert measured["ratios"][0] == 1.0 and all(0.5 < ratio < 2 for ratio in measured["ratios"])
    assert measured["changes"][0] == 0.0 and len(measured["changes"]) == 8 == len(measured["distances"])
    assert {frontier_settings.ran(policy(8, True)) for policy in chosen.values()} == {4}
    again = frontier_settings.Found(tmp_path / "found.json")
    assert again.get("changes", lambda: pytest.fail("measured twice")) == measured
    assert "distances" not in frontier_settings.reported(again)
    if pipeline == "wan":
        theirs = frontier_settings.magcache_ratios(pipeline, 8)
        assert measured["ratios"] == pytest.approx(theirs, rel=1e-5)  # diffusers' MagCache measures the same


def test_the_threshold_is_searched_for_the_ratio(monkeypatch, tmp_path):
    monkeypatch.setattr(frontier_settings, "flops_ratio", lambda text, *_: 1 + math.sqrt(json.loads(text)["threshold"]))
    monkeypatch.setattr(frontier_settings, "TRIALS", 12)
    found = frontier_settings.Found(tmp_path / "found.json")

    def setting(value):
        return peers.setting("FirstBlockCache", threshold=value)

    value = frontier_settings.threshold_for(found, setting, 1.5, "wan", 8, 1)
    assert 1.5 / 1.03 < 1 + math.sqrt(value) < 1.5 * 1.03
    tried = len(found.values)
    assert 2 < tried < 12 and tried == len(frontier_settings.reported(found)["trials"])
    monkeypatch.setattr(frontier_settings, "NEAR", 1.0)  # then all trials are made, those of before not again
    assert frontier_settings.threshold_for(found, setting, 1.5, "wan", 8, 1) == pytest.approx(0.25, rel=0.01)
    assert len(found.values) > tried


# ---- what is said ----------------------------------------------------------------------------------------------------


def test_methods_are_compared_at_equal_speed_between_their_settings():
    psnr = [np.asarray([40.0, 50.0]), np.asarray([30.0, 44.0])]
    between = frontier_report.at_speed([4.0, 1.0], psnr[::-1], 2.0)
    assert between.tolist() == [35.0, 47.0]
    assert frontier_report.at_speed([1.0, 4.0], psnr, 4.0).tolist() == [30.0, 44.0]
    assert frontier_report.at_speed([1.0, 4.0], psnr, 4.1) is None
    assert frontier_report.at_speed([2.5], psnr[:1], 2.0) is None


def made_up(name, method, kind):
    return frontier.Arm(name, method, kind, shapes.Variant(name))


ARMS = [
    made_up("uncached", "uncached", "ours"),
    made_up("calibrated a", "calibrated", "ours"),
    made_up("calibrated b", "calibrated", "ours"),
    made_up("slow", "peer", "peer"),
    made_up("fast", "peer", "peer"),
    made_up("few", "fewer steps", "steps"),
    made_up("fewer", "fewer steps", "steps"),
]
SPEEDS = {"uncached": 1.0, "calibrated a": 1.5, "calibrated b": 4.0, "slow": 1.5, "fast": 2.5, "few": 1.5, "fewer": 4.0}


def test_leads_and_bars_of_made_up_arms():
    measured = {
        name: {
            "psnr_db": np.asarray([50.0, 60.0, 55.0]) - 10 * math.log2(speed) - (5 if name in ("slow", "fast") else 0)
        }
        for name, speed in SPEEDS.items()
    }
    timed = [
        {
            name: {"seconds": 12 / speed, "denoiser_seconds": 10 / speed, "psnr_db": measured[name]["psnr_db"][i] + 0.1}
            for name, speed in SPEEDS.items()
        }
        for i in range(2)
    ]
    comparison = frontier_report.compare(ARMS, measured, timed)
    at = {(one["speed_up"], one["method"]): one for one in comparison}
    assert at[2.0, "peer"]["lead_db"] == pytest.approx(5.0) and at[2.0, "peer"]["bound"] == ""
    beyond = at[3.0, "peer"]  # its fastest is 2.5 times as fast
    assert beyond["bound"] == "at most" and beyond["lead_db"] == pytest.approx(5 - 10 * math.log2(3 / 2.5))
    assert at[3.0, "fewer steps"]["lead_db"] == pytest.approx(0.0)
    faster = [{name: one | {"denoiser_seconds": 10 / SPEEDS[name] / (2 if name in ("slow", "fast") else 1)}
               for name, one in each.items()} for each in timed]  # fmt: skip
    at = {(one["speed_up"], one["method"]): one for one in frontier_report.compare(ARMS, measured, faster)}
    bound, between = at[2.0, "peer"], at[3.0, "peer"]
    assert bound["bound"] == "at least" and bound["psnr_db"] == pytest.approx(measured["slow"]["psnr_db"].mean())
    assert not between["bound"] and between["measured_speed_ups"] == [3.0, 5.0]
    assert between["psnr_db"] == bound["psnr_db"]
    again = frontier_report.repeated(measured, timed)
    assert set(again) == set(SPEEDS) - {"uncached"} and all(x == pytest.approx(0.1) for x in again.values())
    bars = frontier_report.bars(comparison, again, 0.2)
    assert [bar["verdict"] for bar in bars] == ["holds", "holds", "reported", "does not hold", "reported"]
    assert "(none reaches it: over the fastest, 2.50x)" in bars[3]["bar"] and "none" not in bars[1]["bar"]
    assert bars[2]["of"] == "fewer steps" and frontier_report.bars([], again, 0.05)[0]["verdict"] == "does not hold"


def test_a_deadline_ends_the_rounds_and_the_next_run_goes_on(tmp_path, monkeypatch):
    made = []

    def fake(arms, pair, steps, first):
        made.append((pair.seed, first))
        return {arm.name: {"seconds": 1.0, "denoiser_seconds": 1.0, "psnr_db": 50.0} for arm in arms}

    monkeypatch.setattr(frontier, "timed_round", fake)
    monkeypatch.setattr(frontier.steady, "choose_threads", lambda: "")
    pairs = shapes.held_out(3)
    assert frontier.rounds(ARMS, pairs, STEPS, tmp_path, 0.0) == [] == made
    assert len(frontier.rounds(ARMS, pairs, STEPS, tmp_path, math.inf)) == 3
    warm_up, *rest = made
    assert warm_up == (pairs[0].seed, 0) and rest == [(pair.seed, i) for i, pair in enumerate(pairs)]
    assert len(frontier.rounds(ARMS, pairs, STEPS, tmp_path, 0.0)) == 3 and len(made) == 4


def test_the_plot_has_a_line_for_each_method(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [
        {"arm": arm.name, "method": arm.method, "kind": arm.kind, "speed_up": SPEEDS[arm.name], "psnr_db": 50.0}
        for arm in ARMS
    ]
    rows.append({"arm": "broken", "method": "broken", "kind": "peer", "error": "ValueError"})
    for name in ("a.svg", "b.svg"):
        frontier_report.plot(rows, "made up", tmp_path / name)
    text = (tmp_path / "a.svg").read_text()
    assert text == (tmp_path / "b.svg").read_text() and len(text) < 100_000
    assert all(f">{method}<" in text for method in ("calibrated", "peer", "fewer steps")) and "broken" not in text
    assert "measured speed-up" in text
    untimed = [row | {"flops_ratio": row.get("speed_up"), "speed_up": None} for row in rows]
    frontier_report.plot(untimed, "made up", tmp_path / "c.svg")
    assert "FLOPs ratio" in (tmp_path / "c.svg").read_text()


def test_lpips_without_weights_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    measure, reason = frontier_report.lpips()
    assert measure is None and "not measured" in reason


def test_no_plot_no_run(monkeypatch):
    monkeypatch.setattr(frontier_report, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="matplotlib"):
        frontier.main([])


# ---- the command -----------------------------------------------------------------------------------------------------


def test_every_pipeline_has_at_most_32_arms(monkeypatch, tmp_path):
    """With everything that can be found made up, and no peer failing."""
    monkeypatch.setattr(frontier_settings, "threshold_for", lambda found, setting, ratio, *_: ratio / 10)
    monkeypatch.setattr(frontier_settings, "magcache_ratios", lambda *_: [1.0] * STEPS)
    monkeypatch.setattr(frontier_settings, "schedules", lambda *_: dict.fromkeys(("a", "b", "c"), policies.fora))
    monkeypatch.setattr(frontier, "fails", lambda *_: False)
    for number in (0, 1, 2, 10, 11, 12):
        (tmp_path / f"{number}x.json").write_text(policies.none(STEPS).to_json())
    (tmp_path / "long.json").write_text(policies.none(STEPS + 1).to_json())
    for name in ("index.json", "wrong.json"):
        (tmp_path / name).write_text("{}")
    for pipeline in PIPELINES:
        calibrated, left_out = frontier.calibrated_arms(pipeline, STEPS, tmp_path)
        assert len(calibrated) == frontier.MOST_CALIBRATED and len(left_out) == 3
        assert [arm.name for arm in calibrated] == [f"{number}x" for number in (0, 1, 2, 10, 11)]
        assert "7 steps, not 6" in left_out[0] and left_out[1].startswith("wrong.json: ScheduleError")
        theirs = frontier.peer_arms(pipeline, STEPS, None, 1)
        most = max(sum(arm.method == method for arm in theirs) for method in {arm.method for arm in theirs})
        arms = [*frontier.own_arms(pipeline, STEPS), *calibrated, *frontier.policy_arms(pipeline, STEPS, None, 1)]
        names = [arm.name for arm in (*arms, *theirs)]
        assert len(set(names)) == len(names) <= frontier.MOST_ARMS + 2 and most <= frontier.MOST_SETTINGS
        assert len({arm.method for arm in theirs}) == 8
    with pytest.raises(SystemExit, match="no arm's name contains 'fast'; there are: uncached"):
        frontier.chosen_arms(ARMS[:2], ["fast"])


def test_a_small_frontier_from_the_command_to_the_files(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(frontier_settings, "TRIALS", 1)
    monkeypatch.setattr(frontier_settings, "THRESHOLDS", (0.5, 0.5))
    monkeypatch.setattr(frontier, "CONVERGED", 2)
    schedules = tmp_path / "schedules"
    schedules.mkdir()
    (schedules / "2x.json").write_text(policies.given(STEPS, computed=[1, 2, 4]).to_json())
    out = tmp_path / "frontier_wan.json"
    arguments = ["--pipeline", "wan", "--pairs", "2", "--steps", str(STEPS), "--timed", "1", "--processes", "0"]
    arguments += ["--calibration-clips", "1", "--schedules", str(schedules), "--work", str(tmp_path / "work")]
    arguments += ["--out", str(out), "--arms", "3 steps, DPM", "2x", "FirstBlockCache", "FasterCache, def"]
    frontier.main(arguments)
    document = json.loads(out.read_text(), parse_constant=pytest.fail)
    rows = {row["method"]: row for row in document["rows"]}
    assert set(rows) == {
        "uncached",
        "fewer steps, DPM-Solver++ 2M",
        "calibrated",
        "diffusers FirstBlockCache",
        "diffusers FasterCache",
    }
    assert rows["diffusers FasterCache"]["error"].startswith("IndexError")  # it needs both branches in one call
    assert rows["uncached"]["psnr_db"] == shapes.PSNR_CEILING and rows["uncached"]["speed_up"] == 1.0
    assert rows["calibrated"]["flops_ratio"] > 1.9 and rows["diffusers FirstBlockCache"]["flops_ratio"] > 1
    assert all(10 < row["psnr_db"] < 90 for name, row in rows.items() if name != "uncached" and "error" not in row)
    assert document["bars"][0]["verdict"] == "holds" and document["bars"][0]["measured"] < 0.01
    assert len(document["rounds"]) == 1 and set(document["rounds"][0]) == {
        row["arm"] for row in document["rows"] if "error" not in row
    }
    text = out.with_suffix(".md").read_text()
    assert "| diffusers FasterCache, defaults | IndexError: tuple index out of range |" in text
    assert "frontier_wan.svg" in text and "not measured" in text and out.with_suffix(".svg").exists()

    def fail(*_):
        raise AssertionError("a clip was made again")

    monkeypatch.setattr(shapes, "call", fail)
    frontier.main([*arguments, "--minutes", "1"])
    assert json.loads(out.read_text())["rows"] == document["rows"]
