"""The measurements of `bench.gpu`, which runs this in a process of its own: cases until the time is up, the file
rewritten after each."""

from __future__ import annotations

import argparse
import subprocess
import time
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from bench import op_cases, op_rows, report
from bench.dispatch import dispatch_bars, dispatch_rows
from bench.op_rows import Row, against_best

RING_OPS = ("ring_push", "ring_push_residual", "ring_blend", "ring_blend_add")


def cases(device: str, scale: float) -> Iterator[op_cases.Case]:
    """Those with a bar first, as time may run out."""
    sites = {name: (max(1, round(tokens * scale)), channels) for name, (tokens, channels) in op_cases.SITES.items()}
    latents = {name: (max(1, round(shape[0] * scale)), *shape[1:]) for name, shape in op_cases.LATENTS.items()}
    bfloat16 = torch.bfloat16
    return chain(
        (case for name, shape in sites.items() for case in op_cases.ring_cases(name, shape, bfloat16, device)),
        [op_cases.skipped_step_case(device, dtype, latents["CogVideoX"]) for dtype in (torch.float32, torch.float16)],
        (case for name, shape in latents.items() for case in op_cases.cfg_cases(name, shape, bfloat16, device)),
        (case for name, shape in latents.items() for case in op_cases.prediction_cases(name, shape, bfloat16, device)),
        (case for name, shape in sites.items() for case in op_cases.packed_cases(name, shape, bfloat16, device)),
    )


def bars(rows: Sequence[Row], dispatch: Sequence[Row], device: str) -> list[Row]:
    """The bars of the kernels that a run on this device can decide."""

    def of(*names: str) -> list[Row]:
        return [row for row in rows if row["op"] in names]

    skipped = 20.0 if device == "cuda" else 30.0
    return [
        op_rows.bar("ring ops: share of a copy's speed", of(*RING_OPS), lambda row: row["copy_fraction"], 0.9),
        op_rows.bar("ring ops: against the best of eager and Inductor", of(*RING_OPS), against_best, 0.97),
        op_rows.bar(
            "ring_blend_add: against the best eager form", of("ring_blend_add"), lambda row: row["vs_eager"], 1.4
        ),
        op_rows.bar(
            "cfg_reconstruct: share of a copy's speed", of("cfg_reconstruct"), lambda row: row["copy_fraction"], 0.9
        ),
        *op_rows.skipped_step_bars(of("cfg_skipped_step"), skipped),
        op_rows.bar(
            "cfg_split: against cuFFT forward, mask, inverse", of("cfg_split"), lambda row: row["vs_eager"], 1.5
        ),
        *dispatch_bars(dispatch),
    ]


def driver() -> str | None:
    """The GPU driver's version, where its tool tells."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory for kernels.json")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the tokens and frames to measure with")
    parser.add_argument("--seconds", type=float, default=0.8, help="time for a case, without its check and compilation")
    parser.add_argument("--minutes", type=float, default=5.0, help="no case begins later than this")
    parser.add_argument("--commit", default=None, help="the commit measured, where git cannot tell")
    parser.add_argument("--no-inductor", dest="inductor", action="store_false", help="leave out Inductor's code")
    args = parser.parse_args(arguments)
    end = time.monotonic() + 60 * args.minutes

    facts = report.provenance()
    facts["commit"] = args.commit or facts["commit"]
    facts["versions"] |= {"cuda": torch.version.cuda, "driver": driver()}
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    document: dict[str, Any] = {"device": device, "kind": args.device, **facts}
    document |= {"scale": args.scale, "copy_gbps": None, "rows": [], "dispatch": [], "bars": []}
    document |= {"notes": [], "not_measured": []}

    def save() -> None:
        document["copy_gbps"] = op_rows.copy_gbps(document["rows"])
        report.write_whole(args.out / "kernels.json", (report.pretty(document) + "\n").encode())

    args.out.mkdir(parents=True, exist_ok=True)
    for case in cases(args.device, args.scale):
        if time.monotonic() > end:
            document["not_measured"].append({"op": case.op, "case": case.name, **dict.fromkeys(op_rows.TIMES)})
            continue
        row, notes = op_rows.measure(case, args.device, args.seconds, args.inductor)
        document["rows"].append(row)
        document["notes"] += notes
        print(f"{row['op']}, {row['case']}: {row['p50_us']} us, error {row['max_error']}", flush=True)
        save()
    document["dispatch"] = dispatch_rows(args.device)
    if args.scale == 1:
        document["bars"] = bars([*document["rows"], *document["not_measured"]], document["dispatch"], args.device)
    save()


if __name__ == "__main__":
    main()
