"""Blend: approximate a site's output from its last computed outputs, and optionally add it to the residual stream.

FasterCache's dynamic feature reuse (Eq. 5, `F = A + w (A - B)`), PAB's plain reuse (`F = A`) and TaylorSeer's
extrapolation are all one sum over the newest outputs ("taps"), newest first:

    blend = sum_k c_k ring[slot_k]          k < coefficients.TAPS, at most 4 taps
    x    += gate * blend                    (blend_add)

The kernels move far more bytes than they compute, so all that matters is to touch each byte once: PyTorch would write
and read back an intermediate tensor for each product and each sum; here they stay in registers, in float32, and are
rounded once. `blend_add` also saves writing the blend and reading it again.

A tap that is not in use is not loaded at all (its mask is false for every element): its slot may never have been
written.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ._triton import (
    BLOCK_SIZE,
    FUSED,
    MAX_TAPS,
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

CHUNK = 1 << 17
"""Elements that the reference on a CPU takes at a time: what it makes on the way, in float32, stays in the cache."""


def _sum_on_device(ring: torch.Tensor, coefficients: torch.Tensor, most_taps: int = TAP_COUNT) -> torch.Tensor:
    """The blend before rounding, by coefficients that stay on the device: reading them would stop the host until the
    GPU has caught up.

    A tap that is not in use reads the slot of the first one again, which costs no memory traffic where the loop is
    fused, and `where` drops it, NaN included.
    """
    dtype = compute_dtype(ring.dtype)
    taps, first = coefficients[Coefficient.TAPS], coefficients[Coefficient.READ_SLOT]
    total = torch.zeros((), dtype=dtype, device=ring.device)
    for k in range(most_taps):
        used = taps > k
        slot = torch.where(used, coefficients[Coefficient.READ_SLOT + k], first).long()
        term = coefficients[Coefficient.OF_TAP + k].to(dtype) * ring.index_select(0, slot.reshape(1))[0].to(dtype)
        total = total + torch.where(used, term, 0)
    return total


def plain_ring_blend(ring: torch.Tensor, coefficients: torch.Tensor) -> torch.Tensor:
    """`fastercache.ops.ring_blend` in plain operations, which Inductor fuses into what reads the result: no write and
    read of it.

    The coefficients must name no slot twice, as a schedule's never does: no more taps are looked at than the ring has
    slots.
    """
    return _sum_on_device(ring, coefficients, min(TAP_COUNT, ring.shape[0])).to(ring.dtype)


def _taps_on_host(ring: torch.Tensor, coefficients: torch.Tensor) -> list[tuple[float, torch.Tensor]]:
    """Coefficient and slot of each tap in use, of coefficients in the host's memory."""
    values = coefficients.tolist()
    count = values[Coefficient.TAPS]
    if not 0 <= count <= TAP_COUNT:
        raise RuntimeError(f"the coefficients use {count:g} taps, at most {TAP_COUNT}")
    taps = []
    for k in range(int(count)):
        slot = values[Coefficient.READ_SLOT + k]
        if not 0 <= slot < ring.shape[0]:
            raise IndexError(
                f"the coefficients name ring slot {slot:g}, which is out of range: the ring has {ring.shape[0]}"
            )
        taps.append((values[Coefficient.OF_TAP + k], ring[int(slot)]))
    return taps


