"""The implementations under test, and what their tests share: coefficients, tensors of awkward layout, tolerances."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from fastercache import ops
from fastercache.ops.registry import OPS as REGISTRY
from fastercache.triton_kernels import _triton, ring_push

OPS = tuple(REGISTRY)


def _functions(kind: str) -> SimpleNamespace:
    """The references of the ops or their Triton launchers, with the signatures of `fastercache.ops`."""
    return SimpleNamespace(
        **{name: _public(name, getattr(op, kind)) for name, op in REGISTRY.items() if getattr(op, kind)}
    )


def _public(name: str, function: Callable[..., None]) -> Callable[..., Any]:
    """`function`, which takes its arguments in the order of the schema, called as the public function is."""
    signature = inspect.signature(getattr(ops, name))
    order = [argument.name for argument in getattr(torch.ops.fastercache, name).default._schema.arguments]

    def call(*args: Any, **keywords: Any) -> Any:
        given = signature.bind(*args, **keywords).arguments
        if "out" in order and given.get("out") is None:
            given["out"] = given["ring"].new_empty(given["ring"].shape[1:])
        function(*(given.get(argument) for argument in order))
        return given.get("out")

    return call


# "dispatched" is what users call: the C++ library where it is built.
IMPLEMENTATIONS = {"reference": _functions("reference"), f"dispatched-{ops.implementations()['ring_push']['cpu']}": ops}
if type(ring_push.ring_push_kernel).__name__ == "InterpretedFunction":
    IMPLEMENTATIONS["triton"] = _functions("triton")
else:  # compiled kernels want tensors on a GPU, which test_gpu.py gives them
    message = (
        "Set TRITON_INTERPRET=1 before anything imports fastercache (for instance at the top of tests/conftest.py)"
    )
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
        return (
            torch.randn(shape[::-1], generator=rng, dtype=torch.float64).to(dtype).permute(*reversed(range(len(shape))))
        )
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
    """A ring of NaN; with `narrow` one branch's rows of a ring for two branches, so that its slots lie twice as far
    apart."""
    if narrow:
        return nan([slots, 2 * shape[0], *shape[1:]], dtype)[:, shape[0] :]
    return nan([slots, *shape], dtype)


def make_coefficients(
    taps: Sequence[float] = (),
    slots: Sequence[int] = (),
    push: int = 0,
    low: float = 0.0,
    high: float = 0.0,
    now: float = torch.nan,
    newest: float = torch.nan,
    previous: float = torch.nan,
    fresh: float = torch.nan,
) -> torch.Tensor:
    """A vector of coefficients, as a view into a table of three: the others, those of unused taps and those not given
    are NaN."""
    table = nan([3, ops.COEFFICIENT_COUNT], torch.float32)
    coefficients = table[1]
    for k in range(ops.MAX_TAPS):
        coefficients[ops.Coefficient.OF_TAP + k] = taps[k] if k < len(taps) else torch.nan
        coefficients[ops.Coefficient.READ_SLOT + k] = slots[k] if k < len(slots) else 0
    (
        coefficients[ops.Coefficient.WRITE_SLOT],
        coefficients[ops.Coefficient.LOW],
        coefficients[ops.Coefficient.HIGH],
        coefficients[ops.Coefficient.TAPS],
    ) = push, low, high, len(taps)
    (
        coefficients[ops.Coefficient.NOW],
        coefficients[ops.Coefficient.NEWEST],
        coefficients[ops.Coefficient.PREVIOUS],
        coefficients[ops.Coefficient.FRESH],
    ) = now, newest, previous, fresh
    return coefficients


def assert_close(actual: torch.Tensor, exact: torch.Tensor, magnitude: torch.Tensor, operations: int = 8) -> None:
    """`actual` is `exact` (float64) but for one rounding to its dtype, and those of `operations` operations in the
    compute type.

    `magnitude` bounds the intermediate results of each element: the sum of the absolute values of its terms.
    """
    storage, compute = torch.finfo(actual.dtype), torch.finfo(ops.map_dtype(actual.dtype))
    tolerance = storage.eps * exact.abs() + operations * compute.eps * magnitude + storage.smallest_normal * storage.eps
    error = (actual.double() - exact).abs()
    assert not actual.isnan().any(), f"{int(actual.isnan().sum())} of {actual.numel()} elements are NaN"
    assert (error <= tolerance).all(), f"error {error.max():.3g}, {(error / tolerance).max():.3g} times the tolerance"
