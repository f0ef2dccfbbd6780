"""Scores a clip of an embedded pipeline's world against its prompt: colour, shape, texture and motion, each right or
wrong.

Purely analytic, so that the score does not depend on another trained model. The background is the plane through the
colours of the frame's border (their median where the world's backgrounds are plain), the object whatever differs from
it; colour is the nearest named colour of the object's core, shape follows from how much of its bounding box the object
fills (square 1, circle pi/4, triangle 1/2), texture from how much of it is white and how widely the white is spread,
motion from the path of its centroid.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from skimage import measure, morphology

from fastercache.shapes.world import PLAIN, Scene, World

CONTRAST = 0.22
"""Distance in RGB ([0, 1] per channel) from the background at which a pixel belongs to an object: half the least
contrast in the world."""
FILL_SQUARE_CIRCLE = 0.885
"""Bounding-box fill between a circle's (0.785) and a square's (1), which the world has not, so that no blob passes for
a circle."""
FILL_CIRCLE_TRIANGLE = 0.65
"""Bounding-box fill between a triangle's (0.5) and a circle's."""
UPPER_CIRCLE_TRIANGLE = 0.41
"""Share of an object in the upper half of its bounding box, between a triangle's (0.25, blurred up to 0.39) and a
circle's (0.5). It tells shapes in the world with textures, whose pipeline blurs more: a blurred triangle loses its
corners, and with them the box that it hardly fills."""
COLOURED = 0.3
"""Difference of the greatest and the least channel from which a pixel counts as coloured: less than half the least of
the named colours."""
WHITE_LEAST, WHITE_MOST = 0.07, 0.75
"""Share of an object that is not coloured: a plain one has less than the first, and no texture has more than the
second."""
SPREAD = 0.62
"""Root mean square distance of the white from its middle over that of the object: 0.4 to 0.5 for a dot, about 1 for
stripes."""


@dataclass(frozen=True)
class Sighting:
    """The object of one frame: its colour and shape (names of the world), its centroid in pixels (x, y), and its
    texture."""

    colour: str
    shape: str
    centre: tuple[float, float]
    texture: str = "plain"


@dataclass(frozen=True)
class Score:
    """Which parts of the prompt a clip shows. `all_right` is what the project reports as the prompt score.

    texture: true in a world that has no textures.
    """

    colour: bool
    shape: bool
    motion: bool
    texture: bool = True

    @property
    def all_right(self) -> bool:
        return self.colour and self.shape and self.motion and self.texture


def background_of(frame: np.ndarray, world: World) -> np.ndarray:
    """The colour of the background: `[3]`, or `[H, W, 3]` in a world whose backgrounds have a slope."""
    on_border = np.ones(frame.shape[:2], dtype=bool)
    on_border[1:-1, 1:-1] = False
    border = np.concatenate([frame[0], frame[-1], frame[:, 0], frame[:, -1]])
    median = np.median(border, axis=0)
    if not world.slope:
        return median
    y, x = np.indices(frame.shape[:2]) / (len(frame) - 1) - 0.5
    terms = np.stack([np.ones_like(x), x, y], axis=-1)
    # What an object might show at the border is left out: the slope alone keeps every background this near to its
    # median.
    near = on_border & (np.linalg.norm(frame - median, axis=-1) < 4 * world.slope)
    return terms @ np.linalg.lstsq(terms[near], frame[near], rcond=None)[0]


def texture_of(image: np.ndarray, inside: np.ndarray) -> str:
    """The texture of an object: its bounding box `[h, w, 3]`, and which of its pixels are well inside it, `[h, w]`."""
    white = inside & (np.ptp(image, axis=-1) < COLOURED)
    share = white.sum() / inside.sum()
    if share < WHITE_LEAST:
        return "plain"
    if share > WHITE_MOST:
        return "none"

    def spread(mask: np.ndarray) -> float:
        return float(np.sqrt(np.var(np.argwhere(mask), axis=0).sum()))

    return "dotted" if spread(white) < SPREAD * spread(inside) else "striped"


def largest_of(mask: np.ndarray) -> Any:
    """The largest region of a mask; `None` if it is tiny, or a fifth of the mask lies elsewhere."""
    regions = sorted(measure.regionprops(measure.label(mask)), key=lambda region: -region.area)
    if not regions or regions[0].area < 40 or regions[0].area < 0.8 * mask.sum():
        return None
    return regions[0]


def core_of(region: Any) -> np.ndarray:
    """Which pixels of a region's bounding box are well inside it."""
    core = morphology.erosion(np.pad(region.image, 1), morphology.disk(2))[1:-1, 1:-1]
    return core if core.any() else region.image


def shape_of(region: Any, world: World) -> str:
    if region.extent > FILL_SQUARE_CIRCLE:
        return "square"
    if not world.textures:
        return "circle" if region.extent > FILL_CIRCLE_TRIANGLE else "triangle"
    upper = region.image[: len(region.image) // 2].sum() / region.image.sum()
    if upper < UPPER_CIRCLE_TRIANGLE:
        return "triangle"
    return "circle" if region.extent > FILL_CIRCLE_TRIANGLE else "none"


def sight(frame: np.ndarray, world: World = PLAIN) -> Sighting | None:
    """The one object in an RGB frame (`[H, W, 3]`, floats in [0, 1]); `None` if there is none or its mass is
    scattered."""
    largest = largest_of(np.linalg.norm(frame - background_of(frame, world), axis=-1) > CONTRAST)
    if largest is None:
        return None
    top, left, bottom, right = largest.bbox
    inside = core_of(largest)
    image = frame[top:bottom, left:right]
    texture = "plain"
    if world.textures:
        texture = texture_of(image, inside)
        coloured = inside & (np.ptp(image, axis=-1) >= COLOURED)
        inside = coloured if coloured.any() else inside
    mean = image[inside].mean(axis=0)
    colour = min(world.colours, key=lambda name: float(np.linalg.norm(mean - np.asarray(world.colours[name]))))
    if np.linalg.norm(mean - np.asarray(world.colours[colour])) > 0.35:
        return None
    y, x = largest.centroid
    return Sighting(colour, shape_of(largest, world), (float(x), float(y)), texture)


def score(clip: np.ndarray, prompt: str, world: World = PLAIN) -> Score:
    """Score a clip (`[frames, H, W, 3]`, floats in [0, 1]) against a prompt of the world.

    An object must be seen in every frame. Colour, shape and texture must be right in at least three quarters of them.
    Motion must follow the named direction with at least half the world's speed, drift less than half as far across it,
    and never step back by more than a pixel.
    """
    scene = Scene.parse(prompt, world)
    sightings = [sight(frame, world) for frame in clip]
    seen = [sighting for sighting in sightings if sighting is not None]
    if len(seen) < len(sightings):
        return Score(False, False, False, False)
    enough = 0.75 * len(sightings)
    colours = Counter(sighting.colour for sighting in seen)
    shapes = Counter(sighting.shape for sighting in seen)
    textures = Counter(sighting.texture for sighting in seen)

    path = np.asarray([sighting.centre for sighting in seen])
    heading = np.asarray(world.directions[scene.direction])
    along, across = path @ heading, path @ heading[::-1]
    travel = along[-1] - along[0]
    motion = (
        travel >= 0.5 * world.speed * (len(seen) - 1)
        and abs(across[-1] - across[0]) < 0.5 * travel
        and float(np.diff(along).min()) > -1.0
    )
    texture = scene.texture is None or textures[scene.texture] >= enough
    return Score(colours[scene.colour] >= enough, shapes[scene.shape] >= enough, bool(motion), texture)
