"""The embedded text-to-video pipeline "shapes": its world, its detector, its training script and its weights."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastercache.shapes.world import FRAMES, SIZE

if TYPE_CHECKING:
    from diffusers import LattePipeline

PIPELINE = Path(__file__).parent / "pipeline"
"""The diffusers directory of the pipeline."""
CALL: dict[str, Any] = dict(height=SIZE, width=SIZE, video_length=FRAMES, clean_caption=False)
"""What the pipeline was trained for; with `GUIDANCE_SCALE` and `STEPS` the defaults of a call of what `load` gives."""
GUIDANCE_SCALE = 4.0
STEPS = 50


def load(dtype: torch.dtype = torch.float32) -> LattePipeline:
    """The embedded pipeline on the CPU, loaded without a sound: `pipe(prompt)` makes a clip. Needs the packages of `fastercache[demo]`."""
    pipe = load_pipeline(PIPELINE, dtype)
    from fastercache.shapes.text_to_video import ShapesPipeline

    pipe.__class__ = ShapesPipeline
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

    before = [(log, log.get_verbosity(), log.is_progress_bar_enabled()) for log in (diffusers_logging, transformers_logging)]
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
