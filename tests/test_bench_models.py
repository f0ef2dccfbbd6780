"""The benchmark of whole models, rehearsed small: what it writes, what its bars take for measured, and that it ends in
time."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")

sys.path.insert(0, str(Path(__file__).parent.parent))  # `bench` is not installed

from torch.nn.attention import SDPBackend

import fastercache
from bench import model_peers, model_report, model_runs, models
from fastercache import Schedule, Step, policies
from fastercache.report.published import SYSTEMS
from fastercache.schedule.plan import make_plan

SMALL = ["--device", "cpu", "--scale", "small", "--backend", "eager", "--threads", "1"]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def case():
    with torch.no_grad():
        yield model_runs.Case("cogvideox-2b", "small", "cpu", torch.bfloat16, 12, "cogvideox-2b/released")


def document(out):
    return json.loads((out / "models.json").read_text())


def test_rehearsal_from_the_command_to_the_files(tmp_path, threads, capsys):
    names = ["eager-uncached", "eager-cached", "compiled-uncached", "compiled-cached"]
    steps = ["--steps", "12", "--minutes", "3", "--commit", "abc"]
    assert models.main(["--out", str(tmp_path), *SMALL, *steps, "--configurations", *names]) == 0
    found = document(tmp_path)
    rows = {row["configuration"]: row for row in found["rows"]}
    assert list(rows) == ["attention alone", "eager uncached", "eager cached", "compiled uncached", "compiled cached"]
    assert all(row["correct"] and row["outcome"] == "measured" for row in rows.values()) and found["commit"] == "abc"
    for name in ("compiled uncached", "compiled cached"):
        row = rows[name]
        assert row["whole"] and row["compile_s"] > 0 and row["recompiles"] == 0 and row["attention_kernels"]
    cached = rows["compiled cached"]
    assert set(cached["phase_s"]) == {"both", "both, blended", "cond", "cond, blended"}
    assert cached["cache_bytes"] == cached["cache_bytes_planned"] > 0
    assert found["models"]["cogvideox-2b"]["flops"]["ratio"] > 1.3 and found["models"]["cogvideox-2b"]["difference"] > 0
    assert [bar["holds"] for bar in found["bars"]] == [None, None]  # small, and on a CPU
    text = (tmp_path / "models.md").read_text()
    assert "A rehearsal" in text and "not measured" in text and "commit `abc`" in text


def test_peers_are_rehearsed_beside_ours(tmp_path, threads):
    names = ["eager-uncached", "eager-cached-whole-steps", "compiled-cached-paper"]
    names += [f"eager-diffusers-{peer}" for peer in ("fastercache", "magcache", "firstblockcache")]
    names += ["compiled-diffusers-fastercache"]
    steps = ["--steps", "15", "--minutes", "3"]
    assert models.main(["--out", str(tmp_path), *SMALL, *steps, "--configurations", *names]) == 0
    rows = {row["configuration"]: row for row in document(tmp_path)["rows"]}
    assert all(row["outcome"] == "measured" for row in rows.values())
    for mode in ("eager", "compiled"):
        row = rows[f"{mode} diffusers FasterCache"]
        assert row["error"] <= row["error_limit"] and set(row["phase_s"]) == {"both", "cond", "cond, blended"}
        assert row["peer"] == "FasterCache" and row["cache_bytes"] > 0 and row["seconds"] > 0
    assert set(rows["eager diffusers MagCache"]["phase_s"]) == {"computed", "skipped"}
    assert rows["compiled cached, paper"]["cache_bytes"] > rows["eager cached, whole steps"]["cache_bytes"] > 0
    text = (tmp_path / "models.md").read_text()
    assert "| diffusers FirstBlockCache, the same whole steps | eager |" in text
    assert "| this package, the paper's schedule | compiled |" in text


@pytest.mark.parametrize("peer", ["FasterCache", "MagCache", "FirstBlockCache"])
def test_a_window_of_a_peer_does_what_its_labels_say(case, peer, monkeypatch):
    """So many rows of a block and of its self-attention run in each step; and a run has the kinds that its seconds are
    made of."""
    rows: list[list[int]] = []
    predict, block = model_peers.predictions, case.model.transformer_blocks[1]

    def step(*arguments):
        rows.append([0, 0])
        return predict(*arguments)

    monkeypatch.setattr(model_peers, "predictions", step)
    block.ff.register_forward_pre_hook(lambda _, args: rows[-1].__setitem__(0, len(args[0])))
    block.attn1.to_q.register_forward_pre_hook(lambda _, args: rows[-1].__setitem__(1, len(args[0])))
    clock = model_peers.Clock()
    windows, kinds = model_peers.WINDOWS[peer](case, clock)
    assert len(kinds) == case.steps and set(kinds) == {kind for window in windows for kind in window.kinds}
    expected = {"both": [2, 2], "cond": [1, 1], "cond, blended": [1, 0], "computed": [2, 2], "skipped": [0, 0]}
    for window in windows:
        rows.clear()
        with model_peers.hooked(case, peer, window.arguments, False, "eager"):
            model_peers.walk(case, window, clock)
        assert rows == [expected[kind] for kind in window.kinds]
    if peer == "FasterCache":
        assert abs(kinds.count("both") - sum(step.branches == "both" for step in policies.paper(12).steps)) <= 1
    else:
        assert [kind == "computed" for kind in kinds] == [n in model_runs.whole_steps(12) for n in range(1, 13)]


def test_a_peer_that_cannot_run_is_listed_and_fails_nothing(tmp_path, threads):
    names = ["eager-diffusers-fastercache", "eager-diffusers-magcache"]
    arguments = ["--models", "vchitect-2.0", "--steps", "12", "--configurations", *names]
    assert models.main(["--out", str(tmp_path), *SMALL, *arguments]) == 0
    rows = document(tmp_path)["rows"][1:]
    assert [row["outcome"].split(":")[0] for row in rows] == ["AttributeError"] * 2 and not rows[0]["correct"]
    assert "enable_cache" in (tmp_path / "models.md").read_text()


@pytest.mark.parametrize(
    "system", ["vchitect-2.0", "mochi", "hunyuan-video"]
)  # two calls a step; one batch; no branches
def test_a_system_from_end_to_end(tmp_path, threads, system):
    assert models.main(["--out", str(tmp_path), *SMALL, "--models", system]) == 0
    (row,) = document(tmp_path)["rows"]
    assert row["outcome"] == "ran" and row["error"] == 0 and row["cache_bytes"] == row["cache_bytes_planned"] > 0
    assert row["cache_format"] == {"vchitect-2.0": "model", "mochi": "int8", "hunyuan-video": "int8-int4"}[system]


def test_what_does_not_run_says_why_and_the_rest_goes_on(tmp_path, threads, monkeypatch):
    def fail(case, *_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nand more")

    monkeypatch.setattr(models, "measure", fail)
    named = ["--configurations", "eager-uncached", "compiled-cached"]
    assert models.main(["--out", str(tmp_path), *SMALL, "--steps", "12", *named]) == 1
    rows = document(tmp_path)["rows"][1:]
    assert [row["outcome"] for row in rows] == ["OutOfMemoryError: CUDA out of memory. Tried to allocate 9 GiB"] * 2
    assert not any(row["correct"] for row in rows)


def test_it_ends_in_time_with_what_it_has(tmp_path, threads, monkeypatch):
    def spin(case, configuration, backend, left, row):
        row["compile_s"] = 1.5
        while True:
            time.sleep(0.01)

    monkeypatch.setattr(models, "measure", spin)
    start = time.monotonic()
    arguments = [
        "--steps",
        "12",
        "--minutes",
        "0.15",
        "--least-seconds",
        "0.5",
        "--configurations",
        "eager-uncached",
        "eager-cached",
    ]
    assert models.main(["--out", str(tmp_path), *SMALL, *arguments]) == 1
    assert time.monotonic() - start < 20
    found = document(tmp_path)
    last = found["rows"][-1]
    assert (last["configuration"], last["outcome"], last["compile_s"]) == (
        "eager uncached",
        "ended: the time was up",
        1.5,
    )
    assert found["not_measured"] == ["cogvideox-2b, eager cached"]
    assert "Not measured, for want of time: cogvideox-2b, eager cached" in (tmp_path / "models.md").read_text()


def row_of(configuration, seconds, correct=True, whole=True):
    return {
        "model": "cogvideox-2b",
        "configuration": configuration,
        "seconds": seconds,
        "correct": correct,
        "whole": whole,
    }


ROWS = [
    row_of("eager uncached", 90.0, whole=False),
    row_of("compiled uncached", 64.0),
    row_of("compiled cached", 40.0),
    row_of("compiled cached, fastest attention", 30.0),
]


def test_bars_and_factors_of_made_up_rows():
    first, second = model_report.bars(ROWS, 1.6, False)
    assert (first["measured"], first["holds"]) == (pytest.approx(1.0), True)
    assert (second["measured"], second["holds"]) == (pytest.approx(3.0), True)
    assert model_report.bars(ROWS, 1.6, True)[1]["measured"] == pytest.approx(
        2.25
    )  # no attention is faster than the default
    assert [bar["holds"] for bar in model_report.bars(ROWS, 1.7, False)] == [False, True]
    values = {x["factor"].partition(":")[0]: x["value"] for x in model_report.factors(ROWS, "cogvideox-2b", 1.6, False)}
    assert values["compilation"] * values["schedule"] * values["attention"] == pytest.approx(values["all together"])
    assert values["CUDA graphs"] is None


@pytest.mark.parametrize("change", [{"correct": False}, {"seconds": None}, {"whole": False}])
def test_no_bar_is_decided_by_a_run_that_is_wrong_missing_or_in_parts(change):
    rows = [ROWS[0], ROWS[1], ROWS[2] | change, ROWS[3]]
    assert [bar["holds"] for bar in model_report.bars(rows, 1.6, False)] == [None, True]
    if "whole" not in change:
        assert model_report.factor(rows, "cogvideox-2b", "compiled uncached", "compiled cached") is None


@pytest.mark.parametrize("preset", [name for name in policies.PRESETS if name.partition("/")[0] in SYSTEMS])
def test_a_part_has_all_phases_and_the_caches_of_the_whole(preset):
    system = SYSTEMS[preset.partition("/")[0]]
    schedule = policies.PRESETS[preset](system.steps, system.guided)
    part = model_runs.part_with_all(schedule, system.guided, system.tree)
    assert 4 <= len(part) <= 9
    whole, short = (make_plan(one, system.guided, system.tree) for one in (schedule, part))
    assert set(whole.phases) == set(short.phases)
    for storage in ("model", "int8", "int8-int4"):
        assert system.cache_bytes(whole, storage) == system.cache_bytes(short, storage)


@pytest.mark.parametrize("cached", [False, True])
def test_either_order_of_two_calls_guides_alike(cached):
    """The same branches in the same roles: a sampler that calls in the other order denoises to the same latents."""
    found = {}
    with torch.no_grad():
        for layout in ("uncond-then-cond", "cond-then-uncond"):
            case = model_runs.Case("vchitect-2.0", "small", "cpu", torch.float32, 8, "vchitect-2.0/released", layout)
            calls = case.calls(case.first, 0, 8)
            text = [call["encoder_hidden_states"] is case.arguments["encoder_hidden_states"] for call in calls]
            assert text == [branch == "cond" for branch in case.layout.order]
            cond, uncond = (case.predictions(calls[text.index(own) : text.index(own) + 1]) for own in (True, False))
            by_hand = (uncond + model_runs.GUIDANCE_SCALE * (cond - uncond)).unflatten(0, case.first.shape[:2])
            assert torch.equal(case.guided(case.predictions(calls)), by_hand)
            if cached:
                fastercache.compile(case.model, case.schedule, steps=8, cfg=layout)
            found[layout] = case.denoise(8)[0]
            if cached:
                assert fastercache.summary(case.model).steps_done == 8
    one, other = found.values()
    assert model_runs.difference(one, other) < 1e-5


@pytest.mark.parametrize("layout", ["uncond-first", "cond-first"])
def test_either_half_of_a_batch_is_guided_as_it_is_said(layout):
    with torch.no_grad():
        case = model_runs.Case("latte", "small", "cpu", torch.float32, 8, "latte/released", layout)
    halves = {"uncond": torch.zeros_like(case.first), "cond": torch.ones_like(case.first)}
    batch = torch.cat([halves[branch] for branch in case.layout.order])
    assert torch.equal(case.guided(batch), torch.full_like(case.first, model_runs.GUIDANCE_SCALE))


@pytest.mark.parametrize("schedule", ["stack", "none"])
def test_a_part_has_the_steps_that_reuse_all_blocks_or_run_nothing(schedule):
    skipped = Step("both", ("stack",), (1.5, -0.5)) if schedule == "stack" else Step("none")
    steps = (Step(), Step(), Step(), skipped) + (Step("cond"), Step(), Step(), skipped) * 4
    whole, tree = Schedule(steps), SYSTEMS["latte"].tree
    part = model_runs.part_with_all(whole, True, tree)
    plans = [make_plan(one, True, tree) for one in (whole, part)]
    assert len(part) < 8
    names = [{model_runs.phase_name(plan, step) for step in plan.steps} for plan in plans]
    assert names[0] == names[1] == {"both", "cond", "none" if schedule == "none" else "both, blended"}
    assert SYSTEMS["latte"].cache_bytes(plans[0], "model") == SYSTEMS["latte"].cache_bytes(plans[1], "model")


def test_a_wrong_prediction_is_called_wrong(case, monkeypatch):
    row = {"notes": []}
    monkeypatch.setattr(case, "exact", case.exact + 1, raising=False)
    monkeypatch.setattr(case, "eager_error", 0.005, raising=False)
    model_runs.measure(case, model_runs.Configuration("eager uncached", False, False), "eager", lambda: 60.0, row)
    assert row["outcome"].startswith("WRONG") and not row["correct"]


def test_a_configuration_runs_the_attention_it_names(case):
    case.attentions = {"default": SDPBackend.FLASH_ATTENTION, "fastest": SDPBackend.MATH}
    for attention, kernel in (("default", "flash"), ("fastest", "math")):
        row = {"notes": []}
        configuration = model_runs.Configuration("eager uncached", False, False, attention=attention)
        model_runs.measure(case, configuration, "eager", lambda: 60.0, row)
        assert row["attention"] == case.attentions[attention].name and row["correct"]
        assert any(kernel in name for name in row["attention_kernels"])