def _chunks(shape: torch.Size) -> Iterator[tuple[int, int, int]]:
    """A dimension, and where in it a chunk begins and how long it is, for chunks that cover a shape."""
    if shape.numel() <= CHUNK:
        yield 0, 0, shape[0] if shape else 1
        return
    dim = max(range(len(shape)), key=shape.__getitem__)
    length = max(1, CHUNK * shape[dim] // shape.numel())
    for begin in range(0, shape[dim], length):
        yield dim, begin, min(length, shape[dim] - begin)


class _Buffers:
    """Room for a chunk in the type to compute in, made once for a call. A chunk that has this type already needs none
    to be read."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = compute_dtype(dtype)
        self._made: dict[str, torch.Tensor] = {}

    def like(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name not in self._made or self._made[name].shape != tensor.shape:
            self._made[name] = torch.empty(tensor.shape, dtype=self.dtype, device=tensor.device)
        return self._made[name]

    def widened(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if tensor.dtype == self.dtype else self.like(name, tensor).copy_(tensor)


def _is_lerp(taps: list[tuple[float, torch.Tensor]], compute: torch.dtype) -> bool:
    """Whether the sum is an interpolation, as those of Eq. 5 are: two coefficients that add up to 1 but for the
    rounding of float32."""
    return (
        len(taps) == 2
        and compute == torch.float32
        and abs(taps[0][0] + taps[1][0] - 1) <= torch.finfo(torch.float32).eps
    )


def _sum_of_chunk(total: torch.Tensor, taps: list[tuple[float, torch.Tensor]], buffers: _Buffers) -> torch.Tensor:
    """Writes the sum over the taps of a chunk to `total`, which has the type to compute in."""
    if not taps:
        return total.zero_()
    if _is_lerp(taps, total.dtype):
        (_, newest), (weight, older) = taps
        if newest.dtype == total.dtype:
            return torch.lerp(newest, older, weight, out=total)
        return total.copy_(newest).lerp_(buffers.widened("read", older), weight)
    for k, (coefficient, slot) in enumerate(taps):
        if k > 0:
            total.add_(buffers.widened("read", slot), alpha=coefficient)
        elif slot.dtype == total.dtype:
            torch.mul(slot, coefficient, out=total)
        else:
            total.copy_(slot).mul_(coefficient)
    return total


def _narrowed(tensor: torch.Tensor, chunk: tuple[int, int, int]) -> torch.Tensor:
    return tensor.narrow(*chunk) if tensor.dim() else tensor


def reference_ring_blend(out: torch.Tensor, ring: torch.Tensor, coefficients: torch.Tensor) -> None:
    """The op in plain PyTorch; on the CPU in chunks, and only of the taps that the coefficients use."""
    if ring.device.type != "cpu":
        out.copy_(_sum_on_device(ring, coefficients))
        return
    taps, buffers = _taps_on_host(ring, coefficients), _Buffers(out.dtype)
    if len(taps) == 1 and taps[0][0] == 1:
        out.copy_(taps[0][1])
        return
    if _is_lerp(taps, buffers.dtype):  # in one pass, and in float32 within it
        (_, newest), (weight, older) = taps
        torch.lerp(newest, older, weight, out=out)
        return
    for chunk in _chunks(out.shape):
        part, parts = _narrowed(out, chunk), [(coefficient, _narrowed(slot, chunk)) for coefficient, slot in taps]
        if part.dtype == buffers.dtype:
            _sum_of_chunk(part, parts, buffers)
        else:
            part.copy_(_sum_of_chunk(buffers.like("total", part), parts, buffers))


def reference_ring_blend_add(
    x: torch.Tensor, gate: torch.Tensor, ring: torch.Tensor, coefficients: torch.Tensor
) -> None:
    """The op in plain PyTorch; on the CPU in chunks, and only of the taps that the coefficients use."""
    if ring.device.type != "cpu":
        dtype = compute_dtype(x.dtype)
        x.copy_(x.to(dtype) + gate.to(dtype) * _sum_on_device(ring, coefficients))
        return
    taps, buffers = _taps_on_host(ring, coefficients), _Buffers(x.dtype)
    if gate.numel() <= CHUNK:
        gate = gate.to(buffers.dtype)
    if x.dtype == buffers.dtype:  # nothing to round on the way
        for coefficient, slot in taps:
            x.addcmul_(gate.to(x.dtype), slot, value=coefficient)
        return
    gate = gate.reshape((1,) * (x.dim() - gate.dim()) + gate.shape)
    for chunk in _chunks(x.shape):
        part = _narrowed(x, chunk)
        total = _sum_of_chunk(
            buffers.like("total", part), [(coefficient, _narrowed(slot, chunk)) for coefficient, slot in taps], buffers
        )
        factor = buffers.widened("gate", gate if not gate.dim() or gate.shape[chunk[0]] == 1 else gate.narrow(*chunk))
        part.copy_(buffers.widened("read", part).addcmul_(factor, total))


@triton.jit
def weighted_sum(ring, coefficients, index, elements, slot_stride):
    """The blend at `index`, before rounding; 0 beyond `elements`."""
    taps = tl.load(coefficients + TAPS)
    total = tl.zeros(index.shape, tl.float32)
    for k in tl.static_range(MAX_TAPS):
        slot = tl.load(coefficients + READ_SLOT + k).to(tl.int64)
        coefficient = tl.where(taps > k, tl.load(coefficients + OF_TAP + k), 0.0)
        inside = index < tl.where(taps > k, elements, 0)  # nowhere, for a tap that is not in use
        value = tl.load(ring + slot * slot_stride + index, mask=inside, other=0.0)
        total = total + coefficient * widen(value)
    return total


@triton.jit
def ring_blend_kernel(out, ring, coefficients, elements, slot_stride, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    index = program_elements(BLOCK, WIDE)
    inside = index < elements
    total = weighted_sum(ring, coefficients, index, elements, slot_stride)
    tl.store(out + index, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def ring_blend_add_kernel(
    x,
    gate,
    ring,
    coefficients,
    elements,
    slot_stride,
    sizes,
    x_strides,
    gate_strides,
    BLOCK: tl.constexpr,
    WIDE: tl.constexpr,
):
    index = program_elements(BLOCK, WIDE)
    inside = index < elements
    total = weighted_sum(ring, coefficients, index, elements, slot_stride)
    x_pointers = x + strided_offset(index, sizes, x_strides)
    factor = tl.load(gate + strided_offset(index, sizes, gate_strides), mask=inside)
    value = widen(tl.load(x_pointers, mask=inside)) + widen(factor) * total
    tl.store(x_pointers, value.to(x.dtype.element_ty), mask=inside)


def triton_ring_blend(out: torch.Tensor, ring: torch.Tensor, coefficients: torch.Tensor) -> None:
    """Launches the kernel; arguments as in `fastercache.ops.ring_blend`, taken as valid."""
    if out.numel() == 0:
        return
    with on_device_of(ring):
        ring_blend_kernel[grid(out.numel())](
            out,
            ring,
            coefficients,
            out.numel(),
            ring.stride(0),
            BLOCK=BLOCK_SIZE,
            WIDE=needs_wide((out.numel(),), (1,)),
            **FUSED,
        )


def triton_ring_blend_add(x: torch.Tensor, gate: torch.Tensor, ring: torch.Tensor, coefficients: torch.Tensor) -> None:
    """Launches the kernel; arguments as in `fastercache.ops.ring_blend_add`, taken as valid."""
    if x.numel() == 0:
        return
    sizes, x_strides, gate_strides = collapse(x.shape, x.stride(), gate.expand(x.shape).stride())
    with on_device_of(ring):
        ring_blend_add_kernel[grid(x.numel())](
            x,
            gate,
            ring,
            coefficients,
            x.numel(),
            ring.stride(0),
            sizes,
            x_strides,
            gate_strides,
            BLOCK=BLOCK_SIZE,
            WIDE=needs_wide(sizes, x_strides, gate_strides),
            **FUSED,
        )


def bytes_moved(elements: int, itemsize: int, taps: int, gate_bytes: int | None = None) -> int:
    """Bytes a blend must move: each tap is read once and the result written once.

    With `gate_bytes` (the bytes of the gate) the model is that of blend_add, which also reads the gate and `x`.
    """
    if gate_bytes is None:
        return (taps + 1) * elements * itemsize
    return (taps + 2) * elements * itemsize + gate_bytes
