"""Train an embedded pipeline from nothing: `python -m fastercache.shapes.train --pipeline shapes --run runs/shapes`.

Three stages, each resumable from its last checkpoint under `--run`:

1. `stills`: the denoiser and its text encoder on single latents, where colour and shape are learnt at a fraction of a
clip's cost. 2. `clips`: the same on clips, where direction is learnt. From `--wrong-from` on, a share of the captions
   is replaced by a random one, so that the conditional branch alone stays unsure and guidance has something to do.
3. `autoencoder`: a small autoencoder for the latents that `LatentSpace` defines.

The denoiser predicts a velocity (of the cosine schedule, or of the straight path to noise: `recipes.py`), because the
noisiest steps decide what the clip shows, and there an epsilon loss hardly tells right from wrong. The exported weights
are an exponential moving average. Every draw comes from `(--seed, stage, step)`, so a resumed run sees the data an
uninterrupted one would.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.nn import functional as F

from fastercache.shapes.recipes import RECIPES, Latte, Recipe
from fastercache.shapes.world import Scene

M = TypeVar("M", bound=nn.Module)


class Denoiser(nn.Module):
    """The text encoder and the transformer, trained together."""

    def __init__(self, recipe: Recipe, tokenizer: Any):
        super().__init__()
        self.channels = recipe.channels
        self.text_encoder: Any = recipe.text_encoder(len(tokenizer))
        self.transformer: Any = recipe.denoiser(self.text_encoder.config.d_model)

    def forward(self, noisy, timestep, tokens, token_mask, feature_mask):
        text = self.text_encoder(tokens, attention_mask=token_mask)[0] * feature_mask
        return self.transformer(noisy, timestep=timestep, encoder_hidden_states=text, return_dict=False)[0][
            :, : self.channels
        ]


# ---- one loop for all stages -----------------------------------------------------------------------------------------


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
    muon: bool = False

    def train(self, model: M, loss_of_step: Callable[[torch.Generator, int], torch.Tensor]) -> M:
        """Run to the last step and return the averaged weights' model; `loss_of_step(generator, step)` gives a
        scalar."""
        optimizers = self.optimizers(model)
        warmup, cooldown = min(100, self.steps // 10 + 1), max(1, self.steps // 3)

        def rate(step: int) -> float:
            left = min(1.0, (self.steps - step) / cooldown)
            return min(1.0, (step + 1) / warmup) * (self.decay_to + (1 - self.decay_to) * left)

        schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
        parts: list[Any] = [*optimizers, *schedules]

        def blend(averaged: torch.Tensor, current: torch.Tensor, count: torch.Tensor | int) -> torch.Tensor:
            # Young averages forget faster: at a constant 0.998, the random start would still weigh 13 % after 1,000
            # steps.
            return torch.lerp(current, averaged, min(self.ema_decay, (1 + int(count)) / (10 + int(count))))

        average = torch.optim.swa_utils.AveragedModel(model, avg_fn=blend)
        path, first, spent = self.run / f"{self.name}.pt", 0, 0.0
        if path.exists():
            state = torch.load(path, weights_only=True)
            model.load_state_dict(state["model"])
            average.load_state_dict(state["average"])
            for part, saved in zip(parts, state["optimizers"] + state["schedules"], strict=True):
                part.load_state_dict(saved)
            first, spent = state["step"], state["seconds"]
        start, running = time.monotonic() - spent, None
        for step in range(first, self.steps):
            generator = torch.Generator().manual_seed(self._seed(step))
            loss = loss_of_step(generator, step)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for part in parts:
                part.step()
            model.zero_grad(set_to_none=True)
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
                    "model": model.state_dict(),
                    "average": average.state_dict(),
                    "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                    "schedules": [schedule.state_dict() for schedule in schedules],
                    "step": done,
                    "seconds": time.monotonic() - start,
                }
                torch.save(state, path.with_suffix(".tmp"))
                path.with_suffix(".tmp").replace(path)
        return cast(M, average.module)

    def optimizers(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        """AdamW; with `muon`, Muon for the matrices of the attention and feed-forward blocks."""
        matrices = [
            p
            for name, p in model.named_parameters()
            if self.muon and p.ndim == 2 and "block" in name and "relative" not in name
        ]
        others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
        found: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(others, lr=self.learning_rate, betas=(0.9, 0.99), weight_decay=0.01)
        ]
        if matrices:
            found.append(
                torch.optim.Muon(matrices, lr=self.learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
            )
        return found

    def _seed(self, step: int) -> int:
        return (self.seed * 1_000_003 + sum(map(ord, self.name))) * 1_000_003 + step


def random_scenes(recipe: Recipe, count: int, generator: torch.Generator) -> list[Scene]:
    scenes = recipe.world.scenes
    return [scenes[i] for i in torch.randint(len(scenes), (count,), generator=generator).tolist()]


# ---- the latent space ------------------------------------------------------------------------------------------------


class LatentSpace:
    """What the latents mean: frames averaged over 4x4 pixels, with the three colour channels whitened over the world.

    An autoencoder left to itself spent its first 800 steps on the backgrounds and gave every shape the same colour;
    with anchored latents the denoiser does not even have to wait for it. Whitening makes an object's hue as loud as the
    grey it moves over. Where a latent holds several frames, they are its channels, and the first latent holds the first
    frame over and over.
    """

    def __init__(self, seed: int, recipe: Recipe | None = None):
        self.recipe = recipe or Latte()
        clips = self.recipe.world.sample_clips(list(self.recipe.world.scenes) * 4, torch.Generator().manual_seed(seed))
        colours = F.avg_pool2d(clips.transpose(1, 2).flatten(0, 1), 4).double().transpose(0, 1).flatten(1)
        self.mean = colours.mean(1)
        self.whitening = torch.linalg.inv(torch.linalg.cholesky(colours.cov()))

    def encode(self, frames: torch.Tensor) -> torch.Tensor:
        """Frames `[n, 3, size, size]` in [-1, 1] to latents `[n, 3, size / 4, size / 4]`."""
        pooled = F.avg_pool2d(frames, 4).double() - self.mean.to(frames.device)[:, None, None]
        return torch.einsum("ij,njhw->nihw", self.whitening.to(frames.device), pooled).float()

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Blurred frames `[n, 3, size, size]` of `encode`'s latents, without an autoencoder: for a look at a run."""
        colours = torch.linalg.solve(self.whitening, latents.double().flatten(2)).reshape(latents.shape)
        return F.interpolate((colours + self.mean[:, None, None]).float(), scale_factor=4, mode="bicubic").clamp(-1, 1)

    def encode_clips(self, clips: torch.Tensor) -> torch.Tensor:
        """Clips `[n, 3, frames, size, size]` to latents `[n, channels, latents, size / 4, size / 4]`."""
        frames = self.encode(clips.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(clips), -1))
        held = self.recipe.frames_per_latent
        if held > 1:
            frames = torch.cat([frames[:, :1].expand(-1, held - 1, -1, -1, -1), frames], dim=1)
        return frames.unflatten(1, (-1, held)).flatten(2, 3).transpose(1, 2)

    def decode_clips(self, latents: torch.Tensor) -> torch.Tensor:
        """The way back, by `decode`."""
        held = self.recipe.frames_per_latent
        frames = latents.transpose(1, 2).unflatten(2, (held, 3)).flatten(1, 2)[:, held - 1 :]
        return self.decode(frames.flatten(0, 1)).unflatten(0, (len(latents), -1)).transpose(1, 2)


