"""What `bench.frontier` says: the table, the comparison at equal speed-up, and the plot."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bench import report, shapes, stats

if TYPE_CHECKING:
    from bench.frontier import Arm

SPEEDS = (2.0, 3.0)
"""Measured speed-ups of the denoiser at which methods are compared."""
AT_LEAST, AT_MOST = "at least", "at most"
LEAD = 3.0
"""Least lead of the calibrated schedules over the best peer, in dB."""
KINDS = ("ours", "steps", "policy", "peer")
ALEXNET = "alexnet-owt-7be5be79.pth"
"""torchvision's file of the network that LPIPS looks at frames with."""

Rounds = Sequence[Mapping[str, Mapping[str, float]]]


def lpips() -> tuple[Callable[[np.ndarray, np.ndarray], np.ndarray] | None, str]:
    """A function of frames and reference frames `[n, frames, H, W, 3]` in [0, 1] to LPIPS (AlexNet) of each clip; or
    `None`, and why it cannot be measured. Nothing is downloaded.
    """
    weights = Path(torch.hub.get_dir()) / "checkpoints" / ALEXNET
    if find_spec("lpips") is None or not weights.is_file():
        return None, "LPIPS: not measured (the package lpips or the weights of AlexNet are not on this machine)"
    network = import_module("lpips").LPIPS(net="alex", verbose=False).eval()

    def measure(frames: np.ndarray, reference: np.ndarray) -> np.ndarray:
        def tensor(clip: np.ndarray) -> torch.Tensor:
            return torch.from_numpy(clip.astype(np.float32)).permute(0, 3, 1, 2) * 2 - 1

        with torch.no_grad():
            return np.asarray(
                [network(tensor(a), tensor(b)).mean().item() for a, b in zip(frames, reference, strict=True)]
            )

    return measure, ""


# ---- figures ---------------------------------------------------------------------------------------------------------


def speed_ups(timed: Rounds, key: str = "denoiser_seconds") -> dict[str, float]:
    """Of each arm: the median over the rounds of uncached over its seconds."""
    names = timed[0] if timed else ()
    return {name: float(np.median([one["uncached"][key] / one[name][key] for one in timed])) for name in names}


def rows(
    arms: Sequence[Arm],
    measured: Mapping[str, Mapping[str, Any]],
    failed: Mapping[str, str],
    timed: Rounds,
    pairs: Sequence[shapes.Pair],
    seen: Sequence[str],
) -> list[dict[str, Any]]:
    """One row for each arm. seen: prompts that settings were found on."""
    known = np.asarray([pair.prompt in seen for pair in pairs])
    denoiser, clip = speed_ups(timed), speed_ups(timed, "seconds")
    result = []
    for arm in arms:
        row: dict[str, Any] = {"arm": arm.name, "method": arm.method, "kind": arm.kind, "peer": arm.variant.peer}
        result.append(row)
        if arm.name in failed:
            row["error"] = failed[arm.name]
            continue
        one = measured[arm.name]
        x, right = one["psnr_db"], one["right"]
        mean, interval = stats.mean_interval(x)
        row |= {
            "flops_ratio": one["facts"]["flops_ratio"],
            "cache_bytes": one["facts"]["cache_bytes"],
            "speed_up": denoiser.get(arm.name),
            "clip_speed_up": clip.get(arm.name),
            "seconds_median": float(np.median([each[arm.name]["seconds"] for each in timed])) if timed else None,
            "psnr_db": mean,
            "psnr_interval_db": interval,
            "psnr_5th_percentile_db": float(np.percentile(x, 5)),
            "psnr_known_prompts_db": float(x[known].mean()) if known.any() else None,
            "psnr_other_prompts_db": float(x[~known].mean()) if (~known).any() else None,
            "ssim": float(one["ssim"].mean()),
            "lpips": None if one["lpips"] is None else float(one["lpips"].mean()),
            "right": float(right.mean()),
            "right_interval": stats.wilson(int(right.sum()), len(right)),
            "converged_psnr_db": float(one["converged_psnr_db"].mean()),
        }
    return result


