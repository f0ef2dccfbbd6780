"""Videos to show: uncached beside accelerated, with the schedules that made the difference drawn below."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import imageio.v3 as iio
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fastercache.errors import FasterCacheError

FPS = 8
H264 = (".mp4", ".mov", ".mkv")
SUFFIXES = (*H264, ".gif", ".png")
"""What `save` writes."""
MARGIN = 24
GAP = 8
BACKGROUND, TEXT, MUTED = "#0f1216", "#eceff4", "#8d97a7"
ACCENT = "#5aa2ff"
STEP_COLOURS = {"#": (ACCENT, "computed"), "~": ("#f2b33d", "blended"), ".": ("#2b313b", "not run")}
"""Colour and name of each character of a step chart (`Schedule.chart`)."""


class OutputError(FasterCacheError, ValueError):
    """A place that no video can be written to."""


@dataclass(frozen=True)
class Clip:
    """Frames `[frames, H, W, 3]` in [0, 1], the seconds they took, and what made them, for people."""

    name: str
    frames: np.ndarray
    seconds: float


@dataclass(frozen=True)
class Take:
    """One prompt's clips from the same noise: the uncached one first."""

    prompt: str
    clips: tuple[Clip, ...]


def to_bytes(clip: np.ndarray) -> np.ndarray:
    """Pixels in [0, 1] to uint8."""
    return (clip.clip(0, 1) * 255).round().astype(np.uint8)


def check_suffix(path: Path) -> None:
    """`OutputError` if `save` has no format for this name. `ImportError` if the package that writes it is not
    installed."""
    if path.suffix.lower() not in SUFFIXES:
        found = f"{path.suffix} is no format for a video here" if path.suffix else "it has no suffix"
        raise OutputError(
            f"cannot write {path}: {found}; end the name in {', '.join(H264)}, .gif, or .png for the middle frame"
        )
    if path.suffix.lower() in H264:
        importlib.import_module("av")


