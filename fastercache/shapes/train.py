"""Train the "shapes" pipeline from nothing: `python -m fastercache.shapes.train --run runs/shapes`.

Three stages, each resumable from its last checkpoint under `--run`:

1. `stills`: the denoiser and its T5 text encoder on single frames, where colour and shape are learnt at an eighth of a clip's cost.
2. `clips`: the same on clips, where direction is learnt. From `--wrong-from` on, a share of the captions is replaced by a random one, so
   that the conditional branch alone stays unsure and guidance has something to do.
3. `autoencoder`: a small `AutoencoderKL` for the latents that `LatentSpace` defines.

The denoiser predicts v, because the noisiest steps decide what the clip shows, and there an epsilon loss hardly tells right from
wrong. The exported weights are an exponential moving average. Every draw comes from `(--seed, stage, step)`, so a resumed run
sees the data an uninterrupted one would.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from diffusers import AutoencoderKL, DDIMScheduler, LatteTransformer3DModel
from diffusers.models.attention_processor import Attention
from torch import nn
from torch.nn import functional as F
from transformers import T5Config, T5EncoderModel, T5Tokenizer

from fastercache.shapes.world import COLOURS, FRAMES, SCENES, SIZE, Scene, sample_clips

PROMPT_TOKENS = 6
"""Tokens of every prompt of the world, end of sequence included: the length LattePipeline cuts a lone prompt to."""
LATENT_CHANNELS = 3
PADDED_TOKENS = 120
"""The length LattePipeline pads a list of prompts to."""


# ---- the parts of the pipeline --------------------------------------------------------------------------------------------------


def build_tokenizer() -> T5Tokenizer:
    # Square, left and up are in the vocabulary, but no longer in the world: docs/shapes.md says why.
    words = ["a", "moving", *COLOURS, "circle", "square", "triangle", "left", "right", "up", "down"]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -1.0) for word in words)]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0)


def build_text_encoder(vocabulary: int) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=vocabulary, d_model=96, d_kv=24, d_ff=192, num_layers=2, num_heads=4, dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
        )
    )  # fmt: skip


def build_autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        # One group: normalising two channels at a time, as 8 groups of 16 do, wipes out the very thing the latents hold, absolute colour.
        in_channels=3, out_channels=3, latent_channels=LATENT_CHANNELS, block_out_channels=(16, 32, 64), layers_per_block=1,
        norm_num_groups=1, down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        mid_block_add_attention=False, sample_size=SIZE, scaling_factor=1.0,
    )  # fmt: skip


def build_denoiser(text_width: int, width: int = 192, heads: int = 6, layers: int = 4) -> LatteTransformer3DModel:
    # LattePipeline drops the second half of the output channels (a learned variance elsewhere), so twice as many go out as come in.
    return LatteTransformer3DModel(
        num_attention_heads=heads, attention_head_dim=width // heads, in_channels=LATENT_CHANNELS, out_channels=2 * LATENT_CHANNELS,
        num_layers=layers, cross_attention_dim=width, attention_bias=True, sample_size=SIZE // 4, patch_size=2,
        activation_fn="gelu-approximate", num_embeds_ada_norm=1000, norm_type="ada_norm_single", norm_elementwise_affine=False,
        norm_eps=1e-6, caption_channels=text_width, video_length=FRAMES,
    )  # fmt: skip


def build_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False,
        set_alpha_to_one=True, timestep_spacing="trailing", rescale_betas_zero_snr=True,
    )  # fmt: skip


M = TypeVar("M", bound=nn.Module)


class Denoiser(nn.Module):
    """The text encoder and the transformer, trained together."""

    def __init__(self, tokenizer: Any):
        super().__init__()
        self.text_encoder = build_text_encoder(len(tokenizer))
        self.transformer = build_denoiser(self.text_encoder.config.d_model)

    def forward(self, noisy, timestep, tokens, token_mask, feature_mask):
        text = self.text_encoder(tokens, attention_mask=token_mask)[0] * feature_mask
        return self.transformer(noisy, timestep=timestep, encoder_hidden_states=text, return_dict=False)[0][:, :LATENT_CHANNELS]


class Float32Attention:
    """Self- and cross-attention with the products in float32: the bf16 backward of the CPU's fused attention is 4 times slower."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            x.unflatten(-1, (attn.heads, -1)).transpose(1, 2).float()
            for x in (attn.to_q(hidden_states), attn.to_k(source), attn.to_v(source))
        )
        with torch.autocast(hidden_states.device.type, enabled=False):
            mixed = F.scaled_dot_product_attention(query, key, value)
        return attn.to_out[0](mixed.transpose(1, 2).flatten(2))


