"""What calibrated schedules are worth on pairs that nothing was fitted to: `python -m bench.calibration [--pipeline
wan]`.

`--make` calibrates first, on the calibration prompts, and writes the schedules that the pipeline carries. Then
PSNR over held-out pairs, apart for the prompts that calibration knew (with new seeds) and for those that it did not:
the paper's schedule, the calibrated ones, `effort="quick"`, and without guidance, where skipped steps are all there is.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastercache
from bench import graphs, report, shapes, stats
from fastercache import Prediction, Schedule, Step, policies
from fastercache.calibration.calibrate import Calibration, Found
from fastercache.calibration.search import shown
from fastercache.report.calibration import write_schedules
from fastercache.shapes import PIPELINES

TARGETS = (3.0, 1.5, 2.0, 2.5, 4.0)
"""Speed-ups of the schedules that a pipeline carries, the default first."""
QUICK, UNGUIDED = 3.0, 2.0
AT_PAPERS_COST, GAIN_BAR = 1.46, 12.0
PAPERS_PSNR = 48.73
"""In dB, of the paper's schedule over 200 pairs of "shapes" (bench/results/shapes_quality.md)."""
FAST_BAR, STRETCH, FASTER_BAR, FASTER_PSNR, WORST_BAR, UNGUIDED_BAR = 3.0, 4.0, 2.4, 53.0, 40.0, 6.0
FULL_COST, QUICK_COST, SKIPPED_US = 80.0, 15.0, 150.0


def carried(pipeline: str) -> Path:
    """The folder of the schedules that a pipeline carries."""
    return PIPELINES[pipeline].path / shapes.SCHEDULES


def calibration(
    pipeline: str,
    steps: int,
    work: Path,
    effort: str = "full",
    guided: bool = True,
    call: Mapping[str, Any] | None = None,
) -> Calibration:
    """A calibration on the calibration prompts, kept under `work`. call: other arguments than the pipeline's own."""
    embedded = PIPELINES[pipeline]
    sizes = "" if call is None else f"-{call['height']}x{call['width']}"
    call = dict(embedded.call if call is None else call)
    call |= {"guidance_scale": embedded.guidance_scale if guided else 1.0}
    folder = work / f"calibration-{pipeline}-{effort}{'' if guided else '-unguided'}-{steps}{sizes}"
    prompts = shapes.calibration_prompts(pipeline)
    pipe = shapes.pipeline(pipeline)
    return Calibration(pipe, prompts, steps, effort, call, shapes.FIRST_CALIBRATION_SEED, folder)


def make(pipeline: str, steps: int, work: Path) -> list[Found]:
    """Calibrate, and write what the pipeline carries."""
    found = calibration(pipeline, steps, work).run(frontier=TARGETS)
    for one in found:
        print(f"{one.schedule.name}: {one.schedule.measured}", flush=True)
        print(shown([step.branches for step in one.schedule.steps]), flush=True)
    write_schedules([one.schedule for one in found], carried(pipeline))
    return found


def variant(name: str, schedule: Schedule | None, pipeline: str, guided: bool = True) -> shapes.Variant:
    """The variant that runs a schedule, or the uncached pipeline."""
    plain = shapes.Variant(name) if schedule is None else shapes.cached(name, shapes.fixed(schedule), len(schedule))
    return replace(plain, guided=guided, pipeline=pipeline)


def figures(psnr: np.ndarray, known: np.ndarray) -> dict[str, Any]:
    """Of the PSNR of each pair; known: whether its prompt is a calibration prompt."""
    mean, interval = stats.mean_interval(psnr)
    parts = {
        label: (*stats.mean_interval(psnr[which]), int(which.sum()))
        for label, which in (("new_prompts", ~known), ("known_prompts", known))
        if which.sum() > 1
    }
    return {
        "psnr_db": mean,
        "interval": interval,
        "percentile_5": float(np.percentile(psnr, 5)),
        "least": float(psnr.min()),
    } | {label: {"mean": m, "interval": i, "pairs": n} for label, (m, i, n) in parts.items()}


