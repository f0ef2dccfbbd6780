"""The implementations under test, and what their tests share: rows, tensors of awkward layout, tolerances."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from fastercache import ops
from fastercache.triton_kernels import _triton, cfg_reconstruct, cfg_split, packed, ring_blend, ring_push

OPS = tuple(ops.implementations())
MODULES = (ring_push, ring_blend, packed, cfg_split, cfg_reconstruct)


def _functions(prefix: str) -> SimpleNamespace:
    """The functions behind the ops, with the signatures of `fastercache.ops`: those take `out` last, and make it where it is not given."""
    found = {name: getattr(module, prefix + name) for name in OPS for module in MODULES if hasattr(module, prefix + name)}

    def ring_blend(ring, row):
        out = torch.empty(ring.shape[1:], dtype=ring.dtype)
        found["ring_blend"](out, ring, row)
        return out

    def packed_blend(ring, row, out, bits):
        found["packed_blend"](out, ring, row, bits)
        return out

    def cfg_guide(cond, low, high, row, scale):
        out = torch.empty(cond.shape, dtype=cond.dtype)
        found["cfg_guide"](out, cond, low, high, row, scale)
        return out

    return SimpleNamespace(**(found | {"ring_blend": ring_blend, "packed_blend": packed_blend, "cfg_guide": cfg_guide}))


# "dispatched" is what users call: the C++ library where it is built.
IMPLEMENTATIONS = {"reference": _functions("reference_"), f"dispatched-{ops.implementations()['ring_push']['cpu']}": ops}
if type(ring_push.ring_push_kernel).__name__ == "InterpretedFunction":
    IMPLEMENTATIONS["triton"] = _functions("triton_")
else:  # compiled kernels want tensors on a GPU, which test_gpu.py gives them
    message = "Set TRITON_INTERPRET=1 before anything imports fastercache (for instance at the top of tests/conftest.py)"
    assert _triton.MISSING or torch.cuda.is_available(), message

few = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)

dtypes = st.sampled_from(ops.DTYPES)
seeds = st.integers(0, 2**31 - 1)
sides = st.sampled_from([1, 2, 3, 5, 7, 8, 13])
shapes = st.lists(sides, min_size=1, max_size=4)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(shape: Sequence[int], dtype: torch.dtype, rng: torch.Generator, layout: str = "contiguous") -> torch.Tensor:
    """A random tensor in one of LAYOUTS."""
    shape = list(shape)
    if layout == "permuted":
        return torch.randn(shape[::-1], generator=rng, dtype=torch.float64).to(dtype).permute(*reversed(range(len(shape))))
    if layout == "sliced":
        return torch.randn([*shape[:-1], 2 * shape[-1]], generator=rng, dtype=torch.float64).to(dtype)[..., ::2]
    if layout == "half":
        return torch.randn([2 * shape[0], *shape[1:]], generator=rng, dtype=torch.float64).to(dtype)[shape[0] :]
    if layout == "frames":  # what Latte returns: [B * F, C, ...] seen as [B, C, F, ...]
        leading = shape[:1] + shape[2:3] + shape[1:2] + shape[3:] if len(shape) > 2 else shape
        x = torch.randn(leading, generator=rng, dtype=torch.float64).to(dtype)
        return x.transpose(1, 2) if len(shape) > 2 else x
    return torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype)


LAYOUTS = ("contiguous", "permuted", "sliced", "half", "frames")
layouts = st.sampled_from(LAYOUTS)


def nan(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.full(list(shape), torch.nan, dtype=dtype)


def nan_ring(slots: int, shape: Sequence[int], dtype: torch.dtype, narrow: bool) -> torch.Tensor:
    """A ring of NaN; with `narrow` one branch's rows of a ring for two branches, so that its slots lie twice as far apart."""
    if narrow:
        return nan([slots, 2 * shape[0], *shape[1:]], dtype)[:, shape[0] :]
    return nan([slots, *shape], dtype)


def make_row(
    coefficients: Sequence[float] = (), slots: Sequence[int] = (), push: int = 0, low: float = 0.0, high: float = 0.0
) -> torch.Tensor:
    """A row, as a view into a table of three: the others, and the coefficients of unused taps, are NaN."""
    table = nan([3, ops.ROW_SIZE], torch.float32)
    row = table[1]
    for k in range(ops.MAX_TAPS):
        row[ops.Row.COEFFICIENT + k] = coefficients[k] if k < len(coefficients) else torch.nan
        row[ops.Row.READ_SLOT + k] = slots[k] if k < len(slots) else 0
    row[ops.Row.WRITE_SLOT], row[ops.Row.LOW], row[ops.Row.HIGH], row[ops.Row.TAPS] = push, low, high, len(coefficients)
    return row


def assert_close(actual: torch.Tensor, exact: torch.Tensor, magnitude: torch.Tensor, operations: int = 8) -> None:
    """`actual` is `exact` (float64) but for one rounding to its dtype, and those of `operations` operations in the compute type.

    `magnitude` bounds the intermediate results of each element: the sum of the absolute values of its terms.
    """
    storage, compute = torch.finfo(actual.dtype), torch.finfo(ops.map_dtype(actual.dtype))
    tolerance = storage.eps * exact.abs() + operations * compute.eps * magnitude + storage.smallest_normal * storage.eps
    error = (actual.double() - exact).abs()
    assert not actual.isnan().any(), f"{int(actual.isnan().sum())} of {actual.numel()} elements are NaN"
    assert (error <= tolerance).all(), f"error {error.max():.3g}, {(error / tolerance).max():.3g} times the tolerance"
