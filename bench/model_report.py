"""What the rows of `bench.models` say: factors, bars, and the tables of models.md."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench import report
from bench.model_runs import ERROR_FACTOR, Row

LEAST_EFFICIENCY, LEAST_TOGETHER = 0.97, 2.2
"""The bars: speed-up over the FLOPs ratio, both runs compiled; all factors together over the eager uncached run."""
BAR_MODEL = "cogvideox-2b"
ATTENTION_ALONE = "attention alone"
"""The row of the model's attention by each backend, which has a table of its own."""


def find(rows: Sequence[Row], model: str, configuration: str) -> Row | None:
    """The row, if it was measured and is right."""
    return next(
        (
            r
            for r in rows
            if (r["model"], r["configuration"]) == (model, configuration) and r.get("seconds") and r["correct"]
        ),
        None,
    )


def factor(rows: Sequence[Row], model: str, slower: str, faster: str) -> float | None:
    """How many times faster; `None` unless both rows were measured and are right."""
    a, b = find(rows, model, slower), find(rows, model, faster)
    return a["seconds"] / b["seconds"] if a and b else None


def same_attention(rows: Sequence[Row]) -> bool:
    """Whether PyTorch's choice is the fastest, as far as is known."""
    return not any(row.get("fastest") and not row["default"] for row in rows)


def factors(rows: Sequence[Row], model: str, ratio: float, default_is_fastest: bool) -> list[dict[str, Any]]:
    """One by one, and together."""
    suffix = "" if default_is_fastest else ", fastest attention"
    pairs = [
        ("compilation: eager uncached to compiled uncached", "eager uncached", "compiled uncached"),
        ("schedule: compiled uncached to compiled cached", "compiled uncached", "compiled cached"),
        (
            "attention: compiled cached to the same with the fastest attention",
            "compiled cached",
            f"compiled cached{suffix}",
        ),
        ("all together: eager uncached to the last", "eager uncached", f"compiled cached{suffix}"),
        ("schedule, eager", "eager uncached", "eager cached"),
        ("schedule, with the fastest attention", f"compiled uncached{suffix}", f"compiled cached{suffix}"),
        ("int8 caches: against the model's dtype", "compiled cached", "compiled cached, int8"),
        ("CUDA graphs: against regional graphs", "compiled cached", "compiled cached, CUDA graphs"),
    ]
    found = []
    for what, slower, faster in pairs:
        value = factor(rows, model, slower, faster)
        share = value / ratio if value is not None and what.startswith("schedule") else None
        found.append({"factor": what, "value": value, "of_flops_ratio": share})
    return found


def bars(rows: Sequence[Row], ratio: float | None, default_is_fastest: bool) -> list[dict[str, Any]]:
    """The bars of CogVideoX-2B; not measured unless every run they compare was, and is right: the first over whole
    runs."""
    best = "compiled cached" if default_is_fastest else "compiled cached, fastest attention"
    both = [find(rows, BAR_MODEL, name) for name in ("compiled uncached", "compiled cached")]
    schedule = (
        factor(rows, BAR_MODEL, "compiled uncached", "compiled cached")
        if all(row and row.get("whole") for row in both)
        else None
    )
    efficiency = schedule / ratio if schedule and ratio else None
    together = factor(rows, BAR_MODEL, "eager uncached", best)
    values = (
        (
            f"speed-up over compiled uncached, as a share of the FLOPs ratio: at least {LEAST_EFFICIENCY:g}",
            efficiency,
            LEAST_EFFICIENCY,
        ),
        (
            f"schedule, compilation and attention together, over eager uncached: at least {LEAST_TOGETHER:g}",
            together,
            LEAST_TOGETHER,
        ),
    )
    return [
        {"bar": bar, "measured": value, "holds": None if value is None else value >= least}
        for bar, value, least in values
    ]


def verdict(holds: bool | None) -> str:
    return "not measured" if holds is None else "holds" if holds else "does not hold"


