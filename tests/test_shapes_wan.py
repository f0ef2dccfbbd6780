"""The embedded pipeline "wan": it loads, runs, and takes the engine, in the sizes that are promised."""

import numpy as np
import pytest
import torch
from longer import long

import fastercache
from fastercache import shapes
from fastercache.shapes.detector import score

WAN = shapes.PIPELINES["wan"]
PROMPT = "a blue striped circle moving left"


@pytest.fixture(scope="module")
def pipe():
    return shapes.load("wan")


def sample(pipe, steps=4, guidance_scale=WAN.guidance_scale, **changes):
    options = {
        **WAN.call,
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "output_type": "latent",
        **changes,
    }
    return pipe(PROMPT, generator=torch.Generator().manual_seed(1), **options).frames


def test_it_is_a_wan_of_at_most_16_megabytes(pipe):
    assert type(pipe).__name__ == "WanPipeline" and type(pipe.scheduler).__name__ == "UniPCMultistepScheduler"
    assert next(pipe.transformer.parameters()).dtype == torch.float32
    assert sum(path.stat().st_size for path in WAN.path.rglob("*")) < 16e6


def test_an_unknown_name_is_an_error_that_lists_the_names():
    with pytest.raises(ValueError, match=r"no embedded pipeline is called 'wam'; there are shapes, wan"):
        shapes.load("wam")


def test_a_schedule_that_skips_nothing_changes_no_bit(pipe):
    untouched = sample(pipe)
    fastercache.compile(pipe, "none")
    try:
        assert torch.equal(sample(pipe), untouched)
    finally:
        fastercache.restore(pipe)
    assert torch.equal(sample(pipe), untouched)


def test_the_papers_schedule_runs_and_guidance_takes_two_calls(pipe):
    fastercache.compile(pipe)
    try:
        assert sample(pipe, steps=8).isfinite().all()
        rows = {(row.branch, row.kind): row for row in fastercache.summary(pipe).sites}
        assert rows["uncond", "joint"].skipped > 0 and rows["cond", "joint"].blended > 0
    finally:
        fastercache.restore(pipe)


@long
@pytest.mark.parametrize(("schedule", "steps"), [("paper", 12), (None, 50)])
def test_compiled_phases_are_as_near_to_eager_as_the_uncached_model(pipe, schedule, steps):
    """The paper's schedule, and the calibrated one that the pipeline carries."""
    eager = sample(pipe, steps)
    fastercache.compile(pipe, schedule, backend="inductor", regional=True)
    try:
        with fastercache.disabled(pipe):
            assert torch.equal(sample(pipe, steps), eager)
        compiled, said = sample(pipe, steps), fastercache.summary(pipe).compiled
    finally:
        fastercache.restore(pipe)
    fastercache.compile(pipe, schedule)
    try:
        cached = sample(pipe, steps)
    finally:
        fastercache.restore(pipe)
    assert "inductor" in said
    assert 0 < (compiled - cached).abs().max() < 1e-3 * cached.abs().max() < (cached - eager).abs().max()


def test_a_clip_of_few_steps_shows_its_prompt(pipe):
    clip = sample(pipe, steps=12, output_type="np")[0]
    assert clip.shape == (9, 64, 64, 3) and clip.min() >= 0 and clip.max() <= 1
    assert score(clip.astype(np.float32), PROMPT, WAN.world).all_right
