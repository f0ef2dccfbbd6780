"""The command line, as a user types it."""

from __future__ import annotations

import json
import re
import sys

import imageio.v3 as iio
import pytest
import torch
from typer.testing import CliRunner, Result

import fastercache
from fastercache import Measured, Schedule, Signature, Step, demo, ops, policies, shapes
from fastercache.cli import app
from fastercache.report.calibration import write_schedules
from fastercache.report.published import SYSTEMS

PROMPT = "a red circle moving right"


def run(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def error_of(*words: object) -> str:
    """The one line that a mistake gets."""
    result = run(*words)
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    return line


# ---- inspect ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", policies.BY_NAME)
@pytest.mark.parametrize("guidance", [True, False])
def test_inspect_policy(policy, guidance):
    steps = 60
    result = run("inspect", policy, "--steps", steps, "--guidance" if guidance else "--no-guidance")
    assert result.exit_code == 0, result.output
    schedule = policies.get(policy)(steps, guidance)
    rows = [line.split()[1] for line in result.stdout.splitlines() if line.startswith(("cond ", "uncond "))]
    halves = [rows[i] + rows[i + len(rows) // 2] for i in range(len(rows) // 2)]
    drawn = [row.translate(str.maketrans("█▒·", "#~.")) for row in halves]
    assert drawn == [line.split()[1] for line in schedule.chart().splitlines()][: 1 + guidance]


def test_inspect_says_what_is_saved():
    schedule = policies.paper(50)
    single = sum(step.branches == "cond" for step in schedule.steps)
    blended = sum(bool(step.reuse) for step in schedule.steps)
    output = run("inspect", "paper").stdout
    assert f"of branch-steps ({single} of 100)" in output
    assert f"of attention computations ({single + blended} of 100)" in output
    assert "w1 = 1.2" in output and "w2 = 1.2" in output


def test_inspect_file(tmp_path):
    file = tmp_path / "mine.json"
    policies.plain(12).to_json(file)
    assert "plain, 12 steps" in run("inspect", file).stdout
    assert "has 12 steps, not 50" in error_of("inspect", file, "--steps", 50)


def test_a_name_that_looks_like_markup_is_printed_as_it_is(tmp_path):
    file = tmp_path / "mine.json"
    file.write_text('{"steps": [{}, {"branches": "cond"}], "name": "[/red] [bold]x"}')
    assert "[/red] [bold]x, 2 steps" in run("inspect", file).stdout
    file.write_text('{"steps": [{"branches": "cond"}], "name": "[/red]"}')
    assert "schedule '[/red]', step 1 runs" in error_of("inspect", file)


@pytest.mark.parametrize("policy", policies.BY_NAME)
def test_inspect_json(policy):
    document = json.loads(run("inspect", policy, "--steps", 20, "--json").stdout)
    assert Schedule.from_json(json.dumps(document["schedule"])) == policies.get(policy)(20, True)
    assert sorted(step for phase in document["phases"] for step in phase["steps"]) == list(range(1, 21))


def test_inspect_preset_costs():
    """CogVideoX-2B, released: 11,998 TFLOPs uncached and 7,374 cached for 49 frames (counted from the shapes and the
    script's counters)."""
    document = json.loads(run("inspect", "cogvideox-2b/released", "--json").stdout)
    assert document["steps"] == 50 and [len(phase["steps"]) for phase in document["phases"]]
    assert document["flops"]["uncached"] == pytest.approx(11_998e12, rel=1e-3)
    assert document["flops"]["cached"] == pytest.approx(7_374e12, rel=1e-3)
    assert document["flops_ratio"] == pytest.approx(1.627, rel=1e-3)
    assert document["cache_bytes"]["model"] <= 4.3e9 and document["cache_bytes"]["int8"] <= 2.2e9
    output = run("inspect", "cogvideox-2b/released").stdout
    for words in ("11.998 PFLOPs, 5.999 PMACs", "1.627", "4.10 GB as model", "2.13 GB as int8", "49 frames of 480x720"):
        assert words in output
    unguided = run("inspect", "hunyuan-video/paper").stdout
    assert "without guidance" in unguided and "25.64 GB; an 80 GB GPU holds them and the cache as int8-int4" in unguided


def test_inspect_prints_what_a_preset_keeps():
    """CogVideoX-2B: of 30 attentions, two results of video and text each, of the conditional branch; MLPs of Open-Sora
    keep one."""
    output = run("inspect", "cogvideox-2b/released").stdout
    assert "120 tensors of 30 joint sites, cond\n" in output and "4.10 GB as model" in output
    kept = json.loads(run("inspect", "open-sora-1.2/released-mlp", "--json").stdout)["kept"]
    mlp = next(entry for entry in kept if entry["kind"] == "mlp")
    assert mlp["sites"] == 29 and mlp["tensors"] == 29 * len(mlp["branches"])


@pytest.mark.parametrize("system", SYSTEMS)
def test_inspect_prints_what_reusing_the_stack_keeps(tmp_path, system):
    """One tensor for each branch and tap, of the stream that is read after the last block."""
    described = SYSTEMS[system]
    Schedule((Step(), Step(), Step("both", ("stack",), (1.5, -0.5)))).to_json(tmp_path / "stack.json")
    output = run("inspect", tmp_path / "stack.json", "--system", system).stdout
    branches = 2 if described.guided else 1
    tokens, channels = described.sites[1].outputs[0]
    assert f"{2 * branches} tensors of 1 stack site, {'cond + uncond' if described.guided else 'cond'}\n" in output
    assert f"{2 * branches * tokens * channels * 2 / 1e9:.2f} GB as model" in output


def test_inspect_says_what_a_schedule_was_measured_to_do(tmp_path):
    measured = Measured(1.9, 2.0, 45.0, None, 40.0, 8, 15.0, 60.0)
    Schedule((Step(), Step("none")), "calibrated", measured=measured).to_json(tmp_path / "calibrated.json")
    assert f"measured {measured}\n" in run("inspect", tmp_path / "calibrated.json").stdout


def test_inspect_does_not_know_a_system():
    line = error_of("inspect", "paper", "--system", "sora")
    assert "--system sora: known are open-sora-1.2" in line and "hunyuan-video" in line


def test_inspect_shows_sites_that_are_blended_their_own_way():
    assert (
        "mlp[14:43] A, the newest output unchanged, on 10 steps" in run("inspect", "open-sora-1.2/released-mlp").stdout
    )


def test_inspect_mistakes(tmp_path):
    assert "unknown policy 'papers'" in error_of("inspect", "papers")
    assert "cannot be read" in error_of("inspect", tmp_path / "missing.json")
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    assert "is not JSON" in error_of("inspect", broken)


@pytest.mark.parametrize("words", [("inspect", "wide.json"), ("inspect", "--help"), ("sample", "--help"), ("info",)])
def test_no_name_is_cut_at_80_columns(tmp_path, monkeypatch, words):
    selectors = ("spatial[0:28]", "temporal[0:28]", "mlp[14:43]", "joint[100:200]")
    steps = (Step(), Step(), Step(reuse=selectors, taps=(1.0,)))
    Schedule(steps, name="a name of more than forty characters, as people give them").to_json(tmp_path / "wide.json")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    output = run(*words).stdout
    assert "…" not in output
    if words[-1] == "wide.json":
        assert ", ".join(selectors) in output and "as people give them, 3 steps" in output
    if words == ("inspect", "--help"):
        assert all(name in output for name in policies.PRESETS)


def test_version():
    assert run("--version").stdout == f"fastercache {fastercache.__version__}\n"


# ---- info ------------------------------------------------------------------------------------------------------------


def test_info():
    result = run("info")
    assert result.exit_code == 0
    for word in ("fastercache", "torch", "triton", "diffusers", "cpu", "ring_blend", "cfg_split"):
        assert word in result.stdout


def test_info_json():
    document = json.loads(run("info", "--json").stdout)
    assert document["versions"]["torch"] == torch.__version__
    assert document["ops"] == ops.implementations() and document["notes"] == ops.fallback_reasons()
    assert document["machine"]["cores"] >= 1


# ---- demo ------------------------------------------------------------------------------------------------------------


def test_demo(tmp_path):
    result = run("demo", "--steps", 4, "--prompt", PROMPT, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "result.json").read_text())
    assert found["uncached"]["seconds"] > 0 and found["cached"]["seconds"] > 0
    assert found["speedup"] == pytest.approx(found["uncached"]["seconds"] / found["cached"]["seconds"], rel=0.01)
    assert found["flops_ratio"] > 1 and found["psnr_db"] > 10 and 0 < found["ssim"] <= 1 and not found["identical"]
    assert set(found["prompt_score"]) == {"uncached", "cached"}
    assert (found["prompts"], found["steps"], found["schedule"], found["seed"]) == ([PROMPT], 4, "paper", 0)
    assert {"machine", "versions"} < set(found)
    assert len(iio.imread(tmp_path / "comparison.mp4", plugin="pyav")) == 8 * demo.LOOPS
    assert len(iio.imread(tmp_path / "comparison.gif")) == 8
    assert "schedule 'paper', 4 steps" in (tmp_path / "summary.txt").read_text()
    assert "schedule 'paper', 4 steps" in result.stdout and "fewer" in result.stdout
    assert re.search(r"^\d+ CPU threads?[ ,]", result.stdout, re.MULTILINE)


@pytest.mark.parametrize(
    ("prompt", "word"),
    [("a purple circle moving right", "purple"), ("a red circle", "direction"), ("a red red circle moving up", "up")],
)
def test_demo_prompt_of_another_world(tmp_path, prompt, word):
    assert word in error_of("demo", "--prompt", prompt, "--out", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_missing_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    line = error_of("demo", "--prompt", PROMPT, "--out", tmp_path)
    assert line == 'diffusers is not installed: pip install "fastercache[demo]"'


# ---- sample ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pipeline", "prompt", "frames"), [("shapes", PROMPT, 8), ("wan", "a blue striped circle moving left", 9)]
)
def test_sample(tmp_path, pipeline, prompt, frames):
    """With the defaults of what the embedded pipelines were trained for."""
    out = tmp_path / "new" / "clip.mp4"
    result = run("sample", pipeline, "--prompt", prompt, "--steps", 2, "--out", out)
    assert result.exit_code == 0, result.output
    assert f"{frames} frames of 64 x 64" in result.stdout and "2 steps" in result.stdout
    assert "CPU thread" in result.stdout
    assert iio.imread(out, plugin="pyav").shape == (frames, 64, 64, 3)


def test_sample_compares_with_a_schedule_that_skips_nothing(tmp_path):
    schedule, out = tmp_path / "two.json", tmp_path / "pair.mp4"
    policies.none(2).to_json(schedule)
    result = run("sample", "shapes", "--prompt", PROMPT, "--schedule", schedule, "--compare", "--out", out)
    assert result.exit_code == 0, result.output
    assert "identical" in result.stdout
    assert len(iio.imread(out, plugin="pyav")) == 8 * demo.LOOPS


@pytest.mark.skipif(ops.packed_missing(torch.device("cpu")) is not None, reason="packed caches need the C++ library")
def test_sample_with_a_small_cache(tmp_path):
    common = ("sample", "shapes", "--prompt", PROMPT, "--steps", 8, "--out", tmp_path / "clip.mp4")
    assert "MB in int8" in run(*common, "--max-cache-gb", 0.004).stdout
    assert "MB in int8-int4" in run(*common, "--cache-format", "int8-int4").stdout
    assert "no cache fits max_cache_bytes=1,000,000" in error_of(*common, "--max-cache-gb", 0.001)


def test_sample_mistakes(tmp_path):
    line = error_of("sample", tmp_path, "--prompt", PROMPT)
    assert str(tmp_path) in line and "save_pretrained" in line
    (tmp_path / "model_index.json").write_text("{}")
    line = error_of("sample", tmp_path, "--prompt", PROMPT, "--out", tmp_path / "x.mp4")
    assert str(tmp_path) in line and "save_pretrained" in line
    assert "unknown policy" in error_of("sample", "shapes", "--prompt", PROMPT, "--schedule", "fast")


def test_sample_as_json(tmp_path):
    out = tmp_path / "clip.gif"
    result = run("sample", "shapes", "--prompt", PROMPT, "--steps", 4, "--out", out, "--json")
    found = json.loads(result.stdout)
    assert (found["video"], found["frames"], found["height"], found["width"]) == (str(out), 8, 64, 64)
    assert found["summary"]["steps_done"] == 4 and found["summary"]["schedule"] == "paper" and found["seconds"] > 0
    result = run("sample", "shapes", "--prompt", PROMPT, "--steps", 4, "--out", out, "--json", "--compare")
    assert {"uncached_seconds", "psnr_db"} < set(json.loads(result.stdout))


def test_a_directory_is_sampled_as_its_weights_were_made(tmp_path):
    """LattePipeline's own defaults are 16 frames of 512 x 512."""
    result = run("sample", shapes.PIPELINE, "--prompt", PROMPT, "--steps", 1, "--out", tmp_path / "clip.gif")
    assert "8 frames of 64 x 64" in result.stdout


@pytest.fixture
def unloaded(monkeypatch):
    """Whoever comes as far as loading a pipeline has not looked first."""

    def load(*_, **__):
        raise AssertionError("a pipeline was loaded")

    monkeypatch.setattr(shapes, "load_pipeline", load)


@pytest.mark.usefixtures("unloaded")
class TestWhatIsNoticedBeforeAnythingIsLoaded:
    @pytest.mark.parametrize("name", ["clip.webp", "clip", "clip.mp5"])
    def test_a_suffix(self, tmp_path, name):
        line = error_of("sample", "shapes", "--prompt", PROMPT, "--out", tmp_path / name)
        assert name in line and ".mp4, .mov, .mkv, .gif, or .png" in line

    @pytest.mark.parametrize("name", ["file/clip.mp4", "folder.mp4", "a" * 300 + ".mp4"])
    def test_a_place_that_cannot_be_written(self, tmp_path, name):
        (tmp_path / "file").touch()
        (tmp_path / "folder.mp4").mkdir()
        assert "give another place" in error_of("sample", "shapes", "--prompt", PROMPT, "--out", tmp_path / name)

    def test_a_place_for_the_demo(self, tmp_path):
        (tmp_path / "result.json").mkdir()
        assert "result.json" in error_of("demo", "--prompt", PROMPT, "--out", tmp_path)
        (tmp_path / "file").touch()
        assert "give another place" in error_of("demo", "--prompt", PROMPT, "--out", tmp_path / "file")

    @pytest.mark.parametrize(
        ("option", "value", "remedy"),
        [
            ("--max-cache-gb", "inf", "leave the option out"),
            ("--max-cache-gb", "nan", "leave the option out"),
            ("--seed", "12345678901234567890", "from 0 to 9223372036854775807"),
            ("--seed", "-1", "from 0 to"),
            ("--guidance", "nan", "give a number"),
        ],
    )
    def test_a_number(self, option, value, remedy):
        line = error_of("sample", "shapes", "--prompt", PROMPT, option, value)
        assert f"{option} {value}" in line and remedy in line

    def test_steps_beyond_any_sampler(self):
        result = run("sample", "shapes", "--prompt", PROMPT, "--steps", 10**9)
        assert result.exit_code == 2 and "--steps" in result.stderr

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ((), "give one of --speedup, --psnr and --frontier"),
            (("--speedup", 2, "--psnr", 40), "give one of --speedup, --psnr and --frontier"),
            (("--speedup", 0.5), "--speedup 0.5: give a number over 1"),
            (("--psnr", "nan"), "--psnr nan: give a number over 0"),
            (("--frontier", "2;3"), "--frontier 2;3: give speed-ups over 1 with commas"),
            (("--frontier", "2,1"), "--frontier 2,1: give speed-ups over 1"),
        ],
    )
    def test_what_a_calibration_is_to_reach(self, tmp_path, options, message):
        words = ("--prompts", prompts_file(tmp_path), "--out", tmp_path)
        assert message in error_of("calibrate", "shapes", *words, *options)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (b"# nothing\n\n", "there is no prompt in it; write one a line"),
            (b"\xff\xfe", "it is not text in UTF-8"),
            (b"a zebra moving up", "zebra"),
            (None, "cannot be read: No such file"),
        ],
    )
    def test_a_file_of_prompts(self, tmp_path, text, message):
        file = tmp_path / "prompts.txt"
        if text is not None:
            file.write_bytes(text)
        words = ("--speedup", 2, "--prompts", file, "--out", tmp_path)
        assert message in error_of("calibrate", "shapes", *words)

    def test_a_place_for_a_calibration(self, tmp_path):
        (tmp_path / "report.md").mkdir()
        words = ("--speedup", 2, "--prompts", prompts_file(tmp_path), "--out", tmp_path)
        assert "report.md" in error_of("calibrate", "shapes", *words)

    @pytest.mark.parametrize("pipeline", shapes.PIPELINES)
    @pytest.mark.parametrize(
        ("prompt", "message"), [("a red zebra moving up", "has not learnt the word 'zebra'"), ("a red", "names 0 ")]
    )
    def test_a_prompt_that_an_embedded_pipeline_has_not_learnt(self, pipeline, prompt, message):
        assert message in error_of("sample", pipeline, "--prompt", prompt)

    def test_what_is_no_pipeline(self, tmp_path):
        assert "or an embedded one: 'shapes', 'wan'" in error_of("sample", tmp_path, "--prompt", PROMPT)


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [("height", 63, "divisible by 8"), ("frames", 9, "tensor a (9)"), ("steps", 2000, "1000")],
)
def test_sizes_that_the_pipeline_refuses(tmp_path, option, value, reason):
    result = run(
        "sample", "shapes", "--prompt", PROMPT, "--steps", 2, f"--{option}", value, "--out", tmp_path / "clip.gif"
    )
    line = result.stderr.splitlines()[-1]
    assert result.exit_code == 2 and f"{option} {value}" in line and reason in line


