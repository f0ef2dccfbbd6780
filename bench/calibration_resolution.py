"""Whether the steps of a schedule can be searched for at a lower resolution: `python -m bench.calibration_resolution
[--pipeline wan]`.

`effort="quick"` at the pipeline's own size, against the same at half the height and width, of which the steps alone are
kept and the coefficients fitted at the pipeline's own size. Searched and fitted on the calibration prompts, measured on
held-out pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench import report, shapes, stats
from bench.calibration import QUICK, calibration, variant
from fastercache.calibration.calibrate import Calibration
from fastercache.calibration.search import Running, shown
from fastercache.shapes import PIPELINES

WORTH = 0.5
"""Most loss, in dB, at which a search at half the size would be worth having."""


def searched(found: Calibration, speedup: float) -> Running:
    """The steps that a calibration chooses."""
    with found.stage.open():
        found.prepare()
        return found._best(speedup).running


def main(arguments: Sequence[str] | None = None) -> None:
    options = shapes.parser(__doc__, 16, "calibration_resolution_shapes.json")
    options.add_argument("--pipeline", choices=PIPELINES, default="shapes", help="the embedded pipeline")
    args = options.parse_args(arguments)
    if args.out == options.get_default("out"):
        args.out = args.out.with_name(f"calibration_resolution_{args.pipeline}.json")
    full = dict(PIPELINES[args.pipeline].call)
    half = full | {side: int(full[side]) // 2 for side in ("height", "width")}
    own = calibration(args.pipeline, args.steps, args.work, "quick")
    lower = calibration(args.pipeline, args.steps, args.work, "quick", call=half)
    steps = {"at its own size": searched(own, QUICK), "at half of it": searched(lower, QUICK)}
    with own.stage.open():
        fitted = {name: own._rehearsed(running, own.fitted).rehearsal.schedule for name, running in steps.items()}
    arms = {name: variant(name, one, args.pipeline) for name, one in fitted.items()}
    uncached = variant("uncached", None, args.pipeline)
    pairs = shapes.held_out(args.pairs, args.pipeline)
    n, clips = shapes.collect(
        [uncached, *arms.values()], pairs, args.steps, work=args.work, processes=args.processes, minutes=args.minutes
    )
    psnr = {name: shapes.similarity(clips[name], clips["uncached"])[0] for name in arms}
    first, second = arms
    lost, interval = stats.mean_interval(psnr[first] - psnr[second])
    rows: list[dict[str, Any]] = []
    for name in arms:
        mean, between = stats.mean_interval(psnr[name])
        ratio = clips[name].facts["flops_ratio"]
        rows.append({"searched": name, "flops_ratio": ratio, "psnr_db": mean, "interval": between})
    carries = lost <= WORTH
    verdict = f"lost by the search at half the size: {lost:+.2f} dB {report.between(interval)}, mean over pairs; it "
    verdict += "carries over." if carries else "does not carry over."
    body = [
        shapes.described(args.steps, args.pairs, n, args.pipeline),
        f'`effort="quick"` for {QUICK:g} times the speed. Half the size is {half["height"]} x {half["width"]}; the '
        f"coefficients are fitted at {full['height']} x {full['width']} in both. PSNR in dB against uncached clips, "
        "mean over pairs with its 95 % t interval.",
        report.table(
            ("steps searched", "FLOPs ratio", "PSNR"),
            [
                (
                    row["searched"],
                    f"{row['flops_ratio']:.2f}",
                    f"{row['psnr_db']:.1f} {report.between(row['interval'], '.1f')}",
                )
                for row in rows
            ],
        ),
        f"{verdict} Up to {WORTH:g} dB would be worth it.",
        "```\n" + "\n".join(f"{shown(running)} {name}" for name, running in steps.items()) + "\n```",
    ]
    data = {
        "settings": shapes.settings(args.steps, args.pairs, n, args.pipeline),
        "rows": rows,
        "lost_db": lost,
        "lost_interval_db": interval,
        "psnr_db": {name: one.tolist() for name, one in psnr.items()},
    }
    command = "python -m bench.calibration_resolution"
    command += "" if args.pipeline == "shapes" else f" --pipeline {args.pipeline}"
    report.write(args.out, f"{args.pipeline.capitalize()}: steps searched at half the size", command, data, body)


if __name__ == "__main__":
    main()
