"""Threads and the allocator of a program: set by what the machine has free, said, and never by an import."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch

from fastercache.host import environment, steady

FAULTS = """
import resource, sys, torch
from fastercache.host import steady
if sys.argv[1] == "steady":
    assert steady.steady_allocator()
def step():
    x = torch.ones(1 << 21)  # 8 MB
    return (x + 1) * 2
for _ in range(6):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.fixture(autouse=True)
def threads(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def faults(how, **more):
    run = subprocess.run(
        [sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True, env=os.environ | more
    )
    return int(run.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc")
def test_freed_tensors_are_used_again_without_page_faults():
    most = faults("as it is") / 10
    assert faults("steady") < most and faults("as it is", **steady.ENVIRONMENT) < most


def stat(idle, busy):
    return "cpu  1 1 1 1 1 0 0 0\n" + "".join(
        f"cpu{n} {b} 0 0 {i} 0 0 0 0 0 0\n" for n, (i, b) in enumerate(zip(idle, busy, strict=True))
    )


def test_idle_cores_are_those_of_this_process(tmp_path):
    file = tmp_path / "stat"
    file.write_text(stat((0, 0, 0), (0, 0, 0)))
    later = stat((30, 15, 30), (0, 15, 0))
    assert steady.idle_cores(tmp_path, {0, 1}, lambda seconds: file.write_text(later) and None) == 1.5
    assert (
        steady.idle_cores(tmp_path, {0, 1}, lambda seconds: None) is None
    )  # counters that stand still, as in some sandboxes
    assert steady.idle_cores(tmp_path / "none", {0}, lambda seconds: None) is None


@pytest.mark.parametrize(
    "idle, expected, said",
    [(4.0, 4, "4 CPU threads on 4 cores"), (1.2, 1, "about 1.2 are free"), (0.0, 1, "about 0.0 are free")],
)
def test_threads_are_as_many_as_free_cores(monkeypatch, idle, expected, said):
    monkeypatch.setattr(environment, "cores", lambda: 4)
    monkeypatch.setattr(steady, "idle_cores", lambda: idle)
    torch.set_num_threads(4)
    sentence = steady.choose_threads()
    assert torch.get_num_threads() == expected and said in sentence


def test_a_number_that_the_user_has_set_stays(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    torch.set_num_threads(3)
    monkeypatch.setattr(steady, "idle_cores", lambda: 0.0)
    assert steady.choose_threads() == "3 CPU threads, as OMP_NUM_THREADS says" and torch.get_num_threads() == 3


def test_the_clips_of_a_demo_take_turns_and_who_begins_alternates(monkeypatch):
    pytest.importorskip("rich")
    from rich.console import Console

    from fastercache import demo

    made, off = [], []

    @contextmanager
    def disabled(pipe):
        off.append(True)
        yield
        off.pop()

    def generate(pipe, prompt, *, steps, seed, on_step, **arguments):
        made.append((prompt, seed, "uncached" if off else "cached"))
        on_step()
        return f"{prompt} {'uncached' if off else 'cached'}", 2.0 if off else 1.0

    monkeypatch.setattr(demo.fastercache, "disabled", disabled)
    monkeypatch.setattr(demo, "generate", generate)
    runs = demo.with_and_without(None, 1)
    takes = demo.generate_takes(None, ["a", "b", "c"], runs, steps=1, seed=7, console=Console(quiet=True))
    assert made[:2] == [("a", 7, "uncached"), ("a", 7, "cached")]  # the warm-up
    assert [run for _, _, run in made[2:]] == ["uncached", "cached", "cached", "uncached", "uncached", "cached"]
    assert [seed for _, seed, _ in made[2:]] == [7, 7, 8, 8, 9, 9]
    clips = [[(clip.name, clip.frames, clip.seconds) for clip in take.clips] for take in takes]
    assert clips == [[("uncached", f"{x} uncached", 2.0), ("fastercache", f"{x} cached", 1.0)] for x in "abc"]
