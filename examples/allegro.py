"""Allegro, accelerated: python examples/allegro.py "a panda plays the guitar"."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from common import finish, options
from diffusers import AllegroPipeline

import fastercache


def load(path: str) -> AllegroPipeline:
    pipe = AllegroPipeline.from_pretrained(path, torch_dtype=torch.bfloat16)
    pipe.enable_model_cpu_offload()
    pipe.vae.enable_tiling()
    return pipe


def main(words: Sequence[str] | None = None) -> None:
    given = options(
        words, "Allegro", model="rhymes-ai/Allegro", schedule="paper", height=720, width=1280, frames=88, steps=100
    )
    pipe = load(given.model)
    fastercache.compile(pipe, given.schedule)
    video = pipe(
        given.prompt,
        height=given.height,
        width=given.width,
        num_frames=given.frames,
        num_inference_steps=given.steps,
        guidance_scale=7.5,
        output_type="np",
    )
    finish(video.frames[0], fastercache.summary(pipe), given.out)


if __name__ == "__main__":
    main()
