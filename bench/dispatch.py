"""What a call of each op costs the host: on tensors so small that the work itself hardly counts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from bench import op_rows, report
from bench.op_cases import make_row
from bench.timing import dispatch_us
from fastercache import ops

BAR_US = 5.0


def dispatch_rows(device: str, calls: int = 300) -> list[op_rows.Row]:
    """For each op, microseconds of the public function, which checks its arguments, and of the dispatcher's op alone."""
    row, scale = make_row(device, [1.4, -0.4]), torch.tensor([7.5], device=device)
    ring, x, out = torch.randn(3, 1, 1, 16, device=device), torch.randn(1, 1, 16, device=device), torch.empty(1, 1, 16, device=device)
    gate = torch.ones(1, 1, 16, device=device)
    packed_ring = torch.zeros(1, 1, ops.PackedRow(16, 8).bytes, dtype=torch.uint8, device=device)
    cond, uncond, low, high = torch.randn(4, 1, 1, 4, 4, device=device)
    both = torch.empty(2, 1, 4, 4, device=device)
    namespace = torch.ops.fastercache
    calls_of = {
        "ring_push": (lambda: ops.ring_push(ring, x, row), lambda op=namespace.ring_push.default: op(ring, x, row)),
        "ring_blend": (lambda: ops.ring_blend(ring, row, out=out), lambda op=namespace.ring_blend.default: op(out, ring, row)),
        "ring_blend_add": (
            lambda: ops.ring_blend_add(x, gate, ring, row),
            lambda op=namespace.ring_blend_add.default: op(x, gate, ring, row),
        ),
        "packed_push": (lambda: ops.packed_push(packed_ring, x, 8), lambda op=namespace.packed_push.default: op(packed_ring, x, 8)),
        "packed_blend": (
            lambda: ops.packed_blend(packed_ring, row, out, 8),
            lambda op=namespace.packed_blend.default: op(out, packed_ring, row, 8),
        ),
        "packed_blend_add": (
            lambda: ops.packed_blend_add(x, gate, packed_ring, row, 8),
            lambda op=namespace.packed_blend_add.default: op(x, gate, packed_ring, row, 8),
        ),
        "cfg_split": (
            lambda: ops.cfg_split(low, high, uncond, cond, 1),
            lambda op=namespace.cfg_split.default: op(low, high, uncond, cond, 1),
        ),
        "cfg_reconstruct": (
            lambda: ops.cfg_reconstruct(both, cond, low, high, row, 1),
            lambda op=namespace.cfg_reconstruct.default: op(both, cond, low, high, row, 1),
        ),
        "cfg_guide": (
            lambda: ops.cfg_guide(cond, low, high, row, scale, out=uncond),
            lambda op=namespace.cfg_guide.default: op(uncond, cond, low, high, row, scale),
        ),
    }
    missing = ops.packed_missing(torch.device(device)) is not None
    return [
        {"op": name, "function_us": dispatch_us(function, device, calls), "op_us": dispatch_us(op, device, calls)}
        for name, (function, op) in calls_of.items()
        if not (missing and name.startswith("packed"))
    ]


def dispatch_bars(rows: Sequence[op_rows.Row]) -> list[op_rows.Row]:
    """The op alone is what a compiled graph calls; the function is what a user calls."""
    return [
        op_rows.bar("host: dispatcher's op alone (us)", rows, lambda row: row["op_us"], BAR_US, at_least=False),
        op_rows.bar("host: public function, with its checks (us)", rows, lambda row: row["function_us"], BAR_US, at_least=False),
    ]


def dispatch_table(rows: Iterable[op_rows.Row]) -> str:
    return report.table(
        ("op", "function (us)", "dispatcher's op alone (us)"),
        [(row["op"], f"{row['function_us']:.2f}", f"{row['op_us']:.2f}") for row in rows],
    )
