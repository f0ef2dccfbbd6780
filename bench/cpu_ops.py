"""The C++ ops on the CPU against eager PyTorch and Inductor, and what the packed formats cost: `python -m
bench.cpu_ops`.

Everything takes turns, over tensors that together exceed the last level of cache twice over. Run it on a machine that
does nothing else: its load is written beside the figures.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from bench import op_cases, op_rows, report
from bench.dispatch import dispatch_bars, dispatch_rows, dispatch_table
from bench.op_rows import Row, against_best
from fastercache import ops
from fastercache.host import environment

SIZE = 64e6
"""Bytes of one site's output."""
CHANNELS = 1920
PUBLISHED_CHANNELS = {"Open-Sora 1.2, Latte": 1152, "CogVideoX-2B": 1920, "HunyuanVideo": 3072}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RING_OPS = ("ring_push", "ring_push_residual", "ring_blend", "ring_blend_add")
PACKED_OPS = ("packed_push", "packed_push_residual", "packed_blend", "packed_blend_add")
TOKENS, CHANGE, SEED = 512, 0.2, 20241101
"""Of the Gaussian test: its size, the rms of one step's change, and the generator's seed."""


def cases(size: float) -> Iterator[op_cases.Case]:
    for dtype in DTYPES:
        name, shape = str(dtype).removeprefix("torch."), (max(1, round(size / dtype.itemsize / CHANNELS)), CHANNELS)
        yield from op_cases.ring_cases(name, shape, dtype, "cpu")
        yield from op_cases.packed_cases(name, shape, dtype, "cpu")
    for dtype in (torch.float32, torch.float16):
        name = f"CogVideoX {str(dtype).removeprefix('torch.')}"
        yield op_cases.skipped_step_case("cpu", dtype)
        yield from op_cases.prediction_cases(name, op_cases.LATENTS["CogVideoX"], dtype, "cpu")


def blend_errors() -> list[Row]:
    """The error of a blend at w = 1, `2 A - B`, as a share of the exact blend's rms.

    The newest output A is standard normal, and the one before it, B, is A and a change of independent normal values
    with rms 0.2. `model` keeps both in bfloat16, and blends into it; the packed formats are read back in float32, so
    that theirs is the formats' error alone.
    """
    rows = []
    rng = torch.Generator().manual_seed(SEED)
    for model, channels in PUBLISHED_CHANNELS.items():
        newest = torch.randn((TOKENS, channels), generator=rng)
        older = newest + CHANGE * torch.randn((TOKENS, channels), generator=rng)
        exact = 2 * newest.double() - older.double()
        coefficients = op_cases.make_coefficients("cpu", [2.0, -1.0])

        def rms(blend: torch.Tensor, exact: torch.Tensor = exact) -> float:
            return float(((blend.double() - exact).square().mean() / exact.square().mean()).sqrt())

        slots = torch.stack([older, newest]).bfloat16()
        of_model: Row = {
            "channels": channels,
            "model": model,
            "format": "model (bfloat16)",
            "share_of_two_bfloat16_slots": 1.0,
        }
        rows.append(of_model | {"rms_error": rms(ops.ring_blend(slots, coefficients))})
        for label, bits in op_cases.FORMATS.items():
            layout = ops.PackedLine(channels, bits)
            ring = torch.zeros((TOKENS, layout.bytes), dtype=torch.uint8)
            for x in (older, newest):
                ops.packed_push(ring, x, bits)
            error = rms(ops.packed_blend(ring, coefficients, torch.empty_like(newest), bits))
            share = layout.bytes / (2 * channels * torch.bfloat16.itemsize)
            rows.append(
                {
                    "channels": channels,
                    "model": model,
                    "format": label,
                    "share_of_two_bfloat16_slots": share,
                    "rms_error": error,
                }
            )
    return rows


def format_table(rows: Sequence[Row]) -> str:
    return report.table(
        ("channels", "format", "bytes of two bfloat16 slots", "blend error at w = 1, rms"),
        [
            (
                f"{row['channels']} ({row['model']})",
                row["format"],
                f"{row['share_of_two_bfloat16_slots']:.1%}",
                f"{row['rms_error']:.2%}",
            )
            for row in rows
        ],
    )