def skipped_step_microseconds(runs: int = 20) -> float:
    """What a step that calls nothing takes with the denoiser of "shapes", called as its pipeline calls it: median over
    the skipped steps of so many runs, sum of cached predictions included."""
    model, inputs = graphs.latte("cpu")
    terms = Prediction((0.5, 0.3, 0.2), 0.1, -0.1)
    schedule = Schedule((Step(),) * 3 + (Step("none", prediction=terms),) * 30)
    fastercache.compile(model, schedule, steps=len(schedule), cfg="uncond-first")
    seconds = []
    with torch.no_grad():
        for _ in range(runs):
            for step in schedule.steps:
                start = time.perf_counter()
                model(**inputs)
                if not step.runs:
                    seconds.append(time.perf_counter() - start)
    fastercache.restore(model)
    return 1e6 * float(np.median(seconds))


def main(arguments: Sequence[str] | None = None) -> None:
    options = shapes.parser(__doc__, 64, "calibration_shapes.json")
    options.add_argument("--pipeline", choices=PIPELINES, default="shapes", help="the embedded pipeline")
    options.add_argument("--make", action="store_true", help="calibrate, and write the schedules that it carries")
    args = options.parse_args(arguments)
    if args.out == options.get_default("out"):
        args.out = args.out.with_name(f"calibration_{args.pipeline}.json")
    if args.make:
        make(args.pipeline, args.steps, args.work)
    schedules = [Schedule.from_json(path) for path in sorted(carried(args.pipeline).glob("calibrated-*.json"))]
    schedules = sorted(
        (one for one in schedules if len(one) == args.steps),
        key=lambda one: one.measured.speedup if one.measured else 0,
    )
    if not schedules:
        raise SystemExit(f"{carried(args.pipeline)} holds no schedule of {args.steps} steps; give --make")
    (quick,) = calibration(args.pipeline, args.steps, args.work, "quick").run(speedup=QUICK)
    (unguided,) = calibration(args.pipeline, args.steps, args.work, guided=False).run(speedup=UNGUIDED)

    def fewer(name: str, guided: bool) -> shapes.Variant:
        plain = shapes.Variant(name, guided=guided, pipeline=args.pipeline)
        return replace(plain, steps=round(args.steps / UNGUIDED))

    arms = {
        "uncached": variant("uncached", None, args.pipeline),
        "paper": variant("paper", policies.paper(args.steps, True), args.pipeline),
        "fewer steps": fewer("fewer steps", True),
        **{one.name: variant(one.name, one, args.pipeline) for one in schedules},
        "quick": variant("quick", quick.schedule, args.pipeline),
        "no guidance": variant("no guidance", None, args.pipeline, guided=False),
        "no guidance, fewer steps": fewer("no guidance, fewer steps", False),
        "no guidance, calibrated": variant("no guidance, calibrated", unguided.schedule, args.pipeline, guided=False),
    }
    pairs = shapes.held_out(args.pairs, args.pipeline)
    n, clips = shapes.collect(
        list(arms.values()), pairs, args.steps, work=args.work, processes=args.processes, minutes=args.minutes
    )
    known = np.asarray([pair.prompt in shapes.calibration_prompts(args.pipeline) for pair in pairs[:n]])
    measured = {one.name: one.measured for one in (*schedules,)} | {
        "quick": quick.schedule.measured,
        "no guidance, calibrated": unguided.schedule.measured,
    }
    rows = []
    for name in arms:
        reference = "no guidance" if name.startswith("no guidance") else "uncached"
        if name == reference:
            continue
        psnr, _ = shapes.similarity(clips[name], clips[reference])
        ratio = clips[name].facts.get("flops_ratio", args.steps / arms[name].steps_of(args.steps))
        of = measured.get(name)
        rows.append(
            {"arm": name, "flops_ratio": ratio, **figures(psnr, known), "all_psnr": psnr.tolist()}
            | ({} if of is None else {"calibration": of.calibration, "calibration_seconds": of.seconds})
        )
    bars = bars_of({row["arm"]: row for row in rows}, args.pipeline)
    body = [
        shapes.described(args.steps, args.pairs, n, args.pipeline),
        f"Calibrated on {len(shapes.calibration_prompts(args.pipeline))} of the prompts, with seeds from "
        f"{shapes.FIRST_CALIBRATION_SEED} on, which no pair here has. PSNR in dB of decoded clips against uncached "
        "ones, mean over pairs with its 95 % t interval; `new prompts` and `known prompts` are those that calibration "
        "did not and did see. `calibration` is what it took, in times of one uncached generation.",
        *tables(rows, bars),
        "Steps (`#` both branches, `c` the conditional one, `.` none):",
        "```\n"
        + "\n".join(
            f"{name:>24} {shown([step.branches for step in one.steps])}"
            for name, one in {
                **{one.name: one for one in schedules},
                "quick": quick.schedule,
                "no guidance, calibrated": unguided.schedule,
            }.items()
        )
        + "\n```",
    ]
    data = {"settings": shapes.settings(args.steps, args.pairs, n, args.pipeline), "rows": rows, "bars": bars}
    data["per_pair"] = [asdict(pair) | {"known": bool(flag)} for pair, flag in zip(pairs[:n], known, strict=True)]
    command = "python -m bench.calibration" + ("" if args.pipeline == "shapes" else f" --pipeline {args.pipeline}")
    report.write(args.out, f"{args.pipeline.capitalize()}: calibrated schedules", command, data, body)


