"""Mochi, accelerated: python examples/mochi.py "a panda plays the guitar"."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from common import finish, options
from diffusers import MochiPipeline

import fastercache


def load(path: str) -> MochiPipeline:
    pipe = MochiPipeline.from_pretrained(path, torch_dtype=torch.bfloat16)
    pipe.enable_model_cpu_offload()
    pipe.vae.enable_tiling()
    return pipe


def main(words: Sequence[str] | None = None) -> None:
    given = options(
        words,
        "Mochi",
        model="genmo/mochi-1-preview",
        schedule="mochi/paper",
        height=480,
        width=848,
        frames=163,
        steps=64,
    )
    pipe = load(given.model)
    fastercache.compile(pipe, given.schedule, cache_format="int8")
    video = pipe(
        given.prompt,
        height=given.height,
        width=given.width,
        num_frames=given.frames,
        num_inference_steps=given.steps,
        guidance_scale=4.5,
        output_type="np",
    )
    finish(video.frames[0], fastercache.summary(pipe), given.out)


if __name__ == "__main__":
    main()