# ---- one loop for all stages ------------------------------------------------------------------------------------------------------


@dataclass
class Stage:
    """A named run of optimisation steps whose state lives in `<run>/<name>.pt` and whose log in `<run>/log.jsonl`."""

    name: str
    steps: int
    learning_rate: float
    run: Path
    seed: int
    decay_to: float = 0.05
    ema_decay: float = 0.995
    checkpoint_every: int = 200

    def train(self, model: M, loss_of_step: Callable[[torch.Generator, int], torch.Tensor]) -> M:
        """Run to the last step and return the averaged weights' model; `loss_of_step(generator, step)` gives a scalar."""
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
        warmup, cooldown = min(100, self.steps // 10 + 1), max(1, self.steps // 3)

        def rate(step: int) -> float:
            left = min(1.0, (self.steps - step) / cooldown)
            return min(1.0, (step + 1) / warmup) * (self.decay_to + (1 - self.decay_to) * left)

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)

        def blend(averaged: torch.Tensor, current: torch.Tensor, count: torch.Tensor | int) -> torch.Tensor:
            # Young averages forget faster: at a constant 0.998, the random start would still weigh 13 % after 1,000 steps.
            return torch.lerp(current, averaged, min(self.ema_decay, (1 + int(count)) / (10 + int(count))))

        average = torch.optim.swa_utils.AveragedModel(model, avg_fn=blend)
        path, first, spent = self.run / f"{self.name}.pt", 0, 0.0
        if path.exists():
            state = torch.load(path, weights_only=True)
            model.load_state_dict(state["model"])
            average.load_state_dict(state["average"])
            optimizer.load_state_dict(state["optimizer"])
            schedule.load_state_dict(state["schedule"])
            first, spent = state["step"], state["seconds"]
        start, running = time.monotonic() - spent, None
        for step in range(first, self.steps):
            generator = torch.Generator().manual_seed(self._seed(step))
            loss = loss_of_step(generator, step)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            average.update_parameters(model)
            value = float(loss.detach())
            running = value if running is None else 0.98 * running + 0.02 * value
            done = step + 1
            if done % 20 == 0 or done == self.steps:
                seconds = time.monotonic() - start
                row = {"stage": self.name, "step": done, "loss": round(running, 5), "seconds": round(seconds, 1)}
                with (self.run / "log.jsonl").open("a") as log:
                    log.write(json.dumps(row) + "\n")
                print(f"{self.name} {done}/{self.steps}  loss {running:.4f}  {seconds / 60:.1f} min", flush=True)
            if done % self.checkpoint_every == 0 or done == self.steps:
                state = {
                    "model": model.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict(),
                    "schedule": schedule.state_dict(), "step": done, "seconds": time.monotonic() - start,
                }  # fmt: skip
                torch.save(state, path.with_suffix(".tmp"))
                path.with_suffix(".tmp").replace(path)
        return cast(M, average.module)

    def _seed(self, step: int) -> int:
        return (self.seed * 1_000_003 + sum(map(ord, self.name))) * 1_000_003 + step


def random_scenes(count: int, generator: torch.Generator) -> list[Scene]:
    return [SCENES[i] for i in torch.randint(len(SCENES), (count,), generator=generator).tolist()]


# ---- the latent space -------------------------------------------------------------------------------------------------------------


class LatentSpace:
    """What the latents mean: frames averaged over 4x4 pixels, with the three colour channels whitened over the world.

    An autoencoder left to itself spent its first 800 steps on the backgrounds and gave every shape the same colour; with anchored latents
    the denoiser does not even have to wait for it. Whitening makes an object's hue as loud as the grey it moves over.
    """

    def __init__(self, seed: int):
        frames = sample_clips(list(SCENES) * 4, torch.Generator().manual_seed(seed)).transpose(1, 2).flatten(0, 1)
        colours = F.avg_pool2d(frames, 4).double().transpose(0, 1).flatten(1)
        self.mean = colours.mean(1)
        self.whitening = torch.linalg.inv(torch.linalg.cholesky(colours.cov()))

    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        """Frames `[n, 3, SIZE, SIZE]` in [-1, 1] to latents `[n, 3, SIZE / 4, SIZE / 4]`."""
        pooled = F.avg_pool2d(frames, 4).double() - self.mean.to(frames.device)[:, None, None]
        return torch.einsum("ij,njhw->nihw", self.whitening.to(frames.device), pooled).float()


