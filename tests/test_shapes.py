"""The world, its detector, and that training resumes where it stopped."""

import pickle

import numpy as np
import pytest
import torch
from torch import nn

from fastercache import shapes
from fastercache.shapes.detector import score, sight
from fastercache.shapes.train import LatentSpace, Stage
from fastercache.shapes.world import COLOURS, DIRECTIONS, FRAMES, SCENES, SHAPES, SIZE, Scene, sample_clips


@pytest.fixture(scope="module")
def clips():
    video = sample_clips(list(SCENES), torch.Generator().manual_seed(7))
    assert video.shape == (16, 3, FRAMES, SIZE, SIZE) and video.abs().max() <= 1
    return ((video + 1) / 2).permute(0, 2, 3, 4, 1).numpy()


def test_every_rendered_clip_is_all_right(clips):
    for scene, clip in zip(SCENES, clips, strict=True):
        assert score(clip, scene.prompt).all_right, scene


def test_each_wrong_word_is_noticed_alone(clips):
    for scene, clip in zip(SCENES, clips, strict=True):
        for colour in set(COLOURS) - {scene.colour}:
            wrong = score(clip, Scene(colour, scene.shape, scene.direction).prompt)
            assert (wrong.colour, wrong.shape, wrong.motion) == (False, True, True)
        for shape in set(SHAPES) - {scene.shape}:
            wrong = score(clip, Scene(scene.colour, shape, scene.direction).prompt)
            assert (wrong.colour, wrong.shape, wrong.motion) == (True, False, True)
        for direction in set(DIRECTIONS) - {scene.direction}:
            wrong = score(clip, Scene(scene.colour, scene.shape, direction).prompt)
            assert (wrong.colour, wrong.shape, wrong.motion) == (True, True, False)


def test_what_is_not_a_moving_object_scores_nothing(clips):
    generator = np.random.default_rng(0)
    blank, noise = np.full_like(clips[0], 0.5), generator.random(clips[0].shape, dtype=np.float32)
    still = np.repeat(clips[0][:1], FRAMES, axis=0)
    shuffled = clips[0][generator.permutation(FRAMES)]
    vanishing = clips[0].copy()
    vanishing[4] = vanishing[4, 0, 0]
    assert sight(blank[0]) is None and sight(noise[0]) is None
    for broken in (blank, noise, still, shuffled, vanishing, clips[0][::-1]):
        assert not score(broken, SCENES[0].prompt).all_right


def test_two_objects_are_none(clips):
    one = clips[SCENES.index(Scene("red", "circle", "right"))][0]
    other = np.roll(one, SIZE // 2, axis=1)
    both = np.where(np.abs(other - other[0, 0]).sum(-1, keepdims=True) > 0.1, other, one)
    assert sight(one) is not None and sight(both) is None


@pytest.mark.parametrize("prompt", ["a red circle", "a pink circle moving right", "a red circle triangle moving right"])
def test_a_prompt_of_another_world_is_an_error(prompt):
    with pytest.raises(ValueError, match="not one; known"):
        Scene.parse(prompt)


def test_latents_are_white():
    space = LatentSpace(seed=0)
    frames = sample_clips(list(SCENES) * 4, torch.Generator().manual_seed(0)).transpose(1, 2).flatten(0, 1)
    latents = space.encode(frames).transpose(0, 1).flatten(1)
    assert latents.mean(1).abs().max() < 1e-4 and (latents.cov() - torch.eye(3)).abs().max() < 1e-4


def test_training_resumes_as_if_never_stopped(tmp_path):
    def train(run, stop_at=None):
        run.mkdir(exist_ok=True)
        torch.manual_seed(0)
        model = nn.Linear(3, 1)

        def loss(generator, step):
            if step == stop_at:
                raise KeyboardInterrupt
            return model(torch.randn(8, 3, generator=generator)).square().mean()

        return Stage("stage", 9, 1e-2, run, seed=5, checkpoint_every=2).train(model, loss)

    whole = train(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "broken", stop_at=5)
    resumed = train(tmp_path / "broken")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_the_pipeline_makes_what_it_was_trained_for_by_default(tmp_path):
    pipe = shapes.load()
    pipe.set_progress_bar_config(disable=True)

    def clip(pipe, **given):
        return pipe(
            "a red circle moving right", generator=torch.Generator().manual_seed(0), num_inference_steps=2, output_type="np", **given
        )

    by_default = clip(pipe).frames
    assert by_default.shape == (1, FRAMES, SIZE, SIZE, 3)
    assert np.array_equal(by_default, clip(pipe, **shapes.CALL, guidance_scale=shapes.GUIDANCE_SCALE).frames)
    assert pickle.loads(pickle.dumps(pipe)).__class__ is type(pipe)
    pipe.save_pretrained(tmp_path)
    assert type(shapes.load_pipeline(tmp_path, torch.float32)).__name__ == "LattePipeline"
