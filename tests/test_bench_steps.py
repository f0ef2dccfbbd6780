"""The comparison of two revisions: played tiny against the commit that is checked out, and the parts that decide what
it says."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("diffusers")

sys.path.insert(0, str(Path(__file__).parent.parent))  # `bench` is not installed

from bench import report, steps, steps_worker


def has_git():
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=report.ROOT, capture_output=True)
    return found.returncode == 0


@pytest.mark.skipif(not has_git(), reason="needs a git checkout")
def test_a_tiny_comparison_from_the_command_to_the_files(tmp_path, monkeypatch, capsys):
    """The other side is this commit, whose libraries are not built again; afterwards its folder is gone."""
    monkeypatch.setattr(steps, "QUICK", steps.QUICK | {"runs": 1, "calls": 2})
    monkeypatch.setattr(steps, "same_sources", lambda one, other: True)
    built, out = [], tmp_path / "steps.json"
    monkeypatch.setattr(steps, "build", lambda tree, build=steps.build: (built.append(tree), build(tree)))
    command = [
        "--against",
        "HEAD",
        "--quick",
        "--rounds",
        "1",
        "--kinds",
        "engine",
        "dispatch",
        "--threads",
        "1",
        "--out",
        str(out),
    ]
    steps.main(command)
    assert not built[0].exists() and str(built[0]) not in steps.git("worktree", "list")
    document = json.loads(out.read_text(), parse_constant=pytest.fail)
    assert document["settings"]["old_commit"] in document["settings"]["new_commit"]
    figures = {row["figure"]: row for row in document["rows"]}
    assert {"engine, eager (us a step)", "engine, compiled (us a step)", "ring_blend, op (us)"} <= set(figures)
    for figure, row in figures.items():
        assert row["old"] > 0 and row["new"] > 0 and row["ratio"] == pytest.approx(row["new"] / row["old"])
        assert all(len(document["rounds"][side][figure]) == 1 for side in ("old", "new"))
    assert len(document["bars"]) == 2 and {"machine", "versions", "commit"} <= set(document)
    text = out.with_suffix(".md").read_text()
    assert "A trial" in text and "| engine, eager (us a step) |" in text


def found(old, new):
    return {
        "old": {"engine, eager (us a step)": old, "gone (us)": [1.0]},
        "new": {"engine, eager (us a step)": new, "made (us)": [2.0]},
    }


def test_medians_ratios_and_bars():
    first, gone, made = rows = steps.compared(found([40.0, 50.0, 90.0], [42.0, 60.0, 45.0]))
    assert (first["old"], first["new"], first["ratio"]) == (50.0, 45.0, pytest.approx(0.9))
    assert first["ratios"] == pytest.approx([0.5, 1.2])
    assert (gone["new"], gone["ratio"], made["old"], made["ratio"]) == (None, None, None, None)
    assert [bar["holds"] for bar in steps.bars(rows)] == [True, True]
    slower = steps.bars(steps.compared(found([50.0], [53.0])))
    assert [bar["holds"] for bar in slower] == [False, False] and "engine, eager" in slower[0]["bar"]
    assert steps.bars(rows[1:]) == []


def test_libraries_are_copied_only_where_their_sources_are_the_same(tmp_path):
    trees = []
    for name in ("one", "other"):
        (tmp_path / name / "csrc" / "kernels").mkdir(parents=True)
        (tmp_path / name / "setup.py").write_text("setup()")
        (tmp_path / name / "csrc" / "kernels" / "ring.h").write_text("int a;")
        trees.append(tmp_path / name)
    assert steps.same_sources(*trees)
    (trees[1] / "csrc" / "kernels" / "ring.h").write_text("int b;")
    assert not steps.same_sources(*trees)
    (trees[1] / "csrc" / "kernels" / "ring.h").write_text("int a;")
    (trees[1] / "csrc" / "new.h").write_text("")
    assert not steps.same_sources(*trees)


def test_a_library_is_not_compared_with_a_fallback():
    steps.check_served({"old": {"ring_push": "cpp", "gone": "cpp"}, "new": {"ring_push": "cpp", "made": "torch"}})
    with pytest.raises(SystemExit, match="ring_push is served by torch in old and by cpp in new; build both"):
        steps.check_served({"old": {"ring_push": "torch"}, "new": {"ring_push": "cpp"}})


def test_a_revision_that_git_does_not_know():
    with pytest.raises(SystemExit, match="git rev-parse --verify no-such-revision"):
        steps.main(["--against", "no-such-revision", "--quick"])


def test_both_layouts_of_an_engine():
    assert steps_worker.graphs_of(SimpleNamespace(graphs="old")) == "old"
    assert steps_worker.graphs_of(SimpleNamespace(gated=SimpleNamespace(graphs="new"))) == "new"
