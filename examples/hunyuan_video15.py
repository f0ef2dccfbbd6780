"""HunyuanVideo 1.5, accelerated: python examples/hunyuan_video15.py "a panda plays the guitar"."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from common import finish, options
from diffusers import HunyuanVideo15Pipeline

import fastercache


def load(path: str) -> HunyuanVideo15Pipeline:
    pipe = HunyuanVideo15Pipeline.from_pretrained(path, torch_dtype=torch.bfloat16)
    pipe.enable_model_cpu_offload()
    pipe.vae.enable_tiling()
    return pipe


def main(words: Sequence[str] | None = None) -> None:
    given = options(
        words,
        "HunyuanVideo 1.5",
        model="hunyuanvideo-community/HunyuanVideo-1.5-480p_t2v",
        schedule="paper",
        height=480,
        width=848,
        frames=121,
        steps=50,
    )
    pipe = load(given.model)
    fastercache.compile(pipe, given.schedule)
    video = pipe(  # how far it is guided its guider says: pipe.guider = pipe.guider.new(guidance_scale=6.0)
        given.prompt,
        height=given.height,
        width=given.width,
        num_frames=given.frames,
        num_inference_steps=given.steps,
        output_type="np",
    )
    finish(video.frames[0], fastercache.summary(pipe), given.out)


if __name__ == "__main__":
    main()
