"""How long one clip takes, uncached and cached with the paper's schedule or another: `python -m bench.shapes_speed
[--pipeline wan] [--schedule FILE]`.

Uncached and cached take turns after a warm-up, and who begins alternates, so that a machine that slows down slows both;
there is a thread for each free core, and freed memory stays with the process. Times are seconds of a
whole call of the pipeline, text encoder and decoder included; those of the denoiser alone are given beside them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastercache
from bench import report, shapes
from fastercache import Summary
from fastercache.host import environment, steady
from fastercache.shapes import PIPELINES, STEPS

EFFICIENCY_BAR = 0.9
"""Least speed-up as a share of the FLOPs ratio."""
SECONDS_BAR = 12.0
"""Most seconds of an uncached clip."""


class Stopwatch:
    """Adds up the seconds spent in a module's calls."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._start = 0.0

    def begin(self, *_: Any) -> None:
        self._start = time.perf_counter()

    def end(self, *_: Any) -> None:
        self.seconds += time.perf_counter() - self._start

    @contextmanager
    def on(self, module: torch.nn.Module):
        handles = [module.register_forward_pre_hook(self.begin), module.register_forward_hook(self.end)]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()


def once(
    pipe: Any, schedule: str | None, pair: shapes.Pair, steps: int, pipeline: str = "shapes"
) -> tuple[float, float, Summary | None]:
    """Seconds of one clip, seconds of them in the denoiser, and the summary of a cached run."""
    with shapes.compiled(pipe, schedule):
        with Stopwatch().on(pipe.transformer) as denoiser:
            start = time.perf_counter()
            shapes.call(pipe, pair, steps, PIPELINES[pipeline].guidance_scale, pipeline)
            seconds = time.perf_counter() - start
        summary = None if schedule is None else fastercache.summary(pipe)
    return seconds, denoiser.seconds, summary


