"""Schedules drawn and described for people, and what they save, as text and as plain data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich.text import Text

from fastercache.cache.formats import BUILT_IN
from fastercache.report.published import System
from fastercache.schedule.plan import Plan
from fastercache.schedule.schedule import Schedule
from fastercache.schedule.step import Step

CHART_WIDTH = 50
CELLS = {"#": ("█", "bright_blue", "computed"), "~": ("▒", "yellow", "blended"), ".": ("·", "bright_black", "not run")}
"""Glyph, colour and name of each character of a step chart (`Schedule.chart`)."""


def chart(schedule: Schedule, guidance: bool) -> Text:
    """The steps as rows of cells, fifty a line, with a legend; the conditional branch above."""
    lines = schedule.chart().splitlines()[: 2 if guidance else 1]
    rows = [line.split() for line in lines]
    drawn = Text()
    for first in range(0, len(schedule), CHART_WIDTH):
        numbers = range(first + 1, min(first + CHART_WIDTH, len(schedule)) + 1, 10)
        drawn.append(
            f"{'step':<8}" + "".join(f"{number:<10}" for number in numbers).rstrip() + "\n", style="bright_black"
        )
        for branch, cells in rows:
            drawn.append(f"{branch:<8}")
            for cell in cells[first : first + CHART_WIDTH]:
                glyph, colour, _ = CELLS[cell]
                drawn.append(glyph, style=colour)
            drawn.append("\n")
        drawn.append("\n")
    drawn.append(" " * 8)
    for glyph, colour, name in CELLS.values():
        drawn.append(glyph, style=colour)
        drawn.append(f" {name}   ")
    drawn.append("\n")
    drawn.rstrip()
    return drawn


def coefficients(steps: Sequence[Step], guidance: bool) -> str:
    """One line for each form of taps, for each weight of a rebuilt branch that is ever used, and for summed
    predictions."""
    lines = _blends("blend  ", [(number, step.taps) for number, step in enumerate(steps, 1) if step.reuse])
    for selector in dict.fromkeys(selector for step in steps for selector, _ in step.own_taps):
        own = [
            (number, dict(step.own_taps)[selector])
            for number, step in enumerate(steps, 1)
            if selector in dict(step.own_taps)
        ]
        lines += _blends(selector, own)
    rebuilt = {number: step for number, step in enumerate(steps, 1) if guidance and step.branches == "cond"}
    for label, name, unused in (
        ("low     w1", "low", 1.0),
        ("high    w2", "high", 1.0),
        ("previous w", "previous", 0.0),
    ):
        used = {number: getattr(step, name) for number, step in rebuilt.items() if getattr(step, name) != unused}
        if used:
            lines.append(f"{label} = {_span(list(used.values()))}, {_where(list(used))}")
    for label, runs in (("stand-in", False), ("corrected", True)):
        sums = [
            (number, step.terms) for number, step in enumerate(steps, 1) if step.runs == runs and step.terms is not None
        ]
        if sums:
            counts = [len(terms.taps) for _, terms in sums]
            latents = " and the latents" if any(terms.now or terms.newest for _, terms in sums) else ""
            lines.append(
                f"{label} sum of {_span(counts)} predictions{latents}, {_where([number for number, _ in sums])}"
            )
    return "\n".join(lines)


def _blends(label: str, taps: Sequence[tuple[int, tuple[float, ...]]]) -> list[str]:
    """What the numbered steps blend with: one line for each form that their coefficients have."""
    plain = [number for number, row in taps if row == (1.0,)]
    linear = {number: -row[1] for number, row in taps if len(row) == 2 and math.isclose(sum(row), 1.0)}
    other = {number: len(row) for number, row in taps if number not in plain and number not in linear}
    lines = []
    if plain:
        lines.append(f"{label} A, the newest output unchanged, {_where(plain)}")
    if linear:
        lines.append(f"{label} A + w (A - B), w = {_span(list(linear.values()))}, {_where(list(linear))}")
    if other:
        lines.append(f"{label} {_span(list(other.values()))} taps, {_where(list(other))}")
    return lines


def _span(values: Sequence[float]) -> str:
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low} to {high}"


def _where(numbers: Sequence[int]) -> str:
    return f"on {len(numbers)} step{'s' * (len(numbers) > 1)} ({_span(numbers)})"


def phases(schedule: Schedule, guidance: bool) -> list[dict[str, Any]]:
    """The distinct kinds of step, each with the branches that run, the selectors blended, and the numbers of its steps
    (from 1)."""
    found: dict[tuple, list[int]] = {}
    for number, step in enumerate(schedule.steps, 1):
        blended = tuple(selector for selector in schedule.selectors if selector in step.reuse)
        found.setdefault((_branches(step, guidance), blended), []).append(number)
    return [
        {"branches": list(ran), "blended": list(blended), "steps": numbers} for (ran, blended), numbers in found.items()
    ]


def _branches(step: Step, guidance: bool) -> tuple[str, ...]:
    if not step.runs:
        return ()
    return ("cond", "uncond") if guidance and step.branches == "both" else ("cond",)


def saved(schedule: Schedule, guidance: bool) -> dict[str, dict[str, int]]:
    """Branch-steps (one branch through one step) that are not run, and, for each selector, computations of its sites
    that are not made."""
    total = len(schedule) * (2 if guidance else 1)
    ran = [len(_branches(step, guidance)) for step in schedule.steps]
    result = {"branch-steps": {"skipped": total - sum(ran), "of": total}}
    for selector in schedule.selectors:
        computed = sum(count for count, step in zip(ran, schedule.steps, strict=True) if selector not in step.reuse)
        result[f"{selector} computations"] = {"skipped": total - computed, "of": total}
    return result


def kept(system: System, plan: Plan) -> list[dict[str, Any]]:
    """What of the sites is kept for one video, for each kind of site that is blended anywhere: the branches, and how
    many tensors."""
    found: dict[str, dict[str, Any]] = {}
    for site, number in zip(system.sites, plan.cadence_of, strict=True):
        cadence = plan.cadences[number]
        if cadence.branches:
            entry = found.setdefault(site.node.kind, {"kind": site.node.kind, "sites": 0, "branches": [], "tensors": 0})
            entry["sites"] += 1
            entry["branches"] += [branch for branch in cadence.branches if branch not in entry["branches"]]
            entry["tensors"] += len(cadence.branches) * cadence.slots * len(site.outputs)
    return list(found.values())


def costs(system: System, plan: Plan) -> dict[str, Any]:
    """What a run of `plan` costs on a system at its published size; a floating-point operation is half a
    multiply-accumulate."""
    uncached, cached = 2 * system.uncached_macs(plan), 2 * system.cached_macs(plan)
    return {
        "system": {
            "name": system.name,
            "video": system.video,
            "parameters": system.parameters,
            "source": system.source,
        },
        "flops": {"uncached": uncached, "cached": cached},
        "macs": {"uncached": uncached // 2, "cached": cached // 2},
        "flops_ratio": uncached / cached,
        "kept": kept(system, plan),
        "cache_bytes": {storage: system.cache_bytes(plan, storage) for storage in (format.name for format in BUILT_IN)},
        "weight_bytes": system.parameters * system.dtype.itemsize,
        "fits_80_gb": system.fitting_format(plan),
    }
