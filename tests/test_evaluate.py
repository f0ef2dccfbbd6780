"""`fastercache evaluate`: folders of videos by the same names, and the metrics' definitions."""

from __future__ import annotations

import importlib
import json
import sys
import types
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from fastercache.cli import app
from fastercache.report import evaluation, media, metrics, vbench

# What torchmetrics 1.9.0 gives for the pairs below, in float64.
BY_TORCHMETRICS = {"noise": (31.021697291685733, 0.9951194678051138), "ramps": (31.104761821158196, 0.9113235677372113)}


def known_pairs() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Clips `[4, 24, 32, 3]` in [0, 1], each with a noisy copy."""
    random = np.random.default_rng(0)
    noise = random.integers(0, 256, (4, 24, 32, 3), dtype=np.uint8)
    y, x = np.mgrid[:24, :32]
    ramps = np.stack([np.stack([(x * (7 + c) + y * (3 + f)) % 256 for c in range(3)], -1) for f in range(4)])
    found = {}
    for name, clip in (("noise", noise), ("ramps", ramps)):
        noisy = np.clip(clip + random.integers(-12, 13, (1, *clip.shape))[0], 0, 255)
        found[name] = clip / 255, noisy / 255
    return found


@pytest.mark.parametrize("name", BY_TORCHMETRICS)
def test_figures_are_those_of_torchmetrics(name):
    a, b = known_pairs()[name]
    psnr, ssim = BY_TORCHMETRICS[name]
    assert metrics.psnr(a[None], b[None]) == pytest.approx(psnr, abs=1e-4)
    assert metrics.ssim(a[None], b[None], borders=True) == pytest.approx(ssim, abs=1e-4)
    assert abs(metrics.ssim(a[None], b[None]) - ssim) > 1e-4  # the pixels at the borders do matter


@pytest.mark.parametrize("name", BY_TORCHMETRICS)
def test_the_figures_above_are_still_those_of_torchmetrics(name):
    image = pytest.importorskip("torchmetrics.functional.image")
    a, b = known_pairs()[name]
    x, y = (torch.from_numpy(clip).permute(0, 3, 1, 2) for clip in (a, b))
    psnr = float(image.peak_signal_noise_ratio(y, x, data_range=1.0))
    ssim = float(image.structural_similarity_index_measure(y, x, data_range=1.0))
    assert (psnr, ssim) == pytest.approx(BY_TORCHMETRICS[name], abs=1e-6)


# ---- folders ---------------------------------------------------------------------------------------------------------


def clip(seed: int, frames: int = 4, side: int = 48) -> np.ndarray:
    y, x = np.mgrid[:side, :side]
    shades = [[(x * 2 + y * c + 9 * frame + 40 * seed) % 256 for c in range(3)] for frame in range(frames)]
    return np.moveaxis(np.array(shades), 1, -1).astype(np.uint8)


@pytest.fixture
def folders(tmp_path):
    """Three pairs, of which the second is equal, and a video more on either side."""
    reference, output = tmp_path / "reference", tmp_path / "output"
    for folder, noise in ((reference, 0), (output, 12)):
        folder.mkdir()
        for index in range(3):
            frames = clip(index).astype(int)
            changed = frames + (noise if index != 1 else 0) * ((np.indices(frames.shape).sum(0) % 2) * 2 - 1)
            media.save(folder / f"a panda-{index}.gif", changed.clip(0, 255).astype(np.uint8))
        media.save(folder / f"{folder.name}-0.gif", clip(0))
        (folder / "notes.txt").touch()
    return reference, output


def run(*words: object):
    return CliRunner().invoke(app, ["evaluate", *map(str, words)])


def error_of(*words: object) -> str:
    result = run(*words)
    assert result.exit_code == 2, result.output
    return result.stderr.splitlines()[-1]


def test_a_table_and_json(folders):
    result = run(*folders)
    assert result.exit_code == 0, result.output
    assert "3 videos" in result.stdout and "psnr (dB)" in result.stdout and "inf" in result.stdout
    assert "only in the reference, and left out: reference-0.gif" in result.stderr
    found = json.loads(run(*folders, "--json").stdout)
    assert [pair["name"] for pair in found["pairs"]] == [f"a panda-{index}.gif" for index in range(3)]
    assert [(pair["prompt"], pair["index"]) for pair in found["pairs"]] == [("a panda", index) for index in range(3)]
    assert found["only_in_reference"] == ["reference-0.gif"] and found["only_in_output"] == ["output-0.gif"]
    for pair in found["pairs"]:
        a, b = (media.read(folder / pair["name"])[None] / 255 for folder in folders)
        psnr = metrics.psnr(a, b)
        assert pair["psnr"] == (None if np.isinf(psnr) else pytest.approx(psnr))
        assert pair["ssim"] == pytest.approx(metrics.ssim(a, b, borders=True))
        assert (pair["frames"], pair["height"], pair["width"]) == (4, 48, 48)
    assert found["pairs"][1]["psnr"] is None and found["summary"]["psnr"]["mean"] is None
    ssims = [pair["ssim"] for pair in found["pairs"]]
    assert found["summary"]["ssim"] == pytest.approx({"mean": np.mean(ssims), "least": min(ssims), "most": 1.0})
    assert set(found["definitions"]) == {"psnr", "ssim"}


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".png"])
def test_what_is_saved_is_read(tmp_path, suffix):
    frames = clip(0)
    media.save(tmp_path / f"video{suffix}", frames)
    found = media.read(tmp_path / f"video{suffix}")
    assert found.dtype == np.uint8 and found.shape == (frames[2:3] if suffix == ".png" else frames).shape
    assert metrics.psnr(found[None] / 255, (frames[2:3] if suffix == ".png" else frames)[None] / 255) > 25


def test_bad_folders(tmp_path, folders):
    reference, output = folders
    assert "is no folder" in error_of(tmp_path / "none", output)
    (tmp_path / "empty").mkdir()
    assert "has no videos; they end in .mp4" in error_of(reference, tmp_path / "empty")
    other = tmp_path / "other"
    other.mkdir()
    media.save(other / "z.gif", clip(0))
    line = error_of(reference, other)
    assert (
        "no video by the same name: there are a panda-0.gif, a panda-1.gif, a panda-2.gif and 1 more, and z.gif" in line
    )
    assert "metric 'sharpness' is not known; known are psnr, ssim, lpips, vbench" in error_of(
        *folders, "--metrics", "psnr,sharpness"
    )
    assert "no metric is given" in error_of(*folders, "--metrics", ",")


def test_bad_videos(folders):
    output = folders[1]
    media.save(output / "a panda-0.gif", clip(0, side=40))
    line = error_of(*folders)
    assert "a panda-0.gif has 4 frames of 48 x 48 in the reference and 4 frames of 40 x 40 in the output" in line
    media.save(output / "a panda-0.gif", clip(0, frames=3))
    assert "4 frames of 48 x 48 in the reference and 3 frames" in error_of(*folders)
    for folder in folders:
        media.save(folder / "a panda-0.gif", clip(0, side=4))
    assert "frames of 4 x 4; give at least 6 x 6" in error_of(*folders)
    for suffix in (".gif", ".mp4"):
        for folder in folders:
            media.save(folder / f"0{suffix}", clip(0))
        content = (output / f"0{suffix}").read_bytes()
        for broken in (b"", b"no video", content[: len(content) // 8]):
            (output / f"0{suffix}").write_bytes(broken)
            assert f"0{suffix} cannot be read as a video" in error_of(*folders)
        (output / f"0{suffix}").write_bytes(content)
        (output / f"0{suffix}").unlink()


# ---- lpips -----------------------------------------------------------------------------------------------------------


def stand_in(monkeypatch, name: str, **attributes: object) -> None:
    module = types.ModuleType(name)
    vars(module).update(attributes)
    monkeypatch.setitem(sys.modules, name, module)


class Difference(torch.nn.Module):
    """In LPIPS' place: the mean absolute difference; and what it was given."""

    calls: ClassVar[list[tuple[int, ...]]] = []

    def __init__(self, net_type, normalize):
        super().__init__()
        assert net_type == "alex" and normalize

    def forward(self, x, y):
        self.calls.append(tuple(x.shape))
        return (x - y).abs().mean()


