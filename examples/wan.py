"""Wan 2.1 and 2.2, accelerated: python examples/wan.py "a panda plays the guitar"."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from common import finish, options
from diffusers import WanPipeline

import fastercache


def load(path: str) -> WanPipeline:
    pipe = WanPipeline.from_pretrained(path, torch_dtype=torch.bfloat16)
    pipe.enable_model_cpu_offload()
    pipe.vae.enable_tiling()
    return pipe


def main(words: Sequence[str] | None = None) -> None:
    given = options(
        words,
        "Wan 2.1 and 2.2",
        model="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        schedule="paper",
        height=480,
        width=832,
        frames=81,
        steps=50,
    )
    pipe = load(given.model)
    fastercache.compile(pipe, given.schedule)
    video = pipe(
        given.prompt,
        height=given.height,
        width=given.width,
        num_frames=given.frames,
        num_inference_steps=given.steps,
        guidance_scale=5.0,
        output_type="np",
    )
    finish(video.frames[0], fastercache.summary(pipe), given.out)


if __name__ == "__main__":
    main()
