"""What the architectures share: embeddings of positions, time and patches, attention over heads, MLPs."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sinusoids(positions: Tensor, width: int) -> Tensor:
    """[n] -> [n, width], the sines and then the cosines of `width` / 2 frequencies from 1 down to 1 / 10000."""
    exponents = torch.arange(width // 2, dtype=torch.float64, device=positions.device) / (width // 2)
    angles = positions.double()[:, None] * 10000.0**-exponents
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()


def plane_positions(rows: Tensor, columns: Tensor, width: int) -> Tensor:
    """Positions of a grid -> [1, rows * columns, width]: half the channels from the column, half from the row."""
    row = sinusoids(rows, width // 2)[:, None].expand(-1, len(columns), -1)
    column = sinusoids(columns, width // 2)[None].expand(len(rows), -1, -1)
    return torch.cat([column, row], dim=-1).flatten(0, 1)[None]


def time_features(time: Tensor, width: int = 256) -> Tensor:
    """[n] -> [n, width], cosines before sines."""
    frequencies = torch.exp(-math.log(10000.0) * torch.arange(width // 2, device=time.device) / (width // 2))
    angles = time.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def attend(query: Tensor, key: Tensor, value: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention of [batch, tokens, width] tensors, split in heads; `bias` is added to the scores."""
    query, key, value = (tensor.unflatten(2, (heads, -1)).transpose(1, 2) for tensor in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias).transpose(1, 2).flatten(2)


class TimestepEmbedding(nn.Module):
    """Two linear layers with SiLU between, under diffusers' names."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.linear_1 = nn.Linear(inputs, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(x)))


class PatchEmbed(nn.Module):
    """[n, channels, H, W] -> [n, tokens, width], without positions."""

    def __init__(self, channels: int, width: int, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class GELU(nn.Module):
    """A linear layer with the tanh approximation of GELU, under diffusers' name `proj`."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.proj = nn.Linear(inputs, width)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate="tanh")


class FeedForward(nn.Module):
    """An MLP of four times the width, under diffusers' names: `net.0.proj`, `net.2`."""

    def __init__(self, width: int):
        super().__init__()
        self.net = nn.ModuleList([GELU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net:
            x = layer(x)
        return x


def unpatchify(tokens: Tensor, height: int, width: int, patch: int) -> Tensor:
    """[n, height * width, patch * patch * channels] -> [n, channels, patch * height, patch * width]."""
    grid = tokens.unflatten(2, (patch, patch, -1)).unflatten(1, (height, width))
    return grid.permute(0, 5, 1, 3, 2, 4).reshape(len(tokens), -1, height * patch, width * patch)