@pytest.fixture
def packages(monkeypatch, tmp_path):
    """Stand-ins of torchvision and torchmetrics; the file where the weights belong."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    weights = types.SimpleNamespace(DEFAULT=types.SimpleNamespace(url="https://x.invalid/models/alexnet-1.pth"))
    stand_in(monkeypatch, "torchvision")
    stand_in(monkeypatch, "torchvision.models", AlexNet_Weights=weights)
    stand_in(monkeypatch, "torchmetrics")
    stand_in(monkeypatch, "torchmetrics.image")
    stand_in(monkeypatch, "torchmetrics.image.lpip", LearnedPerceptualImagePatchSimilarity=Difference)
    return tmp_path / "hub" / "checkpoints" / "alexnet-1.pth"


def test_lpips_is_the_mean_over_all_frames(packages, monkeypatch):
    packages.parent.mkdir(parents=True)
    packages.touch()
    monkeypatch.setattr(Difference, "calls", [])
    a = np.zeros((11, 6, 7, 3))
    b = a + np.arange(11)[:, None, None, None] / 20
    assert evaluation.lpips()(a, b) == pytest.approx(0.25)
    assert Difference.calls == [(8, 3, 6, 7), (3, 3, 6, 7)]


def test_lpips_without_weights_downloads_nothing(packages, folders):
    line = error_of(*folders, "--metrics", "lpips")
    assert (
        str(packages) in line and "https://x.invalid/models/alexnet-1.pth" in line and "nothing is downloaded" in line
    )


@pytest.mark.parametrize("package", ["torchvision", "torchmetrics"])
def test_lpips_without_its_packages(packages, monkeypatch, folders, package):
    for name in [name for name in sys.modules if name.startswith(f"{package}.")]:
        monkeypatch.setitem(sys.modules, name, None)
    line = error_of(*folders, "--metrics", "lpips")
    assert line == f'{package} is not installed: pip install "fastercache[metrics]"'


def test_lpips_is_that_of_torchmetrics(tmp_path, monkeypatch):
    """With weights drawn at random for AlexNet; torchmetrics brings those of LPIPS itself."""
    try:
        models = importlib.import_module("torchvision.models")
    except (ImportError, RuntimeError):  # not installed, or for another torch
        pytest.skip("needs torchvision")
    functional = pytest.importorskip("torchmetrics.functional.image")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    file = tmp_path / "checkpoints" / models.AlexNet_Weights.DEFAULT.url.rpartition("/")[2]
    file.parent.mkdir()
    torch.manual_seed(0)
    state = models.alexnet(weights=None).state_dict()
    for name, tensor in state.items():  # the classifier, 58 of 61 million parameters, is not part of LPIPS
        state[name] = tensor if name.startswith("features") else torch.zeros(1).expand(tensor.shape)
    torch.save(state, file)
    a, b = (np.random.default_rng(seed).random((3, 64, 64, 3)) for seed in (0, 1))
    x, y = (torch.from_numpy(clip).permute(0, 3, 1, 2).float() for clip in (a, b))
    expected = functional.learned_perceptual_image_patch_similarity(x, y, net_type="alex", normalize=True)
    assert evaluation.lpips()(a, b) == pytest.approx(float(expected), abs=1e-4) and float(expected) > 0


# ---- VBench ----------------------------------------------------------------------------------------------------------


class Judge:
    """In VBench's place: the number of videos, and what it was asked."""

    asked: ClassVar[list[dict]] = []

    def __init__(self, device, full_info_dir, output_path):
        self.device, self.output = device, Path(output_path)

    def evaluate(self, videos_path, name, dimension_list, local, mode):
        print("VBench talks")
        videos = sorted(Path(videos_path).iterdir())
        self.asked.append({"names": [video.name for video in videos], "local": local, "mode": mode})
        assert self.device == "cpu" and all(media.read(video).shape == (4, 48, 48, 3) for video in videos)
        self.output.mkdir()
        scores = {dimension: [len(videos) / 10, []] for dimension in dimension_list}
        (self.output / f"{name}_eval_results.json").write_text(json.dumps(scores))