def quartiles(values: Sequence[float]) -> dict[str, float]:
    """Of seconds, or of ratios."""
    low, middle, high = (float(x) for x in np.percentile(values, (25, 50, 75)))
    return {
        "median": middle,
        "min": float(min(values)),
        "max": float(max(values)),
        "quartile_1": low,
        "quartile_3": high,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--repeats", type=int, default=7, help="timed clips of each kind (default 7), after one of each to warm up"
    )
    parser.add_argument("--steps", type=int, default=STEPS, help=f"denoising steps (default {STEPS})")
    parser.add_argument(
        "--threads", type=int, default=None, help="torch threads (default: one for each core that is free)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=report.RESULTS / "shapes_speed.json",
        help="JSON file; the Markdown table goes next to it",
    )
    parser.add_argument(
        "--pipeline", choices=PIPELINES, default="shapes", help="the embedded pipeline (default shapes)"
    )
    shapes.schedule_option(parser)
    args = parser.parse_args(arguments)
    title, command = "Shapes: seconds of one clip", "python -m bench.shapes_speed"
    command, title, out = shapes.named(command, title, parser.get_default("out"), args.pipeline, args.schedule)
    args.out = out if args.out == parser.get_default("out") else args.out
    load_before = environment.machine()["load_average"]
    if args.threads is None:
        print(steady.choose_threads(), flush=True)
    else:
        torch.set_num_threads(args.threads)
    threads = torch.get_num_threads()
    pipe = shapes.pipeline(args.pipeline)
    schedule = shapes.cached("cached", shapes.policy_of(args.schedule), args.steps).schedule
    pairs = shapes.held_out(args.repeats + 1, args.pipeline)

    total: dict[str, list[float]] = {"uncached": [], "cached": []}
    denoiser: dict[str, list[float]] = {"uncached": [], "cached": []}
    summary = None
    for number, pair in enumerate(pairs):
        for kind, text in shapes.in_turn((("uncached", None), ("cached", schedule)), number):
            seconds, inside, found = once(pipe, text, pair, args.steps, args.pipeline)
            summary = found or summary
            if number:
                total[kind].append(seconds)
                denoiser[kind].append(inside)
            print(f"{number or 'warm-up'} {kind}: {seconds:.3f} s, {inside:.3f} s of them in the denoiser", flush=True)
    assert summary is not None, "every round has a cached clip"
    flops_ratio, cache_bytes = summary.flops.ratio, summary.cache_bytes

    ratios = [a / b for a, b in zip(total["uncached"], total["cached"], strict=True)]
    denoiser_ratios = [a / b for a, b in zip(denoiser["uncached"], denoiser["cached"], strict=True)]
    speed_up, denoiser_speed_up = float(np.median(ratios)), float(np.median(denoiser_ratios))
    rows = [
        {
            "variant": kind,
            "seconds": quartiles(total[kind]),
            "denoiser_seconds": quartiles(denoiser[kind]),
            "all_seconds": total[kind],
        }
        for kind in total
    ]
    efficiency, slowest = speed_up / flops_ratio, rows[0]["seconds"]["median"]
    bars = [
        {
            "bar": f"speed-up at least {EFFICIENCY_BAR} of the FLOPs ratio",
            "measured": efficiency,
            "holds": efficiency >= EFFICIENCY_BAR,
        },
        {
            "bar": f"uncached clip in at most {SECONDS_BAR:g} s (median)",
            "measured": slowest,
            "holds": slowest <= SECONDS_BAR,
        },
    ]

    def seconds_cells(x: dict[str, float]) -> tuple[str, str]:
        return f"{x['median']:.3f}", f"{x['min']:.3f}"

    spread, guidance_scale = quartiles(ratios), PIPELINES[args.pipeline].guidance_scale
    outside = 1 - float(np.median([a / b for a, b in zip(denoiser["uncached"], total["uncached"], strict=True)]))
    body = [
        f'One clip of the embedded pipeline "{args.pipeline}", {args.steps} steps, guidance {guidance_scale}, float32, '
        f"{threads} torch threads; {args.repeats} clips of each kind in turn, after a warm-up. "
        f"The load average was {load_before} at the start.",
        report.table(
            ("variant", "median (s)", "least (s)", "denoiser, median (s)", "denoiser, least (s)"),
            [(row["variant"], *seconds_cells(row["seconds"]), *seconds_cells(row["denoiser_seconds"])) for row in rows],
        ),
        report.table(
            ("figure", "value"),
            [
                ("speed-up, median of the ratios of neighbours", f"{speed_up:.3f}"),
                ("its quartiles over the repeats", report.between((spread["quartile_1"], spread["quartile_3"]), ".3f")),
                ("FLOPs ratio of the denoiser", f"{flops_ratio:.3f}"),
                ("speed-up / FLOPs ratio", f"{efficiency:.3f}"),
                ("speed-up of the denoiser alone", f"{denoiser_speed_up:.3f}"),
                ("the same / FLOPs ratio", f"{denoiser_speed_up / flops_ratio:.3f}"),
                ("share of an uncached clip outside the denoiser (text, decoding, sampler)", f"{outside:.3f}"),
                ("cache", f"{cache_bytes / 1e6:.2f} MB"),
            ],
        ),
        report.table(
            ("bar", "measured", "verdict"),
            [(row["bar"], f"{row['measured']:.3f}", "holds" if row["holds"] else "does not hold") for row in bars],
        ),
    ]
    data = {
        "settings": {
            "steps": args.steps,
            "guidance_scale": guidance_scale,
            "threads": threads,
            "repeats": args.repeats,
            "dtype": "float32",
            "load_average_before": load_before,
        },
        "rows": rows,
        "speed_up": speed_up,
        "speed_ups": ratios,
        "flops_ratio": flops_ratio,
        "efficiency": efficiency,
        "denoiser_speed_up": denoiser_speed_up,
        "outside_denoiser": outside,
        "cache_bytes": cache_bytes,
        "bars": bars,
    }
    report.write(args.out, title, command, data, body)


if __name__ == "__main__":
    main()