def at_speed(speeds: Sequence[float], psnr: Sequence[np.ndarray], wanted: float) -> np.ndarray | None:
    """PSNR of each pair at a speed-up: between the two neighbouring settings in the logarithm of the speed-up, `None`
    where no two of them have it between them. Nothing is extrapolated."""
    order = np.argsort(speeds)
    for a, b in itertools.pairwise(order):
        if speeds[a] <= wanted <= speeds[b]:
            span = math.log(speeds[b] / speeds[a])
            share = math.log(wanted / speeds[a]) / span if span else 0.0
            return (1 - share) * psnr[a] + share * psnr[b]
    return None


def compare(arms: Sequence[Arm], measured: Mapping[str, Mapping[str, Any]], timed: Rounds) -> list[dict[str, Any]]:
    """Every method at each of `SPEEDS`, and how far the calibrated schedules are above it, over the same pairs.

    Of a method whose slowest setting is faster it is that setting's PSNR, which the method has at least; of one that
    does not reach the speed-up it is its fastest setting's, which the method has at most.
    """
    speeds = speed_ups(timed)
    methods: dict[str, list[Arm]] = {}
    for arm in arms:
        if arm.name in measured and arm.name in speeds and arm.name != "uncached":
            methods.setdefault(arm.method, []).append(arm)
    result = []
    for wanted in SPEEDS:
        found = {}
        for method, group in methods.items():
            reached, psnr = [speeds[arm.name] for arm in group], [measured[arm.name]["psnr_db"] for arm in group]
            values, bound = at_speed(reached, psnr, wanted), ""
            if values is None and min(reached) > wanted:
                values, bound = psnr[int(np.argmin(reached))], AT_LEAST
            elif values is None:
                values, bound = psnr[int(np.argmax(reached))], AT_MOST
            found[method] = reached, values, bound
        ours = found.get("calibrated", (None, None, AT_MOST))
        for method, (reached, values, bound) in found.items():
            entry: dict[str, Any] = {
                "speed_up": wanted,
                "method": method,
                "kind": methods[method][0].kind,
                "measured_speed_ups": sorted(reached),
                "psnr_db": float(values.mean()),
                "bound": bound,
            }
            if ours[2] != AT_MOST and method != "calibrated":
                entry["lead_db"], entry["lead_interval_db"] = stats.mean_interval(ours[1] - values)
            result.append(entry)
    return result


def repeated(measured: Mapping[str, Mapping[str, Any]], timed: Rounds) -> dict[str, float]:
    """Of each arm whose clips were made again for the seconds: the mean of its PSNR (dB) over these pairs, less that of
    the kept clips of the same pairs."""
    if not timed:
        return {}
    return {
        name: float(np.mean([one[name]["psnr_db"] for one in timed]) - measured[name]["psnr_db"][: len(timed)].mean())
        for name in timed[0]
        if name != "uncached"
    }


def bars(comparison: Sequence[Mapping[str, Any]], again: Mapping[str, float], agree: float) -> list[dict[str, Any]]:
    """What the command checks: that arms made again agree, and how far the calibrated schedules lead."""
    worst = max(again, key=lambda name: abs(again[name]), default=None)
    result: list[dict[str, Any]] = [
        {
            "bar": f"{len(again)} arms made again agree to {agree:g} dB",
            "measured": None if worst is None else abs(again[worst]),
            "of": worst,
            "verdict": "not measured" if worst is None else "holds" if abs(again[worst]) <= agree else "does not hold",
        }
    ]
    for wanted in SPEEDS:
        compared = [one for one in comparison if one["speed_up"] == wanted and "lead_db" in one]
        for text, kinds, bar in (("the best peer", ("peer",), LEAD), ("the best of all others", KINDS, None)):
            named = f"calibrated over {text} at {wanted:g}x" + ("" if bar is None else f": at least {bar:g} dB")
            among = [one for one in compared if one["kind"] in kinds]
            # A bar is about equal speed-up; what is reported besides counts settings that are slower, too.
            counted = among if bar is None else [one for one in among if one["bound"] != AT_MOST]
            best = max(counted, key=lambda one: one["psnr_db"], default=None)
            if best is None and among:
                best = max(among, key=lambda one: one["measured_speed_ups"][-1])
                named += f" (none reaches it: over the fastest, {best['measured_speed_ups'][-1]:.2f}x)"
            elif best is not None and best["bound"] == AT_MOST:
                named += f" (slower, {best['measured_speed_ups'][-1]:.2f}x)"
            if best is None:
                result.append({"bar": named, "measured": None, "of": None, "verdict": "not measured"})
                continue
            lead, interval = best["lead_db"], best["lead_interval_db"]
            verdict = "reported" if bar is None else stats.bar_verdict(lead, interval, bar, True)
            result.append({"bar": named, "measured": lead, "of": best["method"], "verdict": verdict})
    return result


