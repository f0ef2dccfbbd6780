"""The paper's ablations, on the "shapes" pipeline: `python -m bench.shapes_ablations`.

PSNR and SSIM of each variant's clips against the uncached clips of the same pairs, and whether the order of the
variants is the paper's. Every variant changes one parameter of the paper's schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from bench import report, shapes, stats
from fastercache import policies
from fastercache.schedule.policies import Policy

PAPER_SOURCE = (
    'The column "paper" holds the published PSNR in dB (FasterCache, arXiv 2410.19355, ablation tables; '
    "Open-Sora, 48 frames, 480P): another model and other clips, so the order of the variants can be compared and the "
    "values cannot."
)
DEFAULT = "paper schedule"


@dataclass(frozen=True)
class Arm:
    """One variant of a group. published: the paper's PSNR in dB."""

    name: str
    label: str
    policy: Policy
    published: float


def _arm(name: str, label: str, published: float, **parameters: Any) -> Arm:
    return Arm(name, label, partial(policies.paper, **parameters), published)


def _default(label: str) -> Arm:
    """The paper's own schedule, in every group the variant that the others are compared with. It has one published
    PSNR."""
    return _arm(DEFAULT, label, 28.41)


GROUPS: dict[str, tuple[Arm, ...]] = {
    "Dynamic feature reuse": (
        _default("dynamic, w linear"),
        _arm("plain reuse", "plain reuse, w = 0", 28.20, dynamic=False),
    ),
    "Frequency weights of CFG-Cache": (
        _default("low and high"),
        _arm("low only", "low only", 28.29, high_gain=0.0),
        _arm("high only", "high only", 28.08, low_gain=0.0),
        _arm("no weights", "neither", 27.97, low_gain=0.0, high_gain=0.0),
    ),
    "CFG-Cache interval": (
        _arm("CFG interval 3", "3", 28.56, cfg_interval=3),
        _default("5"),
        _arm("CFG interval 7", "7", 27.68, cfg_interval=7),
        _arm("CFG interval 9", "9", 27.44, cfg_interval=9),
    ),
    "Reuse interval": (
        _default("2"),
        _arm("reuse interval 3", "3", 27.95, reuse_interval=3),
        _arm("reuse interval 4", "4", 27.61, reuse_interval=4),
    ),
}


def compare(
    arms: Sequence[Arm], psnr: dict[str, np.ndarray], ssim: dict[str, np.ndarray], facts: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """One row for each arm. psnr (dB), ssim: of every variant's clips, `[n]`, the same pairs in the same order."""
    reference = next(arm for arm in arms if arm.name == DEFAULT)
    rows = []
    for arm in arms:
        row = {
            "variant": arm.name,
            "label": arm.label,
            "psnr_db": float(psnr[arm.name].mean()),
            "ssim": float(ssim[arm.name].mean()),
            "flops_ratio": facts[arm.name]["flops_ratio"],
            "paper_psnr_db": arm.published,
        }
        if arm is not reference:
            difference, interval = stats.mean_interval(psnr[arm.name] - psnr[reference.name])
            ssim_difference, ssim_interval = stats.mean_interval(ssim[arm.name] - ssim[reference.name])
            published = arm.published - reference.published
            row |= {
                "psnr_difference_db": difference,
                "psnr_difference_interval_db": interval,
                "ssim_difference": ssim_difference,
                "ssim_difference_interval": ssim_interval,
                "paper_psnr_difference_db": published,
                "verdict": stats.order_verdict(interval, published),
            }
        rows.append(row)
    return rows


HEADER = (
    "variant",
    "PSNR (dB)",
    "SSIM",
    "FLOPs ratio",
    "paper (dB)",
    "difference (dB)",
    "95 % interval",
    "paper's difference (dB)",
    "verdict",
)


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    shown = (
        row["label"],
        f"{row['psnr_db']:.2f}",
        f"{row['ssim']:.4f}",
        f"{row['flops_ratio']:.3f}",
        f"{row['paper_psnr_db']:.2f}",
    )
    if "verdict" not in row:
        return (*shown, "", "", "", "compared with")
    interval = report.between(row["psnr_difference_interval_db"], "+.3f")
    return (
        *shown,
        f"{row['psnr_difference_db']:+.3f}",
        interval,
        f"{row['paper_psnr_difference_db']:+.2f}",
        row["verdict"],
    )


def main(arguments: Sequence[str] | None = None) -> None:
    args = shapes.parser(__doc__, 32, "shapes_ablations.json").parse_args(arguments)
    policy_of = {arm.name: arm.policy for arms in GROUPS.values() for arm in arms}
    variants = [shapes.UNCACHED, *(shapes.cached(name, policy, args.steps) for name, policy in policy_of.items())]
    pairs = shapes.held_out(args.pairs)
    n, clips = shapes.collect(
        variants, pairs, args.steps, work=args.work, processes=args.processes, minutes=args.minutes
    )

    psnr, ssim = {}, {}
    for name in policy_of:
        psnr[name], ssim[name] = shapes.similarity(clips[name], clips["uncached"])
    facts = {name: clips[name].facts for name in policy_of}
    groups = {title: compare(arms, psnr, ssim, facts) for title, arms in GROUPS.items()}
    comparisons = sum("verdict" in row for rows in groups.values() for row in rows)

    body = [
        shapes.described(args.steps, args.pairs, n),
        "PSNR and SSIM are means over clips, each against the uncached clip of the same pair. A difference is the "
        "mean over pairs of a variant's PSNR less that of the paper's schedule, with a 95 % t interval over pairs; "
        f"the verdict compares its sign with that of the published difference. The {comparisons} intervals are not "
        "adjusted for their number. The FLOPs ratio is uncached over cached, of the denoiser.",
        PAPER_SOURCE,
    ]
    for title, rows in groups.items():
        body += [f"## {title}", report.table(HEADER, [cells(row) for row in rows])]
    data = {
        "settings": shapes.settings(args.steps, args.pairs, n),
        "paper_source": PAPER_SOURCE,
        "groups": groups,
        "variants": {
            name: {"seconds_median": float(np.median(one.seconds)), **one.facts} for name, one in clips.items()
        },
        "per_pair": {name: {"psnr_db": psnr[name].tolist(), "ssim": ssim[name].tolist()} for name in policy_of},
    }
    report.write(args.out, "Shapes: the paper's ablations", "python -m bench.shapes_ablations", data, body)


if __name__ == "__main__":
    main()