def bars(rows: Sequence[Row], formats: Sequence[Row], dispatch: Sequence[Row]) -> list[Row]:
    def of(*names: str) -> list[Row]:
        return [row for row in rows if row["op"] in names]

    def kept(label: str) -> list[Row]:
        return [
            {"op": label, "case": f"{row['channels']} channels", **row} for row in formats if row["format"] == label
        ]

    return [
        op_rows.bar("ring ops: against the best of eager and Inductor", of(*RING_OPS), against_best, 0.95),
        op_rows.bar("packed ops: against the best of eager and Inductor", of(*PACKED_OPS), against_best, 0.95),
        op_rows.bar(
            "ring_blend_add: against the best eager form", of("ring_blend_add"), lambda row: row["vs_eager"], 1.4
        ),
        *op_rows.skipped_step_bars(of("cfg_skipped_step"), 30.0),
        *dispatch_bars(dispatch),
        *(
            op_rows.bar(
                f"{label}: share of two bfloat16 slots",
                kept(label),
                lambda row: row["share_of_two_bfloat16_slots"],
                most,
                False,
            )
            for label, most in (("int8", 0.52), ("int8-int4", 0.40))
        ),
        op_rows.bar("int8: blend error at w = 1, rms", kept("int8"), lambda row: row["rms_error"], 0.01, False),
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="time for each case (default 20), without its check and compilation"
    )
    parser.add_argument("--size", type=float, default=SIZE, help="bytes of one site's output (default 64e6)")
    parser.add_argument(
        "--threads", type=int, default=environment.cores(), help="torch threads (default: one for each core)"
    )
    parser.add_argument("--no-inductor", dest="inductor", action="store_false", help="leave out Inductor's code")
    parser.add_argument(
        "--out",
        type=Path,
        default=report.RESULTS / "cpu_ops.json",
        help="JSON file; the Markdown table goes next to it",
    )
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    load_before, start = environment.machine()["load_average"], time.monotonic()

    dispatch, formats = dispatch_rows("cpu"), blend_errors()
    rows: list[Row] = []
    notes: list[str] = []
    for case in cases(args.size):
        row, said = op_rows.measure(case, "cpu", args.seconds, args.inductor)
        rows.append(row)
        notes += said
        print(f"{row['op']}, {row['case']}: {row['p50_us']} us, error {row['max_error']}", flush=True)

    verdicts = bars(rows, formats, dispatch)
    copy = op_rows.copy_gbps(rows)
    body = [
        f"{args.size / 1e6:g} MB a site, {CHANNELS} channels, {args.threads} torch threads; about {args.seconds:g} s "
        f"a case, in which the forms take turns. The load average was {load_before} at the start. A copy moves "
        f"{copy or 0:.1f} GB/s, counting bytes read and written.",
        "`of copy` is the time of a copy of the same bytes over ours, `vs` that of the best plain form over ours; "
        "percentiles are over rounds.",
        op_rows.bar_table(verdicts),
        op_rows.table(rows),
        dispatch_table(dispatch),
        "The Gaussian test: the newest output A is standard normal, the one before it A and independent normal values "
        f"of rms {CHANGE:g}; {TOKENS} tokens, seed {SEED}. The blend is 2 A - B.",
        format_table(formats),
        *notes,
    ]
    data = {
        "settings": {
            "size": args.size,
            "channels": CHANNELS,
            "threads": args.threads,
            "seconds": args.seconds,
            "load_average_before": load_before,
            "minutes": round((time.monotonic() - start) / 60, 1),
        },
        "copy_gbps": copy,
        "bars": verdicts,
        "rows": rows,
        "dispatch": dispatch,
        "formats": formats,
        "notes": notes,
    }
    report.write(args.out, "C++ ops on the CPU", "python -m bench.cpu_ops", data, body)


if __name__ == "__main__":
    main()