def bars_of(rows: dict[str, dict[str, Any]], pipeline: str) -> list[dict[str, Any]]:
    """The bars, each with what was measured."""
    ours = [row for name, row in rows.items() if name.startswith("calibrated-")]

    def best(least_ratio: float) -> dict[str, Any] | None:
        fitting = [row for row in ours if row["flops_ratio"] >= least_ratio]
        return max(fitting, key=lambda row: row["psnr_db"]) if fitting else None

    wanted = PAPERS_PSNR if pipeline == "shapes" else rows["paper"]["psnr_db"]
    enough = [row["flops_ratio"] for row in ours if row["psnr_db"] >= wanted]
    fast, faster, cheap = best(FAST_BAR), best(FASTER_BAR), best(AT_PAPERS_COST)
    found: list[tuple[str, float | None, float, bool]] = [
        (
            f"at a FLOPs ratio of at least {AT_PAPERS_COST}: PSNR over the paper's, dB",
            None if cheap is None else cheap["psnr_db"] - rows["paper"]["psnr_db"],
            GAIN_BAR,
            True,
        ),
        (f"at {wanted:.1f} dB: FLOPs ratio", max(enough, default=None), FAST_BAR, True),
        (f"the same, stretch of {STRETCH:g}", max(enough, default=None), STRETCH, True),
        (f"at {FASTER_BAR}x: PSNR, dB", None if faster is None else faster["psnr_db"], FASTER_PSNR, True),
        (
            f"5th percentile of PSNR at {FAST_BAR:g}x, dB",
            None if fast is None else fast["percentile_5"],
            WORST_BAR,
            True,
        ),
        (
            f"guidance off, {UNGUIDED:g}x: PSNR over fewer steps, dB",
            rows["no guidance, calibrated"]["psnr_db"] - rows["no guidance, fewer steps"]["psnr_db"],
            UNGUIDED_BAR,
            True,
        ),
        (
            "calibration for one speed-up, in generations (most)",
            max(row["calibration"] for row in ours),
            FULL_COST,
            False,
        ),
        ("quick, in generations", rows["quick"]["calibration"], QUICK_COST, False),
        ("a skipped step, in microseconds (most)", skipped_step_microseconds(), SKIPPED_US, False),
    ]
    return [
        {
            "bar": text,
            "at": bar,
            "measured": value,
            "holds": value is not None and (value >= bar if at_least else value <= bar),
        }
        for text, value, bar, at_least in found
    ]


def tables(rows: Sequence[dict[str, Any]], bars: Sequence[dict[str, Any]]) -> list[str]:
    def part(row: dict[str, Any], label: str) -> str:
        found = row.get(label)
        return "" if found is None else f"{found['mean']:.1f} {report.between(found['interval'], '.1f')}"

    header = ("arm", "FLOPs ratio", "PSNR", "new prompts", "known prompts", "5th percentile", "least", "calibration")
    lines = [
        (
            row["arm"],
            f"{row['flops_ratio']:.2f}",
            f"{row['psnr_db']:.1f} {report.between(row['interval'], '.1f')}",
            part(row, "new_prompts"),
            part(row, "known_prompts"),
            f"{row['percentile_5']:.1f}",
            f"{row['least']:.1f}",
            f"{row['calibration']:.1f}" if "calibration" in row else "",
        )
        for row in rows
    ]
    bar_lines = [
        (
            row["bar"],
            f"{row['at']:g}",
            "not reached" if row["measured"] is None else f"{row['measured']:.2f}",
            "holds" if row["holds"] else "does not hold",
        )
        for row in bars
    ]
    return [report.table(header, lines), report.table(("bar", "at", "measured", "verdict"), bar_lines)]


if __name__ == "__main__":
    main()
