"""Latte, accelerated: python examples/latte.py "a panda plays the guitar"."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from common import finish, options
from diffusers import LattePipeline

import fastercache


def load(path: str) -> LattePipeline:
    pipe = LattePipeline.from_pretrained(path, torch_dtype=torch.bfloat16)
    pipe.enable_model_cpu_offload()
    return pipe


def main(words: Sequence[str] | None = None) -> None:
    given = options(
        words, "Latte", model="maxin-cn/Latte-1", schedule="latte/released", height=512, width=512, frames=16, steps=50
    )
    pipe = load(given.model)
    fastercache.compile(pipe, given.schedule)
    video = pipe(
        given.prompt,
        height=given.height,
        width=given.width,
        video_length=given.frames,
        num_inference_steps=given.steps,
        guidance_scale=7.5,
        output_type="np",
    )
    finish(video.frames[0], fastercache.summary(pipe), given.out)


if __name__ == "__main__":
    main()