def number(value: float | None, spec: str = ".3f", scale: float = 1.0) -> str | None:
    return None if value is None else f"{value * scale:{spec}}"


def _phases(row: Row, scale: float, spec: str) -> str:
    median = row.get("whole_phase_s") or row.get("phase_s") or {}
    return ", ".join(f"{name} {scale * value:{spec}}" for name, value in median.items())


def configuration_table(rows: Sequence[Row]) -> str:
    cells = []
    for row in rows:
        caches = [number(row.get(key), ".3f", 1e-9) for key in ("cache_bytes_planned", "cache_bytes")]
        cells.append(
            (
                row["configuration"],
                row.get("attention"),
                number(row.get("seconds"), ".2f"),
                "whole" if row.get("whole") else None,
                number(row.get("composed_s"), ".2f"),
                _phases(row, 1e3, ".1f"),
                number(row.get("error"), ".2e"),
                number(row.get("error_limit"), ".2e"),
                number(row.get("compile_s"), ".1f"),
                number(row.get("peak_bytes"), ".2f", 1e-9),
                " / ".join(x for x in caches if x),
                row["outcome"],
            )
        )
    header = (
        "configuration",
        "attention",
        "seconds",
        "run",
        "composed",
        "ms a step",
        "error",
        "limit",
        "compiling (s)",
        "peak GB",
        "cache GB, planned / allocated",
        "outcome",
    )
    return report.table(header, cells)


BESIDE = {
    "uncached": "uncached",
    "this package, the paper's schedule": "cached, paper",
    "this package, whole steps": "cached, whole steps",
    "diffusers FasterCache, the paper's schedule": "diffusers FasterCache",
    "diffusers MagCache, the same whole steps": "diffusers MagCache",
    "diffusers FirstBlockCache, the same whole steps": "diffusers FirstBlockCache",
}
"""What is compared, and the names of its rows but for the mode."""
MODES = ("eager", "compiled")


def beside(rows: Sequence[Row], model: str) -> list[tuple[str | None, ...]]:
    """One line for each of `BESIDE` that was asked for: the faster of its modes, and what the run takes."""
    result = []
    uncached = find(rows, model, "eager uncached")
    for what, name in BESIDE.items():
        asked = [
            row for row in rows if row["model"] == model and row["configuration"] in [f"{m} {name}" for m in MODES]
        ]
        right = [row for row in asked if find([row], model, row["configuration"])]
        if right:
            best = min(right, key=lambda row: row["seconds"])
            over = uncached["seconds"] / best["seconds"] if uncached else None
            peak, kept = best.get("peak_bytes"), best.get("cache_bytes")
            cells = (number(best["seconds"], ".2f"), number(over, ".2f"), number(peak, ".2f", 1e-9))
            result.append((what, best["configuration"].split()[0], *cells, number(kept, ".3f", 1e-9), None))
        elif asked:
            result.append((what, None, None, None, None, None, asked[-1]["outcome"]))
    return result


def attention_table(rows: Sequence[Row]) -> str:
    cells = [
        (
            row["backend"] + (", PyTorch's choice" if row["default"] else ""),
            number(row["seconds"], ".3f", 1e3),
            number(row.get("tflops"), ".0f"),
            number(row.get("difference"), ".1e"),
            row.get("outcome"),
        )
        for row in rows
    ]
    return report.table(("backend", "ms", "TFLOP/s", "difference", "why not"), cells)


def end_to_end_table(rows: Sequence[Row]) -> str:
    cells = [
        (
            row["model"],
            row.get("schedule"),
            row.get("steps_done"),
            row.get("cache_format"),
            _phases(row, 1.0, ".2f"),
            number(row.get("peak_bytes"), ".1f", 1e-9),
            number(row.get("cache_bytes_planned"), ".3f", 1e-9),
            number(row.get("cache_bytes"), ".3f", 1e-9),
            "right" if row["correct"] else "no",
            row["outcome"],
        )
        for row in rows
    ]
    header = (
        "system",
        "schedule",
        "steps",
        "cache format",
        "seconds a step",
        "peak GB",
        "cache GB planned",
        "allocated",
        "right",
        "outcome",
    )
    return report.table(header, cells)


