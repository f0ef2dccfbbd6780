"""The README's snippets run as they are printed, with the embedded pipeline in place of what would be downloaded."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from diffusers import DiffusionPipeline
from models import cogvideox
from typer.testing import CliRunner

import fastercache
from fastercache import Schedule, Step, cli, demo, policies, shapes
from fastercache.report import media
from fastercache.shapes.text_to_video import CLASSES

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [shlex.split(command) for command in re.findall(r"^\| `fastercache (.*?)` \|", README, re.MULTILINE)]
PRINTED = re.search(r"```\n\$ fastercache (.*?)\n\.\.\.\n(.*?)```", README, re.DOTALL)
STEPS = 6
"""Enough for every phase of the paper's schedule; the README's calls say 50."""

pytestmark = pytest.mark.filterwarnings("ignore::fastercache.FasterCacheWarning")


class Short(CLASSES["shapes"]):
    def __call__(self, prompt, num_inference_steps=STEPS, **arguments):
        return super().__call__(prompt, num_inference_steps=STEPS, **arguments)


@pytest.fixture
def pipe(monkeypatch, tmp_path):
    """The stand-in, which `from_pretrained` and `shapes.load` give; in the folder there is a schedule of one's own."""
    found = shapes.load()
    found.set_progress_bar_config(disable=True)
    found.__class__ = Short
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", lambda *_, **__: found)
    monkeypatch.setattr(shapes, "load", lambda: found)
    # Inductor takes a minute for what is tried here; its graphs are in tests/test_graphs.py.
    compile = fastercache.compile
    monkeypatch.setattr(
        fastercache,
        "compile",
        lambda *args, **options: compile(*args, **options | ({"backend": "eager"} if "backend" in options else {})),
    )
    monkeypatch.chdir(tmp_path)
    policies.plain(STEPS).to_json(tmp_path / "my-schedule.json")
    return found


def is_compiled(pipe):
    return hasattr(pipe.transformer, "_fastercache_engine")


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_python_block(pipe, number):
    names = {"fastercache": fastercache, "pipe": pipe, "model": cogvideox()}
    if "disabled" in BLOCKS[number]:
        fastercache.compile(pipe)
    for statement in ast.parse(BLOCKS[number]).body:
        source = ast.unparse(statement)
        if source.startswith("fastercache.compile(pipe") and is_compiled(pipe):
            fastercache.restore(pipe)  # the lines are alternatives
        exec(compile_statement(statement), names)
        if source.startswith("fastercache.compile(pipe"):
            assert is_compiled(pipe)
    if "video" in names:
        assert len(names["video"]) == 1 and fastercache.summary(pipe).skipped_anything


def compile_statement(statement):
    return compile(ast.Module([statement], []), "README.md", "exec")


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_command(monkeypatch, tmp_path, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("a red circle moving right\n")
    stand_ins = {"PIPELINE": "shapes", "...": "a red circle moving right", "FILE": "prompts.txt"}
    words = [stand_ins.get(word, word) for word in words]
    if words[0] == "calibrate":  # the calibration itself takes minutes; tests of its own are elsewhere
        schedule = Schedule((Step(), Step("none")), "calibrated")
        monkeypatch.setattr(fastercache, "calibrate", lambda *_, **__: schedule)
        monkeypatch.setattr(demo, "FILM", (".png",))  # a video takes seconds
    Path("prompts.jsonl").write_text('{"prompt": "a red circle moving right"}\n')
    for folder in ("REFERENCE", "OUTPUT") if words[0] == "evaluate" else ():
        (tmp_path / folder).mkdir()
        media.save(tmp_path / folder / "a video.mp4", np.zeros((2, 16, 16, 3), np.uint8))
    if words[0] in ("demo", "sample", "calibrate", "batch"):
        words += ["--steps", "2"]
    if words[0] == "demo":
        words += ["--prompt", "a red circle moving right"]
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 0, result.output


def test_what_inspect_prints_is_what_is_printed():
    words, printed = PRINTED.groups()
    output = CliRunner().invoke(cli.app, shlex.split(words)).stdout
    assert output.endswith(printed)


def test_the_chart_is_that_of_the_schedule():
    (chart,) = re.findall(r"```\n(cond .*?)\n```", README, re.DOTALL)
    assert chart == policies.paper(30).chart()


def test_nothing_was_left_out():
    assert len(BLOCKS) == 5 and [words[0] for words in COMMANDS] == [
        *("demo", "sample", "calibrate", "batch", "evaluate", "inspect", "info")
    ]