def test_a_name_on_the_hub_needs_download(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    line = error_of("sample", "nobody/nothing", "--prompt", PROMPT, "--out", tmp_path / "clip.gif")
    assert "nobody/nothing" in line and "add --download" in line


# ---- calibrate -------------------------------------------------------------------------------------------------------


@pytest.fixture
def calibrated(monkeypatch):
    """In place of the calibration itself: keeps what it was asked for, and gives schedules for it."""
    asked: dict = {}

    def calibrate(pipe, prompts, **options):
        asked.update(options, prompts=prompts, pipe=type(pipe).__name__)
        steps = (Step(), Step("none")) * (options["num_inference_steps"] // 2)
        measured = Measured(1.9, 2.0, 45.0, (44.0, 46.0), 40.0, 8, 15.0, 60.0)
        made = [
            Schedule(steps, f"calibrated {target}x", made_for=Signature(steps=len(steps)), measured=measured)
            for target in options["frontier"] or (2,)
        ]
        write_schedules(made, options["out"])
        return made if options["frontier"] else made[0]

    monkeypatch.setattr(fastercache, "calibrate", calibrate)
    return asked


def prompts_file(folder, text=f"# of shapes\n\n  {PROMPT}\na blue circle moving down\na green circle moving down\n"):
    (folder / "prompts.txt").write_text(text)
    return folder / "prompts.txt"


def test_calibrate(tmp_path, calibrated):
    out, common = tmp_path / "out", ("calibrate", "shapes", "--prompts", prompts_file(tmp_path), "--steps", 2)
    result = run(*common, "--speedup", 2.5, "--guidance", 3, "--effort", "quick", "--out", out)
    assert result.exit_code == 0, result.output
    assert calibrated["prompts"] == [PROMPT, "a blue circle moving down", "a green circle moving down"]
    assert {name: calibrated[name] for name in ("num_inference_steps", "speedup", "effort", "out", "progress")} == {
        "num_inference_steps": 2,
        "speedup": 2.5,
        "effort": "quick",
        "out": out,
        "progress": True,
    }
    assert calibrated["call"]["guidance_scale"] == 3 and calibrated["psnr"] is calibrated["frontier"] is None
    assert Schedule.from_json(out / "calibrated-2x.json").measured.psnr == 45.0
    assert len(iio.imread(out / "examples.mp4", plugin="pyav")) == 8 * demo.LOOPS
    assert iio.imread(out / "examples.png").shape[1] == 2 * 320 + 8 + 2 * 24
    assert "calibrated 2x: 1.90x faster in the denoiser" in result.stdout and "of the example videos: " in result.stdout


def test_calibrate_several_at_once(tmp_path, calibrated, monkeypatch):
    monkeypatch.setattr(demo, "FILM", (".png",))  # a video takes seconds
    prompts = prompts_file(tmp_path, PROMPT)
    words = ("--frontier", "1.5,3", "--steps", 2, "--prompts", prompts, "--out", tmp_path)
    result = run("calibrate", "shapes", *words)
    assert result.exit_code == 0, result.output
    assert calibrated["frontier"] == (1.5, 3.0) and calibrated["effort"] == "full"
    assert (tmp_path / "calibrated-1.5x.json").is_file() and (tmp_path / "calibrated-3.0x.json").is_file()
    assert iio.imread(tmp_path / "examples.png").shape[1] == 3 * 320 + 2 * 8 + 2 * 24


def test_calibrate_that_is_interrupted_says_what_is_kept(tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(fastercache, "calibrate", interrupt)
    result = run("calibrate", "shapes", "--prompts", prompts_file(tmp_path), "--psnr", 40, "--out", tmp_path)
    assert result.exit_code == 130
    assert f"what was captured is kept in {tmp_path}, and the same command goes on" in result.stderr


def test_a_warning_is_one_line(tmp_path):
    result = run(
        "sample",
        "shapes",
        "--prompt",
        PROMPT,
        "--steps",
        2,
        "--schedule",
        "dynamic-only",
        "--out",
        tmp_path / "clip.gif",
    )
    (line,) = result.stderr.splitlines()
    assert line.startswith("warning: schedule 'dynamic-only' skips nothing here")
