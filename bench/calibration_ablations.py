"""What each stage of a calibration gains, at one speed: `python -m bench.calibration_ablations [--pipeline
wan] [--speedup 2]`.

From steps at equal distances and the newest prediction held, one stage after the other is added: steps chosen,
coefficients fitted to what the model predicted, fitted in closed loop, full steps corrected, steps of the conditional
branch alone, and the choice among candidates by measured clips. Beside that line: attention reused in the steps that
run, and the residual of all blocks held in place of the prediction. Everything is made on the calibration prompts and
measured on held-out pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from bench import report, shapes, stats
from bench.calibration import calibration, variant
from fastercache import Schedule
from fastercache.calibration.calibrate import Calibration
from fastercache.calibration.rehearse import FITTED, Options, Rehearsals
from fastercache.calibration.search import Running, Search, shown
from fastercache.schedule.step import Step
from fastercache.shapes import PIPELINES

WORTH = 0.3
"""Least gain of a stage, in dB, by which it stays."""
REUSING = 0.92
"""The speed-up of the steps, as a share of the others', where attention is reused besides."""


def evenly(steps: int, speedup: float) -> Running:
    """Full steps at equal distances, at most `steps / speedup` of them, the first one among them."""
    count = int(steps / speedup)
    full = {round(i * (steps - 1) / max(count - 1, 1)) for i in range(count)}
    return tuple("both" if t in full else "none" for t in range(steps))


def held(running: Running) -> Schedule:
    """The newest prediction stands in for skipped steps, the newest difference of the branches for a rebuilt one."""
    return Schedule(tuple(Step(branches) for branches in running))


def with_attention(schedule: Schedule) -> Schedule:
    """Attention is reused, extrapolated half a distance, in steps that run the conditional branch alone."""
    seen, steps = 0, []
    for step in schedule.steps:
        if step.branches == "cond" and seen >= 2:
            step = replace(step, reuse=("attention",), taps=(1.5, -0.5))
        else:
            seen += step.runs
        steps.append(step)
    return replace(schedule, steps=tuple(steps))


def with_stack(running: Running) -> Schedule:
    """The newest residual of all blocks stands in, where `held` has the prediction."""
    return Schedule(tuple(Step("both", reuse=("stack",), taps=(1.0,)) if b == "none" else Step(b) for b in running))


def schedules(found: Calibration, speedup: float) -> dict[str, Schedule]:
    """The arms, in the order of the ablation."""
    search = Search(found.residuals, found.importance, found.costs)
    alone = Search(found.residuals, found.importance, found.costs, conditional=False)
    full, running = alone.best(speedup), search.best(speedup)

    def fit(steps: Running, options: Options) -> Schedule:
        return Rehearsals(found.stage, options).fit("fitted", steps, found.fitted).schedule

    bare = Options(closed=False, correct=False)
    with found.stage.open():
        arms = {
            "steps at equal distances, held": held(evenly(found.residuals.steps, speedup)),
            "steps chosen, held": held(full),
            "fitted to the predictions": fit(full, bare),
            "fitted in closed loop": fit(full, replace(bare, closed=True)),
            "full steps corrected": fit(full, FITTED),
            "two predictions summed, not three": fit(full, replace(FITTED, terms=2)),
            "latents left out": fit(full, replace(FITTED, latents=False)),
            "two predictions, latents left out": fit(full, replace(FITTED, terms=2, latents=False)),
            "conditional steps": fit(running, FITTED),
            "conditional steps, two predictions, latents left out": fit(
                running, replace(FITTED, terms=2, latents=False)
            ),
            "no difference before the newest": fit(running, replace(FITTED, previous=False)),
            "chosen by measured clips": found._best(speedup).rehearsal.schedule,
            "attention reused besides": with_attention(fit(search.best(speedup * REUSING), FITTED)),
            "residual of all blocks held": with_stack(full),
        }
    return arms


