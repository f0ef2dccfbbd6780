"""Stand-ins for two upstream classes whose libraries are not installed: their names, their parts, their calls, and no
more."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def patches_of(x: Tensor, channels: int) -> Tensor:
    """Patches of 2 x 2: [B, frames, rows, columns, channels, 2, 2], from a video whose channels are dimension
    `channels`."""
    return x.unfold(3, 2, 2).unfold(4, 2, 2).movedim(channels, -3)


def video_of(patches: Tensor, channels: int) -> Tensor:
    """The way back."""
    return patches.movedim(-3, channels).transpose(4, 5).flatten(5, 6).flatten(3, 4)


class SelfAttention(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.query_key_value, self.dense = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, hidden_states: Tensor, mask: Tensor) -> Tensor:
        if not (mask > 0).all():
            raise NotImplementedError("a causal mask")
        return self.dense(F.scaled_dot_product_attention(*self.query_key_value(hidden_states).chunk(3, dim=-1)))


class Layer(nn.Module):
    """Its own forward is SAT's default, another than the model's."""

    def __init__(self, width: int):
        super().__init__()
        self.attention, self.mlp = SelfAttention(width), nn.Linear(width, width)

    def forward(self, hidden_states: Tensor, mask: Tensor, *args: object, **kw_args: object) -> Tensor:
        return self.mlp(hidden_states + self.attention(hidden_states, mask))


class AdaLN(nn.Module):
    """The mixin with the model's own layers, found by their numbers."""

    def __init__(self, transformer: nn.Module, width: int):
        super().__init__()
        object.__setattr__(self, "transformer", transformer)  # no module of this one
        self.modulations = nn.ModuleList(nn.Linear(1, width) for _ in transformer.layers)

    def layer_forward(self, hidden_states: Tensor, mask: Tensor, *args: object, **kwargs: object) -> Tensor:
        layer, modulation = self.transformer.layers[kwargs["layer_id"]], self.modulations[kwargs["layer_id"]]
        h = hidden_states * (1 + modulation(kwargs["emb"])[:, None])
        h = hidden_states + layer.attention(torch.tanh(h), mask)
        return h + layer.mlp(torch.tanh(h))


class BaseTransformer(nn.Module):
    def __init__(self, width: int, layers: int):
        super().__init__()
        self.hooks: dict = {}
        self.layers = nn.ModuleList(Layer(width) for _ in range(layers))

    def forward(self, h: Tensor, mask: Tensor, **kw_args: object) -> Tensor:
        for number, layer in enumerate(self.layers):
            call = self.hooks.get("layer_forward", layer)
            h = call(h, mask, layer_id=torch.tensor(number), **kw_args, output_this_layer={}, output_cross_layer={})
        return h


class DiffusionTransformer(nn.Module):
    """SAT's CogVideoX: `transformer.layers`, each with `attention` and `mlp`, over [text, video] in one sequence, and
    called by a hook."""

    def __init__(self, hidden_size: int = 16, num_layers: int = 2, channels: int = 2, patch_size: object = (1, 2, 2)):
        super().__init__()
        self.hidden_size, self.num_layers, self.out_channels, self.patch_size = (
            hidden_size,
            num_layers,
            channels,
            patch_size,
        )
        self.dtype = torch.float32
        self.transformer, self.mixins = BaseTransformer(hidden_size, num_layers), nn.ModuleDict()
        self.add_mixin("adaln_layer", AdaLN(self.transformer, hidden_size))
        self.patch, self.text, self.final = (
            nn.Linear(4 * channels, hidden_size),
            nn.Linear(12, hidden_size),
            nn.Linear(hidden_size, 4 * channels),
        )

    def add_mixin(self, name: str, mixin: nn.Module) -> None:
        self.mixins[name] = mixin
        self.hooks = {"layer_forward": self.mixins["adaln_layer"].layer_forward}

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor, **kwargs: object) -> Tensor:
        patches = patches_of(x.to(self.dtype), 2)
        h = torch.cat([self.text(context), self.patch(patches.flatten(4).flatten(1, 3))], dim=1)
        self.transformer.hooks.clear()
        self.transformer.hooks.update(self.hooks)
        h = self.transformer(h, torch.ones((1, 1)).to(h.dtype), emb=timesteps[:, None].to(h.dtype) / 1000)
        return video_of(self.final(h[:, context.shape[1] :]).reshape(patches.shape), 2)


