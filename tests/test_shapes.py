"""The worlds, their detector, and that training resumes where it stopped."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fastercache import shapes
from fastercache.shapes import train
from fastercache.shapes.detector import score, sight
from fastercache.shapes.recipes import RECIPES
from fastercache.shapes.train import LatentSpace, Stage
from fastercache.shapes.world import PLAIN, TEXTURED, Scene

WORLDS = {"plain": PLAIN, "textured": TEXTURED}


@pytest.fixture(scope="module", params=WORLDS)
def world(request):
    return WORLDS[request.param]


@pytest.fixture(scope="module")
def clips(world):
    video = world.sample_clips(world.scenes, torch.Generator().manual_seed(7))
    assert video.shape == (len(world.scenes), 3, world.frames, world.size, world.size) and video.abs().max() <= 1
    return ((video + 1) / 2).permute(0, 2, 3, 4, 1).numpy()


def test_worlds_have_so_many_scenes():
    assert (len(PLAIN.scenes), len(TEXTURED.scenes)) == (16, 96)
    assert (
        PLAIN.scenes[0].prompt == "a red circle moving right"
        and TEXTURED.scenes[0].prompt == "a red plain circle moving right"
    )


def test_every_rendered_clip_is_all_right(world, clips):
    for scene, clip in zip(world.scenes, clips, strict=True):
        assert Scene.parse(scene.prompt, world) == scene
        assert score(clip, scene.prompt, world).all_right, scene


def test_each_wrong_word_is_noticed_alone(world, clips):
    parts = {"colour": world.colours, "shape": world.shapes, "direction": world.directions, "texture": world.textures}
    stride = (
        1 if world is PLAIN else 5
    )  # A prime that divides no number of words: 20 of the 96 scenes, and every word among them.
    for scene, clip in zip(world.scenes[::stride], clips[::stride], strict=True):
        for part, words in parts.items():
            for word in set(words) - {getattr(scene, part)}:
                wrong = score(clip, replace(scene, **{part: word}).prompt, world)
                seen = {
                    "colour": wrong.colour,
                    "shape": wrong.shape,
                    "direction": wrong.motion,
                    "texture": wrong.texture,
                }
                assert [name for name, right in seen.items() if not right] == [part], (scene, word)


def test_what_is_not_a_moving_object_scores_nothing(world, clips):
    generator = np.random.default_rng(0)
    blank, noise = np.full_like(clips[0], 0.5), generator.random(clips[0].shape, dtype=np.float32)
    still = np.repeat(clips[0][:1], world.frames, axis=0)
    shuffled = clips[0][generator.permutation(world.frames)]
    vanishing = clips[0].copy()
    vanishing[4] = vanishing[4, 0, 0]
    assert sight(blank[0], world) is None and sight(noise[0], world) is None
    for broken in (blank, noise, still, shuffled, vanishing, clips[0][::-1]):
        assert not score(broken, world.scenes[0].prompt, world).all_right


def test_two_objects_are_none(world, clips):
    one = clips[0][0]
    other = np.roll(one, world.size // 2, axis=1)
    both = np.where(np.abs(other - other[0, 0]).sum(-1, keepdims=True) > 0.6, other, one)
    assert sight(one, world) is not None and sight(both, world) is None


@pytest.mark.parametrize("prompt", ["a red circle", "a pink circle moving right", "a red circle triangle moving right"])
def test_a_prompt_of_another_world_is_an_error(prompt):
    with pytest.raises(ValueError, match="not one; known"):
        Scene.parse(prompt)


@pytest.mark.parametrize("prompt", ["a red circle moving right", "a red plain striped circle moving right"])
def test_a_prompt_without_one_texture_is_an_error_where_worlds_have_them(prompt):
    with pytest.raises(ValueError, match="textures, not one; known: plain, striped, dotted"):
        Scene.parse(prompt, TEXTURED)


@pytest.mark.parametrize("name", RECIPES)
def test_latents_are_white(name):
    recipe = RECIPES[name]()
    space = LatentSpace(0, recipe)
    clips = recipe.world.sample_clips(list(recipe.world.scenes) * 4, torch.Generator().manual_seed(0))
    latents = space.encode(clips.transpose(1, 2).flatten(0, 1)).transpose(0, 1).flatten(1)
    assert latents.mean(1).abs().max() < 1e-4 and (latents.cov() - torch.eye(3)).abs().max() < 1e-4


@pytest.mark.parametrize("name", RECIPES)
def test_latents_hold_every_frame(name):
    recipe = RECIPES[name]()
    space, world = LatentSpace(0, recipe), recipe.world
    clips = world.sample_clips(world.scenes[:2], torch.Generator().manual_seed(0))
    latents = space.encode_clips(clips)
    assert latents.shape == (2, recipe.channels, (world.frames - 1) // recipe.frames_per_latent + 1, 16, 16)
    pooled = torch.nn.functional.avg_pool3d(clips, (1, 4, 4))
    again = torch.nn.functional.avg_pool3d(space.decode_clips(latents), (1, 4, 4))
    assert (again - pooled).abs().mean() < 0.02  # bicubic enlargement keeps means but near edges


@pytest.mark.parametrize("muon", [False, True])
def test_training_resumes_as_if_never_stopped(tmp_path, muon):
    def train(run, stop_at=None):
        run.mkdir(exist_ok=True)
        torch.manual_seed(0)
        model = nn.ModuleDict({"blocks": nn.Linear(3, 3), "head": nn.Linear(3, 1)})

        def loss(generator, step):
            if step == stop_at:
                raise KeyboardInterrupt
            return model["head"](model["blocks"](torch.randn(8, 3, generator=generator))).square().mean()

        return Stage("stage", 9, 1e-2, run, seed=5, checkpoint_every=2, muon=muon).train(model, loss)

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
            "a red circle moving right",
            generator=torch.Generator().manual_seed(0),
            num_inference_steps=2,
            output_type="np",
            **given,
        )

    by_default = clip(pipe).frames
    assert by_default.shape == (1, PLAIN.frames, PLAIN.size, PLAIN.size, 3)
    assert np.array_equal(by_default, clip(pipe, **shapes.CALL, guidance_scale=shapes.GUIDANCE_SCALE).frames)
    assert pickle.loads(pickle.dumps(pipe)).__class__ is type(pipe)
    pipe.save_pretrained(tmp_path)
    assert type(shapes.load_pipeline(tmp_path, torch.float32)).__name__ == "LattePipeline"


@pytest.mark.parametrize("name", RECIPES)
def test_training_from_nothing_and_from_weights_gives_a_pipeline(tmp_path, name):
    steps = [
        "--still-steps",
        "1",
        "--clip-steps",
        "1",
        "--autoencoder-steps",
        "1",
        "--still-batch",
        "2",
        "--clip-batch",
        "2",
        "--pool",
        "4",
    ]
    options = ["--pipeline", name, *steps, "--device", "cpu", "--no-compile", "--seed", "3"]
    train.main([*options, "--run", str(tmp_path / "first"), "--export", str(tmp_path / "pipeline")])
    train.main([*options, "--run", str(tmp_path / "second"), "--init", str(tmp_path / "pipeline")])
    first, second = (shapes.load_pipeline(tmp_path / path, torch.float32) for path in ("pipeline", "second/pipeline"))
    embedded = shapes.PIPELINES[name]
    prompt = embedded.world.scenes[0].prompt
    clips = []
    for pipe in (first, second):
        generator = torch.Generator().manual_seed(0)
        clip = pipe(
            prompt, **embedded.call, num_inference_steps=2, guidance_scale=2.0, generator=generator, output_type="np"
        ).frames[0]
        assert (
            clip.shape == (embedded.world.frames, embedded.world.size, embedded.world.size, 3)
            and np.isfinite(clip).all()
        )
        clips.append(clip)
    assert not np.array_equal(*clips)
    assert all(torch.equal(a, b) for a, b in zip(first.vae.parameters(), second.vae.parameters(), strict=True))