LINE = (
    "steps at equal distances, held",
    "steps chosen, held",
    "fitted to the predictions",
    "fitted in closed loop",
    "full steps corrected",
    "conditional steps",
    "chosen by measured clips",
)
"""The stages that build on each other; the other arms are compared with the one that they change."""
AGAINST = {
    "two predictions summed, not three": "full steps corrected",
    "latents left out": "full steps corrected",
    "two predictions, latents left out": "full steps corrected",
    "conditional steps, two predictions, latents left out": "conditional steps",
    "no difference before the newest": "conditional steps",
    "attention reused besides": "conditional steps",
    "residual of all blocks held": "steps chosen, held",
}


def main(arguments: Sequence[str] | None = None) -> None:
    options = shapes.parser(__doc__, 24, "calibration_ablations.json")
    options.add_argument("--pipeline", choices=PIPELINES, default="shapes", help="the embedded pipeline")
    options.add_argument("--speedup", type=float, default=3.0, help="of every arm (default 3)")
    args = options.parse_args(arguments)
    found = calibration(args.pipeline, args.steps, args.work)
    with found.stage.open():
        found.prepare()
    arms = {name: variant(name, one, args.pipeline) for name, one in schedules(found, args.speedup).items()}
    pairs = shapes.held_out(args.pairs, args.pipeline)
    uncached = variant("uncached", None, args.pipeline)
    if args.out == options.get_default("out"):
        differs = ([] if args.pipeline == "shapes" else [args.pipeline]) + (
            [] if args.speedup == 3 else [f"{args.speedup:g}x"]
        )
        args.out = args.out.with_name("_".join(["calibration_ablations", *differs]) + ".json")
    n, clips = shapes.collect(
        [uncached, *arms.values()], pairs, args.steps, work=args.work, processes=args.processes, minutes=args.minutes
    )
    psnr = {name: shapes.similarity(clips[name], clips["uncached"])[0] for name in arms}
    rows: list[dict[str, Any]] = []
    for name in arms:
        before = AGAINST.get(name) or (LINE[LINE.index(name) - 1] if LINE.index(name) else None)
        mean, interval = stats.mean_interval(psnr[name])
        gain = None if before is None else stats.mean_interval(psnr[name] - psnr[before])
        ratio = clips[name].facts["flops_ratio"]
        row = {"arm": name, "flops_ratio": ratio, "psnr_db": mean, "interval": interval, "against": before}
        rows.append(row | ({} if gain is None else {"gain_db": gain[0], "gain_interval": gain[1]}))
    table = report.table(
        ("arm", "FLOPs ratio", "PSNR", "against", "gain"),
        [
            (
                row["arm"],
                f"{row['flops_ratio']:.2f}",
                f"{row['psnr_db']:.1f} {report.between(row['interval'], '.1f')}",
                row["against"] or "",
                f"{row['gain_db']:+.1f} {report.between(row['gain_interval'], '.1f')}" if "gain_db" in row else "",
            )
            for row in rows
        ],
    )
    body = [
        shapes.described(args.steps, args.pairs, n, args.pipeline),
        f"Each arm is at least {args.speedup:g} times as fast by the measured costs of its steps. PSNR in dB against "
        "uncached clips, mean over pairs; `gain` over the arm named beside it, on the same pairs; both with 95 % t "
        f"intervals. A stage that gains less than {WORTH} dB would be left out.",
        table,
        "```\n"
        + "\n".join(
            f"{shown([step.branches for step in Schedule.from_json(arms[name].schedule or '').steps])} {name}"
            for name in arms
        )
        + "\n```",
    ]
    data = {
        "settings": shapes.settings(args.steps, args.pairs, n, args.pipeline) | {"speedup": args.speedup},
        "rows": rows,
        "psnr_db": {name: np.asarray(one).tolist() for name, one in psnr.items()},
    }
    command = "python -m bench.calibration_ablations"
    command += "" if args.pipeline == "shapes" else f" --pipeline {args.pipeline}"
    command += "" if args.speedup == 3 else f" --speedup {args.speedup:g}"
    report.write(args.out, "Calibration: what each stage gains", command, data, body)


if __name__ == "__main__":
    main()
