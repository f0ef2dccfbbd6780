"""Packed rings: a site's two taps in 8 or 12 bits an element, where two bfloat16 slots take 32.

A packed ring is one uint8 tensor `[*shape[:-1], line bytes]`. For each line of channels it holds the newest output `A`
as int8 codes, the difference `D = A - B` to the output before it as int8 or int4 codes, and a float32 scale for every
128 codes of either. A difference of neighbouring steps is small, so its codes are spent where they matter. A push (in
CUDA C++, and here where that has no image for the device) works in place and needs no slot:

    D = quantize(x - dequantize(A)),   then   A = quantize(x)

(with `x - entry` in place of `x` where a block stores what it added to its residual stream, see `ring_push`), and a
blend of two taps reads each code once, because `c_0 A + c_1 B = (c_0 + c_1) A - c_1 D`:

    blend = (c_0 + c_1) scale_A code_A - c_1 scale_D code_D

The kernels give a program some lines of one block of 128 channels: a block has one scale of each kind, and codes that
lie side by side.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ._triton import FUSED, OF_TAP, TAPS, UNFUSED, collapse, on_device_of, strided_offset, tl, triton, widen
from .coefficients import Coefficient

BLOCK = 128
"""Channels that share a scale."""
ALIGNMENT = 16
"""Bytes: every part of a line begins where the widest load may."""
BITS = (0, 4, 8)
"""Of a difference's codes; 0 keeps no difference, which one tap needs none of."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

THREADS = 128  # of a program


