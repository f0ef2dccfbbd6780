"""Open-Sora 1.2, accelerated. With its checkout (v1.2) on PYTHONPATH: python examples/open_sora.py "a panda plays the
guitar"."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from common import finish, options
from torch import nn

import fastercache


def load(
    path: str, height: int, width: int, frames: int, steps: int
) -> tuple[nn.Module, Callable[[str], torch.Tensor]]:
    """The denoiser of the checkout, and a function from a prompt to a video [3, frames, H, W] in [-1, 1]."""
    from opensora.registry import MODELS, SCHEDULERS, build_module
    from opensora.utils.inference_utils import prepare_multi_resolution_info

    device, dtype = "cuda", torch.bfloat16
    t5 = {"type": "t5", "from_pretrained": "DeepFloyd/t5-v1_1-xxl", "model_max_length": 300}
    text_encoder = build_module(t5, MODELS, device=device)
    autoencoder = {"type": "OpenSoraVAE_V1_2", "from_pretrained": "hpcai-tech/OpenSora-VAE-v1.2"}
    vae = build_module(autoencoder, MODELS, micro_frame_size=17, micro_batch_size=4).to(device, dtype).eval()
    size = vae.get_latent_size((frames, height, width))
    denoiser = {
        "type": "STDiT3-XL/2",
        "from_pretrained": path,
        "qk_norm": True,
        "enable_flash_attn": True,
        "enable_layernorm_kernel": True,
    }
    model = (
        build_module(
            denoiser,
            MODELS,
            input_size=size,
            in_channels=vae.out_channels,
            caption_channels=text_encoder.output_dim,
            model_max_length=text_encoder.model_max_length,
        )
        .to(device, dtype)
        .eval()
    )
    text_encoder.y_embedder = model.y_embedder
    flow = {"type": "rflow", "use_timestep_transform": True, "num_sampling_steps": steps, "cfg_scale": 7.0}
    scheduler = build_module(flow, SCHEDULERS)

    def sample(prompt: str) -> torch.Tensor:
        noise = torch.randn(1, vae.out_channels, *size, device=device, dtype=dtype)
        sizes = prepare_multi_resolution_info("STDiT2", 1, (height, width), frames, 24, device, dtype)
        latents = scheduler.sample(
            model, text_encoder, z=noise, prompts=[prompt], device=device, additional_args=sizes, progress=True
        )
        return vae.decode(latents.to(dtype), num_frames=frames)[0]

    return model, sample


def main(words: Sequence[str] | None = None) -> None:
    given = options(
        words,
        "Open-Sora 1.2",
        model="hpcai-tech/OpenSora-STDiT-v3",
        schedule="open-sora-1.2/released",
        height=480,
        width=854,
        frames=192,
        steps=30,
    )
    model, sample = load(given.model, given.height, given.width, given.frames, given.steps)
    # There is no pipeline: every 30 calls of the denoiser are a video, each with the conditional rows first.
    fastercache.compile(model, given.schedule, steps=given.steps, cfg="cond-first")
    with torch.no_grad():
        video = sample(given.prompt)
    finish((video.float().cpu().permute(1, 2, 3, 0).numpy() + 1) / 2, fastercache.summary(model), given.out)


if __name__ == "__main__":
    main()
