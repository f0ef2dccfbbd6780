"""Small models with random weights, and the arguments of one call of each."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel, LatteTransformer3DModel
from torch import nn


def latte(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = LatteTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=2, out_channels=4, num_layers=2, cross_attention_dim=16,
        attention_bias=True, sample_size=8, patch_size=2,
        activation_fn="gelu-approximate", num_embeds_ada_norm=1000, norm_type="ada_norm_single",
        norm_elementwise_affine=False, norm_eps=1e-6, caption_channels=12, video_length=3,
    )  # fmt: skip
    return model.to(dtype).eval().requires_grad_(False)


def cogvideox(dtype: torch.dtype = torch.float64, seed: int = 0, layers: int = 2) -> nn.Module:
    torch.manual_seed(seed)
    model = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=2, out_channels=2, time_embed_dim=8, text_embed_dim=12, num_layers=layers,
        sample_width=6, sample_height=10, sample_frames=9, patch_size=2, temporal_compression_ratio=4, max_text_seq_length=5,
    )  # fmt: skip
    with torch.no_grad():  # diffusers starts some projections at zero, which would hide a wrong branch
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.to(dtype).eval().requires_grad_(False)


def arguments(model: nn.Module, rows: int, seed: int = 0) -> dict[str, Any]:
    """Arguments of a call with `rows` rows, every row different."""
    generator = torch.Generator().manual_seed(seed)
    dtype = next(model.parameters()).dtype
    latte = type(model).__name__.startswith("Latte")
    shape = (rows, 2, 3, 8, 8) if latte else (rows, 3, 2, 10, 6)
    return {
        "hidden_states": torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype),
        "encoder_hidden_states": torch.randn((rows, 5, 12), generator=generator, dtype=torch.float64).to(dtype),
        "timestep": torch.full((rows,), 500),
        "return_dict": False,
    }


MODELS = {"latte": latte, "cogvideox": cogvideox}
