"""Latte, in diffusers and upstream, and Open-Sora-Plan 1.1: spatial and temporal blocks in turn, one batch [uncond,
cond]."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from fastercache.models.family import Family, alternating_parts
from fastercache.models.site import Part, Site


class Latte(Family):
    name = "Latte"
    model_classes = ("LatteTransformer3DModel", "LatteT2V")
    batched = (
        "hidden_states",
        "timestep",
        "encoder_hidden_states",
        "attention_mask",
        "encoder_attention_mask",
        "class_labels",
    )
    idle_with = MappingProxyType({"attn1": ("norm1",), "ff": ("norm2",)})

    def parts(self, model: nn.Module) -> list[Part]:
        blocks = {"spatial": "transformer_blocks", "temporal": "temporal_transformer_blocks"}
        return alternating_parts(model, self.config(model).num_layers, blocks, "attn1", "ff", "attn2")

    def idling(self, model: nn.Module, site: Site) -> list[nn.Module]:
        """Only in diffusers' blocks, and with modulation from one table: with other norms `norm2` is that of the
        cross-attention."""
        known = type(model).__name__ == "LatteTransformer3DModel" and self.config(model).norm_type == "ada_norm_single"
        return super().idling(model, site) if known else []

    def site_shapes(self, model: nn.Module, site: Site, arguments: Mapping[str, Any]) -> tuple[torch.Size, ...]:
        batch, _, frames, height, width = arguments["hidden_states"].shape
        tokens = (height // self.config(model).patch_size) * (width // self.config(model).patch_size)
        channels = self.config(model).num_attention_heads * self.config(model).attention_head_dim
        if site.exit_path.startswith("temporal"):
            return (torch.Size((batch * tokens, frames, channels)),)
        return (torch.Size((batch * frames, tokens, channels)),)

    def prediction_shape(self, model: nn.Module, arguments: Mapping[str, Any]) -> torch.Size:
        batch, _, *rest = arguments["hidden_states"].shape
        return torch.Size((batch, self.config(model).out_channels, *rest))

    def at_exit(self, entry: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """Rows are frames of tokens in a spatial block and tokens of frames in a temporal one, where the stack ends."""
        if entry.shape[1:] == shape[1:]:
            return entry
        return entry.unflatten(0, (-1, shape[1])).transpose(1, 2).flatten(0, 1)