# ---- text ------------------------------------------------------------------------------------------------------------


def shown(value: float | None, spec: str) -> str:
    return "not measured" if value is None else f"{value:{spec}}"


def body(data: Mapping[str, Any], described: str, plot_name: str) -> list[str]:
    """The paragraphs and tables of the Markdown."""
    found, settings = data["rows"], data["settings"]
    shipped = " and ".join(f"{name} {version or '(not installed)'}" for name, version in settings["peers"].items())
    ran = [row for row in found if "error" not in row]
    reason = lpips()[1]
    parts = [
        described,
        f"![speed-up against PSNR]({plot_name})",
        "PSNR, SSIM and LPIPS against the uncached clip of the same pair, frames in float; `right`: share of clips "
        f"that show what the prompt says. `converged`: PSNR over the first {settings['converged_pairs']} pairs against "
        f"an uncached run of {settings['converged_steps']} steps, which is fair to fewer steps, too. Speed-ups are "
        f"medians of {settings['timed_pairs']} rounds in which every "
        f"arm makes one clip, of the denoiser and of the whole clip, in eager mode on {settings['threads']} threads. "
        f"FLOPs ratio of the denoiser, counted of peers in a run of them. Peers are {shipped} as they ship. {reason}",
        report.table(
            (
                "arm",
                "FLOPs",
                "denoiser",
                "clip",
                "PSNR (dB)",
                "95 %",
                "5th percentile",
                "SSIM",
                "LPIPS",
                "right (%)",
                "converged (dB)",
                "cache (MB)",
            ),
            [
                (
                    row["arm"],
                    f"{row['flops_ratio']:.2f}",
                    shown(row["speed_up"], ".2f"),
                    shown(row["clip_speed_up"], ".2f"),
                    f"{row['psnr_db']:.2f}",
                    report.between(row["psnr_interval_db"]),
                    f"{row['psnr_5th_percentile_db']:.2f}",
                    f"{row['ssim']:.4f}",
                    shown(row["lpips"], ".4f"),
                    f"{100 * row['right']:.1f}",
                    f"{row['converged_psnr_db']:.2f}",
                    shown(row["cache_bytes"] / 1e6, ".2f"),
                )
                for row in ran
            ],
        ),
    ]
    errors = [row for row in found if "error" in row]
    if errors:
        parts += [
            "What cannot run on this pipeline, as it ships:",
            report.table(("arm", "error"), [(row["arm"], row["error"]) for row in errors]),
        ]
    parts += [
        f"Settings, ratios and lists were found on {settings['calibration_clips']} clips of "
        f"{len(settings['calibration_prompts'])} prompts with seeds of their own. PSNR over pairs with these prompts "
        "(and new seeds), and over pairs with the other prompts:",
        report.table(
            ("arm", "these prompts (dB)", "other prompts (dB)"),
            [
                (row["arm"], shown(row["psnr_known_prompts_db"], ".2f"), shown(row["psnr_other_prompts_db"], ".2f"))
                for row in ran
            ],
        ),
        "## At equal speed-up",
        "PSNR of each method at a measured speed-up of the denoiser, between its two settings on either side of it, in "
        "the logarithm of the speed-up and pair by pair. Of a method whose slowest setting is faster it is that one's, "
        "which the method has at least; of a method that does not reach the speed-up it is its fastest one's, which it "
        "has at most. `lead`: of the calibrated schedules, mean over pairs with a 95 % t interval.",
        report.table(
            ("speed-up", "method", "its settings measure", "PSNR (dB)", "lead (dB)", "95 %"),
            [_compared(one) for one in data["comparison"]],
        ),
        "## Checks",
        report.table(
            ("bar", "measured (dB)", "of", "verdict"),
            [(bar["bar"], shown(bar["measured"], ".2f"), bar["of"], bar["verdict"]) for bar in data["bars"]],
        ),
    ]
    if settings["schedules_left_out"]:
        parts.append(f"Schedules left out: {'; '.join(settings['schedules_left_out'])}.")
    return parts


