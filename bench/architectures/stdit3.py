"""STDiT3, the denoiser of Open-Sora 1.2 (github.com/hpcaitech/Open-Sora, v1.2: opensora/models/stdit/stdit3.py,
opensora/models/layers/blocks.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.architectures.layers import attend, plane_positions, time_features


class RotaryEmbedding(nn.Module):
    """Rotates neighbouring pairs of channels by the position in the second dimension from the end."""

    def __init__(self, dim: int):
        super().__init__()
        self.freqs = nn.Parameter(10000.0 ** -(torch.arange(0, dim, 2)[: dim // 2] / dim), requires_grad=False)

    def rotate_queries_or_keys(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.shape[-2], device=x.device)[:, None] * self.freqs.float()
        even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        rotated = (even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos())
        return torch.stack(rotated, dim=-1).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """Self-attention with one projection for queries, keys and values, and RMS-normalized queries and keys."""

    def __init__(self, width: int, heads: int, rope: Any = None):
        super().__init__()
        self.heads = heads
        self.rotary_emb = rope
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.RMSNorm(width // heads, eps=1e-6)
        self.k_norm = nn.RMSNorm(width // heads, eps=1e-6)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key = self.q_norm(query), self.k_norm(key)
        if self.rotary_emb is not None:
            query, key = self.rotary_emb(query), self.rotary_emb(key)
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class MultiHeadCrossAttention(nn.Module):
    """Cross-attention to texts of different lengths, packed in one row: cond [1, sum of lengths, width]."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_linear = nn.Linear(width, width)
        self.kv_linear = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, cond: Tensor, lengths: Sequence[int]) -> Tensor:
        texts = self.kv_linear(cond)[0].split(list(lengths))
        rows = [
            attend(row[None], *text[None].chunk(2, dim=-1), self.heads)
            for row, text in zip(self.q_linear(x), texts, strict=True)
        ]
        return self.proj(torch.cat(rows))


class Mlp(nn.Module):
    def __init__(self, inputs: int, hidden: int, outputs: int):
        super().__init__()
        self.fc1 = nn.Linear(inputs, hidden)
        self.fc2 = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Modulation:
    """Shifts, scales and gates of shape [B, 1, C] or [B, T S, C]: a table plus the embedding of the timestep `time` [B,
    n C].

    moving [B, T S, 1]: where false, the embedding `still` of timestep 0 stands in (frames that are given).
    """

    def __init__(self, table: Tensor, time: Tensor, still: Tensor | None, moving: Tensor | None):
        self.table, self.time, self.still, self.moving = table, time, still, moving

    def __getitem__(self, index: int) -> Tensor:
        part = self._part(self.time, index)
        return (
            part
            if self.moving is None or self.still is None
            else torch.where(self.moving, part, self._part(self.still, index))
        )

    def _part(self, embedding: Tensor, index: int) -> Tensor:
        return (self.table[index] + embedding.unflatten(1, (-1, self.table.shape[1]))[:, index])[:, None]


class STDiT3Block(nn.Module):
    """Self-attention over a frame or over time, cross-attention to the text, MLP; gates and shifts from the
    timestep."""

    def __init__(self, width: int, heads: int, rope: Any = None, temporal: bool = False):
        super().__init__()
        self.temporal = temporal
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(width, heads, rope)
        self.cross_attn = MultiHeadCrossAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(width, 4 * width, width)
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)

    def forward(
        self,
        x: Tensor,
        text: Tensor,
        lengths: Sequence[int],
        frames: int,
        time: Tensor,
        still: Tensor | None,
        moving: Tensor | None,
    ) -> Tensor:
        """x [B, T S, C]; the modulation is shift, scale and gate of the attention, then of the MLP."""
        modulation, batch = Modulation(self.scale_shift_table, time, still, moving), len(x)
        h = (self.norm1(x) * (1 + modulation[1]) + modulation[0]).unflatten(1, (frames, -1))
        h = self.attn((h.transpose(1, 2) if self.temporal else h).flatten(0, 1)).unflatten(0, (batch, -1))
        h = (h.transpose(1, 2) if self.temporal else h).flatten(1, 2)
        x = x + modulation[2] * h
        x = x + self.cross_attn(x, text, lengths)
        return x + modulation[5] * self.mlp(self.norm2(x) * (1 + modulation[4]) + modulation[3])


