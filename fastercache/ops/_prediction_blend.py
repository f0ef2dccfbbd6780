"""Standing in for a call of the denoiser, or correcting a fresh prediction."""

from __future__ import annotations

import torch

from fastercache.ops.checks import check_contiguous, check_ring, check_tensor, map_dtype
from fastercache.ops.dispatch import define
from fastercache.ops.registry import Arguments, Op, Sizes
from fastercache.triton_kernels.prediction_blend import reference_prediction_blend, triton_prediction_blend


def _examples(sizes: Sizes) -> Arguments:
    """With and without a fresh prediction, which are two kernels."""
    if sizes.prediction:
        dtype = map_dtype(sizes.dtype)
        out, latents = (sizes.zeros(*sizes.prediction, dtype=dtype) for _ in range(2))
        for fresh in (None, latents):
            yield out, sizes.zeros(1, *sizes.prediction, dtype=dtype), latents, latents, sizes.coefficients(), fresh


_prediction_blend = define(
    Op(
        "prediction_blend",
        "(Tensor(a!) out, Tensor ring, Tensor newest, Tensor now, Tensor coefficients, Tensor? fresh=None) -> ()",
        reference=reference_prediction_blend,
        triton=triton_prediction_blend,
        examples=_examples,
    )
)


def prediction_blend(
    out: torch.Tensor,
    ring: torch.Tensor,
    newest: torch.Tensor,
    now: torch.Tensor,
    coefficients: torch.Tensor,
    fresh: torch.Tensor | None = None,
) -> None:
    """Stands in for a call of the denoiser, or corrects one: `sum_k c_k ring[slot_k] + c_now now + c_newest newest (+
    c_fresh fresh)`.

    The taps are cached predictions, as in `ring_blend`; the other coefficients are those at `Coefficient.NOW`,
    `Coefficient.NEWEST` and `Coefficient.FRESH`. A tensor whose coefficient is 0 is not used and may hold anything, as
    may slots that no tap in use names. The sum is taken in float32 (float64 for float64) and rounded once.

    Args:
        out: `[*shape]`, the dtype and device of `ring`, contiguous. Overwritten. It may be `fresh` itself, where that
            is contiguous; no other overlap with an input.
        ring: `[slots, *shape]`, as in `ring_push`: the cached predictions.
        newest: as `out`: the latents at the newest cached prediction.
        now: `[*shape]`, the dtype and device of `ring`; any strides: the latents of this step.
        coefficients: `[16]` float32, contiguous, on the device of `ring`.
        fresh: as `now`: a prediction of this step, to be corrected.

    Moves the bytes of every tensor in use, and those of the result.

    Raises:
        ValueError, TypeError, RuntimeError: as in `ring_push`.
    """
    check_ring(ring, coefficients)
    shape, dtype, device = ring.shape[1:], ring.dtype, ring.device
    check_tensor("out", out, shape, dtype, device)
    check_contiguous("out", out)
    check_tensor("newest", newest, shape, dtype, device)
    check_contiguous("newest", newest)
    check_tensor("now", now, shape, dtype, device)
    if fresh is not None:
        check_tensor("fresh", fresh, shape, dtype, device)
    if out is newest or out is now:
        raise ValueError(f"out and {'newest' if out is newest else 'now'} are one tensor, expected two")
    _prediction_blend(out, ring, newest, now, coefficients, fresh)
