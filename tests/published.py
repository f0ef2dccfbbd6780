"""The systems of `fastercache.systems` at their published sizes, on the meta device: no weights, no values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel, HunyuanVideoTransformer3DModel, LatteTransformer3DModel, MochiTransformer3DModel
from torch import nn

from bench.architectures import LatteT2V, STDiT3, VchitectXLTransformerModel


def _latte() -> nn.Module:
    return LatteTransformer3DModel(
        num_attention_heads=16, attention_head_dim=72, in_channels=4, out_channels=8, num_layers=28, cross_attention_dim=1152,
        attention_bias=True, sample_size=64, patch_size=2, activation_fn="gelu-approximate", num_embeds_ada_norm=1000,
        norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6, caption_channels=4096, video_length=16,
    )  # fmt: skip


def _cogvideox_5b() -> nn.Module:
    return CogVideoXTransformer3DModel(num_attention_heads=48, num_layers=42)


def _mochi() -> nn.Module:
    model = MochiTransformer3DModel()
    # Its rotary positions are made under autocast, which does not know the meta device.
    model.rope.forward = lambda frequencies, frames, rows, columns, **_: (torch.empty(frames * rows * columns, 24, 64, device="meta"),) * 2
    return model


def _call(latents: tuple[int, ...], text: tuple[int, ...], **more: Any) -> dict[str, Any]:
    rows = latents[0]
    call = {"hidden_states": torch.empty(latents), "encoder_hidden_states": torch.empty(rows, *text), "timestep": torch.empty(rows)}
    return call | {"return_dict": False} | more


def _open_sora_call() -> dict[str, Any]:
    sizes = {"fps": torch.empty(1), "height": torch.empty(1), "width": torch.empty(1)}
    return {"x": torch.empty(2, 4, 57, 60, 106), "timestep": torch.empty(2), "y": torch.empty(2, 1, 300, 4096), **sizes}


COGVIDEOX_LATENTS, MASK = (2, 13, 16, 60, 90), {"encoder_attention_mask": torch.empty(2, 256, device="meta")}
PUBLISHED: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Any]]]] = {
    "open-sora-1.2": (STDiT3, _open_sora_call),
    "open-sora-plan-1.1": (LatteT2V, lambda: _call((2, 4, 17, 64, 64), (1, 300, 4096))),
    "latte": (_latte, lambda: _call((2, 4, 16, 64, 64), (120, 4096))),
    "cogvideox-2b": (CogVideoXTransformer3DModel, lambda: _call(COGVIDEOX_LATENTS, (226, 4096))),
    "cogvideox-5b": (_cogvideox_5b, lambda: _call(COGVIDEOX_LATENTS, (226, 4096))),
    "vchitect-2.0": (
        VchitectXLTransformerModel, lambda: _call((1, 40, 16, 54, 96), (77 + 256, 4096), pooled_projections=torch.empty(1, 2048))
    ),
    "mochi": (_mochi, lambda: _call((2, 12, 28, 60, 106), (256, 4096), **MASK)),
    "hunyuan-video": (
        HunyuanVideoTransformer3DModel,
        lambda: _call(
            (1, 16, 33, 90, 160), (256, 4096), encoder_attention_mask=torch.empty(1, 256), pooled_projections=torch.empty(1, 768),
            guidance=torch.empty(1),
        ),
    ),
}  # fmt: skip
"""Name of a system -> its model, and the arguments of one call for one video."""


def build(system: str) -> tuple[nn.Module, dict[str, Any]]:
    model, call = PUBLISHED[system]
    with torch.device("meta"):
        return model().eval().requires_grad_(False), call()
