"""Prediction blend: stand in for a whole call of the denoiser, or correct a fresh one.

Along a sampler's path a denoiser's prediction is well approximated by a weighted sum of what is at hand: its last
predictions, the latents now, and the latents at the newest of those predictions. The weights are calibrated once for a
schedule:

    out = sum_k c_k ring[slot_k] + c_now now + c_newest newest (+ c_fresh fresh)          k < coefficients.TAPS, at most
    4 taps

The kernel is `ring_blend` with more tensors, two of which may have any strides: a sampler's latents and a denoiser's
prediction are as their code leaves them. As there, a term whose coefficient is 0 is not loaded at all: before the first
prediction is cached, `newest` may never have been written.
"""

from __future__ import annotations

import torch

from ._triton import (
    BLOCK_SIZE,
    FRESH,
    FUSED,
    MAX_TAPS,
    NEWEST,
    NOW,
    OF_TAP,
    READ_SLOT,
    TAPS,
    collapse,
    compute_dtype,
    grid,
    needs_wide,
    on_device_of,
    program_elements,
    strided_offset,
    tl,
    triton,
    widen,
)
from .coefficients import MAX_TAPS as TAP_COUNT
from .coefficients import Coefficient


def reference_prediction_blend(
    out: torch.Tensor,
    ring: torch.Tensor,
    newest: torch.Tensor,
    now: torch.Tensor,
    coefficients: torch.Tensor,
    fresh: torch.Tensor | None = None,
) -> None:
    """The op in plain PyTorch. Every slot index is read, to stay on the device; `where` drops what unused terms hold,
    NaN included."""
    dtype = compute_dtype(ring.dtype)
    taps = [
        ring.index_select(0, coefficients[Coefficient.READ_SLOT + k : Coefficient.READ_SLOT + k + 1].long())[0]
        for k in range(TAP_COUNT)
    ]
    weights = [
        torch.where(k < coefficients[Coefficient.TAPS], coefficients[Coefficient.OF_TAP + k], 0)
        for k in range(TAP_COUNT)
    ]
    given = [
        (coefficients[Coefficient.NOW], now),
        (coefficients[Coefficient.NEWEST], newest),
        *([] if fresh is None else [(coefficients[Coefficient.FRESH], fresh)]),
    ]
    total = torch.zeros(ring.shape[1:], dtype=dtype, device=ring.device)
    for coefficient, value in (*zip(weights, taps, strict=True), *given):
        total += torch.where(coefficient != 0, coefficient.to(dtype) * value.to(dtype), 0)
    out.copy_(total)


@triton.jit
def weighted_term(coefficient, values, offset, index, elements):
    """`coefficient` times the elements at `offset`; 0 beyond `elements`, and nothing is loaded where the coefficient is
    0."""
    inside = index < tl.where(coefficient != 0, elements, 0)
    return coefficient * widen(tl.load(values + offset, mask=inside, other=0.0))


@triton.jit
def prediction_blend_kernel(
    out,
    ring,
    newest,
    now,
    fresh,
    coefficients,
    elements,
    slot_stride,
    sizes,
    now_strides,
    fresh_strides,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    index = program_elements(BLOCK, WIDE)
    taps = tl.load(coefficients + TAPS)
    total = tl.zeros(index.shape, tl.float32)
    for k in tl.static_range(MAX_TAPS):
        slot = tl.load(coefficients + READ_SLOT + k).to(tl.int64)
        coefficient = tl.where(taps > k, tl.load(coefficients + OF_TAP + k), 0.0)
        total = total + weighted_term(coefficient, ring + slot * slot_stride, index, index, elements)
    total = total + weighted_term(
        tl.load(coefficients + NOW), now, strided_offset(index, sizes, now_strides), index, elements
    )
    total = total + weighted_term(tl.load(coefficients + NEWEST), newest, index, index, elements)
    if fresh is not None:
        total = total + weighted_term(
            tl.load(coefficients + FRESH), fresh, strided_offset(index, sizes, fresh_strides), index, elements
        )
    tl.store(out + index, total.to(out.dtype.element_ty), mask=index < elements)


def triton_prediction_blend(
    out: torch.Tensor,
    ring: torch.Tensor,
    newest: torch.Tensor,
    now: torch.Tensor,
    coefficients: torch.Tensor,
    fresh: torch.Tensor | None = None,
) -> None:
    """Launches the kernel; arguments as in `fastercache.ops.prediction_blend`, taken as valid."""
    if out.numel() == 0:
        return
    sizes, now_strides, fresh_strides = collapse(out.shape, now.stride(), (now if fresh is None else fresh).stride())
    with on_device_of(ring):
        prediction_blend_kernel[grid(out.numel())](
            out,
            ring,
            newest,
            now,
            fresh,
            coefficients,
            out.numel(),
            ring.stride(0),
            sizes,
            now_strides,
            fresh_strides,
            BLOCK=BLOCK_SIZE,
            **FUSED,
            WIDE=needs_wide(sizes, now_strides, fresh_strides),
        )


def bytes_moved(elements: int, itemsize: int, terms: int) -> int:
    """Bytes a blend of `terms` tensors must move: each is read once and the result written once."""
    return (terms + 1) * elements * itemsize
