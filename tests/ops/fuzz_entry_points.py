"""Calls the C++ ops as the dispatcher does, with random and mostly wrong tensors: each call may raise, none may touch
foreign memory.

    python fuzz_entry_points.py --seconds 8 --seed 0 --log FILE

Most tensors end where a page without access begins, so the first element read or written past one ends the process; the
log then holds the call, and `--seconds 0 --seed N` repeats it. Prints, as JSON, how often each op accepted and refused
its arguments.
"""

from __future__ import annotations

import argparse
import ctypes
import faulthandler
import json
import math
import mmap
import os
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fastercache import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
OTHER_DTYPES = (*DTYPES, torch.uint8, torch.int8, torch.int64, torch.bool, torch.complex64)
NUMBERS = (-1, 0, 1, 2, 3, 4, 8, 127, 2**31, 2**32 + 1, 2**62, 2**63 - 1, -(2**63))
COEFFICIENT_VALUES = (0.0, 1.0, 2.0, 3.0, 4.0, 0.5, -1.0, 5.0, 1e9, 1e30, math.inf, -math.inf, math.nan)
PAGE = mmap.PAGESIZE
libc = ctypes.CDLL(None, use_errno=True)


def guarded(size: int) -> torch.Tensor:
    """`size` bytes that end at a page without access."""
    pages = math.ceil(size / PAGE)
    memory = mmap.mmap(-1, (pages + 1) * PAGE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if libc.mprotect(ctypes.c_void_p(start + pages * PAGE), ctypes.c_size_t(PAGE), 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    return torch.frombuffer(memory, dtype=torch.uint8, offset=pages * PAGE - size, count=size)


class Fuzz:
    """Everything random about one call, from one seed."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)

    def rarely(self, share: float = 0.06) -> bool:
        return self.random.random() < share

    def tensor(self, shape: Sequence[int], dtype: torch.dtype, strided: bool = False) -> torch.Tensor:
        """A tensor of that shape and dtype, or, rarely, one that is wrong in some way."""
        shape = list(shape)
        if self.rarely():
            dtype = self.random.choice(OTHER_DTYPES)
        if self.rarely():
            change = self.random.randrange(5)
            place = self.random.randrange(len(shape) + 1)
            if change == 0:
                shape.insert(place, self.random.choice((1, 2, 3)))
            elif shape and change == 1:
                del shape[place % len(shape)]
            elif shape and change == 2:
                shape[place % len(shape)] = self.random.choice((0, 1, 2, 5, 33))
            elif shape and change == 3:
                shape[place % len(shape)] += self.random.choice((-1, 1)) if shape[place % len(shape)] else 1
            else:
                self.random.shuffle(shape)
        return self.storage(shape, dtype, strided or self.rarely())

    def storage(self, shape: list[int], dtype: torch.dtype, strided: bool) -> torch.Tensor:
        order = list(range(len(shape)))
        steps = [1] * len(shape)
        if strided:
            self.random.shuffle(order)
            steps = [self.random.choice((1, 1, 2, 0 if self.rarely(0.2) else 1)) for _ in shape]
        strides, extent = [0] * len(shape), 1
        for d in reversed(order):
            strides[d] = extent * steps[d]
            extent = max(extent, strides[d] * max(shape[d], 1))
        elements = (
            1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) if all(shape) else 0
        )
        offset = self.random.choice((0, 0, 1, 3))
        size = (elements + offset) * dtype.itemsize
        # malloc's memory lets AddressSanitizer see accesses before a tensor too, which the page behind it cannot.
        memory = guarded(size) if size and self.random.random() < 0.7 else torch.zeros(size, dtype=torch.uint8)
        if self.rarely(0.3):
            memory.random_(0, 256)
        return memory.view(dtype).as_strided(shape, strides, offset if elements else 0)

    def coefficients(self) -> torch.Tensor:
        coefficients = self.tensor([ops.COEFFICIENT_COUNT], torch.float32)
        if (
            coefficients.dtype == torch.float32
            and coefficients.dim() == 1
            and coefficients.shape[0] == ops.COEFFICIENT_COUNT
            and coefficients.stride(0) == 1
        ):
            taps = self.random.randint(0, 2)
            last = [self.random.choice((0.0, 0.5)) for _ in range(4)]
            values = [
                1.5,
                -0.5,
                0.0,
                0.0,
                *(float(self.random.randrange(2)) for _ in range(5)),
                1.2,
                1.0,
                float(taps),
                *last,
            ]
            while self.rarely(0.2):
                values[self.random.randrange(ops.COEFFICIENT_COUNT)] = self.random.choice(COEFFICIENT_VALUES)
            coefficients.copy_(torch.tensor(values))
        return coefficients

    def number(self, valid: int) -> int:
        return self.random.choice(NUMBERS) if self.rarely(0.15) else valid

    def shape(self) -> list[int]:
        if self.rarely(0.02):
            return [3, 1, 20011]  # more than one thread's share
        return [self.random.choice((1, 2, 3, 5, 8)) for _ in range(self.random.randint(1, 4))]

    def arguments(self, op: torch._ops.OpOverload) -> list[Any]:
        """Arguments of one call, in the order of the op's schema."""
        name = op._opname
        shape, dtype, bits = self.shape(), self.random.choice(DTYPES), self.random.choice((0, 4, 8))
        ring, slot_dtype, strided, out = [2, *shape], dtype, name.startswith("ring_push"), shape
        if name.startswith("packed"):
            shape[-1] = self.random.choice((1, 7, 128, 129, 300))
            dtype = dtype if dtype != torch.float64 or self.rarely() else torch.float32
            ring, slot_dtype, strided = (
                [*shape[:-1], ops.PackedLine(shape[-1], bits).bytes],
                torch.uint8,
                name.startswith("packed_push"),
            )
        if name == "cfg_split":
            shape += [self.random.randint(1, 9), self.random.randint(1, 9)]
        if name == "cfg_reconstruct":
            out = [2 * shape[0], *shape[1:]]
        maps = ops.map_dtype(dtype)
        gate = [self.random.choice((1, size)) for size in shape][self.random.randrange(len(shape)) :]
        makers: dict[str, Callable[[], Any]] = {
            "ring": lambda: self.tensor(ring, slot_dtype),
            "x": lambda: self.tensor(shape, dtype, strided),
            "entry": lambda: self.tensor(shape, dtype, strided=True),
            "newest": lambda: self.tensor(shape, dtype),
            "now": lambda: self.tensor(shape, dtype, strided=True),
            "fresh": lambda: self.tensor(shape, dtype, strided=True) if self.random.random() < 0.5 else None,
            "previous": lambda: self.tensor(shape, maps) if self.random.random() < 0.5 else None,
            "gate": lambda: self.tensor(gate, self.random.choice((dtype, torch.float32)), strided=True),
            "coefficients": self.coefficients,
            "out": lambda: self.tensor(out, dtype),
            "bits": lambda: self.number(bits),
            "cond": lambda: self.tensor(shape, dtype, strided=True),
            "uncond": lambda: self.tensor(shape, dtype, strided=True),
            "low": lambda: self.tensor(shape, maps),
            "high": lambda: self.tensor(shape, maps),
            "scale": lambda: self.tensor([1], torch.float32),
            "radius": lambda: self.number((min(shape[-2:]) - 1) // 2),
            "cond_half": lambda: self.number(self.random.randrange(2)),
        }
        return [makers[argument.name]() for argument in op._schema.arguments]


def described(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return str(value)
    text = f"{value.dtype} {list(value.shape)} strides {list(value.stride())} offset {value.storage_offset()}"
    return text + f" {value.tolist()}" if value.shape == (ops.COEFFICIENT_COUNT,) else text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8.0, help="time to fuzz; 0 makes one call of each op")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, help="file that holds the call being made")
    args = parser.parse_args()
    faulthandler.enable()
    assert all(chosen["cpu"] == "C++" for chosen in ops.implementations().values()), ops.fallback_reasons()
    log = os.open(args.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC) if args.log else None
    counts = {name: {"accepted": 0, "refused": 0} for name in ops.implementations()}
    end, seed = time.monotonic() + args.seconds, args.seed
    while True:
        for name in counts:
            op = getattr(torch.ops.fastercache, name).default
            arguments = Fuzz(seed).arguments(op)
            if log is not None:
                call = f"{name}, seed {seed}:\n" + "\n".join(
                    f"  {argument.name}: {described(value)}"
                    for argument, value in zip(op._schema.arguments, arguments, strict=True)
                )
                os.pwrite(log, call.encode().ljust(8192), 0)
            try:
                op(*arguments)
            except Exception:
                counts[name]["refused"] += 1
            else:
                counts[name]["accepted"] += 1
        seed += 1
        if time.monotonic() >= end:
            break
    print(json.dumps({"seeds": seed - args.seed, "ops": counts}))


if __name__ == "__main__":
    main()
