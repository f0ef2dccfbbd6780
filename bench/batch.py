"""What a second worker brings: `python -m bench.batch`, on an idle machine, with Ray installed.

`fastercache batch` makes the same clips of "shapes" on one worker and on two, each with one thread. A worker's rate
counts from the end of its first clip, so that loading is no part of it; the rates of all workers are added up.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench import report
from fastercache.host import environment
from fastercache.shapes import STEPS
from fastercache.shapes.world import SCENES

BAR = 1.7
"""Least ratio of clips a minute, two workers against one."""


def sampled(workers: int, clips: int, steps: int, folder: Path) -> list[dict[str, Any]]:
    """Make the clips; the JSONs beside them."""
    prompts = folder / f"{workers}.jsonl"
    lines = [{"prompt": SCENES[number % len(SCENES)].prompt, "seed": number} for number in range(clips)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = folder / str(workers)
    command = [sys.executable, "-m", "fastercache.cli", "batch", "shapes", str(prompts), "--out", str(out)]
    options = {"--workers": workers, "--threads": 1, "--steps": steps, "--device": "cpu"}
    done = subprocess.run(command + [str(word) for option in options.items() for word in option], cwd=report.ROOT)
    if done.returncode:
        raise SystemExit(f"the batch on {workers} workers ended with {done.returncode}")
    return [json.loads(path.read_text()) for path in sorted(out.glob("*.json"))]


def rate(records: Iterable[Mapping[str, Any]]) -> float:
    """Clips a minute after each worker's first, of all workers together.

    Raises:
        ValueError: a worker made one clip only.
    """
    ends: dict[int, list[float]] = {}
    for record in records:
        ends.setdefault(record["worker"]["pid"], []).append(record["finished"])
    if min(map(len, ends.values())) < 2:
        raise ValueError("a worker made one clip only; ask for more --clips")
    return sum(60 * (len(times) - 1) / (max(times) - min(times)) for times in ends.values())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=16, help="clips of each run (default 16)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"denoising steps (default {STEPS})")
    parser.add_argument("--out", type=Path, default=report.RESULTS / "batch.json", help="JSON; the page lies beside it")
    args = parser.parse_args(arguments)
    load = environment.machine()["load_average"]
    with tempfile.TemporaryDirectory() as folder:
        found = {workers: sampled(workers, args.clips, args.steps, Path(folder)) for workers in (1, 2)}
    rates = {workers: rate(records) for workers, records in found.items()}
    pixels = {workers: [record["frames"]["sha256"] for record in records] for workers, records in found.items()}
    (schedule,) = {record["schedule"] for records in found.values() for record in records}
    ratio, same = rates[2] / rates[1], pixels[1] == pixels[2]
    report.write(
        args.out,
        "Batch: clips a minute on two workers",
        "python -m bench.batch",
        {
            "clips": args.clips,
            "steps": args.steps,
            "schedule": schedule,
            "load_average_before": load,
            "clips_a_minute": {str(workers): value for workers, value in rates.items()},
            "ratio": ratio,
            "bar": BAR,
            "holds": ratio >= BAR,
            "identical": same,
        },
        [
            f'{args.clips} clips of "shapes", {args.steps} steps, float32, schedule {schedule}, on Ray; each worker '
            f"has one thread, and counts from the end of its first clip. The load average was {load} at the start.",
            report.table(("workers", "clips a minute"), [(name, f"{value:.2f}") for name, value in rates.items()]),
            f"Ratio {ratio:.2f}; the bar of {BAR} {'holds' if ratio >= BAR else 'does not hold'}. The pixels of both "
            f"runs are {'identical' if same else 'not identical'}.",
        ],
    )


if __name__ == "__main__":
    main()
