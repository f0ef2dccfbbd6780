"""Folders of videos compared, file by file of the same name."""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastercache.errors import FasterCacheError
from fastercache.report import media, metrics, vbench

METRICS = {
    "psnr": "dB of a clip: 10 log10(1 / MSE) over all its pixels; as torchmetrics' peak_signal_noise_ratio",
    "ssim": "Wang et al. 2004, window of 11 x 11, all pixels, frames mirrored at their edges; as torchmetrics' "
    "structural_similarity_index_measure",
    "lpips": "Zhang et al. 2018, AlexNet, mean over the frames; torchmetrics' "
    "learned_perceptual_image_patch_similarity",
    "vbench": "VBench's own package, on each folder by itself",
}
"""The metrics by name, with their definitions."""
SMALLEST = metrics.WINDOW // 2 + 1
"""Pixels of a side that can be mirrored for SSIM."""
BATCH = 8
"""Frames that go through LPIPS' network at once."""


class EvaluationError(FasterCacheError, ValueError):
    """Folders that cannot be compared, or a metric that cannot be computed here."""


def parse_metrics(text: str) -> list[str]:
    """The metrics of a list with commas. `EvaluationError` for one that is not known."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    for name in names:
        if name not in METRICS:
            raise EvaluationError(f"metric {name!r} is not known; known are {', '.join(METRICS)}")
    if not names:
        raise EvaluationError(f"no metric is given; known are {', '.join(METRICS)}")
    return names


def prompt_of(name: str) -> tuple[str, int] | None:
    """Prompt and index of a file that is named as VBench wants it, `prompt-index.mp4`; else `None`."""
    match = re.fullmatch(r"(.+)-(\d+)", Path(name).stem)
    return None if match is None else (match[1], int(match[2]))


def videos_in(folder: Path) -> set[str]:
    """Names of the videos in a folder. `EvaluationError` where there is none."""
    if not folder.is_dir():
        raise EvaluationError(f"{folder} is no folder; give one with videos in it")
    names = {path.name for path in folder.iterdir() if path.suffix.lower() in media.SUFFIXES and path.name[0] != "."}
    if not names:
        raise EvaluationError(f"{folder} has no videos; they end in {', '.join(media.SUFFIXES)}")
    return names


def evaluate(
    reference: Path,
    output: Path,
    names: Sequence[str] = ("psnr", "ssim"),
    *,
    dimensions: Sequence[str] = vbench.DIMENSIONS,
    device: str = "cpu",
    on_pair: Callable[[int, int], Any] = lambda done, of: None,
) -> dict[str, Any]:
    """Compare the videos that two folders have by the same names; nothing is downloaded.

    names: of the metrics (`METRICS`). dimensions: of VBench. on_pair: called with the pairs done and their number.

    Returns plain data: the figures of each pair, their means, what is in one folder only, VBench's scores of each
    folder. A figure that is infinite, the PSNR of equal videos, is `None`.

    Raises:
        EvaluationError: no common names, videos of different sizes or lengths, names that VBench could not read, or
            weights that are not on this machine. Looked for before the first pair, but for the videos' contents.
        OutputError: a video cannot be read.
        ImportError: a metric's package is not installed.
    """
    found = {"reference": videos_in(reference), "output": videos_in(output)}
    common = sorted(found["reference"] & found["output"])
    if not common:
        raise EvaluationError(
            f"{reference} and {output} have no video by the same name: there are {_some(found['reference'])}, and "
            f"{_some(found['output'])}"
        )
    figures: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {}
    if "psnr" in names:
        figures["psnr"] = lambda a, b: metrics.psnr(a[None], b[None])
    if "ssim" in names:
        figures["ssim"] = lambda a, b: metrics.ssim(a[None], b[None], borders=True)
    if "lpips" in names:
        figures["lpips"] = lpips(device)
    if "vbench" in names:
        _check_names(common)
        vbench.check(dimensions)
    pairs = []
    for number, name in enumerate(common, 1):
        a, b = (media.read(folder / name) for folder in (reference, output))
        _check_shapes(name, a, b)
        a, b = (frames.astype(np.float32) / 255 for frames in (a, b))
        prompt = dict(zip(("prompt", "index"), prompt_of(name) or (), strict=False))
        values = {metric: figure(a, b) for metric, figure in figures.items()}
        pairs.append({"name": name, **prompt, "frames": len(a), "height": a.shape[1], "width": a.shape[2], **values})
        on_pair(number, len(common))
    document: dict[str, Any] = {
        "reference": str(reference),
        "output": str(output),
        "definitions": {name: METRICS[name] for name in names},
        "pairs": [{key: _finite(value) for key, value in pair.items()} for pair in pairs],
        "summary": {metric: _spread([pair[metric] for pair in pairs]) for metric in figures},
        "only_in_reference": sorted(found["reference"] - found["output"]),
        "only_in_output": sorted(found["output"] - found["reference"]),
    }
    if "vbench" in names:
        document["vbench"] = {
            name: vbench.scores(folder, common, dimensions, device)
            for name, folder in (("reference", reference), ("output", output))
        }
    return document


def lpips(device: str = "cpu") -> Callable[[np.ndarray, np.ndarray], float]:
    """LPIPS of two clips `[frames, H, W, 3]` in [0, 1], by torchmetrics.

    Raises:
        EvaluationError: AlexNet's weights are not on this machine.
        ImportError: torchmetrics or torchvision is not installed.
    """
    models = importlib.import_module("torchvision.models")
    image = importlib.import_module("torchmetrics.image.lpip")
    url = models.AlexNet_Weights.DEFAULT.url
    weights = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not weights.is_file():
        raise EvaluationError(
            "lpips: AlexNet's weights are not on this machine, and nothing is downloaded here; put "
            f"{url} at {weights}, or leave lpips out"
        )
    network = image.LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True).to(device)

    def measure(a: np.ndarray, b: np.ndarray) -> float:
        total = 0.0
        for first in range(0, len(a), BATCH):
            x, y = (
                torch.from_numpy(clip[first : first + BATCH]).permute(0, 3, 1, 2).to(device, torch.float32)
                for clip in (a, b)
            )
            total += float(network(x, y)) * len(x)
        return total / len(a)

    return measure


def _check_names(names: Sequence[str]) -> None:
    for name in names:
        if prompt_of(name) is None:
            raise EvaluationError(
                f"vbench: {name!r} is not named prompt-index, as in 'a panda-0.mp4'; rename it, or sample with "
                "`fastercache batch --names vbench`"
            )


def _check_shapes(name: str, a: np.ndarray, b: np.ndarray) -> None:
    if a.shape != b.shape:
        sizes = [f"{len(clip)} frames of {clip.shape[2]} x {clip.shape[1]}" for clip in (a, b)]
        raise EvaluationError(
            f"{name} has {sizes[0]} in the reference and {sizes[1]} in the output; compare videos of one size and "
            "length"
        )
    if min(a.shape[1:3]) < SMALLEST:
        raise EvaluationError(
            f"{name} has frames of {a.shape[2]} x {a.shape[1]}; give at least {SMALLEST} x {SMALLEST}"
        )


def _spread(values: Sequence[float]) -> Mapping[str, float | None]:
    mean, least, most = float(np.mean(values)), min(values), max(values)
    return {"mean": _finite(mean), "least": _finite(least), "most": _finite(most)}


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _some(names: set[str]) -> str:
    first = sorted(names)
    return ", ".join(first[:3]) + (f" and {len(first) - 3} more" if len(first) > 3 else "")
