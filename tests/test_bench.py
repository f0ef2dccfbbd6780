"""The parts of the benchmarks that decide what a report says: intervals, verdicts, the clips kept on disk, the files
written."""

import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from longer import long

pytest.importorskip("scipy")
pytest.importorskip("skimage")

sys.path.insert(0, str(Path(__file__).parent.parent))  # `bench` is not installed

from bench import report, shapes, shapes_ablations, shapes_quality, shapes_speed, stats


def test_wilson_agrees_with_its_formula():
    n, p, z = 200, 0.93, 1.959963984540054
    centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    assert stats.wilson(186, n) == pytest.approx(((centre - half) / scale, (centre + half) / scale), abs=1e-12)
    assert stats.wilson(0, 10)[0] == 0 and stats.wilson(10, 10)[1] == 1


def outcomes(both: int, first: int, second: int, neither: int) -> tuple[list[bool], list[bool]]:
    return [True] * (both + first) + [False] * (second + neither), [True] * both + [False] * first + [True] * second + [
        False
    ] * neither


def test_paired_proportions_reproduce_newcombes_published_example():
    difference, interval, p_value = stats.paired_proportions(*outcomes(36, 12, 2, 0))  # Newcombe (1998), method 10
    assert difference == pytest.approx(0.2)
    assert interval == pytest.approx((0.0569, 0.3404), abs=5e-5)
    assert p_value == pytest.approx(2 * sum(math.comb(14, k) for k in range(3)) / 2**14)


def test_pairs_that_never_disagree_still_have_an_interval():
    difference, (low, high), p_value = stats.paired_proportions(*outcomes(190, 0, 0, 10))
    assert (difference, p_value) == (0, 1) and low < 0 < high and high - low < 0.05


@pytest.mark.parametrize(
    ("interval", "published", "verdict"),
    [
        ((-2.0, -0.1), -0.21, "agrees with the paper"),
        ((0.1, 0.3), 0.47, "agrees with the paper"),
        ((0.1, 0.3), -0.21, "differs"),
        ((-0.1, 0.3), -0.21, "interval includes 0: cannot tell"),
        ((0.0, 0.0), -0.21, "interval includes 0: cannot tell"),
        ((-math.inf, math.inf), 1.0, "interval includes 0: cannot tell"),
    ],
)
def test_order_verdict(interval, published, verdict):
    assert stats.order_verdict(interval, published) == verdict


def test_bar_verdict():
    assert stats.bar_verdict(0.95, (0.91, 0.97), 0.90, at_least=True) == "holds"
    assert stats.bar_verdict(0.92, (0.87, 0.95), 0.90, at_least=True) == "holds, but the interval includes the bar"
    assert stats.bar_verdict(-0.05, (-0.08, -0.01), -0.10, at_least=False) == "does not hold"


def test_mean_interval_of_one_value_is_unbounded():
    assert stats.mean_interval([2.0]) == (2.0, (-math.inf, math.inf))
    mean, (low, high) = stats.mean_interval([1.0, 2.0, 3.0])
    assert (mean, low, high) == pytest.approx((2.0, 2 - 2.48414, 2 + 2.48414), abs=1e-4)


def test_held_out_pairs_cover_every_scene_with_new_seeds():
    pairs = shapes.held_out(96)
    assert len({pair.prompt for pair in pairs[:16]}) == 16 and len({pair.seed for pair in pairs}) == 96
    assert min(pair.seed for pair in pairs) == shapes.FIRST_HELD_OUT_SEED


class FakePipeline:
    """Makes clips whose every pixel tells the seed and the variant, and can be stopped by an error."""

    def __init__(self, fail_at: int | None = None):
        self.made: list[tuple[str, int]] = []
        self.fail_at = fail_at

    def __call__(self, variant, steps, pairs, with_facts):
        for pair in pairs:
            if len(self.made) == self.fail_at:
                raise KeyboardInterrupt
            self.made.append((variant.name, pair.seed))
        values = [(pair.seed % 64 + len(variant.name)) / 128 for pair in pairs]
        frames = np.stack([np.full((2, 4, 4, 3), value, np.float32) for value in values])
        return shapes.Clips(frames, np.ones(len(pairs)), {"flops_ratio": 1.5} if with_facts else {})


@pytest.fixture
def variants(monkeypatch):
    monkeypatch.setattr(
        shapes,
        "identity",
        lambda variant, steps: {"schedule": variant.schedule, "guided": variant.guided, "steps": steps},
    )
    return [shapes.UNCACHED, shapes.UNGUIDED]