def _aligned(size: int) -> int:
    return (size + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


@dataclass(frozen=True)
class PackedLine:
    """Where the parts of a line lie, in bytes from its start; `csrc/packed_layout.h` is the same for C++ and CUDA.

    channels: elements of the line. bits: of a difference's codes, 0, 4 or 8. With 4, channels 2i and 2i + 1 are the low
    and the high half of byte i.
    """

    channels: int
    bits: int

    def __post_init__(self) -> None:
        if self.channels < 1:
            raise ValueError(f"channels is {self.channels}, expected at least 1")
        if self.bits not in BITS:
            raise ValueError(f"bits is {self.bits!r}, expected one of {', '.join(map(str, BITS))}")

    @property
    def blocks(self) -> int:
        return (self.channels + BLOCK - 1) // BLOCK

    @property
    def difference(self) -> int:
        return _aligned(self.channels)

    @property
    def newest_scales(self) -> int:
        return self.difference + _aligned((self.channels * self.bits + 7) // 8)

    @property
    def difference_scales(self) -> int:
        return self.newest_scales + 4 * self.blocks

    @property
    def bytes(self) -> int:
        scales = 4 * self.blocks * (2 if self.bits else 1)
        return _aligned(self.newest_scales + scales)


_LINE_BYTES: dict[tuple[int, int], int] = {}


def line_bytes(channels: int, bits: int) -> int:
    """`PackedLine(channels, bits).bytes`, looked up: the ops check every call, and a line takes 1 us to make."""
    if torch.compiler.is_compiling():
        return PackedLine(channels, bits).bytes
    found = _LINE_BYTES.get((channels, bits))
    return _LINE_BYTES.setdefault((channels, bits), PackedLine(channels, bits).bytes) if found is None else found


def _blocks(x: torch.Tensor) -> torch.Tensor:
    """`[..., channels]` as `[..., blocks, 128]`, the last block filled up with zeros."""
    missing = -x.shape[-1] % BLOCK
    return torch.nn.functional.pad(x, (0, missing)).unflatten(-1, (-1, BLOCK))


def _quantize(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (int8, `[..., channels]`) and scales (`[..., blocks]`) of float32 values; a value that is not finite makes
    its scale so."""
    largest_code = 7 if bits == 4 else 127
    blocks = _blocks(x)
    largest = blocks.abs().amax(-1)
    usable = (largest > 1e-30) & largest.isfinite()
    inverse = torch.where(usable, torch.full_like(largest, largest_code) / largest, 0).unsqueeze(
        -1
    )  # a number over a tensor rounds twice
    codes = torch.where(inverse > 0, blocks * inverse, 0).round().to(torch.int8)
    return codes.flatten(-2)[..., : x.shape[-1]], largest / largest_code


def _dequantize(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    return (_blocks(codes.float()) * scales.unsqueeze(-1)).flatten(-2)[..., : codes.shape[-1]]


def _scales(ring: torch.Tensor, begin: int, layout: PackedLine) -> torch.Tensor:
    return ring[..., begin : begin + 4 * layout.blocks].contiguous().view(torch.float32)


def _newest(ring: torch.Tensor, layout: PackedLine) -> torch.Tensor:
    return _dequantize(
        ring[..., : layout.channels].contiguous().view(torch.int8), _scales(ring, layout.newest_scales, layout)
    )


def _difference(ring: torch.Tensor, layout: PackedLine) -> torch.Tensor:
    if layout.bits == 8:
        codes = ring[..., layout.difference : layout.difference + layout.channels].contiguous().view(torch.int8)
    else:
        pairs = ring[..., layout.difference : layout.difference + (layout.channels + 1) // 2]
        codes = torch.stack((pairs & 0xF, pairs >> 4), -1).flatten(-2)[..., : layout.channels].to(torch.int8)
        codes = (codes ^ 8) - 8  # 4 bits, sign extended
    return _dequantize(codes, _scales(ring, layout.difference_scales, layout))


def reference_packed_push(ring: torch.Tensor, x: torch.Tensor, bits: int) -> None:
    """The op in plain PyTorch."""
    _push(ring, x.float(), bits)


def reference_packed_push_residual(ring: torch.Tensor, x: torch.Tensor, entry: torch.Tensor, bits: int) -> None:
    """The op in plain PyTorch."""
    _push(ring, x.float() - entry.float(), bits)


def _push(ring: torch.Tensor, value: torch.Tensor, bits: int) -> None:
    layout = PackedLine(value.shape[-1], bits)
    parts = []
    if bits:
        codes, scales = _quantize(value - _newest(ring, layout), bits)
        if bits == 4:
            even, odd = torch.nn.functional.pad(codes, (0, layout.channels % 2)).unflatten(-1, (-1, 2)).unbind(-1)
            codes = (even & 0xF) | (odd << 4)
        parts += [(layout.difference, codes), (layout.difference_scales, scales)]
    codes, scales = _quantize(value, 8)
    for begin, part in (*parts, (0, codes), (layout.newest_scales, scales)):
        stored = part.contiguous().view(torch.uint8)
        ring[..., begin : begin + stored.shape[-1]] = stored


def _reference_sum(ring: torch.Tensor, coefficients: torch.Tensor, channels: int, bits: int) -> torch.Tensor:
    layout = PackedLine(channels, bits)
    first = torch.where(coefficients[Coefficient.TAPS] > 0, coefficients[Coefficient.OF_TAP], 0)
    second = torch.where(coefficients[Coefficient.TAPS] > 1, coefficients[Coefficient.OF_TAP + 1], 0)
    total = (first + second) * _newest(ring, layout)
    if bits:
        total = total - torch.where(coefficients[Coefficient.TAPS] > 1, second * _difference(ring, layout), 0)
    return total


def reference_packed_blend(out: torch.Tensor, ring: torch.Tensor, coefficients: torch.Tensor, bits: int) -> None:
    """The op in plain PyTorch."""
    out.copy_(_reference_sum(ring, coefficients, out.shape[-1], bits))


def reference_packed_blend_add(
    x: torch.Tensor, gate: torch.Tensor, ring: torch.Tensor, coefficients: torch.Tensor, bits: int
) -> None:
    """The op in plain PyTorch."""
    x.copy_(x.float() + gate.float() * _reference_sum(ring, coefficients, x.shape[-1], bits))


@triton.jit
def program_tile(channels, LINES: tl.constexpr, BLOCK: tl.constexpr):
    """The program's lines, `[LINES, 1]`, and its block. Neighbouring programs take blocks that lie side by side in
    memory."""
    blocks = tl.cdiv(channels, BLOCK)
    program = tl.program_id(0)
    return (program // blocks).to(tl.int64) * LINES + tl.arange(0, LINES)[:, None], program % blocks


@triton.jit
def packed_sum(
    ring,
    coefficients,
    line,
    block,
    lines,
    channels,
    line_bytes,
    difference,
    newest_scales,
    difference_scales,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The blend of lines `line` (`[LINES, 1]`) in one block of channels, `[LINES, BLOCK]`; 0 beyond `lines`, anything
    beyond `channels`."""
    start = ring + line * line_bytes
    taps = tl.load(coefficients + TAPS)
    first = tl.where(taps > 0, tl.load(coefficients + OF_TAP), 0.0)
    second = tl.where(taps > 1, tl.load(coefficients + OF_TAP + 1), 0.0)

    channel = block * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside_line = line < lines
    codes = tl.load(start + channel, mask=inside_line & (channel < channels), other=0).to(tl.int8, bitcast=True)
    scale = tl.load((start + newest_scales).to(tl.pointer_type(tl.float32)) + block, mask=inside_line, other=0.0)
    total = ((first + second) * scale) * codes.to(tl.float32)
    if BITS > 0:
        wanted = line < tl.where(taps > 1, lines, 0)  # nowhere, for a lone tap: the difference may say nothing yet
        scale = tl.load((start + difference_scales).to(tl.pointer_type(tl.float32)) + block, mask=wanted, other=0.0)
        if BITS == 8:
            codes = tl.load(start + difference + channel, mask=wanted & (channel < channels), other=0).to(
                tl.int8, bitcast=True
            )
        else:
            pair = block * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
            # What fills up the part is read with it: a mask at the last channel would hide that codes lie side by side,
            # in 16 bytes.
            pairs = tl.load(start + difference + pair, mask=wanted & (pair < newest_scales - difference), other=0)
            low, high = (pairs & 0xF).to(tl.int32), (pairs >> 4).to(tl.int32)
            codes = tl.interleave((low ^ 8) - 8, (high ^ 8) - 8)  # 4 bits, sign extended
        total -= (second * scale) * codes.to(tl.float32)
    return total


@triton.jit
def packed_blend_kernel(
    out,
    ring,
    coefficients,
    lines,
    channels,
    line_bytes,
    difference,
    newest_scales,
    difference_scales,
    BITS: tl.constexpr,
    LINES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    line, block = program_tile(channels, LINES, BLOCK)
    total = packed_sum(
        ring,
        coefficients,
        line,
        block,
        lines,
        channels,
        line_bytes,
        difference,
        newest_scales,
        difference_scales,
        BITS,
        BLOCK,
    )
    channel = block * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(
        out + line * channels + channel, total.to(out.dtype.element_ty), mask=(line < lines) & (channel < channels)
    )


@triton.jit
def packed_blend_add_kernel(
    x,
    gate,
    ring,
    coefficients,
    lines,
    channels,
    line_bytes,
    difference,
    newest_scales,
    difference_scales,
    sizes,
    x_strides,
    gate_strides,
    gate_step,
    BITS: tl.constexpr,
    LINES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    line, block = program_tile(channels, LINES, BLOCK)
    total = packed_sum(
        ring,
        coefficients,
        line,
        block,
        lines,
        channels,
        line_bytes,
        difference,
        newest_scales,
        difference_scales,
        BITS,
        BLOCK,
    )
    channel = block * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = (line < lines) & (channel < channels)
    pointers = x + strided_offset(line, sizes, x_strides) + channel
    factor = tl.load(gate + strided_offset(line, sizes, gate_strides) + channel * gate_step, mask=inside)
    value = widen(tl.load(pointers, mask=inside)) + widen(factor) * total
    tl.store(pointers, value.to(x.dtype.element_ty), mask=inside)


@triton.jit
def quantized(values, largest_code):
    """Codes, int32, and scales of lines of a block, `[LINES, BLOCK]`, as `csrc/kernels/packed.h` makes them, byte for
    byte.

    Magnitudes are compared as bits, so that a NaN, whose bits exceed infinity's, is found. Adding 1.5 * 2**23 rounds to
    the nearest integer, ties to even, which the lowest bits then hold.
    """
    magnitude = tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1, keep_dims=True).to(
        tl.float32, bitcast=True
    )
    usable = (magnitude > 1e-30) & (magnitude <= 3.402823466e38)
    inverse = tl.where(usable, tl.div_rn(largest_code, tl.where(usable, magnitude, 1.0)), 0.0)
    scaled = tl.where(inverse > 0, values * inverse, 0.0)
    codes = (scaled + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
    return codes, tl.div_rn(magnitude, largest_code)


@triton.jit
def packed_push_kernel(
    ring,
    x,
    entry,
    lines,
    channels,
    line_bytes,
    difference,
    newest_scales,
    difference_scales,
    sizes,
    x_strides,
    entry_strides,
    x_step,
    entry_step,
    BITS: tl.constexpr,
    LINES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    line, block = program_tile(channels, LINES, BLOCK)
    channel = block * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside_line = line < lines
    inside = inside_line & (channel < channels)
    start = ring + line * line_bytes
    values = tl.load(x + strided_offset(line, sizes, x_strides) + channel * x_step, mask=inside, other=0.0).to(
        tl.float32
    )
    if entry is not None:
        before = tl.load(
            entry + strided_offset(line, sizes, entry_strides) + channel * entry_step, mask=inside, other=0.0
        )
        values -= before.to(tl.float32)
    newest_scale = (start + newest_scales).to(tl.pointer_type(tl.float32)) + block
    if BITS > 0:
        scale = tl.load(newest_scale, mask=inside_line, other=0.0)
        newest = tl.load(start + channel, mask=inside, other=0).to(tl.int8, bitcast=True).to(tl.float32)
        changes = tl.where(
            channel < channels, values - scale * newest, 0.0
        )  # a scale that is NaN says nothing of what fills up
        tl.debug_barrier()  # what one thread replaces below, another may have to read: a line's scale belongs to many
        codes, scale = quantized(changes, 7.0 if BITS == 4 else 127.0)
        tl.store((start + difference_scales).to(tl.pointer_type(tl.float32)) + block, scale, mask=inside_line)
        if BITS == 8:
            tl.store(start + difference + channel, codes.to(tl.uint8), mask=inside)
        else:
            low, high = tl.split(tl.reshape(codes, (LINES, BLOCK // 2, 2)))
            pair = block * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
            # What fills up the part is written with it, which nobody reads as codes: the store then has 16 bytes.
            pairs = ((low & 0xF) | (high << 4)).to(tl.uint8)
            tl.store(start + difference + pair, pairs, mask=inside_line & (pair < newest_scales - difference))
    codes, scale = quantized(values, 127.0)
    tl.store(newest_scale, scale, mask=inside_line)
    tl.store(start + channel, codes.to(tl.uint8), mask=inside)


def _launch_shape(tensor: torch.Tensor, bits: int) -> tuple[PackedLine, int, int, tuple[int]]:
    """The layout and number of lines, how many a program takes (a thread then has one 16-byte load of a difference's
    codes), the grid."""
    layout = PackedLine(tensor.shape[-1], bits)
    lines = tensor.numel() // layout.channels
    per_program = THREADS * (32 if bits == 4 else 16) // BLOCK
    return layout, lines, per_program, (triton.cdiv(lines, per_program) * layout.blocks,)


def triton_packed_push(ring: torch.Tensor, x: torch.Tensor, bits: int) -> None:
    """Launches the kernel; arguments as in `fastercache.ops.packed_push`, taken as valid."""
    _launch_push(ring, x, None, bits)


def triton_packed_push_residual(ring: torch.Tensor, x: torch.Tensor, entry: torch.Tensor, bits: int) -> None:
    """Launches the kernel; arguments as in `fastercache.ops.packed_push_residual`, taken as valid."""
    _launch_push(ring, x, entry, bits)


def _launch_push(ring: torch.Tensor, x: torch.Tensor, entry: torch.Tensor | None, bits: int) -> None:
    if x.numel() == 0:
        return
    layout, lines, per_program, grid = _launch_shape(x, bits)
    other = x if entry is None else entry
    sizes, x_strides, entry_strides = collapse(x.shape[:-1], x.stride()[:-1], other.stride()[:-1])
    with on_device_of(ring):
        packed_push_kernel[grid](
            ring,
            x,
            entry,
            lines,
            layout.channels,
            layout.bytes,
            layout.difference,
            layout.newest_scales,
            layout.difference_scales,
            sizes,
            x_strides,
            entry_strides,
            x.stride(-1),
            other.stride(-1),
            BITS=bits,
            LINES=per_program,
            BLOCK=BLOCK,
            num_warps=THREADS // 32,
            **UNFUSED,
        )


def triton_packed_blend(out: torch.Tensor, ring: torch.Tensor, coefficients: torch.Tensor, bits: int) -> None:
    """Launches the kernel; arguments as in `fastercache.ops.packed_blend`, taken as valid."""
    if out.numel() == 0:
        return
    layout, lines, per_program, grid = _launch_shape(out, bits)
    with on_device_of(out):
        packed_blend_kernel[grid](
            out,
            ring,
            coefficients,
            lines,
            layout.channels,
            layout.bytes,
            layout.difference,
            layout.newest_scales,
            layout.difference_scales,
            BITS=bits,
            LINES=per_program,
            BLOCK=BLOCK,
            num_warps=THREADS // 32,
            **FUSED,
        )


def triton_packed_blend_add(
    x: torch.Tensor, gate: torch.Tensor, ring: torch.Tensor, coefficients: torch.Tensor, bits: int
) -> None:
    """Launches the kernel; arguments as in `fastercache.ops.packed_blend_add`, taken as valid."""
    if x.numel() == 0:
        return
    layout, lines, per_program, grid = _launch_shape(x, bits)
    gate = gate.expand(x.shape)
    sizes, x_strides, gate_strides = collapse(x.shape[:-1], x.stride()[:-1], gate.stride()[:-1])
    with on_device_of(x):
        packed_blend_add_kernel[grid](
            x,
            gate,
            ring,
            coefficients,
            lines,
            layout.channels,
            layout.bytes,
            layout.difference,
            layout.newest_scales,
            layout.difference_scales,
            sizes,
            x_strides,
            gate_strides,
            gate.stride(-1),
            BITS=bits,
            LINES=per_program,
            BLOCK=BLOCK,
            num_warps=THREADS // 32,
            **FUSED,
        )


def push_bytes_moved(lines: int, channels: int, bits: int, itemsize: int, residual: bool = False) -> int:
    """Bytes a push must move: `x` is read, the line's newest codes and scales too (for the difference), and the whole
    line is written.

    Of a residual, `entry` is read as well.
    """
    layout = PackedLine(channels, bits)
    read = channels + 4 * layout.blocks if bits else 0
    return lines * ((2 if residual else 1) * channels * itemsize + read + layout.bytes)


def blend_bytes_moved(lines: int, channels: int, bits: int, itemsize: int, gate_bytes: int | None = None) -> int:
    """Bytes a blend must move: the line is read, the result written. With `gate_bytes`, blend_add's: the gate and `x`
    are read as well."""
    moved = lines * (PackedLine(channels, bits).bytes + channels * itemsize)
    return moved if gate_bytes is None else moved + lines * channels * itemsize + gate_bytes
