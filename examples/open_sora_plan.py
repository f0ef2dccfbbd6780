"""Open-Sora-Plan 1.1, accelerated. With its checkout (v1.1.0) on PYTHONPATH: python examples/open_sora_plan.py "a
panda"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from common import finish, options

import fastercache


def load(path: str) -> Any:
    """The pipeline of the checkout, with the denoiser of 65 frames of 512 x 512."""
    from diffusers import PNDMScheduler
    from opensora.models.ae import ae_stride_config, getae_wrapper
    from opensora.models.diffusion.latte.modeling_latte import LatteT2V
    from opensora.sample.pipeline_videogen import VideoGenPipeline
    from transformers import T5EncoderModel, T5Tokenizer

    vae = getae_wrapper("CausalVAEModel_4x8x8")(path, subfolder="vae").to("cuda", torch.float16)
    vae.vae.enable_tiling()
    vae.vae_scale_factor = ae_stride_config["CausalVAEModel_4x8x8"]
    transformer = LatteT2V.from_pretrained(path, subfolder="65x512x512", torch_dtype=torch.float16)
    tokenizer = T5Tokenizer.from_pretrained("DeepFloyd/t5-v1_1-xxl")
    text_encoder = T5EncoderModel.from_pretrained("DeepFloyd/t5-v1_1-xxl", torch_dtype=torch.float16)
    return VideoGenPipeline(vae, text_encoder, tokenizer, PNDMScheduler(), transformer).to("cuda")


def main(words: Sequence[str] | None = None) -> None:
    given = options(
        words,
        "Open-Sora-Plan 1.1",
        model="LanguageBind/Open-Sora-Plan-v1.1.0",
        schedule="open-sora-plan-1.1/released",
        height=512,
        width=512,
        frames=65,
        steps=150,
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
    ).video
    finish(video[0].numpy() / 255, fastercache.summary(pipe), given.out)


if __name__ == "__main__":
    main()
