"""What a call of each op costs the host: on tensors so small that the work itself hardly counts."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from functools import partial

import torch

from bench import op_rows, report
from bench.timing import dispatch_us
from fastercache import ops
from fastercache.ops.registry import OPS, Sizes

BAR_US = 5.0


def dispatch_rows(device: str, calls: int = 300) -> list[op_rows.Row]:
    """For each op, microseconds of the public function, which checks its arguments, and of the dispatcher's op
    alone."""
    # One line: to quantize 16 takes the CPU as long as the call itself, 0.9 us.
    sizes = Sizes(torch.device(device), torch.float32, ((16, 8),), planes=(4, 4, 1), prediction=(1, 4, 4), lines=1)
    missing = ops.packed_missing(sizes.device) is not None
    rows = []
    for name, op in OPS.items():
        if missing and not op.fallback:
            continue
        arguments, overload, function = (
            next(iter(op.examples(sizes))),
            getattr(torch.ops.fastercache, name).default,
            getattr(ops, name),
        )
        given = {argument.name: value for argument, value in zip(overload._schema.arguments, arguments, strict=False)}
        public = tuple(given.get(parameter) for parameter in inspect.signature(function).parameters)
        function_us = dispatch_us(partial(function, *public), device, calls)
        rows.append(
            {"op": name, "function_us": function_us, "op_us": dispatch_us(partial(overload, *arguments), device, calls)}
        )
    return rows


def dispatch_bars(rows: Sequence[op_rows.Row]) -> list[op_rows.Row]:
    """The op alone is what a compiled graph calls; the function is what a user calls."""
    return [
        op_rows.bar("host: dispatcher's op alone (us)", rows, lambda row: row["op_us"], BAR_US, at_least=False),
        op_rows.bar(
            "host: public function, with its checks (us)", rows, lambda row: row["function_us"], BAR_US, at_least=False
        ),
    ]


def dispatch_table(rows: Iterable[op_rows.Row]) -> str:
    return report.table(
        ("op", "function (us)", "dispatcher's op alone (us)"),
        [(row["op"], f"{row['function_us']:.2f}", f"{row['op_us']:.2f}") for row in rows],
    )
