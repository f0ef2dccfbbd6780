"""Plots as SVG text: points and lines on two axes, for reports that are read in a browser or beside code."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

WIDTH, HEIGHT = 720, 330
"""Pixels of a plot in all, and of the axes' area, above which every series has a line in the legend."""
LEFT, RIGHT, TOP, BOTTOM, LEGEND = 70, 20, 14, 52, 18
"""Pixels around the axes' area, and of a line of the legend."""
COLOURS = ("#2a78d6", "#d97706", "#16a34a", "#c026d3", "#dc2626", "#0891b2")
"""Of the series that are told apart, in turn."""
MUTED, TEXT, GRID = "#a3aab5", "#1f2937", "#e5e7eb"


@dataclass(frozen=True)
class Series:
    """Points `(x, y)` that are drawn alike. Those that are not finite are left out, on a logarithmic axis also those
    that are not positive; a line is broken there.

    kind: small dots, rings, or a line. colour: `None` for the next of `COLOURS`.
    """

    name: str
    points: Sequence[tuple[float, float]]
    kind: Literal["dots", "rings", "line"] = "dots"
    colour: str | None = None


@dataclass(frozen=True)
class _Axis:
    """From values to pixels: `low` at `start`, `high` at `end`."""

    low: float
    high: float
    start: float
    end: float
    ticks: tuple[float, ...]
    logarithmic: bool

    def __call__(self, value: float) -> float:
        low, high, value = (
            (math.log10(v) for v in (self.low, self.high, value))
            if self.logarithmic
            else (
                self.low,
                self.high,
                value,
            )
        )
        return self.start + (value - low) / (high - low) * (self.end - self.start)


def plot(series: Sequence[Series], x: str, y: str, logarithmic: bool = False) -> str:
    """An SVG document. x, y: what the axes are of. logarithmic: whether the y axis is.

    Raises:
        ValueError: no point can be drawn.
    """
    shown = [[point for point in one.points if _drawable(point, logarithmic)] for one in series]
    points = [point for each in shown for point in each]
    if not points:
        raise ValueError("there is no point to draw")
    top = TOP + LEGEND * len(series)
    bottom = top + HEIGHT
    across = _axis([x for one in series for x, _ in one.points if math.isfinite(x)], LEFT, WIDTH - RIGHT, False)
    up = _axis([point[1] for point in points], bottom, top, logarithmic)
    height = bottom + BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'font-family="sans-serif" font-size="12" role="img" aria-label="{escape(f"{y} against {x}")}">',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
    ]
    for tick in across.ticks:
        place = across(tick)
        parts.append(f'<path d="M{place:.1f} {top}V{bottom}" stroke="{GRID}"/>')
        parts.append(_text(place, bottom + 18, f"{tick:g}", "middle"))
    for tick in up.ticks:
        place = up(tick)
        parts.append(f'<path d="M{LEFT} {place:.1f}H{WIDTH - RIGHT}" stroke="{GRID}"/>')
        parts.append(_text(LEFT - 8, place + 4, f"{tick:g}", "end"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, height - 12, x, "middle"))
    middle = (top + bottom) / 2
    parts.append(f'<g transform="rotate(-90 18 {middle:g})">{_text(18, middle, y, "middle")}</g>')
    colours = iter(COLOURS * len(series))
    for number, one in enumerate(series):
        colour = one.colour or next(colours)
        parts += _marks(one, across, up, colour)
        line = TOP + LEGEND * number
        parts.append(_legend(one, LEFT + 6, line, colour))
        parts.append(_text(LEFT + 18, line + 4, one.name, "start"))
    return "\n".join((*parts, "</svg>\n"))


def _drawable(point: tuple[float, float], logarithmic: bool) -> bool:
    return all(map(math.isfinite, point)) and (not logarithmic or point[1] > 0)


def _marks(one: Series, across: _Axis, up: _Axis, colour: str) -> list[str]:
    if one.kind != "line":
        style = f'fill="{colour}"' if one.kind == "dots" else f'fill="none" stroke="{colour}" stroke-width="2.5"'
        radius = 3 if one.kind == "dots" else 7
        return [
            f'<circle cx="{across(x):.1f}" cy="{up(y):.1f}" r="{radius}" {style}/>'
            for x, y in one.points
            if _drawable((x, y), up.logarithmic)
        ]
    path, pen = "", "M"
    for x, y in one.points:
        if _drawable((x, y), up.logarithmic):
            path += f"{pen}{across(x):.1f} {up(y):.1f}"
            pen = "L"
        else:
            pen = "M"
    return [f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="2"/>']


def _legend(one: Series, x: float, y: float, colour: str) -> str:
    """What stands for a series: as its points or its line look."""
    if one.kind == "line":
        return f'<line x1="{x - 6}" x2="{x + 6}" y1="{y}" y2="{y}" stroke="{colour}" stroke-width="2"/>'
    if one.kind == "rings":
        return f'<circle cx="{x}" cy="{y}" r="5" fill="#ffffff" stroke="{colour}" stroke-width="2.5"/>'
    return f'<circle cx="{x}" cy="{y}" r="4" fill="{colour}"/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{TEXT}">{escape(text)}</text>'


def _axis(values: Sequence[float], start: float, end: float, logarithmic: bool) -> _Axis:
    low, high = min(values), max(values)
    if logarithmic:
        factors = (1, 2, 5) if high < 100 * low else (1,)  # powers of ten alone are few lines to read a value by
        powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
        marks = [factor * 10.0**power for power in powers for factor in factors]
        first = max(number for number, mark in enumerate(marks) if mark <= low)
        last = min(number for number, mark in enumerate(marks) if mark >= high and number > first)
        ticks = tuple(marks[first : last + 1])
        return _Axis(ticks[0], ticks[-1], start, end, ticks, True)
    if low == high:
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / 6
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    ticks = tuple(round(number * step, 12) for number in range(first, last + 1))
    return _Axis(ticks[0], ticks[-1], start, end, ticks, False)
