"""diffusers' models with self-attention over all video tokens and cross-attention to the text: LTX-Video, Allegro,
Wan."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from fastercache.errors import RunError
from fastercache.models.family import Family, block_parts
from fastercache.models.site import Part, Site


def _blocks_of(family: Family, model: nn.Module, blocks: str, mlp: str) -> list[Part]:
    kinds = {"attn1": "joint", "attn2": "cross", mlp: "mlp"}
    return block_parts(model, blocks, range(family.config(model).num_layers), kinds)


class Allegro(Family):
    name = "Allegro"
    model_classes = ("AllegroTransformer3DModel",)
    batched = ("hidden_states", "encoder_hidden_states", "timestep", "attention_mask", "encoder_attention_mask")
    idle_with = MappingProxyType({"attn1": ("norm1",), "ff": ("norm2",)})

    def parts(self, model: nn.Module) -> list[Part]:
        return _blocks_of(self, model, "transformer_blocks", mlp="ff")

    def site_shapes(self, model: nn.Module, site: Site, arguments: Mapping[str, Any]) -> tuple[torch.Size, ...]:
        config = self.config(model)
        batch, _, frames, height, width = arguments["hidden_states"].shape
        tokens = (frames // config.patch_size_t) * (height // config.patch_size) * (width // config.patch_size)
        return (torch.Size((batch, tokens, config.num_attention_heads * config.attention_head_dim)),)

    def prediction_shape(self, model: nn.Module, arguments: Mapping[str, Any]) -> torch.Size:
        batch, _, *rest = arguments["hidden_states"].shape
        return torch.Size((batch, self.config(model).out_channels, *rest))


class LTXVideo(Family):
    """Tokens come packed, [batch, frames * height * width, channels], with the three extents as numbers beside them."""

    name = "LTX-Video"
    model_classes = ("LTXVideoTransformer3DModel",)
    batched = ("hidden_states", "encoder_hidden_states", "timestep", "encoder_attention_mask", "video_coords")
    idle_with = MappingProxyType({"attn1": ("norm1",), "ff": ("norm2",)})

    def parts(self, model: nn.Module) -> list[Part]:
        return _blocks_of(self, model, "transformer_blocks", mlp="ff")

    def site_shapes(self, model: nn.Module, site: Site, arguments: Mapping[str, Any]) -> tuple[torch.Size, ...]:
        config = self.config(model)
        batch, tokens, _ = arguments["hidden_states"].shape
        return (torch.Size((batch, tokens, config.num_attention_heads * config.attention_head_dim)),)

    def _extents(self, arguments: Mapping[str, Any]) -> tuple[int, int, int]:
        frames, height, width = (arguments.get(name) or 0 for name in ("num_frames", "height", "width"))
        tokens = arguments["hidden_states"].shape[1]
        if frames * height * width != tokens:
            raise RunError(
                f"{tokens} packed tokens, but num_frames, height, width are {frames}, {height}, {width}; CFG-Cache "
                "needs the latent planes: pass extents whose product is the number of tokens, or use the policy "
                "'dynamic-only'"
            )
        return frames, height, width

    def prediction_shape(self, model: nn.Module, arguments: Mapping[str, Any]) -> torch.Size:
        batch, tokens, _ = arguments["hidden_states"].shape
        return torch.Size((batch, tokens, self.config(model).out_channels))

    def planes_shape(self, model: nn.Module, arguments: Mapping[str, Any]) -> torch.Size:
        return torch.Size((len(arguments["hidden_states"]), self.config(model).out_channels, *self._extents(arguments)))

    def planes(self, prediction: torch.Tensor, arguments: Mapping[str, Any]) -> torch.Tensor:
        return prediction.transpose(1, 2).unflatten(2, self._extents(arguments)).contiguous()

    def unplaned(self, planes: torch.Tensor, arguments: Mapping[str, Any]) -> torch.Tensor:
        return planes.flatten(2).transpose(1, 2)


class Wan(Family):
    """Wan 2.1 and 2.2 call the denoiser twice a step; Wan 2.2 has two experts, one for the first steps and one for the
    others."""

    name = "Wan"
    model_classes = ("WanTransformer3DModel",)
    batched = ("hidden_states", "timestep", "encoder_hidden_states", "encoder_hidden_states_image")
    layout = "cond-then-uncond"
    idle_with = MappingProxyType({"attn1": ("norm1",), "attn2": ("norm2",), "ffn": ("norm3",)})

    def parts(self, model: nn.Module) -> list[Part]:
        return _blocks_of(self, model, "blocks", mlp="ffn")

    def site_shapes(self, model: nn.Module, site: Site, arguments: Mapping[str, Any]) -> tuple[torch.Size, ...]:
        config = self.config(model)
        batch, _, *extents = arguments["hidden_states"].shape
        tokens = math.prod(extent // patch for extent, patch in zip(extents, config.patch_size, strict=True))
        return (torch.Size((batch, tokens, config.num_attention_heads * config.attention_head_dim)),)

    def prediction_shape(self, model: nn.Module, arguments: Mapping[str, Any]) -> torch.Size:
        batch, _, *rest = arguments["hidden_states"].shape
        return torch.Size((batch, self.config(model).out_channels, *rest))