def train_autoencoder(space: LatentSpace, run: Path, steps: int, seed: int, device: str) -> AutoencoderKL:
    """The encoder learns to give the anchored latents, the decoder to give the frames back from slightly noisy ones."""
    torch.manual_seed(seed)
    model = build_autoencoder().to(device)

    def loss_of_step(generator, step):
        clips = sample_clips(random_scenes(32, generator), generator)
        frames = clips[torch.arange(32), :, torch.randint(FRAMES, (32,), generator=generator)]
        latents = space.encode(frames)
        noisy = latents + 0.1 * torch.randn(latents.shape, generator=generator)
        frames, latents, noisy = frames.to(device), latents.to(device), noisy.to(device)
        with torch.autocast(device, torch.bfloat16):
            encoded, decoded = model.encode(frames).latent_dist.mean, model.decode(noisy).sample
        # The object is a tenth of the frame, and its colour is what matters: it counts ten times.
        weight = 1 + 9 * ((frames - frames[:, :, :1, :1]).abs().amax(1, keepdim=True) > 0.05)
        error = decoded.float() - frames
        return (weight * (error.abs() + error.square())).mean() + 0.1 * F.mse_loss(encoded.float(), latents)

    model = Stage("autoencoder", steps, 2e-3, run, seed, ema_decay=0.99).train(model, loss_of_step).eval()
    with torch.no_grad():  # The posterior is a point: its log-variance is not learnt.
        model.quant_conv.weight[LATENT_CHANNELS:] = 0
        model.quant_conv.bias[LATENT_CHANNELS:] = -10
    return model


# ---- stages 2 and 3 -----------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def encode_pool(space: LatentSpace, run: Path, clips: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents of `clips` rendered clips (bf16 `[clips, 3, FRAMES, 16, 16]`) and the index of each one's scene; kept on disk."""
    path = run / f"pool-{clips}.pt"
    if not path.exists():
        generator = torch.Generator().manual_seed(seed + 1)
        scene = torch.arange(clips) % len(SCENES)
        latents = []
        for chunk in scene.split(64):
            frames = sample_clips([SCENES[i] for i in chunk.tolist()], generator).transpose(1, 2).flatten(0, 1)
            latents.append(space.encode(frames).unflatten(0, (len(chunk), FRAMES)).transpose(1, 2).bfloat16())
        torch.save((torch.cat(latents), scene), path)
    return torch.load(path, weights_only=True)


class CaptionedBatches:
    """Draws noisy latents and captions the way LattePipeline will present them."""

    def __init__(self, pool, tokenizer, device: str):
        self.latents, self.scene = pool
        prompts = [scene.prompt for scene in SCENES] + [""]
        self.tokens, self.mask = {}, {}
        for length in (PROMPT_TOKENS, PADDED_TOKENS):
            encoded = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
            self.tokens[length], self.mask[length] = encoded.input_ids, encoded.attention_mask
        self.alphas = build_scheduler().alphas_cumprod
        self.device = device

    def draw(self, generator, batch: int, still: bool, drop: float, wrong: float, padded: float):
        rows = torch.randint(len(self.latents), (batch,), generator=generator)
        clean = self.latents[rows].float()
        if still:
            frame = torch.randint(clean.shape[2], (batch,), generator=generator)
            clean = clean[torch.arange(batch), :, frame][:, :, None]
        # Only the noisiest steps need the prompt to know where the shape is: drawn evenly, a tenth of the batch taught direction, and after
        # 1,000 steps it was not followed yet. This density puts a third of the batch above t = 900.
        share_left = torch.rand(batch, generator=generator).square()
        timestep = ((1 - share_left) * len(self.alphas)).long().clamp(max=len(self.alphas) - 1)
        alpha = self.alphas[timestep].view(-1, 1, 1, 1, 1)
        noise = torch.randn(clean.shape, generator=generator)
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean

        def share(probability):
            return torch.rand(batch, generator=generator) < probability

        caption = self.scene[rows]
        caption = torch.where(share(wrong), torch.randint(len(SCENES), (batch,), generator=generator), caption)
        dropped = share(drop)
        caption = torch.where(dropped, len(SCENES), caption)
        length = PADDED_TOKENS if float(torch.rand((), generator=generator)) < padded else PROMPT_TOKENS
        mask = self.mask[length][caption]
        # The pipeline zeroes the padding of a prompt, but not that of the empty prompt.
        features = torch.where(dropped[:, None], 1, mask)[..., None].float()
        inputs = (noisy, timestep, self.tokens[length][caption], mask, features)
        return tuple(x.to(self.device) for x in inputs), velocity.to(self.device)


