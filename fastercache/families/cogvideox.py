"""CogVideoX in diffusers: joint attention over text and video tokens, one batch [uncond, cond]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fastercache.families.base import Family, Site, child


class CogVideoX(Family):
    name = "CogVideoX"
    model_classes = ("CogVideoXTransformer3DModel",)
    batched = ("hidden_states", "encoder_hidden_states", "timestep", "timestep_cond")

    def sites(self, model: nn.Module) -> list[Site]:
        sites = []
        for layer in range(self.config(model).num_layers):
            path = f"transformer_blocks.{layer}"
            sites.append(Site(f"{path}.attn1", "joint", layer, child(model, f"{path}.attn1")))
            sites.append(Site(f"{path}.ff", "mlp", layer, child(model, f"{path}.ff")))
        return sites

    def site_shapes(self, model: nn.Module, site: Site, arguments: Mapping[str, Any]) -> tuple[torch.Size, ...]:
        config = self.config(model)
        batch, frames, _, height, width = arguments["hidden_states"].shape
        time_patch = config.patch_size_t or 1
        video = -(-frames // time_patch) * (height // config.patch_size) * (width // config.patch_size)
        text = arguments["encoder_hidden_states"].shape[1]
        channels = config.num_attention_heads * config.attention_head_dim
        if site.kind == "mlp":
            return (torch.Size((batch, text + video, channels)),)
        return torch.Size((batch, video, channels)), torch.Size((batch, text, channels))

    def prediction_shape(self, model: nn.Module, arguments: Mapping[str, Any]) -> torch.Size:
        batch, frames, _, *plane = arguments["hidden_states"].shape
        return torch.Size((batch, frames, self.config(model).out_channels, *plane))
