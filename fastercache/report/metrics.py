"""How close two videos are, frame by frame. Both are measured on the decoded pixels, after everything a user would
see."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

WINDOW = 11
"""Pixels of a side of SSIM's window."""


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of videos `[n, frames, H, W, 3]` in [0, 1].

    `10 log10(1 / MSE)` with the mean squared error of a whole clip (all frames, pixels and channels), then the mean
    over the n clips. Infinite as soon as one clip equals the other exactly.
    """
    _check(a, b)
    return float(np.mean([psnr_of_clip(x, y) for x, y in zip(a, b, strict=True)]))


def psnr_of_clip(made: np.ndarray, wanted: np.ndarray, peak: float = 1.0) -> float:
    """`10 log10(peak^2 / MSE)` in dB of two arrays of one shape, such as a clip's frames or its latents, in float64;
    infinite where they are equal."""
    error = float(np.mean((made.astype(np.float64) - wanted) ** 2))
    return 10 * math.log10(peak**2 / error) if error else math.inf


def ssim(a: np.ndarray, b: np.ndarray, *, borders: bool = False) -> float:
    """Structural similarity of videos `[n, frames, H, W, 3]` in [0, 1]: 1 for equal videos.

    As Wang et al. (2004) define it (Gaussian window of 11 x 11, sigma 1.5, population covariance), the mean over the
    three channels of each frame, then over all frames of all clips.

    borders: take the mean over all pixels of frames of at least 6 x 6, mirrored at their edges, as torchmetrics does;
        else over those whose window lies inside the frame, of at least 11 x 11, as the authors and scikit-image do.
    """
    from skimage.metrics import structural_similarity  # a calibration needs PSNR alone

    _check(a, b)
    margin = WINDOW // 2 if borders else 0
    frames = zip(*(_mirrored(clips.reshape(-1, *clips.shape[2:]), margin) for clips in (a, b)), strict=True)
    window = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    return float(np.mean([structural_similarity(x, y, data_range=1.0, channel_axis=-1, **window) for x, y in frames]))


def _mirrored(frames: np.ndarray, margin: int) -> Iterator[np.ndarray]:
    for frame in frames:
        yield np.pad(frame, ((margin, margin), (margin, margin), (0, 0)), mode="reflect") if margin else frame


def _check(a: np.ndarray, b: np.ndarray) -> None:
    if a.shape != b.shape or a.ndim != 5:
        raise ValueError(
            f"videos have shapes {list(a.shape)} and {list(b.shape)}, expected two of the same [n, frames, H, W, 3]"
        )
