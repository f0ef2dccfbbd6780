"""Compiles the Triton kernels for sm_80 and sm_90 without a GPU and prints, as JSON, what the compiler says of each.

The launchers run as they are, on CPU tensors: only the last step, `JITFunction.run`, compiles its arguments' types instead of launching.
"""

from __future__ import annotations

import json

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from fastercache.triton_kernels.cfg_reconstruct import triton_cfg_reconstruct
from fastercache.triton_kernels.cfg_split import triton_cfg_split
from fastercache.triton_kernels.ring_blend import triton_ring_blend, triton_ring_blend_add
from fastercache.triton_kernels.ring_push import triton_ring_push

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float64: "*fp64"}
TARGETS = (80, 90)  # A100 and its relatives, H100
results: list[dict] = []


def describe(value, path, constants, attributes):
    """The type of one argument; as a launch does, takes 1 for a constant and notes what is divisible by 16."""
    if isinstance(value, tuple):
        return tuple(describe(item, (*path, i), constants, attributes) for i, item in enumerate(value))
    if isinstance(value, torch.Tensor):
        attributes[path] = [["tt.divisibility", 16]]
        return POINTERS[value.dtype]
    if value == 1:
        constants[path] = 1
        return "constexpr"
    if value % 16 == 0:
        attributes[path] = [["tt.divisibility", 16]]
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def compile_instead(self, *args, grid, warmup, num_warps=4, **keywords):
    constants, attributes = {}, {}
    signature = {self.arg_names[i]: describe(value, (i,), constants, attributes) for i, value in enumerate(args)}
    for name, value in keywords.items():
        constants[(self.arg_names.index(name),)] = value
        signature[name] = "constexpr"
    for target in TARGETS:
        source = ASTSource(self, signature, constants, attributes)
        kernel = triton.compile(source, target=GPUTarget("cuda", target, 32), options={"num_warps": num_warps})
        ptx = kernel.asm["ptx"]
        wide = "ld.global.v4.b32" in ptx or "ld.global.v2.b64" in ptx
        results.append({"kernel": self.fn.__name__, "target": target, "shared": kernel.metadata.shared, "wide_loads": wide})


def main() -> None:
    JITFunction.run = compile_instead
    row = torch.zeros(16)
    ring = torch.zeros(3, 2, 64, 128, dtype=torch.bfloat16)
    x = ring[0].clone()
    triton_ring_push(ring, x, row)
    triton_ring_blend(ring, row)
    triton_ring_blend_add(x, torch.zeros(2, 1, 128), ring, row)
    cond = torch.zeros(2, 3, 60, 90, dtype=torch.float16)
    low = torch.zeros(cond.shape)
    triton_cfg_reconstruct(torch.zeros(4, 3, 60, 90, dtype=cond.dtype), cond, low, low, row, 1)
    triton_cfg_split(low, low, cond, cond.transpose(0, 1).contiguous().transpose(0, 1), 12)
    large = torch.zeros(1, 128, 128)
    triton_cfg_split(large, large, large, large, 25)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
