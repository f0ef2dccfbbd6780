"""One row for each case: checked first, then timed. Tables of rows, and the bars they are held to."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from bench import report
from bench.op_cases import AS_RELEASED, Case
from bench.timing import percentiles, time_case

Row = dict[str, Any]
TIMES = ("p20_us", "p50_us", "p80_us", "gbps", "copy_fraction", "vs_eager", "vs_inductor")
HEADER = (
    "op",
    "case",
    "served by",
    "MB",
    "p20 (us)",
    "p50 (us)",
    "p80 (us)",
    "GB/s",
    "of copy",
    "vs eager",
    "vs Inductor",
    "max error",
)


def measure(case: Case, device: str, seconds: float, with_inductor: bool = True) -> tuple[Row, list[str]]:
    """The row of a case, and what is to be said of it: each form that fails or is wrong is named, and is not timed.

    Where `ours` is wrong, nothing is.
    """
    notes: list[str] = []
    errors: dict[str, float] = {}
    forms = {}
    for name, form in case.forms.items():
        if name == "inductor" and not with_inductor:
            continue
        try:
            errors[name], right = case.error(name)
        except Exception as error:
            notes.append(
                f"{case.op}, {case.name}: {name} failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
            )
            continue
        finally:
            free(device)
        if right:
            forms[name] = form
        else:
            notes.append(f"{case.op}, {case.name}: {name} is wrong, by {errors[name]:.3g} of the largest value")
    row: Row = {
        "op": case.op,
        "case": case.name,
        "bytes": case.moved,
        **dict.fromkeys(TIMES),
        "max_error": errors.get("ours"),
    }
    row["served_by"] = case.implementation("ours", device)
    row |= {"correct": "ours" in forms, "p50_us_of": {}}
    if row["correct"]:
        times = time_case(case, device, forms, seconds)
        p50 = {name: percentiles(values)[1] for name, values in times.items()}
        eager = [us for name, us in p50.items() if name.startswith("eager")]
        row |= dict(zip(TIMES, percentiles(times["ours"]), strict=False))
        row["gbps"], row["copy_fraction"] = case.moved / p50["ours"] / 1e3, p50["copy"] / p50["ours"]
        row["vs_eager"] = min(eager) / p50["ours"] if eager else None
        row["vs_inductor"] = p50["inductor"] / p50["ours"] if "inductor" in p50 else None
        row["p50_us_of"] = p50
    free(device)
    return row, notes


def free(device: str) -> None:
    """Gives a GPU's memory back, as the next case may need most of it."""
    if device == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def copy_gbps(rows: Iterable[Row]) -> float | None:
    """The fastest of the copies timed beside the rows."""
    return max((row["bytes"] / row["p50_us_of"]["copy"] / 1e3 for row in rows if row["p50_us_of"]), default=None)


def table(rows: Iterable[Row]) -> str:
    """`vs` is the time of the best plain form over ours."""

    def cells(row: Row) -> list[str]:
        def shown(key: str, spec: str, suffix: str = "") -> str:
            return "-" if row[key] is None else f"{row[key]:{spec}}{suffix}"

        times = [shown(key, ".1f") for key in ("p20_us", "p50_us", "p80_us")] + [
            shown("gbps", ".1f"),
            shown("copy_fraction", ".2f"),
        ]
        ratios = [shown(key, ".2f", "x") for key in ("vs_eager", "vs_inductor")]
        right = "" if row["correct"] else " WRONG"
        return [
            row["op"],
            row["case"],
            row.get("served_by", "-"),
            f"{row['bytes'] / 1e6:.1f}",
            *times,
            *ratios,
            shown("max_error", ".1e") + right,
        ]

    return report.table(HEADER, map(cells, rows))


def against_best(row: Row) -> float | None:
    """Time of the best plain form, eager or Inductor's, over ours."""
    known = [row[key] for key in ("vs_eager", "vs_inductor") if row[key] is not None]
    return min(known, default=None)


def skipped_step_bars(rows: Sequence[Row], bound: float) -> list[Row]:
    """The CFG work of a skipped step against the FFTs that the authors' code runs, and against the best plain form of
    them."""

    def against_released(row: Row) -> float | None:
        times = row.get("p50_us_of", {})
        return times[AS_RELEASED] / times["ours"] if {AS_RELEASED, "ours"} <= times.keys() else None

    return [
        bar("CFG work of a skipped step: against the FFTs as released", rows, against_released, bound),
        bar("CFG work of a skipped step: against the best plain FFTs", rows, lambda row: row["vs_eager"], bound),
    ]


def bar(
    text: str, rows: Sequence[Row], value: Callable[[Row], float | None], bound: float, at_least: bool = True
) -> Row:
    """The worst of the rows against a bound. One row that is missing a value leaves the whole bar unmeasured."""
    values = [value(row) for row in rows]
    known = [one for one in values if one is not None]
    row: Row = {"bar": text, "bound": bound, "measured": None, "worst": None, "verdict": "not measured"}
    if not known or len(known) < len(values):
        return row
    worst = min(known) if at_least else max(known)
    where = rows[values.index(worst)]
    holds = worst >= bound if at_least else worst <= bound
    label = f"{where['op']}, {where['case']}" if "case" in where else where["op"]
    return row | {"measured": worst, "worst": label, "verdict": "holds" if holds else "does not hold"}


def bar_table(bars: Iterable[Row]) -> str:
    def cells(one: Row) -> list[str]:
        measured = "-" if one["measured"] is None else f"{one['measured']:.3g}"
        return [one["bar"], f"{one['bound']:g}", measured, one["worst"] or "-", one["verdict"]]

    return report.table(("bar", "bound", "measured", "worst case", "verdict"), map(cells, bars))
