"""What the embedded pipelines are made of, and what each is trained towards; the rest of training (`train.py`) is the
same for all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DDIMScheduler,
    LatteTransformer3DModel,
    UniPCMultistepScheduler,
    WanTransformer3DModel,
)
from torch.nn import functional as F
from transformers import T5Config, T5EncoderModel, T5Tokenizer, UMT5Config, UMT5EncoderModel

from fastercache.shapes.world import PLAIN, TEXTURED, World

TIMESTEPS = 1000


class Recipe(ABC):
    """The parts of one pipeline.

    prompt_tokens: the lengths to which the pipeline pads prompts, the usual one first. frames_per_latent: frames that
    one latent holds, as channels; the first holds the first frame only. autoencoder_batch: clips in a step of the
    autoencoder's training, and how many frames of each, drawn at random where not all. masks_empty: whether the
    pipeline zeroes the padding of the empty prompt. training: where the options of `train.py` have other defaults.
    """

    world: World
    prompt_tokens: tuple[int, ...]
    frames_per_latent: int
    autoencoder_batch: tuple[int, int]
    masks_empty: bool
    export_dtype: torch.dtype
    training: ClassVar[dict[str, Any]]

    @property
    def channels(self) -> int:
        """Channels of the latents."""
        return 3 * self.frames_per_latent

    def tokenizer(self) -> T5Tokenizer:
        vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -1.0) for word in self.words())]
        return T5Tokenizer(vocab=vocabulary, extra_ids=0)

    @abstractmethod
    def words(self) -> list[str]: ...

    @abstractmethod
    def text_encoder(self, vocabulary: int) -> Any: ...

    @abstractmethod
    def denoiser(self, text_width: int) -> Any: ...

    @abstractmethod
    def scheduler(self) -> Any: ...

    @abstractmethod
    def autoencoder(self) -> Any: ...

    @abstractmethod
    def noised(
        self, clean: torch.Tensor, noise: torch.Tensor, share_left: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Noisy latents, timesteps and what the denoiser is to predict, for uniform draws `[n]` of how much of the clip
        is left."""

    @abstractmethod
    def encoded(self, autoencoder: Any, clips: torch.Tensor) -> torch.Tensor:
        """The mean latents of clips `[n, 3, frames, size, size]`."""

    @abstractmethod
    def decoded(self, autoencoder: Any, latents: torch.Tensor) -> torch.Tensor:
        """The clips of latents."""

    def pin_posterior(self, autoencoder: Any) -> None:
        """Make the posterior a point: its log-variance is not learnt."""
        autoencoder.quant_conv.weight[self.channels :] = 0
        autoencoder.quant_conv.bias[self.channels :] = -10

    @abstractmethod
    def pipeline(self, **parts: Any) -> Any: ...

    @abstractmethod
    def use_float32_attention(self, denoiser: Any) -> None:
        """Attention with the products in float32: the bf16 backward of the CPU's fused attention is 4 times slower."""


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Attention in float32 of `[batch, tokens, heads, width]`, heads joined."""
    with torch.autocast(query.device.type, enabled=False):
        query, key, value = (x.transpose(1, 2).float() for x in (query, key, value))
        mixed = F.scaled_dot_product_attention(query, key, value)
    return mixed.transpose(1, 2).flatten(2)


# ---- shapes ----------------------------------------------------------------------------------------------------------


class Latte(Recipe):
    """ "shapes": a Latte with DDIM, guidance in one batch. v is predicted on a cosine schedule."""

    world = PLAIN
    prompt_tokens = (6, 120)
    """LattePipeline cuts a lone prompt to the first (every prompt of the world has as many tokens, end of sequence
    included), and pads a list of prompts to the second."""
    frames_per_latent = 1
    autoencoder_batch = (32, 1)
    masks_empty = False
    export_dtype = torch.bfloat16
    training: ClassVar[dict[str, Any]] = {}

    def __init__(self) -> None:
        self.alphas = self.scheduler().alphas_cumprod

    def words(self) -> list[str]:
        # Square, left and up are in the vocabulary, but no longer in the world: docs/shapes.md says why.
        return ["a", "moving", *self.world.colours, "circle", "square", "triangle", "left", "right", "up", "down"]

    def text_encoder(self, vocabulary: int) -> Any:
        return T5EncoderModel(
            T5Config(
                vocab_size=vocabulary,
                d_model=96,
                d_kv=24,
                d_ff=192,
                num_layers=2,
                num_heads=4,
                dropout_rate=0.0,
                feed_forward_proj="gated-gelu",
            )
        )

    def denoiser(self, text_width: int, width: int = 192, heads: int = 6, layers: int = 4) -> Any:
        # LattePipeline drops the second half of the output channels (a learned variance elsewhere), so twice as many go
        # out as come in.
        return LatteTransformer3DModel(
            num_attention_heads=heads,
            attention_head_dim=width // heads,
            in_channels=self.channels,
            out_channels=2 * self.channels,
            num_layers=layers,
            cross_attention_dim=width,
            attention_bias=True,
            sample_size=self.world.size // 4,
            patch_size=2,
            activation_fn="gelu-approximate",
            num_embeds_ada_norm=TIMESTEPS,
            norm_type="ada_norm_single",
            norm_elementwise_affine=False,
            norm_eps=1e-6,
            caption_channels=text_width,
            video_length=self.world.frames,
        )

    def scheduler(self) -> Any:
        return DDIMScheduler(
            num_train_timesteps=TIMESTEPS,
            beta_schedule="squaredcos_cap_v2",
            prediction_type="v_prediction",
            clip_sample=False,
            set_alpha_to_one=True,
            timestep_spacing="trailing",
            rescale_betas_zero_snr=True,
        )

    def autoencoder(self) -> Any:
        return AutoencoderKL(
            # One group: normalising two channels at a time, as 8 groups of 16 do, wipes out what the latents hold,
            # absolute colour.
            in_channels=3,
            out_channels=3,
            latent_channels=self.channels,
            block_out_channels=(16, 32, 64),
            layers_per_block=1,
            norm_num_groups=1,
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            mid_block_add_attention=False,
            sample_size=self.world.size,
            scaling_factor=1.0,
        )

    def noised(
        self, clean: torch.Tensor, noise: torch.Tensor, share_left: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        # Only the noisiest steps need the prompt to know where the shape is: drawn evenly, a tenth of the batch taught
        # direction, and after 1,000 steps it was not followed yet. This density puts a third of the batch above t =
        # 900.
        timestep = ((1 - share_left.square()) * len(self.alphas)).long().clamp(max=len(self.alphas) - 1)
        alpha = self.alphas[timestep].view(-1, 1, 1, 1, 1)
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        return noisy, timestep, alpha.sqrt() * noise - (1 - alpha).sqrt() * clean

    def encoded(self, autoencoder: Any, clips: torch.Tensor) -> torch.Tensor:
        latents = autoencoder.encode(clips.transpose(1, 2).flatten(0, 1)).latent_dist.mean
        return latents.unflatten(0, (len(clips), -1)).transpose(1, 2)

    def decoded(self, autoencoder: Any, latents: torch.Tensor) -> torch.Tensor:
        frames = autoencoder.decode(latents.transpose(1, 2).flatten(0, 1)).sample
        return frames.unflatten(0, (len(latents), -1)).transpose(1, 2)

    def pipeline(self, **parts: Any) -> Any:
        from diffusers import LattePipeline

        return LattePipeline(**parts)

    def use_float32_attention(self, denoiser: Any) -> None:
        from diffusers.models.attention_processor import Attention

        for module in denoiser.modules():
            if isinstance(module, Attention):
                module.set_processor(LatteAttention())


class LatteAttention:
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            x.unflatten(-1, (attn.heads, -1)) for x in (attn.to_q(hidden_states), attn.to_k(source), attn.to_v(source))
        )
        return attn.to_out[0](attend(query, key, value))


# ---- wan -------------------------------------------------------------------------------------------------------------


class Wan(Recipe):
    """ "wan": a Wan with UniPC on flow sigmas, guidance in two calls. The velocity of a rectified flow is predicted."""

    world = TEXTURED
    prompt_tokens = (8,)
    """One more than every prompt of the world has."""
    frames_per_latent = 4
    autoencoder_batch = (2, 9)
    masks_empty = True
    export_dtype = torch.float16
    training: ClassVar[dict[str, Any]] = dict(
        muon=True,
        learning_rate=2e-3,
        still_steps=400,
        still_batch=48,
        clip_steps=1500,
        wrong=0.25,
        wrong_from=1100,
        autoencoder_steps=1800,
        autoencoder_rate=3e-3,
    )
    density_shift = 6.0
    """Noise levels are drawn as s u / (1 + (s - 1) u): 40 % of a batch lie above 0.9."""

    def words(self) -> list[str]:
        spare = ["checkered", "square", "still"]
        return [
            "a",
            "moving",
            *self.world.colours,
            *self.world.shapes,
            *self.world.textures,
            *self.world.directions,
            *spare,
        ]

    def text_encoder(self, vocabulary: int) -> Any:
        return UMT5EncoderModel(
            UMT5Config(
                vocab_size=vocabulary,
                d_model=96,
                d_kv=24,
                d_ff=192,
                num_layers=2,
                num_heads=4,
                dropout_rate=0.0,
                feed_forward_proj="gated-gelu",
                is_encoder_decoder=False,
            )
        )

    def denoiser(self, text_width: int, width: int = 128, heads: int = 4, layers: int = 6) -> Any:
        return WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=heads,
            attention_head_dim=width // heads,
            in_channels=self.channels,
            out_channels=self.channels,
            text_dim=text_width,
            freq_dim=128,
            ffn_dim=4 * width,
            num_layers=layers,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            eps=1e-6,
            rope_max_seq_len=64,
        )

    def scheduler(self) -> Any:
        return UniPCMultistepScheduler(
            num_train_timesteps=TIMESTEPS,
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=5.0,
            solver_order=2,
        )

    def autoencoder(self) -> Any:
        return AutoencoderKLWan(
            base_dim=8,
            z_dim=self.channels,
            dim_mult=[1, 2, 4],
            num_res_blocks=1,
            temperal_downsample=[True, True],
            latents_mean=[0.0] * self.channels,
            latents_std=[1.0] * self.channels,
            scale_factor_temporal=4,
            scale_factor_spatial=4,
        )

    def noised(
        self, clean: torch.Tensor, noise: torch.Tensor, share_left: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        level = 1 - share_left
        level = self.density_shift * level / (1 + (self.density_shift - 1) * level)
        sigma = level.view(-1, 1, 1, 1, 1)
        return (1 - sigma) * clean + sigma * noise, level * TIMESTEPS, noise - clean

    def encoded(self, autoencoder: Any, clips: torch.Tensor) -> torch.Tensor:
        return autoencoder.encode(clips).latent_dist.mean

    def decoded(self, autoencoder: Any, latents: torch.Tensor) -> torch.Tensor:
        return autoencoder.decode(latents).sample

    def pipeline(self, **parts: Any) -> Any:
        from diffusers import WanPipeline

        return WanPipeline(**parts)

    def use_float32_attention(self, denoiser: Any) -> None:
        from diffusers.models.transformers.transformer_wan import WanAttention

        for module in denoiser.modules():
            if isinstance(module, WanAttention):
                module.set_processor(WanAttention32())


class WanAttention32:
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None, **_):
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = attn.to_q(hidden_states), attn.to_k(source), attn.to_v(source)
        query, key = attn.norm_q(query.float()), attn.norm_k(key.float())
        query, key, value = (x.unflatten(-1, (attn.heads, -1)) for x in (query, key, value))
        if rotary_emb is not None:
            query, key = rotated(query, *rotary_emb), rotated(key, *rotary_emb)
        return attn.to_out[0](attend(query, key, value))


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of neighbouring channels."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


RECIPES: dict[str, type[Recipe]] = {"shapes": Latte, "wan": Wan}
