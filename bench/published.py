"""The systems of `fastercache.report.published` as models with random weights: at their published sizes, or small, for
rehearsals."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bench.architectures import LatteT2V, STDiT3, VchitectXLTransformerModel

SCALES = ("published", "small")


@dataclass(frozen=True)
class Size:
    """The arguments of a model's class, and the shapes of one call for one video; `text` without the row."""

    model: dict[str, Any]
    latents: tuple[int, ...]
    text: tuple[int, ...]
    pooled: int = 0


@dataclass(frozen=True)
class Described:
    """model_class: a class, or the name of one in diffusers. extra: a call's arguments beside latents, text and
    timestep."""

    model_class: type[nn.Module] | str
    published: Size
    small: Size
    extra: Callable[[Size, int], dict[str, Any]] = lambda size, rows: {}

    def size(self, scale: str) -> Size:
        return self.published if scale == "published" else self.small


def _mask(size: Size, rows: int) -> dict[str, Any]:
    return {"encoder_attention_mask": torch.ones(rows, size.text[0], dtype=torch.bool)}


def _pixels(size: Size, rows: int) -> dict[str, Any]:
    height, width = (torch.full((1,), 8.0 * extent, dtype=torch.float32) for extent in size.latents[-2:])
    return {"fps": torch.full((1,), 24.0), "height": height, "width": width}


def _pooled(size: Size, rows: int) -> dict[str, Any]:
    return {"pooled_projections": torch.randn(rows, size.pooled)}


def _rotary(size: Size, rows: int) -> dict[str, Any]:
    """Cosines and sines for the video's tokens, as the pipeline makes them."""
    _, frames, _, height, width = size.latents
    angles = torch.randn(
        frames * (height // 2) * (width // 2), size.model.get("attention_head_dim", 64), dtype=torch.float32
    )
    return {"image_rotary_emb": (angles.cos(), angles.sin())}


LATTE = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 28,
    "cross_attention_dim": 1152,
    "attention_bias": True,
    "sample_size": 64,
    "patch_size": 2,
    "activation_fn": "gelu-approximate",
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_single",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "caption_channels": 4096,
    "video_length": 16,
}
COGVIDEOX_SMALL = {
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 32,
    "text_embed_dim": 32,
    "num_layers": 2,
    "sample_width": 12,
    "sample_height": 10,
    "sample_frames": 9,
    "max_text_seq_length": 8,
}
COGVIDEOX_LATENTS, COGVIDEOX_SMALL_LATENTS = (2, 13, 16, 60, 90), (2, 3, 4, 10, 12)

