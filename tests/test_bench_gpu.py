"""The benchmarks of the ops, rehearsed small: what they check before they time, what they write, and what they say of
failures."""

import json
import math
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("scipy")

sys.path.insert(0, str(Path(__file__).parent.parent))  # `bench` is not installed

from bench import cpu_ops, gpu, gpu_measure, op_cases, op_rows, timing
from fastercache import ops

ROW_KEYS = {
    "op",
    "case",
    "bytes",
    "p20_us",
    "p50_us",
    "p80_us",
    "gbps",
    "copy_fraction",
    "vs_eager",
    "vs_inductor",
    "max_error",
}
needs_packed = pytest.mark.skipif(
    ops.packed_missing(torch.device("cpu")) is not None, reason="packed rings need the C++ library"
)


@pytest.fixture(autouse=True)
def few_sets(monkeypatch):
    monkeypatch.setattr(timing, "MOST_SETS", 2)


def adding(forms) -> op_cases.Case:
    """A case whose forms should add 1 to a tensor."""
    return op_cases.Case(
        "add",
        "small",
        8000,
        lambda: SimpleNamespace(x=torch.rand(1000)),
        forms,
        lambda t: [t.x + 1],
        lambda t: [t.x],
        [1e-6],
    )


def right(t):
    t.x.add_(1)


def wrong(t):
    t.x.add_(2)


def incomplete(t):
    t.x[:-1].add_(1)
    t.x[-1] = torch.nan


def failing(t):
    raise ValueError("no such kernel")


def test_a_right_result_is_timed_against_the_best_plain_form():
    row, notes = op_rows.measure(
        adding({"ours": right, "eager a": right, "eager b": right, "inductor": right}), "cpu", 0.0
    )
    p50 = row["p50_us_of"]
    assert row["correct"] and not notes and set(p50) == {"ours", "eager a", "eager b", "inductor", "copy"}
    assert 0 < row["p20_us"] <= row["p50_us"] <= row["p80_us"] and row["p50_us"] == p50["ours"]
    assert (
        row["vs_eager"] == min(p50["eager a"], p50["eager b"]) / p50["ours"]
        and row["vs_inductor"] == p50["inductor"] / p50["ours"]
    )
    assert row["copy_fraction"] == p50["copy"] / p50["ours"] and row["gbps"] == 8000 / p50["ours"] / 1e3


@pytest.mark.parametrize(
    ("ours", "said"), [(wrong, "is wrong"), (incomplete, "is wrong"), (failing, "failed: ValueError: no such kernel")]
)
def test_a_wrong_result_gets_no_time(ours, said):
    row, notes = op_rows.measure(adding({"ours": ours, "eager": right}), "cpu", 0.0)
    assert not row["correct"] and all(row[key] is None for key in op_rows.TIMES) and said in notes[0]
    assert "WRONG" in op_rows.table([row])
    assert op_rows.bar("fast", [row], lambda row: row["vs_eager"], 1.0)["verdict"] == "not measured"


@pytest.mark.parametrize("plain", [wrong, failing])
def test_a_plain_form_that_is_wrong_is_no_baseline(plain):
    row, notes = op_rows.measure(adding({"ours": right, "eager": plain}), "cpu", 0.0)
    assert row["correct"] and row["vs_eager"] is None and "eager" in notes[0]


def test_bars_take_the_worst_row():
    rows = [{"op": "a", "case": "small", "ratio": 1.2}, {"op": "a", "case": "large", "ratio": 0.8}]
    bar = partial(op_rows.bar, "text", value=lambda row: row["ratio"])
    assert bar(rows=rows, bound=0.9) | {"bar": 0} == {
        "bar": 0,
        "bound": 0.9,
        "measured": 0.8,
        "worst": "a, large",
        "verdict": "does not hold",
    }
    assert bar(rows=rows, bound=0.8)["verdict"] == "holds"
    assert bar(rows=rows, bound=1.1, at_least=False)["worst"] == "a, small"
    assert (
        bar(rows=[*rows, {"ratio": None}], bound=0.0)["verdict"] == "not measured" == bar(rows=[], bound=0.0)["verdict"]
    )


def test_forms_take_turns():
    assert list(timing.turned(["a", "b", "c"], 4)) == ["b", "c", "a"]


@needs_packed
def test_a_rehearsal_on_the_cpu(tmp_path, monkeypatch, capsys):
    """Every case runs small, its result is right, and the files hold what the documentation names."""

    def in_process(name, command, out, minutes, **environment):
        assert command[1:3] == ["-m", "bench.gpu_measure"] and name == "measure"
        gpu_measure.main(command[3:])
        return {"step": name, "outcome": "passed", "seconds": 0.0, "last": ""}

    committed = tmp_path / "committed.json"
    monkeypatch.setattr(gpu, "run", in_process)
    monkeypatch.setattr(gpu, "COMMITTED", committed)
    arguments = [
        "--out",
        str(tmp_path),
        "--device",
        "cpu",
        "--scale",
        "0.0005",
        "--seconds",
        "0",
        "--no-inductor",
        "--commit",
        "abc",
    ]
    assert gpu.main(arguments) == 0
    document = json.loads((tmp_path / "kernels.json").read_text(), parse_constant=pytest.fail)
    assert {"device", "versions", "commit", "copy_gbps", "rows"} <= set(document)
    assert document["device"] == "cpu" and document["commit"] == "abc" and document["copy_gbps"] > 0
    assert all(set(row) >= ROW_KEYS and row["correct"] and row["vs_eager"] > 0 for row in document["rows"])
    assert {row["op"] for row in document["rows"]} == {*ops.implementations(), "cfg_skipped_step"}
    assert {row["op"] for row in document["dispatch"]} == set(ops.implementations())
    assert not document["notes"] and not document["not_measured"] and not document["regressions"]
    text = (tmp_path / "kernels.md").read_text()
    assert "| ring_push | HunyuanVideo |" in text and "| measure | passed |" in text

    faster = json.loads(json.dumps(document))
    faster["rows"][0]["p50_us"] /= 2
    committed.write_text(json.dumps(faster))

    def measured_again(name, command, out, minutes, **environment):
        (out / "kernels.json").write_text(json.dumps(document))
        return {"step": name, "outcome": "passed", "seconds": 0.0, "last": ""}

    monkeypatch.setattr(gpu, "run", measured_again)
    capsys.readouterr()
    gpu.main(arguments)
    assert "REGRESSION: ring_push, CogVideoX-2B" in capsys.readouterr().out


