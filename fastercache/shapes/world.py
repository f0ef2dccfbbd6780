"""The worlds that the embedded pipelines have learnt: one coloured shape that moves over a background.

A *scene* is a few words (colour, shape, direction, in the second world also a texture) and a handful of nuisance values
(background, size, start) that the prompt does not name. Rendering is analytic (signed distances, one pixel of
anti-aliasing), so a data set needs no files.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

Colour = tuple[float, float, float]

DIRECTIONS = {"right": (1.0, 0.0), "down": (0.0, 1.0)}
ALL_DIRECTIONS = {**DIRECTIONS, "left": (-1.0, 0.0), "up": (0.0, -1.0)}
SHAPES = ("circle", "triangle")
WHITE: Colour = (0.97, 0.97, 0.97)
"""The second colour of a textured object."""
STRIPE_PERIOD = 11.0
"""Pixels from one white stripe of a striped object to the next."""
DOT = 0.4
"""Radius of the white dot of a dotted object, as a share of the object's."""


@dataclass(frozen=True)
class Scene:
    """What a prompt says: colour, shape and direction, and a texture where the world has textures."""

    colour: str
    shape: str
    direction: str
    texture: str | None = None

    @property
    def prompt(self) -> str:
        texture = "" if self.texture is None else f"{self.texture} "
        return f"a {self.colour} {texture}{self.shape} moving {self.direction}"

    @classmethod
    def parse(cls, prompt: str, world: World | None = None) -> Scene:
        """The scene a prompt of the world (the first where none is given) names; `ValueError` says which word is
        missing."""
        world = world or PLAIN
        words = prompt.lower().split()

        def only(kind: str, known) -> str:
            found = [word for word in words if word in known]
            if len(found) != 1:
                raise ValueError(f"prompt {prompt!r} names {len(found)} {kind}s, not one; known: {', '.join(known)}")
            return found[0]

        texture = only("texture", world.textures) if world.textures else None
        return cls(
            only("colour", world.colours), only("shape", world.shapes), only("direction", world.directions), texture
        )


