"""VBench's scores of a folder of videos, by its own package, with weights that are on this machine."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from fastercache.errors import FasterCacheError

HUB = "hub:"
"""Begins the name of a file among the checkpoints of torch's hub."""
WEIGHTS: dict[str, tuple[str, ...]] = {
    "subject_consistency": (
        "dino_model/facebookresearch_dino_main",
        "dino_model/dino_vitbase16_pretrain.pth",
        HUB + "dino_vitbase16_pretrain.pth",  # what it does load, though it asks for the other
    ),
    "background_consistency": ("clip_model/ViT-B-32.pt",),
    "temporal_flickering": (),
    "motion_smoothness": ("amt_model/amt-s.pth",),
    "dynamic_degree": ("raft_model/models/raft-things.pth",),
    "aesthetic_quality": ("clip_model/ViT-L-14.pt", "aesthetic_model/emb_reader/sa_0_4_vit_l_14_linear.pth"),
    "imaging_quality": ("pyiqa_model/musiq_spaq_ckpt-358bb6af.pth",),
    "overall_consistency": ("ViCLIP/ViClip-InternVid-10M-FLT.pth", "ViCLIP/bpe_simple_vocab_16e6.txt.gz"),
}
"""The dimensions that VBench 0.1.5 has for any video, and the files under `cache` that it would fetch for them."""
DIMENSIONS = tuple(WEIGHTS)


class VBenchError(FasterCacheError, ValueError):
    """A dimension that is not known, or whose weights or package are not on this machine."""


def cache() -> Path:
    """Where VBench keeps its weights."""
    return Path(os.environ.get("VBENCH_CACHE_DIR") or Path.home() / ".cache" / "vbench")


def place(name: str) -> Path:
    """Where a file of `WEIGHTS` must be."""
    if name.startswith(HUB):
        return Path(torch.hub.get_dir()) / "checkpoints" / name.removeprefix(HUB)
    return cache() / name


def check(dimensions: Sequence[str]) -> None:
    """`VBenchError` if the package would download something for these dimensions, or is not installed."""
    for dimension in dimensions:
        if dimension not in WEIGHTS:
            raise VBenchError(f"vbench: dimension {dimension!r} is not known; known are {', '.join(DIMENSIONS)}")
    missing = {
        dimension: [str(place(name)) for name in WEIGHTS[dimension] if not place(name).exists()]
        for dimension in dimensions
    }
    if any(missing.values()):
        names = dict.fromkeys(name for files in missing.values() for name in files)
        ready = [dimension for dimension, files in missing.items() if not files]
        raise VBenchError(
            f"vbench: weights are not on this machine, and nothing is downloaded here: {', '.join(names)}; put them "
            "there as VBench's instructions say (VBENCH_CACHE_DIR is another folder for the first of them)"
            + (f", or give --dimensions {','.join(ready)}" if ready else "")
        )
    try:
        importlib.import_module("vbench")
    except ModuleNotFoundError as error:
        if error.name != "vbench":
            raise
        raise VBenchError(
            "vbench is not installed: pip install vbench, in an environment of its own, as it needs versions of numpy "
            "and transformers that pipelines do not work with; fastercache[metrics] goes beside it"
        ) from None


def scores(folder: Path, names: Sequence[str], dimensions: Sequence[str], device: str) -> dict[str, float]:
    """A score for each dimension, of the videos of these names. What VBench prints goes to the standard error."""
    package = importlib.import_module("vbench")
    with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(sys.stderr):
        videos, results = Path(place, "videos"), Path(place, "results")
        videos.mkdir()
        for name in names:
            (videos / name).symlink_to((folder / name).resolve())
        judge = package.VBench(device, "", str(results))
        judge.evaluate(
            videos_path=str(videos), name="folder", dimension_list=list(dimensions), local=True, mode="custom_input"
        )
        found = json.loads((results / "folder_eval_results.json").read_text())
    return {dimension: float(found[dimension][0]) for dimension in dimensions}