def train_denoiser(args, space: LatentSpace, tokenizer: T5Tokenizer) -> Denoiser:
    data = CaptionedBatches(encode_pool(space, args.run, args.pool, args.seed), tokenizer, args.device)
    torch.manual_seed(args.seed)
    model = Denoiser(tokenizer).to(args.device)
    if args.init is not None:
        model.text_encoder.load_state_dict(T5EncoderModel.from_pretrained(args.init / "text_encoder").float().state_dict())
        model.transformer.load_state_dict(LatteTransformer3DModel.from_pretrained(args.init / "transformer").float().state_dict())
    if args.device == "cpu":
        for module in model.transformer.modules():
            if isinstance(module, Attention):
                module.set_processor(Float32Attention())
    forward = torch.compile(model, dynamic=False) if args.compile else model

    def loss_of(still: bool, batch: int, wrong_from: int):
        def loss_of_step(generator, step):
            wrong = args.wrong if step >= wrong_from else 0.0
            inputs, velocity = data.draw(generator, batch, still, drop=0.12, wrong=wrong, padded=0.2)
            with torch.autocast(args.device, torch.bfloat16):
                predicted = forward(*inputs)
            return F.mse_loss(predicted.float(), velocity)

        return loss_of_step

    stills = Stage("stills", args.still_steps, args.learning_rate, args.run, args.seed, decay_to=1.0)
    stills.train(model, loss_of(True, args.still_batch, wrong_from=args.still_steps))
    clips = Stage("clips", args.clip_steps, args.learning_rate, args.run, args.seed)
    return clips.train(model, loss_of(False, args.clip_batch, args.wrong_from)).eval()


# ---- the pipeline -------------------------------------------------------------------------------------------------------------------


def export(directory: Path, autoencoder, tokenizer, denoiser: Denoiser) -> None:
    """Write a diffusers pipeline directory in bf16 safetensors."""
    from diffusers import LattePipeline

    transformer = build_denoiser(denoiser.text_encoder.config.d_model)
    transformer.load_state_dict(denoiser.transformer.state_dict())
    pipeline = LattePipeline(
        tokenizer=tokenizer, text_encoder=denoiser.text_encoder, vae=autoencoder, transformer=transformer, scheduler=build_scheduler()
    )
    pipeline.to("cpu", torch.bfloat16).save_pretrained(directory, safe_serialization=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/shapes"), help="checkpoints and log; an existing one is resumed")
    parser.add_argument("--export", type=Path, default=None, help="where the pipeline goes (default: <run>/pipeline)")
    parser.add_argument(
        "--init", type=Path, default=None, help="a pipeline directory to go on from: its denoiser is trained, its autoencoder kept"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pool", type=int, default=4800, help="rendered clips to learn from")
    parser.add_argument("--autoencoder-steps", type=int, default=500)
    parser.add_argument("--still-steps", type=int, default=1200)
    parser.add_argument("--still-batch", type=int, default=64)
    parser.add_argument("--clip-steps", type=int, default=2400)
    parser.add_argument("--clip-batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--wrong", type=float, default=0.2, help="share of captions replaced by a random one")
    parser.add_argument("--wrong-from", type=int, default=2200, help="step of the clips stage from which they are")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile the denoiser")
    args = parser.parse_args()
    args.run.mkdir(parents=True, exist_ok=True)

    tokenizer = build_tokenizer()
    space = LatentSpace(args.seed)
    denoiser = train_denoiser(args, space, tokenizer)
    if args.init is None:
        autoencoder = train_autoencoder(space, args.run, args.autoencoder_steps, args.seed, args.device)
    else:
        autoencoder = AutoencoderKL.from_pretrained(args.init / "vae")
    export(args.export or args.run / "pipeline", autoencoder, tokenizer, denoiser)


if __name__ == "__main__":
    main()
