"""The embedded text-to-video pipelines, "shapes" and "wan": their worlds, their detector, their training script and
their weights."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastercache.shapes.world import PLAIN, TEXTURED, World


@dataclass(frozen=True, eq=False)
class Embedded:
    """An embedded pipeline.

    path: its diffusers directory. call: arguments of every call, `pipe(prompt, **call, guidance_scale=...,
        num_inference_steps=steps)`.
    """

    path: Path
    world: World
    call: Mapping[str, Any]
    guidance_scale: float
    steps: int = 50


PIPELINES = {
    "shapes": Embedded(
        Path(__file__).parent / "pipeline",
        PLAIN,
        dict(height=PLAIN.size, width=PLAIN.size, video_length=PLAIN.frames, clean_caption=False),
        guidance_scale=4.0,
    ),
    "wan": Embedded(
        Path(__file__).parent / "wan",
        TEXTURED,
        dict(height=TEXTURED.size, width=TEXTURED.size, num_frames=TEXTURED.frames, max_sequence_length=8),
        guidance_scale=4.0,
    ),
}
"""The embedded pipelines by name: a Latte with DDIM, and a Wan with UniPC."""
PIPELINE, CALL, GUIDANCE_SCALE, STEPS = (
    PIPELINES["shapes"].path,
    dict(PIPELINES["shapes"].call),
    PIPELINES["shapes"].guidance_scale,
    PIPELINES["shapes"].steps,
)
"""The same of "shapes"."""


def load(name: str = "shapes", dtype: torch.dtype = torch.float32) -> Any:
    """An embedded pipeline on the CPU, loaded without a sound: "shapes" (a `LattePipeline`) or "wan" (a `WanPipeline`).

    Needs the packages of `fastercache[demo]`.
    """
    if name not in PIPELINES:
        raise ValueError(
            f"no embedded pipeline is called {name!r}; there are {', '.join(PIPELINES)}, and a dtype is given as dtype="
        )
    pipe = load_pipeline(PIPELINES[name].path, dtype)
    from fastercache.shapes.text_to_video import CLASSES

    pipe.__class__ = CLASSES[name]  # whose defaults are what it was trained for
    return pipe


def load_pipeline(source: str | Path, dtype: torch.dtype, *, download: bool = False) -> Any:
    """Any diffusers pipeline, on the CPU and with its progress bar off: a directory, or the hub's name of one.

    download: let diffusers fetch what is not on this machine, with its own progress bars.
    """
    from diffusers import DiffusionPipeline

    with warnings.catch_warnings(), _quiet(download):
        # diffusers 0.42 renamed `torch_dtype` to `dtype`; earlier versions know the old name only.
        warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
        pipe = DiffusionPipeline.from_pretrained(str(source), torch_dtype=dtype, local_files_only=not download)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextmanager
def _quiet(bars: bool) -> Iterator[None]:
    """Errors only from diffusers and transformers, and no progress bars unless `bars`."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    before = [
        (log, log.get_verbosity(), log.is_progress_bar_enabled()) for log in (diffusers_logging, transformers_logging)
    ]
    try:
        for log, _, shown in before:
            log.set_verbosity_error()
            if shown and not bars:
                log.disable_progress_bar()
        yield
    finally:
        for log, verbosity, shown in before:
            log.set_verbosity(verbosity)
            if shown and not bars:
                log.enable_progress_bar()
