"""Mochi in diffusers, one batch [uncond, cond], and as released: joint attention over video and a narrower text."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from fastercache.models.family import Family, block_parts
from fastercache.models.site import Part, Site


class Mochi(Family):
    name = "Mochi"
    model_classes = ("MochiTransformer3DModel",)
    batched = ("hidden_states", "encoder_hidden_states", "timestep", "encoder_attention_mask")
    streams = ("hidden_states", "encoder_hidden_states")
    idle_with = MappingProxyType(
        {"attn1": ("norm1", "norm1_context"), "ff": ("norm3",), "ff_context": ("norm3_context",)}
    )

    def parts(self, model: nn.Module) -> list[Part]:
        last = self.config(model).num_layers - 1
        whole = block_parts(
            model, "transformer_blocks", range(last), {"attn1": "joint", "ff": "mlp", "ff_context": "mlp"}
        )
        return whole + block_parts(model, "transformer_blocks", range(last, last + 1), {"attn1": "joint", "ff": "mlp"})

    def site_shapes(self, model: nn.Module, site: Site, arguments: Mapping[str, Any]) -> tuple[torch.Size, ...]:
        config = self.config(model)
        batch, _, frames, height, width = arguments["hidden_states"].shape
        channels, text_channels = config.num_attention_heads * config.attention_head_dim, config.pooled_projection_dim
        video = torch.Size((batch, frames * (height // config.patch_size) * (width // config.patch_size), channels))
        text = arguments["encoder_hidden_states"].shape[1]
        if site.kind == "mlp":
            return (torch.Size((batch, text, text_channels)) if site.path.endswith("ff_context") else video,)
        if site.kind == "stack":
            return (video,)
        # The last block has no projection of the text back to its own width, because nothing reads it.
        last = site.kind == "joint" and site.layer == config.num_layers - 1
        return video, torch.Size((batch, text, channels if last else text_channels))

    def prediction_shape(self, model: nn.Module, arguments: Mapping[str, Any]) -> torch.Size:
        batch, channels, *rest = arguments["hidden_states"].shape
        return torch.Size((batch, self.config(model).out_channels or channels, *rest))


class AsymmMochi(Family):
    """The same model as released (github.com/genmoai/mochi): texts as lists of tensors, two calls a step, the
    conditional one first.

    Its batched way of guidance packs the tokens of both branches in one sequence, which cannot be divided; sample with
    two calls.
    """

    name = "Mochi (released)"
    model_classes = ("AsymmDiTJoint",)
    batched = ("x", "sigma")
    time = "sigma"
    layout = "cond-then-uncond"
    streams = ("x", "y")

    def parts(self, model: nn.Module) -> list[Part]:
        last = len(self.config(model).blocks) - 1
        whole = block_parts(model, "blocks", range(last), {"attn": "joint", "mlp_x": "mlp", "mlp_y": "mlp"})
        return whole + block_parts(model, "blocks", range(last, last + 1), {"attn": "joint", "mlp_x": "mlp"})

    def site_shapes(self, model: nn.Module, site: Site, arguments: Mapping[str, Any]) -> tuple[torch.Size, ...]:
        config = self.config(model)
        batch, _, frames, height, width = arguments["x"].shape
        video = torch.Size(
            (batch, frames * (height // config.patch_size) * (width // config.patch_size), config.hidden_size_x)
        )
        text = arguments["y_feat"][0].shape[1]
        if site.kind == "mlp":
            return (torch.Size((batch, text, config.hidden_size_y)) if site.path.endswith("mlp_y") else video,)
        if site.kind == "stack":
            return (video,)
        last = site.kind == "joint" and site.layer == len(config.blocks) - 1
        return video, torch.Size((batch, text, config.hidden_size_x if last else config.hidden_size_y))

    def prediction_shape(self, model: nn.Module, arguments: Mapping[str, Any]) -> torch.Size:
        batch, _, *rest = arguments["x"].shape
        return torch.Size((batch, self.config(model).out_channels, *rest))

    def config(self, model: nn.Module) -> Any:
        """The model keeps its sizes as attributes."""
        return model

    def latents(self, arguments: Mapping[str, Any]) -> torch.Tensor:
        return arguments["x"]

    def dtype(self, model: nn.Module, arguments: Mapping[str, Any]) -> torch.dtype:
        return next(model.parameters()).dtype
