"""Videos to show: uncached beside accelerated, with the schedule that made the difference drawn below."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Iterator, Sequence
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
class Pair:
    """One prompt's two clips, `[frames, H, W, 3]` in [0, 1], and the seconds each took."""

    prompt: str
    uncached: np.ndarray
    cached: np.ndarray
    uncached_seconds: float
    cached_seconds: float


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


def comparison(pairs: Sequence[Pair], chart: str, title: str, headline: str) -> np.ndarray:
    """Draw pairs of clips of one shape as a video, `[frames, height, width, 3]` uint8 with even height and width.

    A pair is a row, or half a row from three pairs on. chart: the steps, as `Schedule.chart` gives them. title and
    headline stand at the top left and right.
    """
    frames, height, width = pairs[0].uncached.shape[:3]
    columns = 1 if len(pairs) < 3 else 2
    scale = max(1, round((320 if columns == 1 else 192) / width))
    w, h = width * scale, height * scale
    cell_w, cell_h = 2 * w + GAP, h + 68
    rows = -(-len(pairs) // columns)
    chart_rows = [line.split() for line in chart.splitlines()]
    top, bottom = 60, 38 + 22 * len(chart_rows)
    canvas_w = max(2 * MARGIN + columns * cell_w + (columns - 1) * MARGIN, 640)
    canvas_h = top + rows * cell_h + bottom + MARGIN // 2
    canvas = Image.new("RGB", (canvas_w + canvas_w % 2, canvas_h + canvas_h % 2), BACKGROUND)
    draw = ImageDraw.Draw(canvas)

    draw.text((MARGIN, 36), title, font=_font(20), fill=TEXT, anchor="ls")
    draw.text((canvas_w - MARGIN, 36), headline, font=_font(20), fill=ACCENT, anchor="rs")
    left = (canvas_w - columns * cell_w - (columns - 1) * MARGIN) // 2
    places = []
    for index, pair in enumerate(pairs):
        x, y = left + index % columns * (cell_w + MARGIN), top + index // columns * cell_h
        speedup = pair.uncached_seconds / pair.cached_seconds
        draw.text((x, y + 16), f"uncached  {pair.uncached_seconds:.1f} s", font=_font(13), fill=MUTED, anchor="ls")
        draw.text(
            (x + w + GAP, y + 16), f"fastercache  {pair.cached_seconds:.1f} s", font=_font(13), fill=ACCENT, anchor="ls"
        )
        draw.text((x + cell_w, y + 16), f"{speedup:.2f}x", font=_font(13), fill=ACCENT, anchor="rs")
        draw.text(
            (x + cell_w / 2, y + h + 45), _fit(pair.prompt, _font(17), cell_w), font=_font(17), fill=TEXT, anchor="ms"
        )
        places.append(((x, y + 24), (x + w + GAP, y + 24)))
    _draw_chart(draw, chart_rows, MARGIN, top + rows * cell_h + 8, canvas_w - 2 * MARGIN)

    video = np.tile(np.asarray(canvas), (frames, 1, 1, 1))
    for pair, corners in zip(pairs, places, strict=True):
        for clip, (x, y) in zip((pair.uncached, pair.cached), corners, strict=True):
            for frame, picture in zip(video, to_bytes(clip), strict=True):
                frame[y : y + h, x : x + w] = Image.fromarray(picture).resize((w, h), Image.Resampling.LANCZOS)
    return video


def _draw_chart(draw: ImageDraw.ImageDraw, rows: Sequence[Sequence[str]], x: int, y: int, width: int) -> None:
    """Rows of steps, one for each branch, over a legend; `width` pixels in all."""
    label_width = 66
    steps = len(rows[0][1])
    step_width = (width - label_width) / steps
    gap = 2 if step_width >= 6 else 0
    for branch, cells in rows:
        draw.text((x, y + 13), branch, font=_font(13), fill=MUTED, anchor="ls")
        for position, cell in enumerate(cells):
            start, end = (x + label_width + round(edge * step_width) for edge in (position, position + 1))
            draw.rectangle((start, y, max(start, end - 1 - gap), y + 15), fill=STEP_COLOURS[cell][0])
        y += 22
    x += label_width
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
    return text.rstrip() + "..."
