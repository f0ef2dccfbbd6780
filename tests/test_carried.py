"""Schedules that a pipeline's directory or a repository carries: the one that fits is chosen as a run begins."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import imageio.v3 as iio
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from models import arguments, cogvideox
from rich.console import Console

import fastercache
from fastercache import Schedule, ScheduleError, Signature, Step, demo, policies, shapes
from fastercache.host import carried
from fastercache.report.calibration import write_schedules
from fastercache.schedule.carried import Carried, index_of

PROMPT = "a red circle moving right"
GUIDED = Schedule((Step(), Step("cond"), Step("none"), Step()), "guided", made_for=Signature(steps=4, guidance=(4.0,)))
PLAIN = Schedule((Step(), Step("none")) * 2, "plain", made_for=Signature(steps=4, guidance=(1.0,)))
SIX = Schedule((Step(), Step("cond"), Step("none")) * 2, "six", made_for=Signature(steps=6, scheduler="DDIMScheduler"))


def write(folder: Path, *schedules: Schedule) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[int, tuple[str, ...]] = {}
    for schedule in schedules:
        schedule.to_json(folder / f"{schedule.name}.json")
        files[len(schedule)] = (*files.get(len(schedule), ()), f"{schedule.name}.json")
    (folder / "index.json").write_text(index_of(files))
    return folder


@pytest.fixture
def directory(tmp_path):
    """The embedded pipeline in a folder of its own."""
    place = tmp_path / "pipeline"
    place.mkdir()
    for part in shapes.PIPELINE.iterdir():
        if part.name != carried.FOLDER:
            (place / part.name).symlink_to(part)
    return place


def load(monkeypatch, directory):
    monkeypatch.setitem(shapes.PIPELINES, "shapes", replace(shapes.PIPELINES["shapes"], path=directory))
    return shapes.load()


def sample(pipe, steps, guidance_scale=4.0):
    options = dict(guidance_scale=guidance_scale, num_inference_steps=steps, output_type="latent")
    return pipe(PROMPT, generator=torch.Generator().manual_seed(0), **options).frames


def ran(pipe, steps, **changes) -> tuple[str, str]:
    """The name of the schedule of a run, and what its summary says of carried ones."""
    sample(pipe, steps, **changes)
    summary = fastercache.summary(pipe)
    return summary.schedule, " ".join(note for note in summary.notes if "schedules" in note)


def test_the_one_that_fits_is_chosen_as_a_run_begins(monkeypatch, directory):
    write(directory / "schedules", GUIDED, PLAIN, SIX)
    pipe = fastercache.compile(load(monkeypatch, directory))
    assert f"of {directory / 'schedules'}" in str(fastercache.summary(pipe))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ran(pipe, 4) == ("guided", f"schedule 'guided' is carried by {directory / 'schedules'}")
        assert ran(pipe, 4, guidance_scale=1.0)[0] == "plain"
        assert ran(pipe, 6)[0] == "six"
        name, note = ran(pipe, 8)
    assert name == "paper" and "no schedule in " in note and "fits a run of 8 steps with guidance" in note
    assert "'guided' for 4 steps with guidance; 'plain' for 4 steps without guidance" in note
    assert note.endswith("'six' for 6 steps by DDIMScheduler; 'paper' ran instead")


def test_another_scheduler_gets_the_papers(monkeypatch, directory):
    write(directory / "schedules", SIX)
    pipe = fastercache.compile(load(monkeypatch, directory))
    assert ran(pipe, 6)[0] == "six"
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    name, note = ran(pipe, 6)
    assert name == "paper" and "with guidance by DPMSolverMultistepScheduler; it has" in note


def test_a_pipeline_that_carries_none_runs_the_papers_without_a_word(monkeypatch, directory):
    (directory / "schedules").mkdir()  # of somebody else: it has no index
    pipe = load(monkeypatch, directory)
    assert carried.of_pipeline(pipe) is None and carried.resolve(None, pipe) is policies.paper
    assert ran(fastercache.compile(pipe), 4) == ("paper", "")


def test_a_pipeline_made_of_parts_carries_none():
    pipe = shapes.load()
    assert carried.of_pipeline(type(pipe)(**pipe.components)) is None


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "has no object 'default'; it must be as"),
        ('{"default": {}}', "has format None; this version reads 'fastercache-schedules-1'"),
        ({"defaults": {}}, "unknown key 'defaults'"),
        ({"default": {"4 steps": "guided.json"}}, "has '4 steps' among its step counts"),
        ({"default": {"0": "guided.json"}}, "has '0' among its step counts"),
        ({"default": {"4": "../guided.json"}}, r"4 steps, names '\.\./guided\.json'; .* in its own folder"),
        ({"default": {"4": 3}}, "4 steps, names 3"),
        ({"default": {"4": []}}, "4 steps, names no file"),
        ({"default": {"4": "gone.json"}}, r"gone\.json' cannot be read"),
        ({"default": {"4": "broken.json"}}, r"broken\.json'.* is not JSON"),
        ({"default": {"6": "guided.json"}}, r"guided\.json' has 4 steps, but its index names it for 6"),
        ({"default": {"4": "other.json"}}, r"other\.json' was made for 9 steps, but"),
    ],
)
def test_a_broken_index_or_file_is_an_error_at_compile(directory, index, message):
    folder = write(directory / "schedules", GUIDED)
    (folder / "broken.json").write_text("{")
    replace(GUIDED, made_for=Signature(steps=9)).to_json(folder / "other.json")
    text = index if isinstance(index, str) else json.dumps({"format": "fastercache-schedules-1", "default": {}} | index)
    (folder / "index.json").write_text(text)
    with pytest.raises(ScheduleError, match=message):
        carried.of_pipeline(SimpleNamespace(config=SimpleNamespace(_name_or_path=str(directory))))


def test_a_broken_index_leaves_the_pipeline_as_it_was(monkeypatch, directory):
    write(directory / "schedules", GUIDED)
    (directory / "schedules" / "guided.json").unlink()
    pipe = load(monkeypatch, directory)
    with pytest.raises(ScheduleError, match=r"guided\.json' cannot be read"):
        fastercache.compile(pipe)
    assert not hasattr(pipe.transformer, "_fastercache_engine")
    assert ran(fastercache.compile(pipe, "paper"), 4) == ("paper", "")


def test_the_demo_shows_the_calibrated_one_beside_the_papers(monkeypatch, directory, tmp_path):
    write(directory / "schedules", GUIDED)
    monkeypatch.setitem(shapes.PIPELINES, "shapes", replace(shapes.PIPELINES["shapes"], path=directory))
    found = demo.run_demo(tmp_path / "demo", [PROMPT], steps=4, console=Console(quiet=True))
    calibrated = found["calibrated"]
    assert (found["schedule"], calibrated["schedule"]) == ("paper", "guided")
    assert calibrated["flops_ratio"] > found["flops_ratio"] > 1 and calibrated["psnr_db"] != found["psnr_db"]
    assert calibrated["uncached"] == found["uncached"] and calibrated["cached"] != found["cached"]
    assert iio.imread(tmp_path / "demo" / "comparison.png").shape[1] == 3 * 320 + 2 * 8 + 2 * 24
    summary = (tmp_path / "demo" / "summary.txt").read_text()
    assert "schedule 'paper', 4 steps" in summary and "schedule 'guided', 4 steps" in summary
    one = demo.run_demo(tmp_path / "one", [PROMPT], policies.paper, steps=4, console=Console(quiet=True))
    assert "calibrated" not in one and one["schedule"] == "paper"


# ---- on the hub ------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub's cache on this machine, with one repository."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--somebody--fitted"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    return repository / "snapshots" / ("0" * 40)


def test_a_file_of_a_repository(hub):
    write(hub, GUIDED)
    assert carried.resolve("somebody/fitted/guided.json") == GUIDED


@pytest.mark.parametrize("folder", ["schedules", "."])
def test_a_repository(hub, folder):
    write(hub / folder, GUIDED, PLAIN, SIX)
    found = carried.resolve("somebody/fitted")
    assert isinstance(found, Carried) and found(4, True) == GUIDED and found(6, True) == SIX


def test_a_repository_in_which_nothing_fits_is_refused(hub):
    """It was asked for by name, so that nothing else may run in its place."""
    write(hub, PLAIN)
    model = fastercache.compile(cogvideox(), "somebody/fitted", steps=4, cfg="cond-first")
    message = "no schedule in somebody/fitted fits a run of 4 steps with guidance; .*fastercache.calibrate"
    with pytest.raises(ScheduleError, match=message):
        model(**arguments(model, 2))
    fastercache.restore(model)
    fastercache.compile(model, "somebody/fitted", steps=4, cfg="none")
    for _ in range(4):
        model(**arguments(model, 1))
    assert fastercache.summary(model).schedule == "plain"


def test_a_carried_schedule_that_skips_nothing_without_guidance_says_why(hub):
    write(hub, Schedule((Step(), Step("cond")), "cfg", made_for=Signature(steps=2, guidance=(1.0,))))
    model = fastercache.compile(cogvideox(), "somebody/fitted", steps=2, cfg="none")
    with pytest.warns(fastercache.FasterCacheWarning, match="skips unconditional calls alone, and this run"):
        model(**arguments(model, 1))


@pytest.mark.parametrize("name", ["somebody/else", "mochi/relased", "somebody/fitted", "somebody/fitted/gone.json"])
def test_what_is_not_on_this_machine_is_not_fetched_unasked(hub, monkeypatch, name):
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", asked := Fetched())
    with pytest.raises(ScheduleError, match=rf"unknown policy '{name[:13]}.*mochi/released.*download=True"):
        carried.resolve(name)
    assert asked.local == [True] * len(asked.local) and asked.local


def test_a_download_is_asked_for(hub, monkeypatch):
    write(hub / "schedules", GUIDED)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", asked := Fetched(hub))
    model = fastercache.compile(cogvideox(), "somebody/fitted", steps=4, cfg="cond-first", download=True)
    assert asked.files == ["schedules/index.json", "schedules/guided.json"] and asked.local == [False, False]
    model(**arguments(model, 2))
    with pytest.raises(
        ScheduleError, match=r"gone\.json of the repository somebody/fitted cannot be downloaded: offline"
    ):
        carried.resolve("somebody/fitted/gone.json", download=True)


class Fetched:
    """In place of the hub's download: gives what lies in a folder, and keeps what was asked for."""

    def __init__(self, folder: Path | None = None):
        self.folder, self.files, self.local = folder, [], []

    def __call__(self, repository: str, file: str, *, local_files_only: bool) -> str:
        self.files.append(file)
        self.local.append(local_files_only)
        if self.folder is None or not (self.folder / file).exists():
            raise OSError("offline")
        return str(self.folder / file)


def test_a_folder_that_a_calibration_left(tmp_path):
    write_schedules([GUIDED, SIX], tmp_path)
    for name in (tmp_path, str(tmp_path)):
        found = carried.resolve(name)
        assert found.schedules == {4: (GUIDED,), 6: (SIX,)}
        with pytest.raises(ScheduleError, match="fits a run of 8 steps with guidance; it has 'guided' for 4 steps"):
            found(8, True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ScheduleError, match=r"empty' is a folder without an index\.json"):
        carried.resolve(tmp_path / "empty")


def test_a_policy_goes_before_a_folder_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "paper").mkdir()
    assert carried.resolve("paper") is policies.paper


def test_a_file_that_is_there_goes_before_a_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "somebody" / "fitted", GUIDED)
    assert carried.resolve("somebody/fitted/guided.json") == GUIDED
    with pytest.raises(ScheduleError, match="cannot be read"):
        carried.resolve("folder/gone.json")
