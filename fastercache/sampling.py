"""What `fastercache sample` and `fastercache batch` share: finding and loading a pipeline, and the arguments of its
call."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastercache import shapes
from fastercache.errors import FasterCacheError
from fastercache.host import carried

STEPS = 50
"""Denoising steps where neither the caller, nor the schedule, nor the pipeline says how many."""


class PipelineError(FasterCacheError, ValueError):
    """A pipeline or a device that is not there, or an argument that a pipeline's call does not have."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its type's name where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def device_here(device: str) -> str:
    """`auto` is the GPU where torch sees one. `PipelineError` for a GPU that is not there."""
    there = torch.cuda.is_available()
    if device == "cuda" and not there:
        raise PipelineError("--device cuda: torch sees no GPU; leave the option out to run on the CPU")
    return ("cuda" if there else "cpu") if device == "auto" else device


def is_directory(pipeline: str) -> bool:
    """Whether this is a directory that diffusers' `save_pretrained` wrote."""
    return (Path(pipeline) / "model_index.json").is_file()


def check_source(pipeline: str, download: bool) -> None:
    """`PipelineError`, before anything is loaded, for what cannot be a pipeline."""
    if pipeline in shapes.PIPELINES or download or is_directory(pipeline):
        return
    if Path(pipeline).exists() or not re.fullmatch(carried.HUB_NAME, pipeline):
        raise PipelineError(
            f"{pipeline!r} is not a pipeline directory (no model_index.json in it); give one that save_pretrained "
            f"wrote, or an embedded one: {', '.join(map(repr, shapes.PIPELINES))}"
        )


def load(pipeline: str, dtype: torch.dtype, download: bool) -> Any:
    """The pipeline, on the CPU: an embedded one, a directory, or a name on the hub. `PipelineError` says what is wrong
    with it."""
    if pipeline in shapes.PIPELINES:
        return shapes.load(pipeline, dtype)
    try:
        return shapes.load_pipeline(pipeline, dtype, download=download)
    except ImportError:
        raise
    except (
        Exception
    ) as error:  # whatever diffusers, transformers and safetensors raise on a directory that is incomplete or broken
        reason = first_line(error)
    if is_directory(pipeline):
        raise PipelineError(f"{pipeline} cannot be loaded: {reason}; save it again with save_pretrained")
    if not download:
        raise PipelineError(
            f"{pipeline} is no directory and not on this machine; if it is a name on the Hugging Face hub, add "
            "--download"
        )
    raise PipelineError(f"{pipeline} cannot be downloaded: {reason}; check the name and the network")


def parameters(pipe: Any) -> Mapping[str, inspect.Parameter]:
    """The parameters of a pipeline's call."""
    return inspect.signature(pipe.__call__).parameters


def default(pipe: Any, name: str) -> Any:
    """The default of an argument of a pipeline's call; `None` where there is none."""
    call = parameters(pipe)
    return None if name not in call or call[name].default is inspect.Parameter.empty else call[name].default


def frames_name(call: Mapping[str, inspect.Parameter]) -> str:
    """What a pipeline's call names the number of frames; "frames" where it has no such argument."""
    return next((name for name in ("num_frames", "video_length") if name in call), "frames")


def option_of(argument: str) -> str:
    """The command's option that stands for an argument of a pipeline's call."""
    return {
        "num_frames": "frames",
        "video_length": "frames",
        "guidance_scale": "guidance",
        "num_inference_steps": "steps",
    }.get(argument, argument)


def arguments(pipe: Any, *, frames: int | None = None, **asked: Any) -> dict[str, Any]:
    """Keyword arguments of a pipeline's call: what its weights were made for, then whatever was asked for (not
    `None`), by the pipeline's own names. `PipelineError` names the option that it has no argument for."""
    call = parameters(pipe)
    asked = {name: value for name, value in ({frames_name(call): frames} | asked).items() if value is not None}
    for name in asked:
        if name not in call:
            raise PipelineError(f"{type(pipe).__name__} has no argument for --{option_of(name)}; leave it out")
    return _made_for(pipe, call) | asked


def _made_for(pipe: Any, call: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    """LattePipeline's own defaults are those of one checkpoint, 16 frames of 512 x 512; the model's configuration has
    those of any."""
    config = getattr(getattr(pipe, "transformer", None), "config", {})
    if "video_length" not in call or not isinstance(config.get("sample_size"), int) or not config.get("video_length"):
        return {}
    side = config["sample_size"] * pipe.vae_scale_factor
    return {"video_length": config["video_length"], "height": side, "width": side}