@pytest.fixture
def judge(monkeypatch, tmp_path):
    stand_in(monkeypatch, "vbench", VBench=Judge)
    monkeypatch.setattr(Judge, "asked", [])
    monkeypatch.setenv("VBENCH_CACHE_DIR", str(tmp_path / "weights"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))


def test_vbench_judges_the_common_videos_of_each_folder(judge, folders):
    for name in (name for files in vbench.WEIGHTS.values() for name in files):
        vbench.place(name).parent.mkdir(parents=True, exist_ok=True)
        vbench.place(name).touch()
    result = run(*folders, "--metrics", "vbench", "--device", "cpu", "--json")
    found = json.loads(result.stdout)
    assert found["vbench"] == {place: dict.fromkeys(vbench.DIMENSIONS, 0.3) for place in ("reference", "output")}
    names = [f"a panda-{index}.gif" for index in range(3)]
    assert Judge.asked == [{"names": names, "local": True, "mode": "custom_input"}] * 2
    assert "VBench talks" in result.stderr
    result = run(*folders, "--metrics", "ssim,vbench", "--dimensions", "temporal_flickering", "--device", "cpu")
    assert "temporal_flickering      0.3000   0.3000" in result.stdout


def test_vbench_without_weights_names_or_package(judge, folders, monkeypatch):
    line = error_of(*folders, "--metrics", "vbench")
    assert str(vbench.cache() / "amt_model/amt-s.pth") in line and "hub/checkpoints/dino_vitbase16_pretrain.pth" in line
    assert "nothing is downloaded" in line and line.endswith("or give --dimensions temporal_flickering")
    line = error_of(*folders, "--metrics", "vbench", "--dimensions", "beauty")
    assert "dimension 'beauty' is not known; known are subject_consistency" in line
    monkeypatch.setitem(sys.modules, "vbench", None)
    line = error_of(*folders, "--metrics", "vbench", "--dimensions", "temporal_flickering")
    assert "vbench is not installed: pip install vbench" in line
    for folder in folders:
        (folder / "a panda-0.gif").rename(folder / "first.gif")
    line = error_of(*folders, "--metrics", "vbench", "--dimensions", "temporal_flickering")
    assert "'first.gif' is not named prompt-index" in line and "--names vbench" in line
    assert not Judge.asked