PUBLISHED: dict[str, Described] = {
    "open-sora-1.2": Described(
        STDiT3,
        Size({}, (2, 4, 57, 60, 106), (1, 300, 4096)),
        Size(
            {"hidden_size": 32, "depth": 2, "num_heads": 2, "caption_channels": 16, "model_max_length": 6},
            (2, 4, 3, 8, 10),
            (1, 6, 16),
        ),
        _pixels,
    ),
    "open-sora-plan-1.1": Described(
        LatteT2V,
        Size({}, (2, 4, 17, 64, 64), (1, 300, 4096)),
        Size(
            {
                "num_attention_heads": 2,
                "attention_head_dim": 16,
                "num_layers": 2,
                "sample_size": (8, 8),
                "caption_channels": 16,
            },
            (2, 4, 3, 8, 8),
            (1, 6, 16),
        ),
    ),
    "latte": Described(
        "LatteTransformer3DModel",
        Size(LATTE, (2, 4, 16, 64, 64), (120, 4096)),
        Size(
            LATTE
            | {
                "num_attention_heads": 2,
                "attention_head_dim": 16,
                "num_layers": 2,
                "cross_attention_dim": 32,
                "sample_size": 8,
                "caption_channels": 16,
                "video_length": 3,
            },
            (2, 4, 3, 8, 8),
            (6, 16),
        ),
    ),
    "cogvideox-2b": Described(
        "CogVideoXTransformer3DModel",
        Size({}, COGVIDEOX_LATENTS, (226, 4096)),
        Size(COGVIDEOX_SMALL, COGVIDEOX_SMALL_LATENTS, (8, 32)),
    ),
    "cogvideox-5b": Described(
        "CogVideoXTransformer3DModel",
        Size(
            {"num_attention_heads": 48, "num_layers": 42, "use_rotary_positional_embeddings": True},
            COGVIDEOX_LATENTS,
            (226, 4096),
        ),
        Size(COGVIDEOX_SMALL | {"use_rotary_positional_embeddings": True}, COGVIDEOX_SMALL_LATENTS, (8, 32)),
        _rotary,
    ),
    "vchitect-2.0": Described(
        VchitectXLTransformerModel,
        Size({}, (1, 40, 16, 54, 96), (77 + 256, 4096), pooled=2048),
        Size(
            {
                "sample_size": 16,
                "in_channels": 4,
                "num_layers": 2,
                "attention_head_dim": 16,
                "num_attention_heads": 2,
                "joint_attention_dim": 16,
                "caption_projection_dim": 32,
                "pooled_projection_dim": 8,
                "out_channels": 4,
                "pos_embed_max_size": 12,
            },
            (1, 3, 4, 8, 10),
            (6, 16),
            pooled=8,
        ),
        _pooled,
    ),
    "mochi": Described(
        "MochiTransformer3DModel",
        Size({}, (2, 12, 28, 60, 106), (256, 4096)),
        Size(
            {
                "num_attention_heads": 2,
                "attention_head_dim": 16,
                "num_layers": 2,
                "pooled_projection_dim": 16,
                "in_channels": 4,
                "text_embed_dim": 16,
                "time_embed_dim": 16,
            },
            (2, 4, 3, 8, 10),
            (6, 16),
        ),
        _mask,
    ),
    "hunyuan-video": Described(
        "HunyuanVideoTransformer3DModel",
        Size({}, (1, 16, 33, 90, 160), (256, 4096), pooled=768),
        Size(
            {
                "in_channels": 4,
                "out_channels": 4,
                "num_attention_heads": 2,
                "attention_head_dim": 16,
                "num_layers": 1,
                "num_single_layers": 2,
                "num_refiner_layers": 1,
                "text_embed_dim": 16,
                "pooled_projection_dim": 8,
                "rope_axes_dim": (4, 6, 6),
            },
            (1, 4, 3, 8, 10),
            (6, 16),
            pooled=8,
        ),
        lambda size, rows: _mask(size, rows) | _pooled(size, rows) | {"guidance": torch.full((rows,), 6000.0)},
    ),
}
"""By the name of the system."""


def class_of(system: str) -> type[nn.Module]:
    named = PUBLISHED[system].model_class
    if not isinstance(named, str):
        return named
    try:
        import diffusers
    except ImportError as error:
        raise SystemExit(
            f"{system} is diffusers' {named}, and diffusers is not installed ({error}): pip install diffusers"
        ) from error
    return getattr(diffusers, named)


@contextmanager
def _made_as(dtype: torch.dtype, device: str) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def build(
    system: str, scale: str = "published", device: str = "meta", dtype: torch.dtype = torch.float32
) -> tuple[nn.Module, dict[str, Any]]:
    """A model on a device, by default without weights or values, and the arguments of one call for one video."""
    described = PUBLISHED[system]
    size, model_class = described.size(scale), class_of(system)
    rows = size.latents[0]
    torch.manual_seed(0)
    with _made_as(dtype, device), torch.no_grad():
        model = model_class(**size.model).eval().requires_grad_(False)
        latents = "x" if model_class is STDiT3 else "hidden_states"
        text = "y" if model_class is STDiT3 else "encoder_hidden_states"
        whole = model_class.__name__ in (
            "CogVideoXTransformer3DModel",
            "LatteTransformer3DModel",
        )  # their pipelines' timesteps
        arguments: dict[str, Any] = {
            latents: torch.randn(size.latents),
            text: torch.randn(rows, *size.text),
            "timestep": torch.full((rows,), 999, dtype=torch.int64 if whole else torch.float32),
        }
        arguments |= described.extra(size, rows) | ({} if model_class is STDiT3 else {"return_dict": False})
        if device == "meta":
            _without_values(model)
        else:
            for parameter in model.parameters():
                if not parameter.any():  # where training starts at zero, nothing would go on to the blocks behind
                    parameter.normal_(std=0.02)
    return model, arguments


def _without_values(model: nn.Module) -> None:
    """Mochi makes its rotary positions under autocast, which does not know the meta device."""
    if type(model).__name__ == "MochiTransformer3DModel":

        def empty(frequencies: Any, frames: int, rows: int, columns: int, **_: Any) -> tuple[torch.Tensor, ...]:
            return (torch.empty(frames * rows * columns, 24, 64, device="meta"),) * 2

        model.get_submodule("rope").forward = empty  # type: ignore[method-assign]
