"""The operations a cached model calls: schemas, dispatch, and the public functions that check their arguments.

| op | what it does | CPU | CUDA |
|---|---|---|---|
| `ring_push` | stores a site's newest output in its ring | C++ | CUDA C++, else Triton |
| `ring_push_residual` | stores what a block added to its residual stream | C++ | Triton |
| `ring_blend` | approximates an output from the last computed ones | C++ | Triton |
| `ring_blend_add` | the same, gated and added to the residual stream | C++ | Triton |
| `packed_push` | stores a site's newest output in 8 bits, and its change in 8 or 4 | C++ | CUDA C++, else Triton |
| `packed_push_residual` | the same of what a block added to its residual stream | C++ | CUDA C++, else Triton |
| `packed_blend`, `packed_blend_add` | as `ring_blend`, `ring_blend_add`, from a packed ring | C++ | Triton |
| `cfg_split` | splits the difference of the CFG branches into two bands | C++ | Triton |
| `cfg_reconstruct` | rebuilds the unconditional half from the conditional one | C++ | Triton |
| `prediction_blend` | stands in for a call of the denoiser, or corrects a fresh one | C++ | Triton |

Where a library is not built, Triton cannot be imported, or the device is neither (`mps`, `xpu`), plain PyTorch serves
the op under the same name; the packed ops have no such stand-in. `implementations()` says which serves,
`fallback_reasons()` says why. `prepare()` launches ops once and replaces those that cannot be.
FASTERCACHE_FORCE_REFERENCE=1 in the environment selects PyTorch everywhere.

Every op reads what changes from step to step from the *coefficients*, 16 float32 values on the device that
`fastercache.triton_kernels.coefficients` describes, so one graph serves all steps. The ops have no gradient, and mutate
their arguments without returning them. Coefficients that name a slot outside the ring are an error on the CPU; on a GPU
that cannot be checked without waiting for it, and is undefined.
"""

from __future__ import annotations

from fastercache.ops._cfg_reconstruct import cfg_reconstruct
from fastercache.ops._cfg_split import cfg_split, prepare_cfg_split
from fastercache.ops._packed_blend import packed_blend, packed_blend_add
from fastercache.ops._packed_push import packed_push, packed_push_residual
from fastercache.ops._prediction_blend import prediction_blend
from fastercache.ops._ring_blend import plain_blends, ring_blend, ring_blend_add
from fastercache.ops._ring_push import ring_push, ring_push_residual
from fastercache.ops.checks import DTYPES, PACKED_DTYPES, map_dtype
from fastercache.ops.dispatch import fallback_reasons, implementation, implementations, packed_missing, prepare
from fastercache.triton_kernels.coefficients import COEFFICIENT_COUNT, MAX_TAPS, Coefficient
from fastercache.triton_kernels.packed import PackedLine

__all__ = [
    "COEFFICIENT_COUNT",
    "DTYPES",
    "MAX_TAPS",
    "PACKED_DTYPES",
    "Coefficient",
    "PackedLine",
    "cfg_reconstruct",
    "cfg_split",
    "fallback_reasons",
    "implementation",
    "implementations",
    "map_dtype",
    "packed_blend",
    "packed_blend_add",
    "packed_missing",
    "packed_push",
    "packed_push_residual",
    "plain_blends",
    "prediction_blend",
    "prepare",
    "prepare_cfg_split",
    "ring_blend",
    "ring_blend_add",
    "ring_push",
    "ring_push_residual",
]