class AsymmetricAttention(nn.Module):
    computed_in: torch.dtype | None = None

    def __init__(self, x: int, y: int, update_y: bool):
        super().__init__()
        self.qkv_x, self.qkv_y, self.proj_x = nn.Linear(x, 3 * x), nn.Linear(y, 3 * x), nn.Linear(x, x)
        self.proj_y = nn.Linear(x, y) if update_y else nn.Identity()

    def forward(self, x: Tensor, y: Tensor, *, scale_x: Tensor, packed_indices: dict) -> tuple[Tensor, Tensor]:
        qkv_x = self.qkv_x(x * scale_x)
        assert self.computed_in is None or qkv_x.dtype == self.computed_in
        h = F.scaled_dot_product_attention(*torch.cat([qkv_x, self.qkv_y(y)], dim=1).chunk(3, dim=-1))
        return self.proj_x(h[:, : x.shape[1]]), self.proj_y(h[:, x.shape[1] :])


class AsymmetricJointBlock(nn.Module):
    """With upstream's signature: two streams, of the video and of the text, and what they are modulated by between
    them."""

    def __init__(self, x: int, y: int, update_y: bool):
        super().__init__()
        self.update_y = update_y
        self.attn, self.mlp_x = AsymmetricAttention(x, y, update_y), nn.Linear(x, x)
        if update_y:
            self.mlp_y = nn.Linear(y, y)

    def forward(self, x: Tensor, c: Tensor, y: Tensor, **attn_kwargs: object) -> tuple[Tensor, Tensor]:
        attended, text = self.attn(x, y, scale_x=c, **attn_kwargs)
        x = x + torch.tanh(attended)
        x = self.ff_block_x(x)
        if self.update_y:
            y = y + torch.tanh(text)
            y = self.ff_block_y(y)
        return x, y

    def ff_block_x(self, x: Tensor) -> Tensor:
        return x + self.mlp_x(torch.tanh(x))

    def ff_block_y(self, y: Tensor) -> Tensor:
        return y + self.mlp_y(torch.tanh(y))


class AsymmDiTJoint(nn.Module):
    """Mochi as released: `blocks`, each with `attn`, `mlp_x` and, but for the last, `mlp_y`; texts come as lists."""

    def __init__(self, x: int = 16, y: int = 12, depth: int = 2, channels: int = 2):
        super().__init__()
        self.hidden_size_x, self.hidden_size_y, self.out_channels, self.patch_size = x, y, channels, 2
        self.x_embedder, self.final_layer = nn.Linear(4 * channels, x), nn.Linear(x, 4 * channels)
        self.blocks = nn.ModuleList(AsymmetricJointBlock(x, y, update_y=layer < depth - 1) for layer in range(depth))

    def forward(
        self, x: Tensor, sigma: Tensor, y_feat: list[Tensor], y_mask: list[Tensor], packed_indices: dict
    ) -> Tensor:
        patches = patches_of(x, 1)
        h, y = self.x_embedder(patches.flatten(4).flatten(1, 3)), y_feat[0]
        for block in self.blocks:
            h, y = block(h, 1 + sigma[:, None, None], y, packed_indices=packed_indices)
        return video_of(self.final_layer(h).reshape(patches.shape), 1)


def sat_call(rows: int) -> dict:
    generator = torch.Generator().manual_seed(0)
    x, context = (torch.randn(shape, generator=generator) for shape in ((rows, 3, 2, 8, 6), (rows, 5, 12)))
    return {"x": x, "timesteps": torch.full((rows,), 500.0), "context": context}


def mochi_calls(rows: int) -> SimpleNamespace:
    """The conditional and the unconditional call of a step."""
    generator = torch.Generator().manual_seed(0)
    latents = {"x": torch.randn((rows, 2, 3, 8, 6), generator=generator), "sigma": torch.full((rows,), 0.5)}
    mask, packed = [torch.ones(rows, 5, dtype=torch.bool)], {"max_seqlen_in_batch_kv": 41}
    texts = [[torch.randn((rows, 5, 12), generator=generator)] for _ in range(2)]
    cond, uncond = (latents | {"y_feat": text, "y_mask": mask, "packed_indices": packed} for text in texts)
    return SimpleNamespace(cond=cond, uncond=uncond)