def _compared(one: Mapping[str, Any]) -> tuple[str, ...]:
    speeds = ", ".join(f"{speed:.2f}" for speed in one["measured_speed_ups"])
    psnr = f"{one['bound']} {one['psnr_db']:.2f}".strip()
    lead = f"{one['lead_db']:+.2f}" if "lead_db" in one else ""
    interval = report.between(one["lead_interval_db"], "+.2f") if "lead_db" in one else ""
    return f"{one['speed_up']:g}", one["method"], speeds, psnr, lead, interval


# ---- the plot --------------------------------------------------------------------------------------------------------

MARKS = {"ours": "o", "steps": "s", "policy": "^", "peer": "D"}
COLOURS = (
    "#4269d0",
    "#efb118",
    "#ff725c",
    "#6cc5b0",
    "#3ca951",
    "#ff8ab7",
    "#a463f2",
    "#97bbf5",
    "#9c6b4e",
    "#9498a0",
    "#7d1d3f",
    "#1f6f6b",
    "#b5a642",
    "#5b4bd6",
    "#d96c06",
)


def need_matplotlib() -> None:
    """`SystemExit` before hours of work whose plot could not be drawn."""
    if find_spec("matplotlib") is None:
        raise SystemExit("the plot needs matplotlib: pip install 'fastercache[bench]', or pip install matplotlib")


def plot(found: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Speed-up of the denoiser (the FLOPs ratio where no seconds were measured) against PSNR, one line a method, as
    SVG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    timed = any(row.get("speed_up") for row in found)
    axis = "speed_up" if timed else "flops_ratio"
    methods: dict[str, list[Mapping[str, Any]]] = {}
    for row in found:
        if "error" not in row and row["arm"] != "uncached":
            methods.setdefault(row["method"], []).append(row)
    # The text stays text, and no file differs from another by its date or by random names.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "frontier", "font.size": 9}):
        figure, axes = pyplot.subplots(figsize=(8.5, 5.2), layout="constrained")
        others = [method for method in methods if method != "calibrated"]
        for method, points in sorted(methods.items(), key=lambda one: one[0] != "calibrated"):
            points = sorted(points, key=lambda row: row[axis])
            ours = method == "calibrated"
            axes.plot(
                [row[axis] for row in points],
                [row["psnr_db"] for row in points],
                marker=MARKS[points[0]["kind"]],
                markersize=6 if ours else 4.5,
                linewidth=2.2 if ours else 1.1,
                linestyle="--" if points[0]["kind"] == "steps" else "-",
                color="black" if ours else COLOURS[others.index(method) % len(COLOURS)],
                label=method,
            )
        axes.set_xscale("log")
        axes.set_xticks([1, 1.5, 2, 2.5, 3, 4, 5])
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("measured speed-up of the denoiser" if timed else "FLOPs ratio of the denoiser")
        axes.set_ylabel("PSNR against uncached (dB)")
        axes.set_title(title)
        axes.grid(alpha=0.25)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        figure.legend(loc="outside right upper", frameon=False, fontsize=7.5)
        partial = path.with_name(f"{path.name}.partial")
        figure.savefig(partial, format="svg", metadata={"Date": None})
        partial.replace(path)
        pyplot.close(figure)