class TimestepEmbedder(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(time_features(t).to(self.mlp[0].weight.dtype))


class CaptionEmbedder(nn.Module):
    def __init__(self, channels: int, width: int, tokens: int):
        super().__init__()
        self.y_proj = Mlp(channels, width, width)
        self.register_buffer("y_embedding", torch.randn(tokens, channels) / channels**0.5)

    def forward(self, caption: Tensor) -> Tensor:
        return self.y_proj(caption)


class PatchEmbed3D(nn.Module):
    """[B, C, T, H, W], zero-padded to whole patches -> [B, tokens, width]."""

    def __init__(self, patch: tuple[int, int, int], channels: int, width: int):
        super().__init__()
        self.proj = nn.Conv3d(channels, width, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        missing = [-size % patch for size, patch in zip(x.shape[2:], self.proj.kernel_size, strict=True)]
        padding = [amount for after in reversed(missing) for amount in (0, after)]
        return self.proj(F.pad(x, padding)).flatten(2).transpose(1, 2)


class T2IFinalLayer(nn.Module):
    def __init__(self, width: int, outputs: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, outputs)
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)

    def forward(self, x: Tensor, time: Tensor, still: Tensor | None, moving: Tensor | None) -> Tensor:
        both = None if still is None else still.repeat(1, 2)
        modulation = Modulation(self.scale_shift_table, time.repeat(1, 2), both, moving)
        return self.linear(self.norm_final(x) * (1 + modulation[1]) + modulation[0])


class STDiT3(nn.Module):
    """forward(x [B, C, T, H, W], timestep [B], y [B, 1, L, D], mask [B or B / 2, L], x_mask [B, T], fps, height, width
    [B or B / 2]).

    Returns [B, 2 C, T, H, W] in float32. Rows are [conditional, unconditional]; `mask` has those of the prompts alone,
    as upstream gives it.
    """

    def __init__(
        self,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        in_channels: int = 4,
        caption_channels: int = 4096,
        model_max_length: int = 300,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        input_sq_size: int = 512,
    ):
        super().__init__()
        self.config = SimpleNamespace(
            hidden_size=hidden_size,
            depth=depth,
            num_heads=num_heads,
            in_channels=in_channels,
            patch_size=patch_size,
            pred_sigma=True,
            input_sq_size=input_sq_size,
        )
        outputs = 2 * in_channels * patch_size[0] * patch_size[1] * patch_size[2]
        self.rope = RotaryEmbedding(hidden_size // num_heads)
        self.x_embedder = PatchEmbed3D(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.fps_embedder = TimestepEmbedder(hidden_size)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))
        self.y_embedder = CaptionEmbedder(caption_channels, hidden_size, model_max_length)
        rotate = self.rope.rotate_queries_or_keys
        self.spatial_blocks = nn.ModuleList([STDiT3Block(hidden_size, num_heads) for _ in range(depth)])
        self.temporal_blocks = nn.ModuleList(
            [STDiT3Block(hidden_size, num_heads, rotate, temporal=True) for _ in range(depth)]
        )
        self.final_layer = T2IFinalLayer(hidden_size, outputs)

    def encode_text(self, y: Tensor, mask: Tensor | None) -> tuple[Tensor, list[int]]:
        """The texts of all rows in one, [1, sum of lengths, width], and their lengths."""
        text = self.y_embedder(y).squeeze(1)
        if mask is None:
            return text.flatten(0, 1)[None], [text.shape[1]] * len(text)
        mask = mask.flatten(1).repeat(len(text) // len(mask), 1)
        return text[mask != 0][None], mask.sum(dim=1).tolist()

    def forward(
        self,
        x: Tensor,
        timestep: Tensor,
        y: Tensor,
        mask: Tensor | None = None,
        x_mask: Tensor | None = None,
        *,
        fps: Tensor,
        height: Any,
        width: Any,
        **_: Any,
    ) -> Tensor:
        dtype = self.x_embedder.proj.weight.dtype
        batch, _, *size = x.shape
        patch = self.config.patch_size
        frames, rows, columns = (-(-extent // step) for extent, step in zip(size, patch, strict=True))

        rate = self.fps_embedder(fps.flatten())
        rate = rate.repeat(batch // len(rate), 1)
        time, still = self.t_embedder(timestep) + rate, None
        if x_mask is not None:
            still = self.t_embedder(torch.zeros_like(timestep)) + rate
            x_mask = x_mask.repeat_interleave(rows * columns, dim=1)[..., None]
        text, lengths = self.encode_text(y.to(dtype), mask)

        # Positions are scaled so that a square of `input_sq_size` pixels has the ones of training.
        scale = (height[0].item() * width[0].item()) ** 0.5 / self.config.input_sq_size
        base = round((rows * columns) ** 0.5)
        grid = [torch.arange(extent, device=x.device) / scale * (base / extent) for extent in (rows, columns)]
        h = self.x_embedder(x.to(dtype)).unflatten(1, (frames, -1)) + plane_positions(
            *grid, self.config.hidden_size
        ).to(dtype)
        h = h.flatten(1, 2)

        modulation = self.t_block(time), None if still is None else self.t_block(still)
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks, strict=True):
            for block in (spatial, temporal):
                h = block(h, text, lengths, frames, *modulation, x_mask)
        h = self.final_layer(h, time, still, x_mask)
        h = h.unflatten(2, (*patch, -1)).unflatten(1, (frames, rows, columns)).permute(0, 7, 1, 4, 2, 5, 3, 6)
        h = h.reshape(batch, -1, frames * patch[0], rows * patch[1], columns * patch[2])
        return h[:, :, : size[0], : size[1], : size[2]].float()
