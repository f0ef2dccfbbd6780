"""`fastercache batch`: the list, the folder, who makes what, and videos on one process and on workers of Ray."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import replace
from pathlib import Path

import imageio.v3 as iio
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner, Result

from bench import batch as bench_batch
from fastercache import policies, shapes
from fastercache.batch import pools, run
from fastercache.batch.jobs import BatchError, Folder, Job, read_jobs, settings_of
from fastercache.batch.pools import Died, Done, Ready
from fastercache.batch.worker import Failed, Made, Setup, Worker, WorkerError
from fastercache.cli import app
from fastercache.host import environment
from fastercache.sampling import PipelineError

PROMPTS = [
    f"a {colour} {shape} moving {direction}"
    for colour in ("red", "green", "blue")
    for shape in ("circle", "triangle")
    for direction in ("right", "down")
]


def written(path: Path, *lines: object) -> Path:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def command(*words: object) -> Result:
    return CliRunner().invoke(app, ["batch", *(str(word) for word in words)])


def records(folder: Path) -> dict[str, dict]:
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def hashes(folder: Path) -> dict[str, str]:
    return {name: record["frames"]["sha256"] for name, record in records(folder).items()}


# ---- the list --------------------------------------------------------------------------------------------------------


def test_a_list_with_names_seeds_and_arguments(tmp_path):
    path = written(
        tmp_path / "list.jsonl",
        {"prompt": "one"},
        "",
        {"prompt": "two", "seed": 7, "name": "second", "guidance_scale": 2.5, "negative_prompt": "three"},
        {"prompt": "one", "num_inference_steps": 9},
    )
    found = read_jobs(path, seed=3, arguments={"num_inference_steps": 20})
    assert found == [
        Job(1, "0001", "one", 3, {"num_inference_steps": 20}),
        Job(3, "second", "two", 7, {"num_inference_steps": 20, "guidance_scale": 2.5, "negative_prompt": "three"}),
        Job(4, "0004", "one", 3, {"num_inference_steps": 9}),
    ]
    assert [job.name for job in read_jobs(path, names="vbench")] == ["one-0", "second", "one-1"]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"prompt": "a"', "not JSON"),
        ('"a"', "not an object"),
        ("\udcff", "is not UTF-8"),
        ('{"prompt": "a", "prompt": "b"}', "key 'prompt' stands twice"),
        ('{"prompt": "a", "guidance_scale": NaN}', "NaN is no number"),
        ('{"seed": 1}', '"prompt" is null; give the text'),
        ('{"prompt": " "}', '"prompt" is " "'),
        ('{"prompt": "a", "seed": -1}', '"seed" is -1; give a whole number from 0 to 9223372036854775807'),
        ('{"prompt": "a", "seed": true}', '"seed" is true'),
        ('{"prompt": "a", "seed": 1.5}', '"seed" is 1.5'),
        ('{"prompt": "a", "name": "../a"}', "cannot name a file"),
        ('{"prompt": "a", "name": ".a"}', "cannot name a file"),
        ('{"prompt": "a", "name": 7}', "cannot name a file"),
        ('{"prompt": "a", "name": "' + 201 * "a" + '"}', "at most 200 bytes"),
        ('{"prompt": "a", "num_inference_steps": 0}', '"num_inference_steps" is 0'),
        ('{"prompt": "a", "generator": 1}', "'generator' cannot be given here; give a seed"),
        ('{"prompt": "a", "num_videos_per_prompt": 2}', "a line for each video"),
        ('{"prompt": "a", "name": "0001"}', "like that of line 1"),
        ('{"prompt": "zebra"}', "no zebras"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, words):
    path = tmp_path / "list.jsonl"
    path.write_bytes(b'{"prompt": "first"}\n\n' + line.encode("utf-8", "surrogateescape") + b"\n")

    def check(job):
        if job.prompt == "zebra":
            raise BatchError("no zebras")

    with pytest.raises(BatchError, match=re.escape(words)) as caught:
        read_jobs(path, check=check)
    assert f"{path}, line 3: " in str(caught.value)


def test_an_empty_list(tmp_path):
    with pytest.raises(BatchError, match="has no prompts"):
        read_jobs(written(tmp_path / "list.jsonl", "", ""))


def test_a_prompt_too_long_for_the_name_of_a_file_wants_a_name(tmp_path):
    path = written(tmp_path / "list.jsonl", {"prompt": 300 * "a"})
    assert read_jobs(path)[0].name == "0001"
    with pytest.raises(BatchError, match="at most 200 bytes; give another"):
        read_jobs(path, names="vbench")


# ---- the folder ------------------------------------------------------------------------------------------------------

JOB = Job(1, "0001", "one", 0, {"num_inference_steps": 2})
COMMON = {"pipeline": "shapes", "suffix": ".mp4"}
SETTINGS = settings_of(JOB, COMMON)


@pytest.fixture
def folder(tmp_path):
    found = Folder(tmp_path / "videos")
    found.path.mkdir()
    return found


def test_a_video_is_complete_with_its_json_of_the_same_settings(folder):
    assert not folder.is_complete(JOB, SETTINGS)
    folder.publish(JOB, b"pictures", {"settings": SETTINGS})
    assert folder.is_complete(JOB, SETTINGS)
    assert sorted(path.name for path in folder.path.iterdir()) == ["0001.json", "0001.mp4"]
    for other, words in (
        (settings_of(JOB, COMMON | {"pipeline": "other"}), 'pipeline "shapes", not "other"'),
        (settings_of(Job(1, "0001", "one", 1, JOB.arguments), COMMON), "seed 0, not 1"),
        (settings_of(Job(1, "0001", "one", 0, {}), COMMON), "num_inference_steps 2, not none"),
        (settings_of(JOB, COMMON | {"suffix": ".gif"}), 'suffix ".mp4", not ".gif"'),
    ):
        with pytest.raises(BatchError, match=re.escape(words) + ".*--overwrite"):
            folder.is_complete(JOB, other)


@pytest.mark.parametrize("gone", ["video", "half of it", "both"])
def test_what_is_not_whole_is_made_again(folder, gone):
    folder.publish(JOB, b"pictures", {"settings": SETTINGS})
    folder.video(JOB).write_bytes(b"pict")
    if gone != "half of it":
        folder.video(JOB).unlink()
    if gone == "both":
        folder.record(JOB).unlink()
    assert not folder.is_complete(JOB, SETTINGS)
    assert not folder.is_complete(JOB, {**SETTINGS, "seed": 1}) or gone == "video"


@pytest.mark.parametrize("there", ["0001.mp4", "0001.json"])
def test_files_of_others_are_left_alone(folder, there):
    (folder.path / there).write_text("{}")
    with pytest.raises(BatchError, match=re.escape(there)):
        folder.is_complete(JOB, SETTINGS)


@pytest.mark.parametrize("last", range(4))
def test_an_interruption_at_any_moment_leaves_nothing_that_looks_complete(folder, monkeypatch, last):
    """Publishing is cut off after each of its operations on files; the video before was another."""
    folder.publish(JOB, b"old pictures", {"settings": settings_of(JOB, {"pipeline": "old"})})
    calls = 0

    def counted(function):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls > last:
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(Path, "unlink", counted(Path.unlink))
    monkeypatch.setattr(Path, "write_bytes", counted(Path.write_bytes))
    monkeypatch.setattr(os, "replace", counted(os.replace))
    with pytest.raises(KeyboardInterrupt):
        folder.publish(JOB, b"pictures", {"settings": SETTINGS})
    monkeypatch.undo()
    try:
        assert not folder.is_complete(JOB, SETTINGS)
    except BatchError:
        assert folder.video(JOB).read_bytes() == b"old pictures"


def test_one_batch_at_a_time_in_a_folder(folder):
    with folder.locked(), pytest.raises(BatchError, match="another batch is writing to"), Folder(folder.path).locked():
        pass
    with Folder(folder.path).locked():
        pass


# ---- who makes what --------------------------------------------------------------------------------------------------

ABOUT = {
    "worker": {"host": "here", "pid": 1, "device": "cpu", "threads": 1},
    "versions": environment.versions(),
    "pipeline": "LattePipeline",
    "arguments": ["guidance_scale", "num_inference_steps"],
}
LIST = [Job(line, f"{line:04d}", f"prompt {line}", 0, {}) for line in range(1, 7)]


class Played:
    """A pool whose workers take turns; `plot(worker, job)` says what becomes of a job, `loads` of each load."""

    device = "cpu"

    def __init__(self, workers=2, plot=lambda worker, job: "made", loads=()):
        self.workers, self.plot, self.loads = workers, plot, deque(loads)
        self.events, self.given, self.closed = deque(), [], False

    def start(self, setup, most):
        for worker in range(min(self.workers, most)):
            self.restart(worker)
        return min(self.workers, most)

    def restart(self, worker):
        what = self.loads.popleft() if self.loads else ABOUT
        self.events.append(Died(worker, "killed") if what == "dies" else Ready(worker, what))

    def give(self, worker, job, settings):
        self.given.append((worker, job.name))
        what = self.plot(worker, job)
        record = {"seconds": 1.0, "settings": settings}
        self.events.append(
            Died(worker, "killed")
            if what == "dies"
            else Done(worker, Made(b"pictures", record) if what == "made" else Failed(what))
        )

    def next(self):
        return self.events.popleft()

    def close(self):
        self.closed = True


def played(folder, pool, wanted=LIST, **options):
    screen = Console(file=io.StringIO(), width=200)
    result = run.run_batch(wanted, folder, None, pool, COMMON, screen=screen, **options)
    assert pool.closed
    return result, screen.file.getvalue()


NAMES = [job.name for job in LIST]


def test_prompts_go_to_workers_as_they_are_free_and_a_second_time_to_none(folder):
    pool = Played()
    result, said = played(folder, pool)
    assert sorted(result.made) == NAMES == [name for _, name in pool.given] and {w for w, _ in pool.given} == {0, 1}
    assert re.search(r"0006\.mp4 in 1\.0 s by worker 1; 6 of 6, [\d.]+ a minute, 0:00:00 left", said)
    folder.video(LIST[2]).unlink()
    again = Played()
    result, _ = played(folder, again)
    assert again.given == [(0, "0003")] and result.made == ["0003"] and len(result.there) == 5
    result, _ = played(folder, again := Played(), overwrite=True)
    assert len(again.given) == 6 and not result.there


def test_a_prompt_that_fails_does_not_stop_the_rest(folder):
    result, said = played(folder, Played(plot=lambda worker, job: "no such size" if job.line == 2 else "made"))
    assert result.failed == {"0002": "no such size"} and len(result.made) == 5
    assert "line 2 (0002) failed: no such size" in said and not folder.record(LIST[1]).exists()


def test_what_a_worker_dies_of_is_made_by_another(folder):
    deaths = iter(["dies"])
    pool = Played(plot=lambda worker, job: next(deaths, "made") if job.line == 2 else "made")
    result, said = played(folder, pool)
    assert sorted(result.made) == NAMES and not result.failed
    assert [worker for worker, name in pool.given if name == "0002"] == [1, 0]
    assert "worker 1 died at line 2 (0002)" in said
    assert json.loads(folder.record(LIST[1]).read_text())["tries"] == 2


def test_a_prompt_that_kills_every_worker_is_given_up(folder):
    result, _ = played(folder, Played(plot=lambda worker, job: "dies" if job.line == 1 else "made"))
    assert list(result.failed) == ["0001"] and len(result.made) == 5
    assert result.failed["0001"] == f"{run.TRIES} workers died of it: killed"


def test_workers_that_die_while_loading(folder):
    assert len(played(folder, Played(loads=["dies", "dies"]))[0].made) == 6
    with pytest.raises(BatchError, match="3 workers in a row died while loading the pipeline: killed"):
        played(folder, Played(loads=["dies"] * 6), overwrite=True)
    # One that never comes up leaves the work to the other.
    pool = Played(loads=[ABOUT, *["dies"] * 3])
    result, said = played(folder, pool, overwrite=True)
    assert len(result.made) == 6 and {worker for worker, _ in pool.given} == {0} and said.count("while loading") == 3


def test_no_worker_is_started_that_has_nothing_to_do(folder):
    deaths = iter(["dies"])
    pool = Played(plot=lambda worker, job: next(deaths, "made") if worker == 1 else "made")
    restarted = []
    pool.restart = lambda worker: (restarted.append(worker), Played.restart(pool, worker))
    assert len(played(folder, pool, LIST[:2])[0].made) == 2 and restarted == [0, 1]


def test_a_worker_of_another_version(folder):
    other = {**ABOUT, "versions": {**ABOUT["versions"], "torch": "1.0"}}
    with pytest.raises(BatchError, match=r"worker 1 on here has torch 1\.0, this machine"):
        played(folder, Played(loads=[ABOUT, other]))


def test_an_argument_that_the_pipeline_does_not_have(folder):
    wanted = [*LIST, Job(9, "0009", "nine", 0, {"sharpness": 3})]
    pool = Played()
    with pytest.raises(
        BatchError, match="line 9: LattePipeline has no argument 'sharpness'; it has guidance_scale, num"
    ):
        played(folder, pool, wanted)
    assert not pool.given and pool.closed


# ---- on one process --------------------------------------------------------------------------------------------------


def test_a_list_is_made_and_gone_on_with(tmp_path):
    path = written(
        tmp_path / "list.jsonl",
        {"prompt": PROMPTS[0]},
        {"prompt": PROMPTS[1], "seed": 5, "num_inference_steps": 3, "name": "second"},
        {"prompt": PROMPTS[2], "height": 63},
        {"prompt": PROMPTS[3], "guidance_scale": 2.0},
    )
    out = tmp_path / "videos"
    words = ("shapes", path, "--out", out, "--steps", 2, "--threads", 1)
    result = command(*words)
    assert result.exit_code == 1, result.output
    assert "line 3 (0003) failed: ValueError: `height` and `width`" in result.stdout
    assert "3 made, 0 were there, 1 failed, of 4" in result.stdout
    assert sorted(file.name for file in out.iterdir() if file.name != ".lock") == [
        *("0001.json", "0001.mp4", "0004.json", "0004.mp4", "second.json", "second.mp4")
    ]
    assert iio.imread(out / "second.mp4", plugin="pyav").shape == (8, 64, 64, 3)
    found = records(out)
    second = found["second"]
    assert (second["prompt"], second["seed"], second["schedule"], second["steps"]) == (PROMPTS[1], 5, "paper", 3)
    assert second["settings"]["arguments"] == {"num_inference_steps": 3} and second["settings"]["dtype"] == "float32"
    assert second["summary"]["steps_done"] == 3 and second["frames"]["shape"] == [8, 64, 64, 3]
    assert second["worker"]["threads"] == 1 and second["seconds"] > 0 and found["0004"]["steps"] == 2
    before = {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in out.glob("0*")}
    (out / "second.mp4").unlink()
    again = command(*words, "--json")
    assert again.exit_code == 1
    document = json.loads(again.stdout)
    assert (
        document["made"] == ["second"]
        and document["there"] == ["0001", "0004"]
        and list(document["failed"]) == ["0003"]
    )
    assert before == {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in out.glob("0*")}
    assert records(out)["second"]["frames"] == second["frames"]


def test_a_video_does_not_depend_on_those_before_it(tmp_path):
    """A fixed schedule from a file, and an error in between; the hash is that of the pixels before they are encoded."""
    file = tmp_path / "schedule.json"
    policies.plain(4).to_json(file)
    lines = [{"prompt": PROMPTS[0]}, {"prompt": PROMPTS[1], "width": 63}, {"prompt": PROMPTS[2]}]
    common = ("--schedule", file, "--threads", 1, "--out")
    together, alone = tmp_path / "together", tmp_path / "alone"
    command("shapes", written(tmp_path / "three.jsonl", *lines), *common, together)
    result = command("shapes", written(tmp_path / "one.jsonl", {**lines[2], "name": "0003"}), *common, alone)
    assert result.exit_code == 0, result.output
    assert hashes(together)["0003"] == hashes(alone)["0003"] != hashes(together)["0001"]
    assert records(alone)["0003"]["settings"]["schedule"] == json.loads(policies.plain(4).to_json())


def test_a_worker_whose_gpu_is_lost_does_not_fail_one_prompt_after_the_other(monkeypatch):
    def lost(*_):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    worker = Worker()
    worker.load(Setup("shapes", policies.resolve("paper"), "cpu", torch.float32))
    wrong = Job(1, "0001", PROMPTS[0], 0, {"height": 63, "num_inference_steps": 1})
    assert isinstance(worker.make(wrong, {}), Failed)
    worker.setup = replace(worker.setup, device="cuda")
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(WorkerError, match="the GPU is lost to this process: CUDA error"):
        worker.make(wrong, {})


def test_compiled_phases(tmp_path):
    path = written(tmp_path / "list.jsonl", {"prompt": PROMPTS[0]})
    result = command("shapes", path, "--out", tmp_path / "videos", "--steps", 2, "--backend", "eager", "--regional")
    assert result.exit_code == 0, result.output
    assert "graph" in records(tmp_path / "videos")["0001"]["summary"]["compiled"]


@pytest.fixture
def unloaded(monkeypatch):
    def load(*_, **__):
        raise AssertionError("a pipeline was loaded")

    monkeypatch.setattr(shapes, "load_pipeline", load)


def error_of(*words: object) -> str:
    result = command(*words)
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    return line


@pytest.mark.usefixtures("unloaded")
class TestWhatIsNoticedBeforeAnythingIsLoaded:
    def test_mistakes(self, tmp_path):
        path = written(tmp_path / "list.jsonl", {"prompt": PROMPTS[0]}, {"prompt": "a zebra moving right"})
        assert "line 2: prompt 'a zebra" in error_of("shapes", path, "--out", tmp_path / "out")
        assert "none.jsonl" in error_of("shapes", tmp_path / "none.jsonl", "--out", tmp_path / "out")
        written(path, {"prompt": PROMPTS[0], "num_inference_steps": 9})
        policies.plain(4).to_json(tmp_path / "four.json")
        line = error_of("shapes", path, "--schedule", tmp_path / "four.json", "--out", tmp_path / "out")
        assert "line 1: num_inference_steps is 9, but" in line and "has 4 steps" in line
        assert "no format" in error_of("shapes", path, "--suffix", ".webp", "--out", tmp_path / "out")
        assert "save_pretrained" in error_of(tmp_path, path, "--out", tmp_path / "out")
        assert "give another --out" in error_of("shapes", path, "--out", path)
        assert not (tmp_path / "out").exists()

    def test_a_folder_of_other_settings(self, tmp_path):
        path = written(tmp_path / "list.jsonl", {"prompt": PROMPTS[0]})
        job = Job(1, "0001", PROMPTS[0], 0, {"num_inference_steps": 2})
        out = Folder(tmp_path / "out")
        out.path.mkdir()
        out.publish(job, b"", {"settings": {"prompt": PROMPTS[0], "seed": 1}})
        line = error_of("shapes", path, "--steps", 2, "--out", out.path)
        assert "0001.mp4 was made with" in line and "--overwrite" in line

    def test_without_ray(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "ray", None)
        path = written(tmp_path / "list.jsonl", {"prompt": PROMPTS[0]})
        for words in (("--workers", 2), ("--ray", "auto")):
            assert 'pip install "fastercache[ray]"' in error_of("shapes", path, "--out", tmp_path, *words)


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("127.0.0.1", "give host:port"),
        ("127.0.0.1:0", "give host:port"),
        ("127.0.0.1:1", "refused"),
        ("no.such.host.invalid:6379", ""),
    ],
)
def test_a_cluster_that_cannot_be_reached(address, words):
    start = time.monotonic()
    with pytest.raises(BatchError, match=f"{re.escape(address)}.*{words}"):
        pools.check_reachable(address)
    assert time.monotonic() - start < 15


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("ray.exceptions.AuthenticationError: RPC error: InvalidAuthToken", "asks for a token.*RAY_AUTH_MODE=token"),
        ("Traceback\n\nRpcError: gone\n", "RpcError: gone; start one"),
        ("", "health check ends with 1"),
    ],
)
def test_a_cluster_that_answers_with_an_error(monkeypatch, said, words):
    monkeypatch.setattr(
        pools.subprocess, "run", lambda command, **_: subprocess.CompletedProcess(command, 1, stdout="", stderr=said)
    )
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        pytest.raises(BatchError, match=f"{server.getsockname()[1]}.*{words}"),
    ):
        pools.check_reachable(f"127.0.0.1:{server.getsockname()[1]}")


# ---- on Ray ----------------------------------------------------------------------------------------------------------


class Watcher(Console):
    """A screen that kills the process of the worker that made the first video, `after` seconds later."""

    def __init__(self, after=None):
        super().__init__(file=io.StringIO(), width=200)
        self.after, self.pids = after, {}

    def print(self, text="", *args, **kwargs):
        super().print(text, *args, **kwargs)
        if ready := re.match(r"worker (\d+) is ready: process (\d+) ", str(text)):
            self.pids[ready[1]] = int(ready[2])
        if self.after is not None and (made := re.search(r"by worker (\d+);", str(text))):
            kill = threading.Timer(self.after, os.kill, (self.pids[made[1]], signal.SIGKILL))
            self.after = None
            kill.start()
            if not kill.interval:
                kill.join()


def on_ray(tmp_path, prompts, steps, after):
    """The same list on one process and, with a worker killed, on two workers; then what a repetition makes."""
    wanted = [
        Job(line, f"{line:04d}", prompt, line, {"num_inference_steps": steps}) for line, prompt in enumerate(prompts, 1)
    ]
    setup = Setup("shapes", policies.resolve("paper"), "cpu", torch.float32, threads=1)
    alone, folder = Folder(tmp_path / "alone"), Folder(tmp_path / "ray")
    run.run_batch(wanted, alone, setup, pools.InProcess("cpu"), COMMON, screen=Watcher())
    screen = Watcher(after)
    result = run.run_batch(wanted, folder, setup, pools.RayPool(2, None, "cpu"), COMMON, screen=screen)
    assert sorted(result.made) == [job.name for job in wanted] and not result.failed
    assert "died at line" in screen.file.getvalue()
    assert sorted(record["tries"] for record in records(folder.path).values()) == [1] * (len(wanted) - 1) + [2]
    assert hashes(folder.path) == hashes(alone.path) and len(set(hashes(alone.path).values())) == len(wanted)
    assert {record["worker"]["threads"] for record in records(folder.path).values()} == {1}
    again = run.run_batch(wanted, folder, setup, pools.RayPool(2, None, "cpu"), COMMON, screen=screen)
    assert not again.made and len(again.there) == len(wanted)
    return records(folder.path)


def test_a_worker_that_is_killed_loses_no_video(tmp_path):
    pytest.importorskip("ray")
    on_ray(tmp_path, PROMPTS[:3], steps=2, after=0)


@pytest.mark.skipif(os.environ.get("FASTERCACHE_LONG") != "1", reason="takes minutes: make test-all")
def test_twelve_prompts_on_two_workers_of_which_one_is_killed_in_the_middle(tmp_path):
    pytest.importorskip("ray")
    found = on_ray(tmp_path, PROMPTS, steps=50, after=1.5)
    assert len({record["worker"]["pid"] for record in found.values()}) >= 2


def test_a_port_that_is_no_cluster(monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setattr(pools, "LONGEST_CHECK", 3.0)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(BatchError, match=f"{address}: something listens there"):
            pools.RayPool(1, address, "cpu")
    with pytest.raises(BatchError, match="on a machine of the cluster with --ray auto"):
        pools.RayPool(1, "ray://127.0.0.1:10001", "cpu")


def test_on_ray_the_cpu_needs_a_number_of_workers():
    pytest.importorskip("ray")
    with pytest.raises(BatchError, match="needs --workers"):
        pools.RayPool(None, None, "cpu")


def test_a_worker_says_what_is_wrong_with_a_pipeline(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(PipelineError, match="save_pretrained"):
        Worker().load(Setup(str(tmp_path), policies.resolve("paper"), "cpu", torch.float32))


# ---- the benchmark ---------------------------------------------------------------------------------------------------


def test_the_rate_counts_from_each_workers_first_clip():
    ends = {1: (100.0, 110.0, 120.0), 2: (103.0, 108.0, 113.0, 118.0)}
    found = [{"worker": {"pid": pid}, "finished": end} for pid, times in ends.items() for end in times]
    assert bench_batch.rate(found) == pytest.approx(6 + 12)
    with pytest.raises(ValueError, match="one clip only"):
        bench_batch.rate(found[:4])


def test_the_benchmark(tmp_path, monkeypatch):
    """Its page, with the clips of one process in place of those of Ray."""

    def here(command, **_):
        kept = [word for word in command[3:] if word not in ("--workers", "1", "2")]
        assert command[3:6] == ["batch", "shapes", command[5]] and "--threads" in command
        result = CliRunner().invoke(app, [*kept[: kept.index("--threads")], "--threads", "1", "--steps", "1"])
        return subprocess.CompletedProcess(command, result.exit_code)

    monkeypatch.setattr(bench_batch.subprocess, "run", here)
    monkeypatch.setattr(bench_batch.report, "commit", lambda: "none")
    bench_batch.main(["--clips", "2", "--steps", "1", "--out", str(tmp_path / "batch.json")])
    found = json.loads((tmp_path / "batch.json").read_text())
    assert found["identical"] and found["ratio"] > 0 and found["bar"] == 1.7
    assert "clips a minute" in (tmp_path / "batch.md").read_text()
