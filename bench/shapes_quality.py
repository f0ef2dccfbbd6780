"""Does caching keep what the prompt says? Prompt scores of an embedded pipeline: `python -m bench.shapes_quality
[--pipeline wan] [--schedule FILE]`.

Uncached with guidance, uncached without, and cached with the paper's schedule or another, over the same held-out pairs;
and PSNR and SSIM of the cached clips against the uncached ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from bench import report, shapes, stats
from fastercache.shapes import PIPELINES
from fastercache.shapes.detector import score
from fastercache.shapes.world import PLAIN, World

UNCACHED_BAR, GUIDANCE_BAR, CACHED_BAR = 0.90, -0.10, -0.02


def parts_of(world: World) -> tuple[str, ...]:
    """The parts of the prompt score, the whole first."""
    return ("all_right", "colour", "shape", *(("texture",) if world.textures else ()), "motion")


def scores(clips: shapes.Clips, pairs: Sequence[shapes.Pair], world: World = PLAIN) -> dict[str, np.ndarray]:
    """Each part of the prompt score over the clips: bool `[n]`."""
    found = [score(clip.astype(np.float32), pair.prompt, world) for clip, pair in zip(clips.frames, pairs, strict=True)]
    return {part: np.asarray([getattr(one, part) for one in found]) for part in parts_of(world)}


def compare(first: np.ndarray, second: np.ndarray) -> dict[str, Any]:
    """The paired difference of two scores (share of the pairs, -1 to 1)."""
    difference, interval, p_value = stats.paired_proportions(first, second)
    return {"difference": difference, "interval": interval, "mcnemar_p": p_value}


def bars(right: dict[str, np.ndarray]) -> list[dict[str, Any]]:
    """The three bars, each with what was measured. right: the all-right score of every variant, bool `[n]`."""
    uncached = right["uncached"]
    rows = [
        (
            "uncached prompt score at least 90 %",
            float(uncached.mean()),
            stats.wilson(int(uncached.sum()), len(uncached)),
            UNCACHED_BAR,
            True,
        )
    ]
    for text, name, bar, at_least in (
        ("unguided at least 10 points under uncached", "unguided", GUIDANCE_BAR, False),
        ("cached at most 2 points under uncached", "cached", CACHED_BAR, True),
    ):
        found = compare(right[name], uncached)
        rows.append((text, found["difference"], found["interval"], bar, at_least))
    return [
        {
            "bar": text,
            "measured": value,
            "interval": interval,
            "verdict": stats.bar_verdict(value, interval, bar, at_least),
        }
        for text, value, interval, bar, at_least in rows
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    options = shapes.parser(__doc__, 200, "shapes_quality.json")
    options.add_argument(
        "--pipeline", choices=PIPELINES, default="shapes", help="the embedded pipeline (default shapes)"
    )
    shapes.schedule_option(options)
    args = options.parse_args(arguments)
    title, command = "Shapes: prompt score", "python -m bench.shapes_quality"
    command, title, out = shapes.named(command, title, options.get_default("out"), args.pipeline, args.schedule)
    args.out = out if args.out == options.get_default("out") else args.out
    world = PIPELINES[args.pipeline].world
    parts = parts_of(world)
    variants = [shapes.UNCACHED, shapes.UNGUIDED, shapes.cached("cached", shapes.policy_of(args.schedule), args.steps)]
    variants = [replace(variant, pipeline=args.pipeline) for variant in variants]
    pairs = shapes.held_out(args.pairs, args.pipeline)
    n, clips = shapes.collect(
        variants, pairs, args.steps, work=args.work, processes=args.processes, minutes=args.minutes
    )

    found = {name: scores(one, pairs[:n], world) for name, one in clips.items()}
    rows = []
    for name, one in found.items():
        shares = {
            part: {"right": int(x.sum()), "share": float(x.mean()), "interval": stats.wilson(int(x.sum()), n)}
            for part, x in one.items()
        }
        rows.append(
            {
                "variant": name,
                "pairs": n,
                "seconds_median": float(np.median(clips[name].seconds)),
                **shares,
                **clips[name].facts,
            }
        )
    against = {
        name: {part: compare(found[name][part], found["uncached"][part]) for part in parts}
        for name in ("unguided", "cached")
    }
    psnr, ssim = shapes.similarity(clips["cached"], clips["uncached"])
    likeness = {}
    for metric, values in (("psnr_db", psnr), ("ssim", ssim)):
        mean, interval = stats.mean_interval(values)
        likeness[metric] = {
            "mean": mean,
            "interval": interval,
            "min": float(values.min()),
            "median": float(np.median(values)),
        }
    verdicts = bars({name: one["all_right"] for name, one in found.items()})
    per_pair = [
        asdict(pair)
        | {name: [part for part in parts if found[name][part][i]] for name in found}
        | {"cached_psnr_db": float(psnr[i]), "cached_ssim": float(ssim[i])}
        for i, pair in enumerate(pairs[:n])
    ]

    body = [
        shapes.described(args.steps, args.pairs, n, args.pipeline),
        *score_tables(rows, against, parts),
        bar_table(verdicts),
        f"Cached clips ({'the paper' if args.schedule is None else args.schedule.stem}'s schedule, FLOPs ratio of the "
        f"denoiser {clips['cached'].facts['flops_ratio']:.3f}) against the uncached clips of the same pairs.",
        likeness_table(likeness),
    ]
    data = {
        "settings": shapes.settings(args.steps, args.pairs, n, args.pipeline),
        "rows": rows,
        "against_uncached": against,
        "cached_likeness": likeness,
        "bars": verdicts,
        "per_pair": per_pair,
    }
    report.write(args.out, title, command, data, body)


def percent(interval: Sequence[float]) -> str:
    """An interval of shares, in percent or points."""
    return report.between([100 * end for end in interval], ".1f")


def score_tables(rows: Sequence[dict[str, Any]], against: dict[str, dict[str, Any]], parts: Sequence[str]) -> list[str]:
    """The scores in %, and their differences to uncached in points."""

    def share(entry: dict[str, Any]) -> str:
        return f"{100 * entry['share']:.1f} {percent(entry['interval'])}"

    def points(entry: dict[str, Any]) -> str:
        return f"{100 * entry['difference']:+.1f} {percent(entry['interval'])}"

    titles = ("all right", *parts[1:])
    together = ", ".join(parts[1:-1]) + f" and {parts[-1]}"
    return [
        f"Share of clips, in %, that show what the prompt says, with 95 % Wilson intervals; all right is {together} "
        "together.",
        report.table(("variant", *titles), [(row["variant"], *(share(row[part]) for part in parts)) for row in rows]),
        "Difference to uncached over the same pairs, in points, with 95 % intervals (Newcombe's method for paired "
        "proportions); p is of McNemar's exact test of the first.",
        report.table(
            ("variant", *titles, "p"),
            [
                (name, *(points(one[part]) for part in parts), f"{one['all_right']['mcnemar_p']:.3g}")
                for name, one in against.items()
            ],
        ),
    ]


def bar_table(verdicts: Sequence[dict[str, Any]]) -> str:
    rows = [(row["bar"], f"{100 * row['measured']:.1f}", percent(row["interval"]), row["verdict"]) for row in verdicts]
    return report.table(("bar", "measured (%, points)", "95 % interval", "verdict"), rows)


def likeness_table(likeness: dict[str, dict[str, Any]]) -> str:
    rows = []
    for label, key, spec in (("PSNR (dB)", "psnr_db", ".2f"), ("SSIM", "ssim", ".4f")):
        x = likeness[key]
        rows.append(
            (
                label,
                f"{x['mean']:{spec}}",
                report.between(x["interval"], spec),
                f"{x['median']:{spec}}",
                f"{x['min']:{spec}}",
            )
        )
    return report.table(("metric", "mean", "95 % interval", "median", "lowest"), rows)


if __name__ == "__main__":
    main()
