"""What a calibration leaves in a folder: its schedules with an index, and a report with charts, in Markdown."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastercache.report import charts
from fastercache.report.plots import MUTED, Series, plot
from fastercache.schedule.carried import INDEX, index_of
from fastercache.schedule.schedule import Schedule

REPORT, SPEED, ERRORS = "report.md", "speed.svg", "errors.svg"


@dataclass(frozen=True)
class CalibrationReport:
    """What was found.

    schedules: those that were made; what each says of itself (`Schedule.measured`) is of held-out pairs.
    candidates: of each that was tried: how many times faster the denoiser is, and the mean PSNR in dB of its decoded
        clips against uncached ones, on the prompts by which schedules are chosen.
    errors: for each schedule and step, the root-mean-square error of the latents after that step against the uncached
        run's.
    facts: whatever else a reader should know (pipeline, prompts, machine, versions), in the order they are printed.
    """

    schedules: Sequence[Schedule]
    candidates: Sequence[tuple[float, float]] = ()
    errors: Sequence[Sequence[float]] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.schedules:
            raise ValueError("a report needs at least one schedule")
        if self.errors and len(self.errors) != len(self.schedules):
            raise ValueError(f"errors are of {len(self.errors)} schedules, and there are {len(self.schedules)}")


def write_schedules(schedules: Sequence[Schedule], folder: Path) -> list[Path]:
    """Write each to a file of its name, and an index that names them by step count, the first as the default: the
    folder can then be carried by a pipeline, as `schedules` beside its `model_index.json`. Returns the schedules'
    files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths, files = [], dict[int, tuple[str, ...]]()
    for schedule, name in zip(schedules, file_names(schedules), strict=True):
        schedule.to_json(folder / name)
        paths.append(folder / name)
        files[len(schedule)] = (*files.get(len(schedule), ()), name)
    (folder / INDEX).write_text(index_of(files))
    return paths


def write_report(report: CalibrationReport, folder: Path) -> Path:
    """Write the schedules, the charts and the report, and give the path of the latter. Files of the same names are
    replaced."""
    names = [path.name for path in write_schedules(report.schedules, folder)]
    drawn = {SPEED: _speed(report), ERRORS: _errors(report)}
    for name, chart in drawn.items():
        (folder / name).unlink(missing_ok=True)
        if chart is not None:
            (folder / name).write_text(chart)
    lines = ["# Calibrated schedules", "", *_table(report, names)]
    if drawn[SPEED] is not None:
        equal = sum(not math.isfinite(psnr) for _, psnr in report.candidates)
        lines += ["", "## Speed against PSNR", "", f"![Speed against PSNR]({SPEED})", "", _about_speed(report, equal)]
    if drawn[ERRORS] is not None:
        lines += ["", "## Error along the run", "", f"![Error along the run]({ERRORS})", ""]
        lines += ["Root-mean-square error of the latents after each step, against those of the uncached run."]
    lines += ["", "## Steps"]
    for schedule in report.schedules:
        guided = schedule.made_for is None or schedule.made_for.guided is not False
        lines += ["", f"### {_cell(schedule.name)}", "", "```", charts.chart(schedule, guided).plain]
        lines += [coefficients] if (coefficients := charts.coefficients(schedule.steps, guided)) else []
        lines += ["```"]
    if report.facts:
        lines += ["", "## How this was made", "", "| | |", "|---|---|"]
        lines += [f"| {_cell(name)} | {_cell(value)} |" for name, value in report.facts.items()]
    path = folder / REPORT
    path.write_text("\n".join(lines) + "\n")
    return path


def file_names(schedules: Sequence[Schedule]) -> list[str]:
    """A file's name for each schedule, of its own name; none twice, and none that the index has."""
    names: list[str] = []
    for schedule in schedules:
        stem = re.sub(r"[^\w.-]+", "-", schedule.name).strip("-.") or "schedule"
        tries = (f"{stem}{f'-{number}' if number else ''}.json" for number in range(len(schedules) + 1))
        names.append(next(name for name in tries if name not in (*names, INDEX)))
    return names


def _table(report: CalibrationReport, names: Sequence[str]) -> list[str]:
    lines = [
        "| schedule | denoiser, times faster | FLOPs ratio | PSNR, dB | 95 % interval | least | held-out pairs "
        "| calibration |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for schedule, name in zip(report.schedules, names, strict=True):
        found, cells = schedule.measured, ["not measured"] * 7
        if found is not None:
            interval = (
                "of one pair none" if found.psnr_interval is None else "{:.1f} to {:.1f}".format(*found.psnr_interval)
            )
            cells = [f"{found.speedup:.2f}", f"{found.flops_ratio:.2f}", f"{found.psnr:.1f}", interval]
            cells += [f"{found.psnr_least:.1f}", f"{found.pairs}"]
            cells += [f"{found.calibration:.0f} generations, {found.seconds:.0f} s"]
        lines.append(f"| [{_cell(schedule.name)}]({name}) | {' | '.join(cells)} |")
    return lines


def _speed(report: CalibrationReport) -> str | None:
    series = [Series("tried", list(report.candidates), colour=MUTED)] if report.candidates else []
    series += [
        Series(schedule.name, [(schedule.measured.speedup, schedule.measured.psnr)], "rings")
        for schedule in report.schedules
        if schedule.measured is not None
    ]
    if not any(math.isfinite(psnr) for one in series for _, psnr in one.points):
        return None
    return plot(series, "times faster, of the denoiser", "PSNR, dB")


def _about_speed(report: CalibrationReport, equal: int) -> str:
    what = []
    if report.candidates:
        what.append("Dots are the candidates that were tried, on the prompts by which schedules were chosen.")
    if any(schedule.measured is not None for schedule in report.schedules):
        what.append("Rings are the schedules above, on held-out pairs.")
    if equal:
        what.append(f"{equal} whose PSNR is not finite are left out.")
    return " ".join(what)


def _errors(report: CalibrationReport) -> str | None:
    if not any(error > 0 and math.isfinite(error) for errors in report.errors for error in errors):
        return None
    series = [
        Series(schedule.name, list(enumerate(map(float, errors), 1)), "line")
        for schedule, errors in zip(report.schedules, report.errors, strict=True)
    ]
    return plot(series, "step", "root-mean-square error of the latents", logarithmic=True)


def _cell(value: Any) -> str:
    """Text for a cell of a table: on one line, with no mark of Markdown's or HTML's that would be read as one."""
    return re.sub(r"([\\|`*_\[\]<>])", r"\\\1", " ".join(str(value).split()))