def train_autoencoder(space: LatentSpace, args: argparse.Namespace) -> Any:
    """The encoder learns to give the anchored latents, the decoder to give the frames back from slightly noisy ones."""
    recipe, device = space.recipe, args.device
    torch.manual_seed(args.seed)
    model = recipe.autoencoder().to(device)
    count, length = recipe.autoencoder_batch

    def loss_of_step(generator, step):
        clips, cover = recipe.world.sample_covered(random_scenes(recipe, count, generator), generator)
        if length < recipe.world.frames:
            rows, frame = torch.arange(count), torch.randint(recipe.world.frames, (count,), generator=generator)
            clips, cover = clips[rows, :, frame][:, :, None], cover[rows, :, frame][:, :, None]
        latents = space.encode_clips(clips)
        noisy = latents + 0.1 * torch.randn(latents.shape, generator=generator)
        clips, cover, latents, noisy = (x.to(device) for x in (clips, cover, latents, noisy))
        with torch.autocast(device, torch.bfloat16):
            encoded, decoded = recipe.encoded(model, clips), recipe.decoded(model, noisy)
        # The object is a tenth of the frame, and its colour is what matters: it counts ten times.
        weight = 1 + 9 * (cover > 0.05)
        error = decoded.float() - clips
        return (weight * (error.abs() + error.square())).mean() + 0.1 * F.mse_loss(encoded.float(), latents)

    stage = Stage(
        "autoencoder",
        args.autoencoder_steps,
        args.autoencoder_rate,
        args.run,
        args.seed,
        ema_decay=0.99,
        checkpoint_every=args.checkpoint_every,
    )
    model = stage.train(model, loss_of_step).eval()
    with torch.no_grad():
        recipe.pin_posterior(model)
    return model


