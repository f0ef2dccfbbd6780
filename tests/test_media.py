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


COLOURS = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (1.0, 1.0, 1.0))


@pytest.mark.parametrize("prompts", [1, 2, 3])
@pytest.mark.parametrize("shown", [2, 3, 4])
def test_comparison_shows_all_clips_of_every_prompt(prompts, shown):
    """Flat clips come back as areas of their own colour: as many pixels of each as there are clips."""
    charts = {f"schedule {number}": policies.paper(50, number % 2 == 0).chart() for number in range(1, shown)}
    clips = [
        media.Clip(f"run {number} of a long name" * 5, np.full((2, 8, 8, 3), colour), 4.12 / (1 + number))
        for number, colour in enumerate(COLOURS[:shown])
    ]
    takes = [media.Take("a prompt too long to be shown in full " * 9, tuple(clips))] * prompts
    video = media.comparison(takes, charts, "title", "headline")
    assert video.dtype == np.uint8 and video.shape[0] == 2
    assert video.shape[1] % 2 == video.shape[2] % 2 == 0
    side = 320 if prompts < 3 else 192
    for colour in COLOURS[:shown]:
        assert (video[0] == np.multiply(colour, 255)).all(-1).sum() == prompts * side**2


def test_every_chart_has_its_rows():
    """A row more, or a chart more, makes the picture higher."""
    take = media.Take("a prompt", (media.Clip("uncached", clips(1)[0], 2.0), media.Clip("cached", clips(1)[0], 1.0)))
    guided, plain = policies.paper(20).chart(), policies.paper(20, False).chart().splitlines()[0]
    heights = [
        media.comparison([take], charts, "title", "headline").shape[1]
        for charts in ({"a": plain}, {"a": guided}, {"a": guided, "b": plain}, {"a": guided, "b": guided})
    ]
    assert heights == sorted(set(heights))


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