@dataclass(frozen=True, eq=False)
class World:
    """The words of a world, and how its scenes are rendered.

    frames, size: of a clip, the latter the height and width in pixels. textures: empty where prompts name none.
    slope: brightness that a background gains from its middle to the right and to the lower edge, and loses to the
        others.
    speed: pixels from frame to frame. radius: least and greatest, in pixels. across, along: greatest offset of the path
        from the middle.
    """

    frames: int
    size: int
    colours: Mapping[str, Colour]
    shapes: Sequence[str]
    directions: Mapping[str, tuple[float, float]]
    textures: Sequence[str]
    backgrounds: Sequence[Colour]
    slope: float
    speed: float
    radius: tuple[float, float]
    along: float
    across: float

    @cached_property
    def scenes(self) -> tuple[Scene, ...]:
        """All scenes, in a fixed order."""
        words = itertools.product(self.colours, self.shapes, self.directions, self.textures or (None,))
        return tuple(Scene(*scene) for scene in words)

    def sample_clips(self, scenes: Sequence[Scene], generator: torch.Generator) -> torch.Tensor:
        """Render one clip per scene with random background, size and path.

        Returns float32 `[len(scenes), 3, frames, size, size]` in [-1, 1]. The path crosses the middle of the frame; the
        shape never leaves it.
        """
        return self.sample_covered(scenes, generator)[0]

    def sample_covered(self, scenes: Sequence[Scene], generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """The clips of `sample_clips`, and how much of each pixel the shape covers: `[len(scenes), 1, frames, size,
        size]` in [0, 1]."""
        n = len(scenes)

        def uniform(low: float, high: float) -> torch.Tensor:
            return low + (high - low) * torch.rand(n, generator=generator)

        def flags(of_scene) -> torch.Tensor:
            return torch.tensor([of_scene(scene) for scene in scenes])[:, None, None, None]

        colour = torch.tensor([self.colours[scene.colour] for scene in scenes])[:, :, None, None, None]
        background = torch.tensor(self.backgrounds)[torch.randint(len(self.backgrounds), (n,), generator=generator)]
        radius = uniform(*self.radius)
        along, across = uniform(-self.along, self.along), uniform(-self.across, self.across)

        heading = torch.tensor([self.directions[scene.direction] for scene in scenes])
        travel = (torch.arange(self.frames) - (self.frames - 1) / 2) * self.speed
        offset = travel[None, :] + along[:, None]
        centre_x = self.size / 2 + heading[:, :1] * offset + heading[:, 1:].abs() * across[:, None]
        centre_y = self.size / 2 + heading[:, 1:] * offset + heading[:, :1].abs() * across[:, None]

        pixel = torch.arange(self.size) + 0.5
        x = pixel[None, None, None, :] - centre_x[:, :, None, None]
        y = pixel[None, None, :, None] - centre_y[:, :, None, None]
        r = radius[:, None, None, None]
        circle = (x.square() + y.square()).sqrt() - r
        # An isosceles triangle, point up, as wide as high.
        triangle = torch.maximum(y - r, (2.0 * x.abs() - y - r) / 5.0**0.5)
        round_one = flags(lambda scene: scene.shape == "circle")
        distance = torch.where(round_one, circle, triangle)
        cover = (0.5 - distance).clamp(0.0, 1.0)[:, None]

        if self.textures:
            # Stripes lie beside the line through the middle; the dot lies on the centroid, which a triangle has below
            # its middle.
            stripes = (y + STRIPE_PERIOD / 2).remainder(STRIPE_PERIOD) - STRIPE_PERIOD / 2
            stripes = STRIPE_PERIOD / 4 - stripes.abs()
            centroid = torch.where(round_one, torch.zeros_like(r), r / 3)
            dot = (x.square() + (y - centroid).square()).sqrt() - DOT * r
            white = torch.where(flags(lambda scene: scene.texture == "striped"), stripes, torch.full_like(dot, 1.0))
            white = torch.where(flags(lambda scene: scene.texture == "dotted"), dot, white)
            share = (0.5 - white).clamp(0.0, 1.0)[:, None]
            colour = colour * (1 - share) + torch.tensor(WHITE)[None, :, None, None, None] * share

        ground = background[:, :, None, None, None]
        if self.slope:
            ramp = self.slope * (pixel - self.size / 2) / (self.size / 2)
            ground = ground + ramp[None, None, None, None, :] + ramp[None, None, None, :, None]
        video = ground * (1 - cover) + colour * cover
        return video * 2 - 1, cover


COLOURS: dict[str, Colour] = {
    "red": (0.86, 0.16, 0.16),
    "green": (0.13, 0.67, 0.27),
    "blue": (0.16, 0.33, 0.88),
    "yellow": (0.96, 0.82, 0.12),
}

PLAIN = World(
    frames=8,
    size=64,
    colours=COLOURS,
    shapes=SHAPES,
    directions=DIRECTIONS,
    textures=(),
    backgrounds=((0.10, 0.10, 0.12), (0.50, 0.50, 0.52), (0.93, 0.93, 0.91)),
    slope=0.0,
    speed=4.0,
    radius=(12.0, 14.0),
    along=1.5,
    across=4.0,
)
"""The world of "shapes": 16 scenes."""

TEXTURED = World(
    frames=9,
    size=64,
    colours=COLOURS,
    shapes=SHAPES,
    directions=ALL_DIRECTIONS,
    textures=("plain", "striped", "dotted"),
    backgrounds=((0.16, 0.16, 0.18), (0.32, 0.32, 0.34), (0.48, 0.48, 0.50)),
    slope=0.07,
    speed=3.5,
    radius=(13.0, 15.5),
    along=1.5,
    across=4.0,
)
"""The world of "wan": 96 scenes. Its backgrounds are darker than the first's, because white belongs to the textures."""

FRAMES, SIZE, SCENES, PIXELS_PER_FRAME = PLAIN.frames, PLAIN.size, PLAIN.scenes, PLAIN.speed


def sample_clips(scenes: list[Scene], generator: torch.Generator) -> torch.Tensor:
    """`World.sample_clips` of the first world."""
    return PLAIN.sample_clips(scenes, generator)