# ---- stages 2 and 3 --------------------------------------------------------------------------------------------------


@torch.no_grad()
def encode_pool(space: LatentSpace, run: Path, clips: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents of `clips` rendered clips (bf16 `[clips, channels, latents, 16, 16]`) and the index of each one's scene;
    kept on disk."""
    path = run / f"pool-{clips}.pt"
    if not path.exists():
        world = space.recipe.world
        generator = torch.Generator().manual_seed(seed + 1)
        scene = torch.arange(clips) % len(world.scenes)
        latents = []
        for chunk in scene.split(64):
            rendered = world.sample_clips([world.scenes[i] for i in chunk.tolist()], generator)
            latents.append(space.encode_clips(rendered).bfloat16())
        torch.save((torch.cat(latents), scene), path)
    return torch.load(path, weights_only=True)


class CaptionedBatches:
    """Draws noisy latents and captions the way the pipeline will present them."""

    def __init__(self, recipe: Recipe, pool, tokenizer, device: str):
        self.recipe = recipe
        self.latents, self.scene = pool
        prompts = [scene.prompt for scene in recipe.world.scenes] + [""]
        self.scenes = len(recipe.world.scenes)
        self.tokens, self.mask = {}, {}
        for length in recipe.prompt_tokens:
            encoded = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
            self.tokens[length], self.mask[length] = encoded.input_ids, encoded.attention_mask
        self.device = device

    def draw(self, generator, batch: int, still: bool, drop: float, wrong: float, padded: float):
        rows = torch.randint(len(self.latents), (batch,), generator=generator)
        clean = self.latents[rows].float()
        if still:
            frame = torch.randint(clean.shape[2], (batch,), generator=generator)
            clean = clean[torch.arange(batch), :, frame][:, :, None]
        share_left = torch.rand(batch, generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        noisy, timestep, target = self.recipe.noised(clean, noise, share_left)

        def share(probability):
            return torch.rand(batch, generator=generator) < probability

        caption = self.scene[rows]
        caption = torch.where(share(wrong), torch.randint(self.scenes, (batch,), generator=generator), caption)
        dropped = share(drop)
        caption = torch.where(dropped, self.scenes, caption)
        usual, *others = self.recipe.prompt_tokens
        length = others[0] if others and float(torch.rand((), generator=generator)) < padded else usual
        mask = self.mask[length][caption]
        features = mask if self.recipe.masks_empty else torch.where(dropped[:, None], 1, mask)
        inputs = (noisy, timestep, self.tokens[length][caption], mask, features[..., None].float())
        return tuple(x.to(self.device) for x in inputs), target.to(self.device)


def train_denoiser(args: argparse.Namespace, space: LatentSpace, tokenizer: Any) -> Denoiser:
    recipe = space.recipe
    data = CaptionedBatches(recipe, encode_pool(space, args.run, args.pool, args.seed), tokenizer, args.device)
    torch.manual_seed(args.seed)
    model = Denoiser(recipe, tokenizer).to(args.device)
    if args.init is not None:
        for part, folder in ((model.text_encoder, "text_encoder"), (model.transformer, "transformer")):
            part.load_state_dict(type(part).from_pretrained(args.init / folder).float().state_dict())
    if args.device == "cpu":
        recipe.use_float32_attention(model.transformer)
    forward = torch.compile(model, dynamic=False) if args.compile else model

    def loss_of(still: bool, batch: int, wrong_from: int):
        def loss_of_step(generator, step):
            wrong = args.wrong if step >= wrong_from else 0.0
            inputs, target = data.draw(generator, batch, still, drop=0.12, wrong=wrong, padded=0.2)
            with torch.autocast(args.device, torch.bfloat16):
                predicted = forward(*inputs)
            return F.mse_loss(predicted.float(), target)

        return loss_of_step

    stills = Stage(
        "stills",
        args.still_steps,
        args.learning_rate,
        args.run,
        args.seed,
        decay_to=1.0,
        checkpoint_every=args.checkpoint_every,
        muon=args.muon,
    )
    stills.train(model, loss_of(True, args.still_batch, wrong_from=args.still_steps))
    clips = Stage(
        "clips",
        args.clip_steps,
        args.learning_rate,
        args.run,
        args.seed,
        checkpoint_every=args.checkpoint_every,
        muon=args.muon,
    )
    return clips.train(model, loss_of(False, args.clip_batch, args.wrong_from)).eval()


# ---- the pipeline ----------------------------------------------------------------------------------------------------


def export(directory: Path, recipe: Recipe, autoencoder: nn.Module, tokenizer: Any, denoiser: Denoiser) -> None:
    """Write a diffusers pipeline directory in safetensors of the recipe's dtype."""
    transformer = recipe.denoiser(denoiser.text_encoder.config.d_model)
    transformer.load_state_dict(denoiser.transformer.state_dict())
    pipeline = recipe.pipeline(
        tokenizer=tokenizer,
        text_encoder=denoiser.text_encoder,
        vae=autoencoder,
        transformer=transformer,
        scheduler=recipe.scheduler(),
    )
    pipeline.to("cpu", recipe.export_dtype).save_pretrained(directory, safe_serialization=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--pipeline", choices=sorted(RECIPES), default="shapes", help="which pipeline to train (default shapes)"
    )
    parser.add_argument(
        "--run",
        type=Path,
        default=None,
        help="checkpoints and log (default runs/<pipeline>); an existing one is resumed",
    )
    parser.add_argument("--export", type=Path, default=None, help="where the pipeline goes (default: <run>/pipeline)")
    parser.add_argument(
        "--init",
        type=Path,
        default=None,
        help="a pipeline directory to go on from: its denoiser is trained, its autoencoder kept",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pool", type=int, default=4800, help="rendered clips to learn from")
    parser.add_argument("--autoencoder-steps", type=int, default=500)
    parser.add_argument("--autoencoder-rate", type=float, default=2e-3, help="learning rate")
    parser.add_argument("--still-steps", type=int, default=1200)
    parser.add_argument("--still-batch", type=int, default=64)
    parser.add_argument("--clip-steps", type=int, default=2400)
    parser.add_argument("--clip-batch", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument(
        "--muon",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="train the blocks' matrices with Muon instead of AdamW",
    )
    parser.add_argument("--checkpoint-every", type=int, default=200, help="steps")
    parser.add_argument("--wrong", type=float, default=0.2, help="share of captions replaced by a random one")
    parser.add_argument("--wrong-from", type=int, default=2200, help="step of the clips stage from which they are")
    parser.add_argument(
        "--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile the denoiser"
    )
    recipe = RECIPES[parser.parse_known_args(arguments)[0].pipeline]()
    parser.set_defaults(**recipe.training)
    args = parser.parse_args(arguments)
    args.run = args.run or Path("runs") / args.pipeline
    args.run.mkdir(parents=True, exist_ok=True)

    tokenizer = recipe.tokenizer()
    space = LatentSpace(args.seed, recipe)
    denoiser = train_denoiser(args, space, tokenizer)
    kept = None if args.init is None else type(recipe.autoencoder()).from_pretrained(args.init / "vae")
    autoencoder = train_autoencoder(space, args) if kept is None else kept
    export(args.export or args.run / "pipeline", recipe, autoencoder, tokenizer, denoiser)


if __name__ == "__main__":
    main()
