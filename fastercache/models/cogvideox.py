"""CogVideoX in diffusers and as released: joint attention over text and video tokens, one batch [uncond, cond]."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from fastercache.errors import UnsupportedModelError
from fastercache.models.family import Family, block_parts, child
from fastercache.models.patching import Route
from fastercache.models.site import Part, Site


class CogVideoX(Family):
    name = "CogVideoX"
    model_classes = ("CogVideoXTransformer3DModel",)
    batched = ("hidden_states", "encoder_hidden_states", "timestep", "timestep_cond")
    streams = ("hidden_states", "encoder_hidden_states")
    idle_with = MappingProxyType({"attn1": ("norm1",), "ff": ("norm2",)})

    def parts(self, model: nn.Module) -> list[Part]:
        return block_parts(
            model, "transformer_blocks", range(self.config(model).num_layers), {"attn1": "joint", "ff": "mlp"}
        )

    def site_shapes(self, model: nn.Module, site: Site, arguments: Mapping[str, Any]) -> tuple[torch.Size, ...]:
        config = self.config(model)
        batch, frames, _, height, width = arguments["hidden_states"].shape
        time_patch = config.patch_size_t or 1
        video = -(-frames // time_patch) * (height // config.patch_size) * (width // config.patch_size)
        text = arguments["encoder_hidden_states"].shape[1]
        channels = config.num_attention_heads * config.attention_head_dim
        if site.kind == "mlp":
            return (torch.Size((batch, text + video, channels)),)
        shapes = torch.Size((batch, video, channels)), torch.Size((batch, text, channels))
        return shapes[:1] if site.kind == "stack" else shapes

    def prediction_shape(self, model: nn.Module, arguments: Mapping[str, Any]) -> torch.Size:
        batch, frames, _, *plane = arguments["hidden_states"].shape
        return torch.Size((batch, frames, self.config(model).out_channels, *plane))


class SATCogVideoX(Family):
    """The same model in SwissArmyTransformer (github.com/THUDM/CogVideo, sat/dit_video_concat.py): text and video in
    one sequence. It calls the function `hooks["layer_forward"]` for each layer, not the layer."""

    name = "CogVideoX (SAT)"
    model_classes = ("DiffusionTransformer",)
    batched = ("x", "timesteps", "context", "y", "concat_images", "ofs")
    repeated = ("y", "concat_images")
    time = "timesteps"

    def parts(self, model: nn.Module) -> list[Part]:
        child(model, "transformer.layers")  # other projects have a class of that name too
        if "layer_forward" not in getattr(model, "hooks", {}):
            raise UnsupportedModelError(
                f"{type(model).__name__} has no hook 'layer_forward', which its family expects; the model was changed "
                "after it was built, or its library version is not supported"
            )
        return block_parts(
            model, "transformer.layers", range(self.config(model).num_layers), {"attention": "joint", "mlp": "mlp"}
        )

    def site_shapes(self, model: nn.Module, site: Site, arguments: Mapping[str, Any]) -> tuple[torch.Size, ...]:
        batch, frames, _, *plane = arguments["x"].shape
        patches = self.config(model).patch_size
        patches = (1, patches, patches) if isinstance(patches, int) else patches  # a number in 1.0, three in 1.5
        tokens = math.prod(extent // patch for extent, patch in zip((frames, *plane), patches, strict=True))
        return (torch.Size((batch, arguments["context"].shape[1] + tokens, self.config(model).hidden_size)),)

    def prediction_shape(self, model: nn.Module, arguments: Mapping[str, Any]) -> torch.Size:
        batch, frames, _, *plane = arguments["x"].shape
        return torch.Size((batch, frames, self.config(model).out_channels, *plane))

    def config(self, model: nn.Module) -> Any:
        """The model keeps its sizes as attributes."""
        return model

    def latents(self, arguments: Mapping[str, Any]) -> torch.Tensor:
        return arguments["x"]

    def block_of(self, part: Part) -> str:
        return part.path.rpartition(".")[0]

    def route(self, model: nn.Module) -> Route:
        transformer: Any = model.transformer
        return Route((model, transformer), "layer_forward", "layer_id", transformer.layers)

    def dtype(self, model: nn.Module, arguments: Mapping[str, Any]) -> torch.dtype:
        return self.config(model).dtype