def test_bars_need_every_case():
    """Rows that time did not allow leave their bar open."""
    names = (
        "ring_push",
        "ring_push_residual",
        "ring_blend",
        "ring_blend_add",
        "cfg_reconstruct",
        "cfg_skipped_step",
        "cfg_split",
    )
    times = {"p50_us_of": {"ours": 1.0, op_cases.AS_RELEASED: 50.0}}
    rows = [
        {"op": name, "case": "x", "copy_fraction": 0.95, "vs_eager": 40.0, "vs_inductor": 1.0, **times}
        for name in names
    ]
    dispatch = [{"op": "ring_push", "op_us": 2.0, "function_us": 4.0}]
    assert {bar["verdict"] for bar in gpu_measure.bars(rows, dispatch, "cuda")} == {"holds"}
    late = {"op": "ring_push", "case": "y", **dict.fromkeys(op_rows.TIMES)}
    verdicts = [bar["verdict"] for bar in gpu_measure.bars([*rows, late], dispatch, "cuda")]
    assert verdicts[:2] == ["not measured"] * 2 and set(verdicts[2:]) == {"holds"}


def test_regressions_compare_like_with_like():
    row = {"op": "ring_push", "case": "x", "p50_us": 100.0}
    committed = {"device": "H100", "scale": 1.0, "rows": [row]}

    def found(us, **changed):
        return gpu.regressions(committed | changed | {"rows": [row | {"p50_us": us}]}, committed)

    assert not found(109.0) and found(111.0)[0]["committed_us"] == 100.0 and found(None)
    assert not found(200.0, device="H200") and not found(200.0, scale=0.1) and not gpu.regressions(committed, None)


@pytest.mark.parametrize(
    ("script", "minutes", "outcome"),
    [
        ("print('fine')", 1, "passed"),
        ("raise SystemExit(3)", 1, "failed with 3"),
        ("import time; time.sleep(60)", 0, "ended after"),
    ],
)
def test_a_step_is_ended_and_reported(tmp_path, script, minutes, outcome):
    step = gpu.run("build", [sys.executable, "-c", script], tmp_path, minutes)
    assert step["outcome"].startswith(outcome) and step["last"] == ("fine" if outcome == "passed" else "")


def test_the_gpu_tests_are_those_of_the_ops_and_of_cuda_graphs(tmp_path, monkeypatch):
    """Never with interpreted kernels; and one that only skips has not passed."""
    begun = []

    def start(name, command, out, **environment):
        begun.append(command[3])
        return {"step": name}

    def finish(step, minutes):
        return {
            **step,
            "outcome": "passed",
            "seconds": 0,
            "last": "2 skipped" if step["step"] == "graphs" else "9 passed",
        }

    monkeypatch.setattr(gpu, "start", start)
    monkeypatch.setattr(gpu, "finish", finish)
    assert [step["outcome"] for step in gpu.test(tmp_path, 1.0)] == ["passed", "failed: no test ran"]
    assert begun == ["tests/ops/test_gpu.py", "tests/test_cuda_graphs.py"] and all(
        (gpu.ROOT / path).is_file() for path in begun
    )
    assert gpu.ENVIRONMENT["TRITON_INTERPRET"] == "0"


def test_a_step_that_fails_fails_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(
        gpu, "build", lambda out, minutes: {"step": "build", "outcome": "failed with 1", "seconds": 0, "last": ""}
    )
    assert gpu.main(["--out", str(tmp_path), "--steps", "build"]) == 1


@needs_packed
def test_the_cpu_report(tmp_path):
    out = tmp_path / "cpu_ops.json"
    cpu_ops.main(["--out", str(out), "--size", "1e5", "--seconds", "0", "--no-inductor", "--threads", "1"])
    document = json.loads(out.read_text(), parse_constant=pytest.fail)
    assert all(row["correct"] for row in document["rows"]) and len(document["bars"]) == 10
    assert all(bar["verdict"] in ("holds", "does not hold") for bar in document["bars"])
    formats = {(row["channels"], row["format"]): row for row in document["formats"]}
    assert formats[1920, "int8"]["rms_error"] < formats[1920, "int8-int4"]["rms_error"]
    assert math.isclose(
        formats[1920, "int8"]["share_of_two_bfloat16_slots"], ops.PackedLine(1920, 8).bytes / (4 * 1920)
    )
