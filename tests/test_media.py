"""Videos and the metrics on them."""

from __future__ import annotations

import imageio.v3 as iio
import numpy as np
import pytest

from fastercache import policies
from fastercache.report import media, metrics


def clips(n: int = 2, frames: int = 3, height: int = 12, width: int = 16) -> np.ndarray:
    return np.random.default_rng(0).uniform(0.2, 0.8, (n, frames, height, width, 3)).astype(np.float32)


def test_psnr_is_that_of_each_clip_averaged():
    a = clips().astype(np.float64)
    b = a + np.array([0.1, 0.01])[:, None, None, None, None]
    assert metrics.psnr(a, b) == pytest.approx((20 + 40) / 2)
    assert metrics.psnr(a, a) == np.inf


def test_ssim():
    a = clips()
    assert metrics.ssim(a, a) == pytest.approx(1)
    assert metrics.ssim(a, 1 - a) < 0.5


@pytest.mark.parametrize("metric", [metrics.psnr, metrics.ssim])
def test_metrics_refuse_other_shapes(metric):
    with pytest.raises(ValueError, match=r"\[2, 3, 12, 16, 3\] and \[1, 3, 12, 16, 3\]"):
        metric(clips(), clips(1))


@pytest.mark.parametrize("prompts", [1, 2, 3])
@pytest.mark.parametrize("guidance", [True, False])
def test_comparison_shows_both_clips_of_every_prompt(prompts, guidance):
    """Flat clips come back as areas of their own colour: as many pixels of each as there are clips."""
    chart = policies.paper(50, guidance).chart()
    uncached, cached = np.full((2, 8, 8, 3), (1.0, 0.0, 0.0)), np.full((2, 8, 8, 3), (0.0, 1.0, 0.0))
    pairs = [media.Pair("a prompt too long to be shown in full " * 9, uncached, cached, 4.12, 2.81)] * prompts
    video = media.comparison(pairs, chart, "title", "headline")
    assert video.dtype == np.uint8 and video.shape[0] == 2
    assert video.shape[1] % 2 == video.shape[2] % 2 == 0
    side = 320 if prompts < 3 else 192
    for colour in ((255, 0, 0), (0, 255, 0)):
        assert (video[0] == colour).all(-1).sum() == prompts * side**2


def test_save_and_read_back(tmp_path):
    frames = media.to_bytes(clips(1, frames=8, height=33, width=47)[0])
    for name in ("video.mp4", "video.gif", "video.png"):
        media.save(tmp_path / name, frames, loops=3)
    assert iio.imread(tmp_path / "video.mp4", plugin="pyav").shape == (24, 34, 48, 3)
    assert iio.imread(tmp_path / "video.gif").shape == frames.shape
    assert np.array_equal(iio.imread(tmp_path / "video.png"), frames[4])


@pytest.mark.parametrize("name", ["clip.webp", "clip"])
def test_a_name_without_a_format_is_refused(tmp_path, name):
    with pytest.raises(media.OutputError, match="end the name in"):
        media.save(tmp_path / name, media.to_bytes(clips(1)[0]))


def test_a_place_is_looked_at_and_left_as_it_was(tmp_path):
    there, new = tmp_path / "there.mp4", tmp_path / "folder" / "new.mp4"
    there.write_bytes(b"before")
    for path in (there, new):
        media.check_writable(path)
    assert there.read_bytes() == b"before" and new.parent.is_dir() and not new.exists()
    with pytest.raises(media.OutputError, match=r"there\.mp4/clip\.mp4"):
        media.check_writable(there / "clip.mp4")
