"""How near the demo comes to the operations it saves, run after run: `python -m bench.demo [--runs 5]`, on an idle
machine.

Each run is the command of `make demo` in a process of its own. What it gains is the speed-up of its clips, from the
text encoder to the decoder, over the ratio of the denoiser's operations.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import report
from fastercache.host import environment

BAR = 0.9
"""Least speed-up as a share of the ratio of operations, in every run."""


def demo(folder: Path) -> dict[str, dict[str, float]]:
    """One run: seconds, speed-up, FLOPs ratio, PSNR (dB) and share gained of each schedule."""
    command = [sys.executable, "-m", "fastercache.cli", "demo", "--out", str(folder)]
    done = subprocess.run(command, cwd=report.ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the demo ended with {done.returncode}: {done.stderr[-2000:]}")
    result = json.loads((folder / "result.json").read_text())
    return {one["schedule"]: figures(one) for one in (result, result.get("calibrated")) if one is not None}


def figures(one: dict[str, Any]) -> dict[str, float]:
    return {
        "uncached_seconds": one["uncached"]["seconds"],
        "seconds": one["cached"]["seconds"],
        "speedup": one["speedup"],
        "flops_ratio": one["flops_ratio"],
        "psnr_db": one["psnr_db"],
        "share": one["speedup"] / one["flops_ratio"],
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="default 5")
    parser.add_argument("--out", type=Path, default=report.RESULTS / "demo.json", help="JSON; the page lies beside it")
    args = parser.parse_args(arguments)
    load, commit = environment.machine()["load_average"], report.commit()
    with tempfile.TemporaryDirectory() as folder:
        runs = [demo(Path(folder) / str(number)) for number in range(args.runs)]
    least = min(one["share"] for run in runs for one in run.values())
    lines = [
        (
            number,
            name,
            f"{one['uncached_seconds']:.2f}",
            f"{one['seconds']:.2f}",
            f"{one['speedup']:.2f}",
            f"{one['flops_ratio']:.2f}",
            f"{one['share']:.3f}",
            f"{one['psnr_db']:.1f}",
        )
        for number, run in enumerate(runs, 1)
        for name, one in run.items()
    ]
    report.write(
        args.out,
        "The demo, run after run",
        "python -m bench.demo",
        {"runs": runs, "load_average_before": load, "least_share": least, "bar": BAR, "holds": least >= BAR},
        [
            f"{len(runs)} runs of `fastercache demo`, each in a process of its own; the load average was {load} at the "
            "start. Seconds are of all clips of a run.",
            report.table(
                (
                    "run",
                    "schedule",
                    "uncached (s)",
                    "cached (s)",
                    "speed-up",
                    "FLOPs ratio",
                    "speed-up / FLOPs ratio",
                    "PSNR (dB)",
                ),
                lines,
            ),
            f"The least share is {least:.3f}; the bar of {BAR} {'holds' if least >= BAR else 'does not hold'}.",
        ],
        commit_measured=commit,
    )


if __name__ == "__main__":
    main()
