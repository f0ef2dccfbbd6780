"""Compiles a list of specialisations of the Triton kernels for GPUs that need not be there, and prints what came of
each, as JSON.

The launchers run as they are, on CPU tensors of real sizes that nothing is written to. Only the last step,
`JITFunction.run`, compiles for the types of its arguments instead of launching.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from fastercache.triton_kernels.cfg_reconstruct import triton_cfg_reconstruct
from fastercache.triton_kernels.cfg_split import triton_cfg_split
from fastercache.triton_kernels.packed import (
    PackedLine,
    triton_packed_blend,
    triton_packed_blend_add,
    triton_packed_push,
    triton_packed_push_residual,
)
from fastercache.triton_kernels.prediction_blend import triton_prediction_blend
from fastercache.triton_kernels.ring_blend import triton_ring_blend, triton_ring_blend_add
from fastercache.triton_kernels.ring_push import triton_ring_push, triton_ring_push_residual

# T4, A100 (and what has its machine code: sm_86, sm_89), H100, B200, RTX 50. `make test` has the one whose machine
# code most GPUs run, `make test-all` all of them.
ALL_TARGETS = (75, 80, 90, 100, 120)
TARGETS = ALL_TARGETS if os.environ.get("FASTERCACHE_ALL_TARGETS") == "1" else (80,)
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float64: "*fp64",
    torch.uint8: "*u8",
}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
COGVIDEOX = (2, 17776, 1920)  # text and video tokens of 49 frames of 480 x 720
LATTE = (2, 16, 1024, 1152)


def empty(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


COEFFICIENTS = empty(16, dtype=FP32)


def push(x: torch.Tensor) -> None:
    triton_ring_push(empty(3, *x.shape, dtype=x.dtype), x, COEFFICIENTS)


def push_residual(x: torch.Tensor, entry: torch.Tensor) -> None:
    triton_ring_push_residual(empty(3, *x.shape, dtype=x.dtype), x, entry, COEFFICIENTS)


def blend(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    triton_ring_blend(empty(*shape, dtype=dtype), empty(3, *shape, dtype=dtype), COEFFICIENTS)


def blend_add(x: torch.Tensor, gate: torch.Tensor) -> None:
    triton_ring_blend_add(x, gate, empty(3, *x.shape, dtype=x.dtype), COEFFICIENTS)


def packed_push(x: torch.Tensor, bits: int) -> None:
    triton_packed_push(packed_ring(x.shape, bits), x, bits)


def packed_push_residual(x: torch.Tensor, entry: torch.Tensor, bits: int) -> None:
    triton_packed_push_residual(packed_ring(x.shape, bits), x, entry, bits)


def packed(shape: tuple[int, ...], dtype: torch.dtype, bits: int) -> None:
    triton_packed_blend(empty(*shape, dtype=dtype), packed_ring(shape, bits), COEFFICIENTS, bits)


def packed_add(x: torch.Tensor, gate: torch.Tensor, bits: int) -> None:
    triton_packed_blend_add(x, gate, packed_ring(x.shape, bits), COEFFICIENTS, bits)


def packed_ring(shape: tuple[int, ...], bits: int) -> torch.Tensor:
    return empty(*shape[:-1], PackedLine(shape[-1], bits).bytes, dtype=torch.uint8)


def split(height: int, width: int, radius: int, dtype: torch.dtype) -> None:
    maps = empty(2, 4, height, width, dtype=FP32)
    latent = empty(2, 4, height, width, dtype=dtype)
    triton_cfg_split(maps, maps, latent, latent, radius)


def reconstruct(shape: tuple[int, ...], dtype: torch.dtype, in_place: bool = False, previous: bool = False) -> None:
    out = empty(2 * shape[0], *shape[1:], dtype=dtype)
    maps = empty(*shape, dtype=FP32)
    cond = out[shape[0] :] if in_place else empty(*shape, dtype=dtype)
    triton_cfg_reconstruct(out, cond, maps, maps, COEFFICIENTS, 1, maps if previous else None)


def predict(now: torch.Tensor, fresh: torch.Tensor | None = None) -> None:
    ring, newest = empty(2, *now.shape, dtype=now.dtype), empty(*now.shape, dtype=now.dtype)
    triton_prediction_blend(empty(*now.shape, dtype=now.dtype), ring, newest, now, COEFFICIENTS, fresh)


CASES: dict[str, Callable[[], None]] = {
    "ring_push bf16": lambda: push(empty(*COGVIDEOX)),
    "ring_push fp32": lambda: push(empty(*COGVIDEOX, dtype=FP32)),
    "ring_push bf16, frames moved inward": lambda: push(empty(*LATTE).transpose(1, 2)),
    "ring_push_residual bf16": lambda: push_residual(empty(*COGVIDEOX), empty(*COGVIDEOX)),
    "ring_push_residual fp32": lambda: push_residual(empty(*COGVIDEOX, dtype=FP32), empty(*COGVIDEOX, dtype=FP32)),
    "ring_push_residual bf16, frames moved inward": lambda: push_residual(
        empty(*LATTE).transpose(1, 2), empty(*LATTE).transpose(1, 2)
    ),
    "ring_blend bf16": lambda: blend(COGVIDEOX, BF16),
    "ring_blend fp16": lambda: blend(COGVIDEOX, FP16),
    "ring_blend fp32": lambda: blend(COGVIDEOX, FP32),
    "ring_blend_add bf16, no gate": lambda: blend_add(empty(*COGVIDEOX), empty(1, dtype=FP32)),
    "ring_blend_add bf16, gate by channel": lambda: blend_add(empty(*COGVIDEOX), empty(2, 1, 1920)),
    "ring_blend_add fp16, gate by channel": lambda: blend_add(
        empty(*COGVIDEOX, dtype=FP16), empty(2, 1, 1920, dtype=FP16)
    ),
    "ring_blend_add bf16, float32 gate by channel": lambda: blend_add(empty(*COGVIDEOX), empty(2, 1, 1920, dtype=FP32)),
    "ring_blend_add bf16, gate by element": lambda: blend_add(empty(*COGVIDEOX), empty(*COGVIDEOX)),
    "ring_blend_add bf16, part of a sequence": lambda: blend_add(empty(*COGVIDEOX)[:, 226:], empty(2, 1, 1920)),
    "packed_push bf16, 0 bits": lambda: packed_push(empty(*COGVIDEOX), 0),
    "packed_push bf16, 8 bits": lambda: packed_push(empty(*COGVIDEOX), 8),
    "packed_push bf16, 4 bits": lambda: packed_push(empty(*COGVIDEOX), 4),
    "packed_push_residual bf16, 0 bits": lambda: packed_push_residual(empty(*COGVIDEOX), empty(*COGVIDEOX), 0),
    "packed_push_residual bf16, 8 bits": lambda: packed_push_residual(empty(*COGVIDEOX), empty(*COGVIDEOX), 8),
    "packed_push_residual bf16, 4 bits": lambda: packed_push_residual(empty(*COGVIDEOX), empty(*COGVIDEOX), 4),
    "packed_blend bf16, 0 bits": lambda: packed(COGVIDEOX, BF16, 0),
    "packed_blend bf16, 8 bits": lambda: packed(COGVIDEOX, BF16, 8),
    "packed_blend bf16, 4 bits": lambda: packed(COGVIDEOX, BF16, 4),
    "packed_blend_add bf16, 8 bits": lambda: packed_add(empty(*COGVIDEOX), empty(2, 1, 1920), 8),
    "packed_blend_add bf16, 4 bits": lambda: packed_add(empty(*COGVIDEOX), empty(2, 1, 1920), 4),
    "cfg_split bf16, 60 x 90": lambda: split(60, 90, 12, BF16),
    "cfg_split fp32, 60 x 90": lambda: split(60, 90, 12, FP32),
    "cfg_split fp16, 64 x 64": lambda: split(64, 64, 12, FP16),
    "cfg_split fp32, 128 x 128": lambda: split(128, 128, 25, FP32),
    "cfg_reconstruct bf16": lambda: reconstruct((1, 13, 16, 60, 90), BF16),
    "cfg_reconstruct bf16, in place": lambda: reconstruct((1, 13, 16, 60, 90), BF16, in_place=True),
    "cfg_reconstruct fp16, 57 x 4 x 60 x 106": lambda: reconstruct((57, 4, 60, 106), FP16),
    "cfg_reconstruct fp32": lambda: reconstruct((16, 4, 64, 64), FP32),
    "cfg_reconstruct bf16, three maps": lambda: reconstruct((1, 13, 16, 60, 90), BF16, previous=True),
    "prediction_blend bf16": lambda: predict(empty(1, 13, 16, 60, 90)),
    "prediction_blend bf16, fresh": lambda: predict(empty(1, 13, 16, 60, 90), empty(1, 13, 16, 60, 90)),
    "prediction_blend fp32": lambda: predict(empty(16, 4, 64, 64, dtype=FP32)),
    "prediction_blend bf16, frames moved inward": lambda: predict(empty(1, 16, 4, 64, 64).transpose(1, 2)),
}

results: list[dict] = []


def describe(value, path, constants, attributes):
    """The type of one argument; as a launch does, takes None and 1 for constants and notes what is divisible by 16."""
    if isinstance(value, tuple):
        return tuple(describe(item, (*path, i), constants, attributes) for i, item in enumerate(value))
    if isinstance(value, torch.Tensor):
        if value.data_ptr() % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return POINTERS[value.dtype]
    if value is None or value == 1:
        constants[path] = value
        return "constexpr"
    if value % 16 == 0:
        attributes[path] = [["tt.divisibility", 16]]
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def compile_instead(self, *args, grid, warmup, **keywords):
    options = {name: keywords.pop(name) for name in ("num_warps", "num_stages", "enable_fp_fusion") if name in keywords}
    constants, attributes = {}, {}
    signature = {self.arg_names[i]: describe(value, (i,), constants, attributes) for i, value in enumerate(args)}
    for name, value in keywords.items():
        constants[(self.arg_names.index(name),)] = value
        signature[name] = "constexpr"
    for target in TARGETS:
        assert "enable_fp_fusion" in options, "a launch leaves the fusing of products and sums to Triton's default"
        source = ASTSource(self, signature, constants, attributes)
        kernel = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
        results.append({"target": target, "shared": kernel.metadata.shared, **machine_code(kernel.asm["cubin"])})


def machine_code(cubin: bytes) -> dict:
    """Registers of a thread, its bytes of stack and local memory, and how often each global access is in the code."""

    def dump(option: str) -> str:
        command = [triton.knobs.nvidia.cuobjdump.path, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        registers, stack, local = re.findall(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", dump("--dump-resource-usage"))[0]
        accesses = Counter(
            name.removesuffix(".SYS") for name in re.findall(r"\b((?:LDG|STG)[\w.]*) ", dump("-sass"))
        )  # as sm_75 spells it
    return {"registers": int(registers), "memory": int(stack) + int(local), "accesses": accesses}


def main() -> None:
    JITFunction.run = compile_instead
    for name, launch in CASES.items():
        first = len(results)
        launch()
        for result in results[first:]:
            result["case"] = name
    print(json.dumps(results))


if __name__ == "__main__":
    main()
