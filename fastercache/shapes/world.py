"""The world that "shapes" has learnt: one coloured shape that moves over a plain background.

A *scene* is three words (colour, shape, direction) and a handful of nuisance values (background, size, start) that the prompt does
not name. Rendering is analytic (signed distances, one pixel of anti-aliasing), so a data set needs no files.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch

FRAMES = 8
"""Frames of a clip."""
SIZE = 64
"""Height and width of a frame in pixels."""

COLOURS = {
    "red": (0.86, 0.16, 0.16),
    "green": (0.13, 0.67, 0.27),
    "blue": (0.16, 0.33, 0.88),
    "yellow": (0.96, 0.82, 0.12),
}
SHAPES = ("circle", "triangle")
DIRECTIONS = {"right": (1.0, 0.0), "down": (0.0, 1.0)}
BACKGROUNDS = ((0.10, 0.10, 0.12), (0.50, 0.50, 0.52), (0.93, 0.93, 0.91))
PIXELS_PER_FRAME = 4.0
"""Speed of every shape."""


@dataclass(frozen=True)
class Scene:
    """What a prompt says: a key of `COLOURS`, a member of `SHAPES`, a key of `DIRECTIONS`."""

    colour: str
    shape: str
    direction: str

    @property
    def prompt(self) -> str:
        return f"a {self.colour} {self.shape} moving {self.direction}"

    @classmethod
    def parse(cls, prompt: str) -> Scene:
        """The scene a prompt of this world names; `ValueError` says which word is missing."""
        words = prompt.lower().split()

        def only(kind: str, known) -> str:
            found = [word for word in words if word in known]
            if len(found) != 1:
                raise ValueError(f"prompt {prompt!r} names {len(found)} {kind}s, not one; known: {', '.join(known)}")
            return found[0]

        return cls(only("colour", COLOURS), only("shape", SHAPES), only("direction", DIRECTIONS))


SCENES = tuple(Scene(*words) for words in itertools.product(COLOURS, SHAPES, DIRECTIONS))
"""All 16 scenes, in a fixed order."""


def sample_clips(scenes: list[Scene], generator: torch.Generator, frames: int = FRAMES) -> torch.Tensor:
    """Render one clip per scene with random background, size and path.

    Returns float32 `[len(scenes), 3, frames, SIZE, SIZE]` in [-1, 1]. The path crosses the middle of the frame; the shape never
    leaves it.
    """
    n = len(scenes)

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(n, generator=generator)

    colour = torch.tensor([COLOURS[scene.colour] for scene in scenes])
    background = torch.tensor(BACKGROUNDS)[torch.randint(len(BACKGROUNDS), (n,), generator=generator)]
    radius = uniform(12.0, 14.0)
    along, across = uniform(-1.5, 1.5), uniform(-4.0, 4.0)

    heading = torch.tensor([DIRECTIONS[scene.direction] for scene in scenes])
    travel = (torch.arange(frames) - (frames - 1) / 2) * PIXELS_PER_FRAME
    offset = travel[None, :] + along[:, None]
    centre_x = SIZE / 2 + heading[:, :1] * offset + heading[:, 1:].abs() * across[:, None]
    centre_y = SIZE / 2 + heading[:, 1:] * offset + heading[:, :1].abs() * across[:, None]

    pixel = torch.arange(SIZE) + 0.5
    x = pixel[None, None, None, :] - centre_x[:, :, None, None]
    y = pixel[None, None, :, None] - centre_y[:, :, None, None]
    r = radius[:, None, None, None]
    circle = (x.square() + y.square()).sqrt() - r
    # An isosceles triangle, point up, as wide as high.
    triangle = torch.maximum(y - r, (2.0 * x.abs() - y - r) / 5.0**0.5)
    round_one = torch.tensor([scene.shape == "circle" for scene in scenes])[:, None, None, None]
    distance = torch.where(round_one, circle, triangle)
    cover = (0.5 - distance).clamp(0.0, 1.0)[:, None]

    video = background[:, :, None, None, None] * (1 - cover) + colour[:, :, None, None, None] * cover
    return video * 2 - 1
