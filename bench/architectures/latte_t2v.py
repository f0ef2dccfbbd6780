"""LatteT2V as Open-Sora-Plan 1.1 has it (github.com/PKU-YuanGroup/Open-Sora-Plan, v1.1.0:
opensora/models/diffusion/latte/)."""

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
    sinusoids,
    time_features,
    unpatchify,
)


class Attention(nn.Module):
    """Attention under diffusers' names. A row of `context`, and of `bias` [m, 1, keys] added to the scores, may serve
    several of x."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width), nn.Identity()])

    def forward(self, x: Tensor, context: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        key, value = (
            part.repeat_interleave(len(x) // len(context), dim=0) for part in (self.to_k(context), self.to_v(context))
        )
        bias = None if bias is None else bias.repeat_interleave(len(x) // len(context), dim=0)[:, None]
        return self.to_out[0](attend(self.to_q(x), key, value, self.heads, bias))


class BasicTransformerBlock_(nn.Module):
    """Self-attention and MLP; the block of the temporal half."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn1 = Attention(width, heads)
        self.norm3 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.ff = FeedForward(width)
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)

    def cross(self, x: Tensor, context: Tensor | None, bias: Tensor | None) -> Tensor:
        return x

    def forward(self, x: Tensor, time: Tensor, context: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (
            self.scale_shift_table + time.unflatten(1, (6, -1))
        ).chunk(6, dim=1)
        x = x + gate_a * self.attn1(self.norm1(x) * (1 + scale_a) + shift_a)
        x = self.cross(x, context, bias)
        return x + gate_m * self.ff(self.norm3(x) * (1 + scale_m) + shift_m)


class BasicTransformerBlock(BasicTransformerBlock_):
    """With cross-attention to the text between; the block of the spatial half."""

    def __init__(self, width: int, heads: int):
        super().__init__(width, heads)
        self.attn2 = Attention(width, heads)

    def cross(self, x: Tensor, context: Tensor | None, bias: Tensor | None) -> Tensor:
        return x + self.attn2(x, context, bias)


class CaptionProjection(nn.Module):
    def __init__(self, channels: int, width: int):
        super().__init__()
        self.linear_1 = nn.Linear(channels, width)
        self.linear_2 = nn.Linear(width, width)
        self.register_buffer("y_embedding", torch.randn(120, channels) / channels**0.5)

    def forward(self, caption: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(caption), approximate="tanh"))


class AdaLayerNormSingle(nn.Module):
    """The timestep's embedding, and from it the six modulations that all blocks share."""

    def __init__(self, width: int):
        super().__init__()
        self.emb = nn.ModuleDict({"timestep_embedder": TimestepEmbedding(256, width)})
        self.linear = nn.Linear(width, 6 * width)

    def forward(self, timestep: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        embedded = self.emb["timestep_embedder"](time_features(timestep).to(dtype))
        return self.linear(F.silu(embedded)), embedded


class LatteT2V(nn.Module):
    """forward(hidden_states [B, C, T, H, W], timestep [B], encoder_hidden_states [B, 1, L, D], encoder_attention_mask
    [B, 1, L] or [B, L]).

    Returns ([B, out, T, H, W],), or an object with it as `sample`. Rows are [unconditional, conditional].
    """

    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int = 8,
        num_layers: int = 28,
        sample_size: tuple[int, int] = (64, 64),
        patch_size: int = 2,
        caption_channels: int = 4096,
        video_length: int = 17,
    ):
        super().__init__()
        self.config = SimpleNamespace(
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            in_channels=in_channels,
            out_channels=out_channels,
            num_layers=num_layers,
            sample_size=sample_size,
            patch_size=patch_size,
            video_length=video_length,
        )
        width = num_attention_heads * attention_head_dim
        self.pos_embed = PatchEmbed(in_channels, width, patch_size)
        # Positions in time are stretched from 16 frames.
        moments = sinusoids(torch.arange(video_length) / max(video_length // 16, 1), width)
        self.register_buffer("temp_pos_embed", moments[None], persistent=False)
        self.transformer_blocks = nn.ModuleList(
            [BasicTransformerBlock(width, num_attention_heads) for _ in range(num_layers)]
        )
        self.temporal_transformer_blocks = nn.ModuleList(
            [BasicTransformerBlock_(width, num_attention_heads) for _ in range(num_layers)]
        )
        self.norm_out = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.proj_out = nn.Linear(width, patch_size * patch_size * out_channels)
        self.adaln_single = AdaLayerNormSingle(width)
        self.caption_projection = CaptionProjection(caption_channels, width)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
        **_: Any,
    ) -> Any:
        batch, _, frames, height, width = hidden_states.shape
        patch, channels, dtype = self.config.patch_size, self.proj_out.in_features, hidden_states.dtype
        rows, columns = height // patch, width // patch
        # Positions in a frame are those of the training size, stretched from 64 x 64 latents.
        plane = max(self.config.sample_size[0] // 64, 1)
        grid = [torch.arange(extent, device=hidden_states.device) / plane for extent in (rows, columns)]
        time, embedded = self.adaln_single(timestep, dtype)
        # Upstream repeats the text for every frame before its projections, with the same result and 2 % more
        # operations.
        text = self.caption_projection(encoder_hidden_states).reshape(batch, -1, channels)
        bias = None
        if encoder_attention_mask is not None:
            bias = (1 - encoder_attention_mask.reshape(batch, 1, -1).to(dtype)) * -10000.0

        x = self.pos_embed(hidden_states.transpose(1, 2).flatten(0, 1)) + plane_positions(*grid, channels).to(dtype)
        moments = self.temp_pos_embed[:, :frames].to(dtype)
        spatial_time, temporal_time = (
            time.repeat_interleave(frames, dim=0),
            time.repeat_interleave(rows * columns, dim=0),
        )
        for layer, (spatial, temporal) in enumerate(
            zip(self.transformer_blocks, self.temporal_transformer_blocks, strict=True)
        ):
            x = spatial(x, spatial_time, text, bias).unflatten(0, (batch, frames)).transpose(1, 2).flatten(0, 1)
            x = temporal(x + moments if layer == 0 else x, temporal_time)
            x = x.unflatten(0, (batch, rows * columns)).transpose(1, 2).flatten(0, 1)

        shift, scale = (self.scale_shift_table + embedded.repeat_interleave(frames, dim=0)[:, None]).chunk(2, dim=1)
        x = unpatchify(self.proj_out(self.norm_out(x) * (1 + scale) + shift), rows, columns, patch)
        output = x.unflatten(0, (batch, frames)).transpose(1, 2).contiguous()
        return SimpleNamespace(sample=output) if return_dict else (output,)