def test_an_interrupted_evaluation_goes_on_where_it_stopped(tmp_path, variants):
    pairs = shapes.held_out(10)
    first = FakePipeline(fail_at=14)
    with pytest.raises(KeyboardInterrupt):
        shapes.collect(variants, pairs, 5, work=tmp_path, processes=0, make=first)
    second = FakePipeline()
    n, clips = shapes.collect(variants, pairs, 5, work=tmp_path, processes=0, make=second)
    kept = first.made[: len(first.made) // shapes.CHUNK * shapes.CHUNK]
    assert sorted(kept + second.made) == sorted((variant.name, pair.seed) for variant in variants for pair in pairs)
    assert n == 10 and clips["unguided"].facts == {"flops_ratio": 1.5}
    assert clips["uncached"].frames[:, 0, 0, 0, 0].tolist() == [
        (pair.seed % 64 + len("uncached")) / 128 for pair in pairs
    ]

    third = FakePipeline()
    shapes.collect(variants, pairs, 6, work=tmp_path, processes=0, make=third)
    assert len(third.made) == 20  # another step count shares nothing


def test_fewer_pairs_use_the_clips_of_more(tmp_path, variants):
    shapes.collect(variants, shapes.held_out(8), 5, work=tmp_path, processes=0, make=FakePipeline())
    again = FakePipeline()
    n, _ = shapes.collect(variants, shapes.held_out(4), 5, work=tmp_path, processes=0, make=again)
    assert n == 4 and not again.made


def test_variants_of_one_schedule_are_made_once(tmp_path, variants):
    fake = FakePipeline()
    twins = [shapes.Variant("a", "{}"), shapes.Variant("b", "{}")]
    _, clips = shapes.collect(twins, shapes.held_out(4), 5, work=tmp_path, processes=0, make=fake)
    assert {name for name, _ in fake.made} == {"a"} and set(clips) == {"a", "b"}


def test_a_deadline_leaves_whole_pairs_or_says_so(tmp_path, variants):
    shapes.collect(variants, shapes.held_out(4), 5, work=tmp_path, processes=0, make=FakePipeline())
    n, clips = shapes.collect(
        variants, shapes.held_out(12), 5, work=tmp_path, processes=0, minutes=-1, make=FakePipeline()
    )
    assert n == 4 and len(clips["uncached"].frames) == 4
    with pytest.raises(SystemExit, match="minutes"):
        shapes.collect(variants, shapes.held_out(4), 7, work=tmp_path, processes=0, minutes=-1, make=FakePipeline())


def test_ablation_rows_compare_pair_by_pair():
    arms = shapes_ablations.GROUPS["Dynamic feature reuse"]
    base = np.asarray([20.0, 30.0, 25.0, 40.0])
    psnr = {arms[0].name: base, arms[1].name: base - np.asarray([0.20, 0.21, 0.19, 0.20])}
    ssim = {arm.name: np.full(4, 0.9) for arm in arms}
    rows = shapes_ablations.compare(arms, psnr, ssim, {arm.name: {"flops_ratio": 1.5} for arm in arms})
    assert "verdict" not in rows[0] and rows[1]["verdict"] == "agrees with the paper"
    assert rows[1]["psnr_difference_db"] == pytest.approx(-0.2) and rows[1][
        "paper_psnr_difference_db"
    ] == pytest.approx(-0.21)
    assert len(shapes_ablations.cells(rows[0])) == len(shapes_ablations.cells(rows[1])) == len(shapes_ablations.HEADER)


def test_every_ablation_group_has_one_default_and_builds():
    for arms in shapes_ablations.GROUPS.values():
        assert [arm.name for arm in arms].count(shapes_ablations.DEFAULT) == 1
    texts = {
        arm.name: shapes.cached(arm.name, arm.policy, 50).schedule
        for arms in shapes_ablations.GROUPS.values()
        for arm in arms
    }
    assert len(set(texts.values())) == len(texts) == 10


def test_bars_follow_the_scores():
    right = {
        "uncached": np.asarray([True] * 190 + [False] * 10),
        "unguided": np.asarray([True] * 150 + [False] * 50),
        "cached": np.asarray([True] * 180 + [False] * 20),
    }
    rows = shapes_quality.bars(right)
    assert [row["verdict"].startswith("holds") for row in rows] == [True, True, False]
    assert [row["measured"] for row in rows] == pytest.approx([0.95, -0.2, -0.05])


def test_table_refuses_ragged_rows_and_escapes_bars():
    assert report.table(("a", "b"), [(1, None), ("x|y", "z\nz")]).splitlines() == [
        "| a | b |",
        "| --- | --- |",
        "| 1 |  |",
        "| x\\|y | z z |",
    ]
    with pytest.raises(ValueError, match="1 cells under 2"):
        report.table(("a", "b"), [(1,)])


def test_report_files_are_strict_json_and_markdown(tmp_path, capsys):
    out = tmp_path / "deep" / "result.json"
    data = {"numbers": np.float64(0.5), "unbounded": (-math.inf, 1), "long": [{"key": "value " * 10}] * 5, "empty": {}}
    report.write(out, "Title", "python -m bench.x", data, ["A line."])
    document = json.loads(out.read_text(), parse_constant=pytest.fail)
    assert (
        document["numbers"] == 0.5
        and document["unbounded"] == [None, 1]
        and document["long"] == data["long"]
        and document["empty"] == {}
    )
    assert {"commit", "date", "machine", "versions", "ops"} <= set(document)
    text = out.with_suffix(".md").read_text()
    assert text.startswith("# Title\n\nA line.\n\nMade by `python -m bench.x`") and capsys.readouterr().out.startswith(
        "# Title"
    )
    assert sorted(path.name for path in out.parent.iterdir()) == ["result.json", "result.md"]


def test_timed_clips_take_turns_and_another_kind_begins_each_round(tmp_path, monkeypatch, capsys):
    assert [shapes.in_turn("abc", number) for number in range(4)] == [
        list("abc"),
        list("bca"),
        list("cab"),
        list("abc"),
    ]
    order = []

    def once(pipe, schedule, pair, steps, pipeline):
        order.append((pair.seed, "uncached" if schedule is None else "cached"))
        summary = SimpleNamespace(flops=SimpleNamespace(ratio=1.5), cache_bytes=1000)
        return (3.0, 2.7, None) if schedule is None else (2.0, 1.8, summary)

    monkeypatch.setattr(shapes_speed, "once", once)
    monkeypatch.setattr(shapes, "pipeline", lambda name: None)
    before = torch.get_num_threads()
    out = tmp_path / "speed.json"
    shapes_speed.main(["--repeats", "2", "--steps", "4", "--threads", "1", "--out", str(out)])
    torch.set_num_threads(before)
    first, second, third = (pair.seed for pair in shapes.held_out(3))
    assert order == [
        (first, "uncached"),
        (first, "cached"),
        (second, "cached"),
        (second, "uncached"),
        (third, "uncached"),
        (third, "cached"),
    ]
    document = json.loads(out.read_text())
    assert document["speed_up"] == 1.5 and document["efficiency"] == 1.0 and document["settings"]["threads"] == 1
    assert [row["seconds"]["median"] for row in document["rows"]] == [3.0, 2.0]


# ---- the demo, run after run -----------------------------------------------------------------------------------------


def test_the_demo_is_as_good_as_its_worst_run(tmp_path, monkeypatch):
    """Two runs; the second's calibrated clips gain less than the bar of what they save."""
    from bench import demo

    def one(schedule, speedup, ratio):
        seconds = {"uncached": {"seconds": 4 * speedup}, "cached": {"seconds": 4.0}}
        return {"schedule": schedule, "speedup": speedup, "flops_ratio": ratio, "psnr_db": 50.0, **seconds}

    gained = iter([3.0, 2.6])

    def run(command, **_):
        folder = Path(command[command.index("--out") + 1])
        folder.mkdir()
        result = one("paper", 1.4, 1.5) | {"calibrated": one("calibrated-3x", next(gained), 3.0)}
        (folder / "result.json").write_text(json.dumps(result))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(demo.subprocess, "run", run)
    monkeypatch.setattr(demo.report, "commit", lambda: "none")
    demo.main(["--runs", "2", "--out", str(tmp_path / "demo.json")])
    found = json.loads((tmp_path / "demo.json").read_text())
    assert found["least_share"] == pytest.approx(2.6 / 3) and not found["holds"]
    assert "does not hold" in (tmp_path / "demo.md").read_text()


@long
def test_the_steps_searched_at_half_the_size(tmp_path, monkeypatch):
    """From the command to the files, of few steps."""
    from bench import calibration_resolution

    monkeypatch.setattr(calibration_resolution.report, "commit", lambda: "none")
    out = tmp_path / "out.json"
    arguments = ["--pipeline", "wan", "--steps", "14", "--pairs", "2", "--processes", "0", "--work", str(tmp_path)]
    calibration_resolution.main([*arguments, "--out", str(out)])
    found = json.loads(out.read_text())
    assert [row["searched"] for row in found["rows"]] == ["at its own size", "at half of it"]
    assert all(row["flops_ratio"] > 2.5 and 15 < row["psnr_db"] < 60 for row in found["rows"])
    assert "carr" in out.with_suffix(".md").read_text()
