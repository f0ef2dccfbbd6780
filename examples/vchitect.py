"""Vchitect-2.0, accelerated. With its checkout on PYTHONPATH: python examples/vchitect.py "a panda plays the guitar"
--model WEIGHTS."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from common import finish, options

import fastercache


def load(path: str) -> Any:
    from models.pipeline import VchitectXLPipeline

    return VchitectXLPipeline(path)


def main(words: Sequence[str] | None = None) -> None:
    given = options(
        words,
        "Vchitect-2.0",
        model="Vchitect-2.0-2B",
        schedule="vchitect-2.0/released",
        height=432,
        width=768,
        frames=40,
        steps=100,
    )
    pipe = load(given.model)
    # The pipeline is none of diffusers', so its denoiser is compiled: two calls a step, the unconditional one first.
    denoiser = fastercache.compile(pipe.transformer, given.schedule, steps=given.steps, cfg="uncond-then-cond")
    with torch.autocast(pipe.execution_device.type, torch.bfloat16):
        frames = pipe(
            given.prompt,
            negative_prompt="",
            num_inference_steps=given.steps,
            guidance_scale=7.5,
            width=given.width,
            height=given.height,
            frames=given.frames,
        )
    finish(np.stack([np.asarray(frame) for frame in frames]) / 255, fastercache.summary(denoiser), given.out)


if __name__ == "__main__":
    main()
