"""VchitectXL, the denoiser of Vchitect-2.0 (github.com/Vchitect/Vchitect-2.0: models/VchitectXL.py, models/blocks.py,
models/attention.py).
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.architectures.layers import (
    FeedForward,
    PatchEmbed,
    TimestepEmbedding,
    attend,
    plane_positions,
    time_features,
    unpatchify,
)

SPATIAL_GAIN = 1.1
"""Weight of the spatial attention in the sum of the three (VchitectAttnProcessor)."""


def rotate(x: Tensor, heads: int, theta: float = 1e6) -> Tensor:
    """Rotary positions over the tokens of [n, tokens, width], pairs of neighbouring channels in each head, in
    float32."""
    dim = x.shape[2] // heads
    frequencies = theta ** -(torch.arange(0, dim, 2, device=x.device) / dim)
    angles = torch.arange(x.shape[1], device=x.device)[:, None, None] * frequencies
    even, odd = x.float().unflatten(2, (heads, -1, 2)).unbind(-1)
    rotated = (even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos())
    return torch.stack(rotated, dim=-1).flatten(2).to(x.dtype)


class Attention(nn.Module):
    """Three attentions that share the text's projections: over a frame with its text, over time, and to the first
    frame's text.

    forward(x [B T, S, C], text [B T, L, C], frames) -> the same two shapes.
    """

    def __init__(self, width: int, heads: int, context_pre_only: bool):
        super().__init__()
        self.heads, self.context_pre_only = heads, context_pre_only
        for name in (
            "to_q",
            "to_k",
            "to_v",
            "to_q_cross",
            "to_q_temp",
            "to_k_temp",
            "to_v_temp",
            "add_k_proj",
            "add_v_proj",
            "add_q_proj",
        ):
            setattr(self, name, nn.Linear(width, width))
        self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Identity()])
        self.to_out_temporal = nn.Linear(width, width)
        if not context_pre_only:
            self.to_add_out = nn.Linear(width, width)
        self.to_add_out_temporal = nn.Linear(width, width)
        self.to_out_context = nn.Linear(width, width)

    def forward(self, x: Tensor, text: Tensor, frames: int) -> tuple[Tensor, Tensor]:
        tokens, videos = x.shape[1], len(x) // frames
        text_query, text_key, text_value = self.add_q_proj(text), self.add_k_proj(text), self.add_v_proj(text)

        over_time = [self.to_q_temp(x), self.to_k_temp(x), self.to_v_temp(x)]
        over_time = [torch.cat(pair, dim=1) for pair in zip(over_time, (text_query, text_key, text_value), strict=True)]
        query, key, value = (part.unflatten(0, (videos, frames)).transpose(1, 2).flatten(0, 1) for part in over_time)
        moved = attend(rotate(query, self.heads), rotate(key, self.heads), value, self.heads)
        moved = moved.unflatten(0, (videos, -1)).transpose(1, 2).flatten(0, 1)

        query = torch.cat([self.to_q_cross(x), text_query], dim=1).unflatten(0, (videos, frames)).flatten(1, 2)
        first_key, first_value = (part.unflatten(0, (videos, frames))[:, 0] for part in (text_key, text_value))
        crossed = attend(query, first_key, first_value, self.heads).unflatten(1, (frames, -1)).flatten(0, 1)

        query, key = torch.cat([self.to_q(x), text_query], dim=1), torch.cat([self.to_k(x), text_key], dim=1)
        value = torch.cat([self.to_v(x), text_value], dim=1)
        joined = attend(query, key, value, self.heads) * SPATIAL_GAIN + self.to_out_context(crossed)

        video, context = joined[:, :tokens], joined[:, tokens:]
        temporal = 0.0 if frames == 1 else 1.0
        video = self.to_out[0](video) + temporal * self.to_out_temporal(moved[:, :tokens])
        context = context if self.context_pre_only else self.to_add_out(context)
        return video, context + temporal * self.to_add_out_temporal(moved[:, tokens:])


class AdaLayerNorm(nn.Module):
    """A layer norm; `parts` modulations from the timestep's embedding."""

    def __init__(self, width: int, parts: int):
        super().__init__()
        self.parts = parts
        self.linear = nn.Linear(width, parts * width)

    def forward(self, x: Tensor, embedding: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        return F.layer_norm(x, x.shape[-1:], eps=1e-6), self.linear(F.silu(embedding))[:, None].chunk(
            self.parts, dim=-1
        )


class JointTransformerBlock(nn.Module):
    """Attention and MLPs of two streams; the last block leaves the text's."""

    def __init__(self, width: int, heads: int, context_pre_only: bool):
        super().__init__()
        self.context_pre_only = context_pre_only
        self.norm1 = AdaLayerNorm(width, 6)
        self.norm1_context = AdaLayerNorm(width, 2 if context_pre_only else 6)
        self.attn = Attention(width, heads, context_pre_only)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.ff = FeedForward(width)
        if not context_pre_only:
            self.norm2_context = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
            self.ff_context = FeedForward(width)

    def forward(self, x: Tensor, text: Tensor, embedding: Tensor, frames: int) -> tuple[Tensor, Tensor]:
        h, (shift_a, scale_a, gate_a, shift_m, scale_m, gate_m) = self.norm1(x, embedding)
        c, modulation = self.norm1_context(text, embedding)
        # The continuous norm of the last block gives its scale before its shift, the other its shift before its scale.
        c_scale, c_shift = modulation if self.context_pre_only else (modulation[1], modulation[0])
        attended, c = self.attn(h * (1 + scale_a) + shift_a, c * (1 + c_scale) + c_shift, frames)
        x = x + gate_a * attended
        x = x + gate_m * self.ff(self.norm2(x) * (1 + scale_m) + shift_m)
        if not self.context_pre_only:
            _, _, gate_a, shift_m, scale_m, gate_m = modulation
            text = text + gate_a * c
            text = text + gate_m * self.ff_context(self.norm2_context(text) * (1 + scale_m) + shift_m)
        return x, text


class CombinedTimestepTextProjEmbeddings(nn.Module):
    def __init__(self, width: int, pooled: int):
        super().__init__()
        self.timestep_embedder = TimestepEmbedding(256, width)
        self.text_embedder = TimestepEmbedding(pooled, width)

    def forward(self, timestep: Tensor, pooled: Tensor) -> Tensor:
        return self.timestep_embedder(time_features(timestep).to(pooled.dtype)) + self.text_embedder(pooled)


class PositionedPatchEmbed(PatchEmbed):
    """Patches with the positions of the middle of a larger square, which the checkpoint holds."""

    def __init__(self, channels: int, width: int, patch: int, base: int, largest: int):
        super().__init__(channels, width, patch)
        self.largest = largest
        line = torch.arange(largest) * (base / largest)
        self.register_buffer("pos_embed", plane_positions(line, line, width))

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = (extent // self.proj.stride[0] for extent in x.shape[-2:])
        top, left = (self.largest - rows) // 2, (self.largest - columns) // 2
        square = self.pos_embed.unflatten(1, (self.largest, self.largest))
        return super().forward(x) + square[:, top : top + rows, left : left + columns].flatten(1, 2).to(x.dtype)


class VchitectXLTransformerModel(nn.Module):
    """forward(hidden_states [B, T, C, H, W], encoder_hidden_states [B, L, D], pooled_projections [B, P], timestep [B]).

    Returns ([B T, C, H, W],), or an object with it as `sample`. Upstream samples with two calls a step, the
    unconditional one first. It runs one video at a time (B = 1); here rows of a batch are videos of their own.
    """

    def __init__(
        self,
        sample_size: int = 128,
        patch_size: int = 2,
        in_channels: int = 16,
        num_layers: int = 24,
        attention_head_dim: int = 64,
        num_attention_heads: int = 24,
        joint_attention_dim: int = 4096,
        caption_projection_dim: int = 1536,
        pooled_projection_dim: int = 2048,
        out_channels: int = 16,
        pos_embed_max_size: int = 192,
    ):
        super().__init__()
        self.config = SimpleNamespace(
            sample_size=sample_size,
            patch_size=patch_size,
            in_channels=in_channels,
            num_layers=num_layers,
            out_channels=out_channels,
            attention_head_dim=attention_head_dim,
            num_attention_heads=num_attention_heads,
        )
        width = num_attention_heads * attention_head_dim
        self.pos_embed = PositionedPatchEmbed(
            in_channels, width, patch_size, sample_size // patch_size, pos_embed_max_size
        )
        self.time_text_embed = CombinedTimestepTextProjEmbeddings(width, pooled_projection_dim)
        self.context_embedder = nn.Linear(joint_attention_dim, caption_projection_dim)
        self.transformer_blocks = nn.ModuleList(
            [JointTransformerBlock(width, num_attention_heads, layer == num_layers - 1) for layer in range(num_layers)]
        )
        self.norm_out = AdaLayerNorm(width, 2)
        self.proj_out = nn.Linear(width, patch_size * patch_size * out_channels)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        timestep: Tensor,
        joint_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Any:
        frames, patch = hidden_states.shape[1], self.config.patch_size
        rows, columns = (extent // patch for extent in hidden_states.shape[-2:])
        x = self.pos_embed(hidden_states.flatten(0, 1))
        text = self.context_embedder(encoder_hidden_states).repeat_interleave(frames, dim=0)
        embedding = self.time_text_embed(timestep, pooled_projections).repeat_interleave(frames, dim=0)
        for block in self.transformer_blocks:
            x, text = block(x, text, embedding, frames)
        x, (scale, shift) = self.norm_out(x, embedding)
        output = unpatchify(self.proj_out(x * (1 + scale) + shift), rows, columns, patch)
        return SimpleNamespace(sample=output) if return_dict else (output,)