def _of_model(model: str, about: dict[str, Any], dtype: str, rows: Sequence[Row]) -> list[str]:
    counted = about["flops"]
    parts = [
        f"## {model}",
        f"{about['video']}, {about['steps']} steps of `{about['schedule']}`, {dtype}, random weights, the denoiser "
        f"alone. FLOPs ratio {counted['ratio']:.4f} ({counted['uncached'] / 1e15:.3f} to "
        f"{counted['cached'] / 1e15:.3f} PFLOPs).",
        "`seconds` of a run: whole where one was timed, else `composed` of the medians of its phases. `error`: the "
        f"largest over a part of the schedule ({about['part_steps']} steps on given inputs), relative to the eager "
        f"model's predictions; `limit`: {ERROR_FACTOR:g} times what the eager model differs from a computation in "
        "higher precision. No factor is given of a run whose error is over it.",
        configuration_table([row for row in rows if row["configuration"] != ATTENTION_ALONE or not row["correct"]]),
        report.table(
            ("factor", "times", "of the FLOPs ratio"),
            [
                (x["factor"], number(x["value"]) or "not measured", number(x["of_flops_ratio"]))
                for x in about["factors"]
            ],
        ),
    ]
    if any(row.get("peer") for row in rows):
        parts += [
            "Beside others: each in the faster of its modes, eager or compiled, as far as its hooks let it be; `over`: "
            "how many times faster than the eager model. diffusers' MagCache and FirstBlockCache are made to skip the "
            "steps that this package's schedule skips.",
            report.table(("method", "mode", "seconds", "over", "peak GB", "cache GB", "why not"), beside(rows, model)),
        ]
    kernels = [
        f"{row['configuration']}: `{row['attention_kernels'][0]}`" for row in rows if row.get("attention_kernels")
    ]
    if kernels:
        parts.append(f"The kernels of attention, as the profiler saw them: {'; '.join(kernels)}.")
    if about["difference"] is not None:
        parts.append(
            "The latents at the end of the compiled cached run differ from the uncached ones by "
            f"{about['difference']:.3f} of their root mean square. With random weights this says nothing of quality."
        )
    if about["attention"]:
        shape = about["attention"][0]["shape"]
        parts += [
            f"Attention of {shape}, by `torch.nn.attention.sdpa_kernel`. {about['attention_note']}",
            attention_table(about["attention"]),
        ]
    return parts


def body_of(document: dict[str, Any], rehearsal: bool) -> list[str]:
    """The paragraphs and tables of models.md."""
    parts = (
        ["A rehearsal, not at the published sizes: no figure here says anything of the models."] if rehearsal else []
    )
    for model, about in document["models"].items():
        parts += _of_model(model, about, document["dtype"], [row for row in document["rows"] if row["model"] == model])
    rows = [row for row in document["rows"] if row["model"] not in document["models"]]
    if rows:
        parts += [
            "## From end to end",
            "A part of each schedule with all its phases, eager, random weights. `right`: the first step equals the "
            "untouched model bit for bit, every prediction is finite, and the cache has the bytes that "
            "`fastercache.report.published` predicts.",
            end_to_end_table(rows),
        ]
    parts += [
        "## Bars",
        report.table(
            ("bar", "measured", "verdict"),
            [(x["bar"], number(x["measured"]), verdict(x["holds"])) for x in document["bars"]],
        ),
    ]
    if document["not_measured"]:
        parts.append(f"Not measured, for want of time: {'; '.join(document['not_measured'])}.")
    notes = [
        f"- {row['model']}, {row['configuration']}: {note}"
        for row in document["rows"]
        for note in dict.fromkeys(row["notes"])
    ]
    return [*parts, "\n".join(notes)] if notes else parts
