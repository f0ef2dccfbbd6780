"""Scores a clip of the "shapes" world against its prompt: colour, shape and motion, each right or wrong.

Purely analytic, so that the score does not depend on another trained model. The background is the median of the frame's border, the
object whatever differs from it; colour is the nearest named colour of the object's core, shape follows from how much of its
bounding box the object fills (square 1, circle pi/4, triangle 1/2), motion from the path of its centroid.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
from skimage import measure, morphology

from fastercache.shapes.world import COLOURS, DIRECTIONS, PIXELS_PER_FRAME, Scene

CONTRAST = 0.22
"""Distance in RGB ([0, 1] per channel) from the background at which a pixel belongs to an object: half the least contrast in the world."""
FILL_SQUARE_CIRCLE = 0.885
"""Bounding-box fill between a circle's (0.785) and a square's (1), which the world has not, so that no blob passes for a circle."""
FILL_CIRCLE_TRIANGLE = 0.65
"""Bounding-box fill between a triangle's (0.5) and a circle's."""


@dataclass(frozen=True)
class Sighting:
    """The object of one frame: its colour and shape (names of the world) and its centroid in pixels (x, y)."""

    colour: str
    shape: str
    centre: tuple[float, float]


@dataclass(frozen=True)
class Score:
    """Which parts of the prompt a clip shows. `all_right` is what the project reports as the prompt score."""

    colour: bool
    shape: bool
    motion: bool

    @property
    def all_right(self) -> bool:
        return self.colour and self.shape and self.motion


def sight(frame: np.ndarray) -> Sighting | None:
    """The one object in an RGB frame (`[H, W, 3]`, floats in [0, 1]); `None` if there is none or its mass is scattered."""
    border = np.concatenate([frame[0], frame[-1], frame[:, 0], frame[:, -1]])
    background = np.median(border, axis=0)
    mask = np.linalg.norm(frame - background, axis=-1) > CONTRAST
    regions = sorted(measure.regionprops(measure.label(mask)), key=lambda region: -region.area)
    if not regions or regions[0].area < 40 or regions[0].area < 0.8 * mask.sum():
        return None
    largest = regions[0]
    core = morphology.erosion(np.pad(largest.image, 1), morphology.disk(2))[1:-1, 1:-1]
    top, left, bottom, right = largest.bbox
    pixels = frame[top:bottom, left:right][core if core.any() else largest.image]
    mean = pixels.mean(axis=0)
    colour = min(COLOURS, key=lambda name: float(np.linalg.norm(mean - np.asarray(COLOURS[name]))))
    if np.linalg.norm(mean - np.asarray(COLOURS[colour])) > 0.35:
        return None
    fill = largest.extent
    shape = "square" if fill > FILL_SQUARE_CIRCLE else "circle" if fill > FILL_CIRCLE_TRIANGLE else "triangle"
    y, x = largest.centroid
    return Sighting(colour, shape, (float(x), float(y)))


def score(clip: np.ndarray, prompt: str) -> Score:
    """Score a clip (`[frames, H, W, 3]`, floats in [0, 1]) against a prompt of the world.

    An object must be seen in every frame. Colour and shape must be right in at least three quarters of them. Motion must follow the named
    direction with at least half the world's speed, drift less than half as far across it, and never step back by more than a pixel.
    """
    scene = Scene.parse(prompt)
    sightings = [sight(frame) for frame in clip]
    seen = [sighting for sighting in sightings if sighting is not None]
    if len(seen) < len(sightings):
        return Score(False, False, False)
    enough = 0.75 * len(sightings)
    colours = Counter(sighting.colour for sighting in seen)
    shapes = Counter(sighting.shape for sighting in seen)

    path = np.asarray([sighting.centre for sighting in seen])
    heading = np.asarray(DIRECTIONS[scene.direction])
    along, across = path @ heading, path @ heading[::-1]
    travel = along[-1] - along[0]
    motion = (
        travel >= 0.5 * PIXELS_PER_FRAME * (len(seen) - 1)
        and abs(across[-1] - across[0]) < 0.5 * travel
        and float(np.diff(along).min()) > -1.0
    )
    return Score(colours[scene.colour] >= enough, shapes[scene.shape] >= enough, bool(motion))