def check_writable(path: Path) -> None:
    """`OutputError` if no file can be written at `path`. Makes the folders above it; leaves what is there as it is."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        there = path.exists()
        with path.open("ab"):
            pass
        if not there:
            path.unlink()
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}; give another place") from error


def read(path: Path) -> np.ndarray:
    """All frames of a video that `save` may have written, `[frames, H, W, 3]` uint8. `OutputError` if it cannot be
    read."""
    try:
        if path.suffix.lower() in H264:
            return iio.imread(path, plugin="pyav")
        frames = iio.imread(path, mode="RGB")
        return frames if frames.ndim == 4 else frames[None]
    except ImportError:
        raise
    except Exception as error:  # whatever PyAV and Pillow raise on a file that is cut off or is something else
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise OutputError(f"{path} cannot be read as a video: {reason}") from error


def save(path: Path, frames: np.ndarray, loops: int = 1) -> None:
    """Write frames `[frames, H, W, 3]` uint8: `.png` is the middle one, `.gif` repeats for ever, the others are H.264
    at 8 Hz.

    loops: how often the frames are repeated in an H.264 file; an odd last row or column is doubled there.
    """
    check_suffix(path)
    suffix = path.suffix.lower()
    if suffix == ".png":
        iio.imwrite(path, frames[len(frames) // 2])
    elif suffix == ".gif":
        iio.imwrite(path, frames, duration=1000 / FPS, loop=0)
    else:
        height, width = frames.shape[1:3]
        even = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
        frames = np.tile(even, (loops, 1, 1, 1))
        with _nothing_to_collect():
            iio.imwrite(path, frames, plugin="pyav", codec="h264", fps=FPS, out_pixel_format="yuv420p")


@contextmanager
def _nothing_to_collect() -> Iterator[None]:
    """imageio collects the garbage of the whole process twice for each file: 1.2 s of 1.2 s beside a pipeline. Here it
    finds what came after this only."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def comparison(takes: Sequence[Take], charts: Mapping[str, str], title: str, headline: str) -> np.ndarray:
    """Draw clips of one shape as a video, `[frames, height, width, 3]` uint8 with even height and width.

    A take is a row, or half a row from three takes on; each has as many clips as the first. charts: the steps of each
    schedule, as `Schedule.chart` gives them, by its name, which is written above where there are several. title and
    headline stand at the top left and right.
    """
    frames, height, width = takes[0].clips[0].frames.shape[:3]
    columns = 1 if len(takes) < 3 else 2
    scale = max(1, round((320 if columns == 1 else 192) / width))
    w, h = width * scale, height * scale
    cell_w, cell_h = len(takes[0].clips) * (w + GAP) - GAP, h + 68
    rows = -(-len(takes) // columns)
    drawn = {name: [line.split() for line in chart.splitlines()] for name, chart in charts.items()}
    heading = 22 * (len(drawn) > 1)
    top, bottom = 60, 38 + sum(heading + 22 * len(chart) for chart in drawn.values())
    canvas_w = max(2 * MARGIN + columns * cell_w + (columns - 1) * MARGIN, 640)
    canvas_h = top + rows * cell_h + bottom + MARGIN // 2
    canvas = Image.new("RGB", (canvas_w + canvas_w % 2, canvas_h + canvas_h % 2), BACKGROUND)
    draw = ImageDraw.Draw(canvas)

    headline = _fit(headline, _font(20), canvas_w - 2 * MARGIN)
    room = canvas_w - 3 * MARGIN - _font(20).getlength(headline)
    draw.text((MARGIN, 36), _fit(title, _font(20), room), font=_font(20), fill=TEXT, anchor="ls")
    draw.text((canvas_w - MARGIN, 36), headline, font=_font(20), fill=ACCENT, anchor="rs")
    left = (canvas_w - columns * cell_w - (columns - 1) * MARGIN) // 2
    video_places = []
    for index, take in enumerate(takes):
        x, y = left + index % columns * (cell_w + MARGIN), top + index // columns * cell_h
        for number, clip in enumerate(take.clips):
            place = x + number * (w + GAP)
            _draw_label(draw, clip, take.clips[0].seconds / clip.seconds if number else None, place, y + 16, w)
            video_places.append((clip.frames, place, y + 24))
        draw.text(
            (x + cell_w / 2, y + h + 45), _fit(take.prompt, _font(17), cell_w), font=_font(17), fill=TEXT, anchor="ms"
        )
    y = top + rows * cell_h + 8
    for name, chart in drawn.items():
        if heading:
            draw.text((MARGIN, y + 13), name, font=_font(13), fill=TEXT, anchor="ls")
        _draw_chart(draw, chart, MARGIN, y + heading, canvas_w - 2 * MARGIN)
        y += heading + 22 * len(chart)
    _draw_legend(draw, len(next(iter(drawn.values()))[0][1]), y)

    video = np.tile(np.asarray(canvas), (frames, 1, 1, 1))
    for clip_frames, x, y in video_places:
        for frame, picture in zip(video, to_bytes(clip_frames), strict=True):
            frame[y : y + h, x : x + w] = Image.fromarray(picture).resize((w, h), Image.Resampling.LANCZOS)
    return video


def _draw_label(draw: ImageDraw.ImageDraw, clip: Clip, speedup: float | None, x: int, y: int, width: int) -> None:
    """What made a clip and in how many seconds, and how much faster than the uncached one, over `width` pixels."""
    font, colour = _font(13), MUTED if speedup is None else ACCENT
    gain = "" if speedup is None else f"{speedup:.2f}x"
    seconds = f"  {clip.seconds:.1f} s"
    room = width - font.getlength(seconds) - font.getlength(gain) - GAP
    draw.text((x, y), _fit(clip.name, font, room) + seconds, font=font, fill=colour, anchor="ls")
    draw.text((x + width, y), gain, font=font, fill=colour, anchor="rs")


CHART_LABEL = 66
"""Pixels of a chart's row before its first step."""


def _draw_chart(draw: ImageDraw.ImageDraw, rows: Sequence[Sequence[str]], x: int, y: int, width: int) -> None:
    """Rows of steps, one for each branch; `width` pixels in all."""
    step_width = (width - CHART_LABEL) / len(rows[0][1])
    gap = 2 if step_width >= 6 else 0
    for branch, cells in rows:
        draw.text((x, y + 13), branch, font=_font(13), fill=MUTED, anchor="ls")
        for position, cell in enumerate(cells):
            start, end = (x + CHART_LABEL + round(edge * step_width) for edge in (position, position + 1))
            draw.rectangle((start, y, max(start, end - 1 - gap), y + 15), fill=STEP_COLOURS[cell][0])
        y += 22


def _draw_legend(draw: ImageDraw.ImageDraw, steps: int, y: int) -> None:
    """What the colours of charts mean, and how many steps they have."""
    x = MARGIN + CHART_LABEL
    for colour, name in STEP_COLOURS.values():
        draw.rectangle((x, y + 5, x + 11, y + 16), fill=colour)
        draw.text((x + 18, y + 16), name, font=_font(13), fill=MUTED, anchor="ls")
        x += 36 + round(_font(13).getlength(name))
    draw.text((draw.im.size[0] - MARGIN, y + 16), f"{steps} denoising steps", font=_font(13), fill=MUTED, anchor="rs")


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=size)


def _fit(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: float) -> str:
    """The text, cut with an ellipsis where it is longer than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..." if text else ""
