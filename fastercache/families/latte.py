"""Latte, in diffusers and upstream, and Open-Sora-Plan 1.1: spatial and temporal blocks in turn, one batch [uncond, cond]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from fastercache.families.base import Family, Site, alternating_sites


class Latte(Family):
    name = "Latte"
    model_classes = ("LatteTransformer3DModel", "LatteT2V")
    batched = ("hidden_states", "timestep", "encoder_hidden_states", "attention_mask", "encoder_attention_mask", "class_labels")

    def sites(self, model: nn.Module) -> list[Site]:
        blocks = {"spatial": "transformer_blocks", "temporal": "temporal_transformer_blocks"}
        return alternating_sites(model, self.config(model).num_layers, blocks, "attn1", "ff")

    def site_shapes(self, model: nn.Module, site: Site, arguments: Mapping[str, Any]) -> tuple[torch.Size, ...]:
        batch, _, frames, height, width = arguments["hidden_states"].shape
        tokens = (height // self.config(model).patch_size) * (width // self.config(model).patch_size)
        channels = self.config(model).num_attention_heads * self.config(model).attention_head_dim
        if site.path.startswith("temporal"):
            return (torch.Size((batch * tokens, frames, channels)),)
        return (torch.Size((batch * frames, tokens, channels)),)

    def prediction_shape(self, model: nn.Module, arguments: Mapping[str, Any]) -> torch.Size:
        batch, _, *rest = arguments["hidden_states"].shape
        return torch.Size((batch, self.config(model).out_channels, *rest))
