"""Every script of `examples/`, run from its command line on a small random denoiser; the text encoder and the decoder
stand in."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    DDIMScheduler,
    DiffusionPipeline,
    LattePipeline,
    PNDMScheduler,
)
from models import OTHERS, TWO_CALLS, Values, call, cogvideox, latte
from test_video_pipelines import PIPELINES, embeddings

pytestmark = pytest.mark.filterwarnings("ignore::fastercache.FasterCacheWarning")
EXAMPLES = Path(__file__).parents[1] / "examples"
STEPS = 10


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    loaded = []

    def load(name):
        loaded.append(name)
        return importlib.import_module(name)

    yield load
    for name in (*loaded, "common"):
        sys.modules.pop(name, None)


def picture(latents):
    """Any latents as a video [1, 4, 16, 16, 3] in [0, 1]."""
    return torch.sigmoid(latents.flatten()).repeat(4 * 16 * 16 * 3)[: 4 * 16 * 16 * 3].reshape(1, 4, 16, 16, 3).numpy()


def stand_in(pipe, arguments):
    """The pipeline with given embeddings in place of the prompt, and a picture of the latents in place of the
    decoder."""
    texts = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}

    def __call__(self, prompt, output_type, **sizes):
        assert prompt == "a panda" and output_type == "np"
        generator = torch.Generator().manual_seed(0)
        negative = {"negative_prompt": None} if "Allegro" in original.__name__ or "Latte" in original.__name__ else {}
        latents = original.__call__(
            self, **texts, **negative, **sizes, output_type="latent", generator=generator
        ).frames
        return SimpleNamespace(frames=picture(latents))

    original = type(pipe)
    pipe.__class__ = type(original.__name__, (original,), {"__call__": __call__})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def cogvideox_pipeline():
    pipe = CogVideoXPipeline(None, None, None, cogvideox(torch.float32), CogVideoXDDIMScheduler())
    return pipe, embeddings(("prompt_embeds", "negative_prompt_embeds"), 1, 12)


def latte_pipeline():
    pipe = LattePipeline(None, None, None, latte(torch.float32), DDIMScheduler())
    return pipe, embeddings(("prompt_embeds", "negative_prompt_embeds"), 1, 12)


SIZES = {
    "cogvideox": ("CogVideoX", cogvideox_pipeline, "80", "48", "9"),
    "latte": ("Latte", latte_pipeline, "64", "64", "3"),
    "mochi": ("Mochi", lambda: PIPELINES["mochi"](1), "64", "48", "13"),
    "wan": ("Wan", lambda: PIPELINES["wan"](1), "64", "48", "9"),
    "hunyuan_video": ("HunyuanVideo", lambda: PIPELINES["hunyuan"](1), "64", "48", "9"),
    "hunyuan_video15": ("HunyuanVideo 1.5", lambda: PIPELINES["hunyuan15_text"](1), "128", "96", "9"),
    "ltx_video": ("LTX-Video", lambda: PIPELINES["ltx"](1), "192", "160", "9"),
    "allegro": ("Allegro", lambda: PIPELINES["allegro"](1), "64", "48", "12"),
}
"""Name of the example -> the family it is of, its pipeline, and the height, width and frames of a small video."""


def check(out, capsys, family, steps=STEPS):
    printed = capsys.readouterr().out
    assert f"({family})" in printed and f"{steps} steps" in printed and f"wrote {out}" in printed
    assert "~" in printed
    assert iio.imread(out, plugin="pyav").shape == (4, 16, 16, 3)


@pytest.mark.parametrize("name", SIZES)
def test_pipelines_of_diffusers(name, example, monkeypatch, tmp_path, capsys):
    family, build, height, width, frames = SIZES[name]
    module = example(name)
    monkeypatch.setattr(module, "load", lambda path: stand_in(*build()))
    out = tmp_path / "video.mp4"
    module.main(
        ["a panda", "--height", height, "--width", width, "--frames", frames, "--steps", str(STEPS), "--out", str(out)]
    )
    check(out, capsys, family)


def test_open_sora(example, monkeypatch, tmp_path, capsys):
    module, model = example("open_sora"), OTHERS["stdit3"](torch.float32)

    def load(path, height, width, frames, steps):
        def sample(prompt):
            inputs = call(model, 2)
            latents = inputs["x"][:1]
            for _ in range(steps):  # rectified flow, as upstream samples: one batch [cond, uncond]
                cond, uncond = model(**inputs | {"x": torch.cat([latents, latents])}).chunk(2, dim=1)[0].chunk(2)
                latents = latents + (uncond + 7.0 * (cond - uncond)) / steps
            return torch.from_numpy(picture(latents))[0].permute(3, 0, 1, 2) * 2 - 1

        return model, sample

    monkeypatch.setattr(module, "load", load)
    out = tmp_path / "video.mp4"
    module.main(["a panda", "--steps", str(STEPS), "--out", str(out)])
    check(out, capsys, "Open-Sora")


def test_open_sora_plan(example, monkeypatch, tmp_path, capsys):
    """Its pipeline has a scale of guidance in the call alone, and as many calls as PNDM has timesteps."""

    class VideoGenPipeline(DiffusionPipeline):
        def __init__(self, transformer, scheduler):
            super().__init__()
            self.register_modules(transformer=transformer, scheduler=scheduler)

        def __call__(self, prompt, height, width, num_frames, num_inference_steps, guidance_scale=4.5):
            inputs = call(self.transformer, 2)
            self.scheduler.set_timesteps(num_inference_steps)
            latents = inputs["hidden_states"][:1]
            for step in self.scheduler.timesteps:
                both = torch.cat([latents, latents])
                uncond, cond = self.transformer(**inputs | {"hidden_states": both})[0].chunk(2, dim=1)[0].chunk(2)
                latents = self.scheduler.step(uncond + guidance_scale * (cond - uncond), step, latents).prev_sample
            return SimpleNamespace(video=torch.from_numpy(picture(latents) * 255).byte())

    scheduler, module = PNDMScheduler(), example("open_sora_plan")
    monkeypatch.setattr(module, "load", lambda path: VideoGenPipeline(OTHERS["latte_t2v"](torch.float32), scheduler))
    out = tmp_path / "video.mp4"
    module.main(["a panda", "--steps", str(STEPS), "--out", str(out)])
    assert len(scheduler.timesteps) > STEPS
    check(out, capsys, "Latte", len(scheduler.timesteps))


def test_vchitect(example, monkeypatch, tmp_path, capsys):
    """Two calls a step, the unconditional one first, each on a copy of the latents."""
    model = TWO_CALLS["vchitect"](torch.float32)

    def pipeline(prompt, negative_prompt, num_inference_steps, guidance_scale, width, height, frames):
        text = Values(torch.float32, 1)
        cond = call(model, 1)
        uncond = cond | {"encoder_hidden_states": text(1, 5, 12)}
        latents = cond["hidden_states"]
        for _ in range(num_inference_steps):
            e_u = model(**uncond | {"hidden_states": latents.clone()})[0]
            e_c = model(**cond | {"hidden_states": latents.clone()})[0]
            latents = latents - (e_u + guidance_scale * (e_c - e_u))[None].float() / num_inference_steps
        return list((picture(latents)[0] * 255).astype(np.uint8))

    def run(*args, **kwargs):
        with torch.no_grad():
            return pipeline(*args, **kwargs)

    run.transformer, run.execution_device = model, torch.device("cpu")
    module = example("vchitect")
    monkeypatch.setattr(module, "load", lambda path: run)
    out = tmp_path / "video.mp4"
    module.main(["a panda", "--steps", str(STEPS), "--out", str(out)])
    check(out, capsys, "Vchitect")
    assert "uncond-then-cond" in str(module.fastercache.summary(model))


def test_every_example_is_run_here():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {
        *SIZES,
        "open_sora",
        "open_sora_plan",
        "vchitect",
        "common",
    }
