"""Packed rings: each implementation against the format as it is described, with plain Python loops over float64."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastercache import ops
from fastercache.ops import PACKED_DTYPES, PackedLine

from .helpers import IMPLEMENTATIONS, assert_close, few, generator, layouts, make_coefficients, nan, randn, seeds

CPU = torch.device("cpu")
has_cpp = ops.packed_missing(CPU) is None
needs_cpp = pytest.mark.skipif(not has_cpp, reason="packed rings need the C++ library")
PUSHES = {
    name: one for name, one in IMPLEMENTATIONS.items() if hasattr(one, "packed_push") and (one is not ops or has_cpp)
}
BLENDS = {name: one for name, one in IMPLEMENTATIONS.items() if one is not ops or has_cpp}
each_push = pytest.mark.parametrize("push", PUSHES.values(), ids=PUSHES.keys())
each_blend = pytest.mark.parametrize("blend", BLENDS.values(), ids=BLENDS.keys())
REFERENCE = IMPLEMENTATIONS["reference"]

bits = st.sampled_from([0, 4, 8])
weights = st.just(0.0) | st.floats(
    2**-20, 1, width=32
)  # no subnormal products: the interpreter flushes those of bfloat16
shapes = st.tuples(
    st.sampled_from([1, 2, 3]), st.sampled_from([1, 5, 17]), st.sampled_from([1, 7, 31, 128, 129, 192, 260])
)


def codes_and_scales(ring: torch.Tensor, channels: int, bits: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Codes and scales of the newest output, then of the difference, read out of the bytes as csrc/packed_layout.h
    describes them."""
    layout, data = PackedLine(channels, bits), ring.numpy().reshape(-1, ring.shape[-1])

    def scales(begin: int) -> np.ndarray:
        return np.ascontiguousarray(data[:, begin : begin + 4 * layout.blocks]).view(np.float32).astype(np.float64)

    found = [(data[:, :channels].astype(np.int8).astype(np.int64), scales(layout.newest_scales))]
    if bits == 8:
        found.append(
            (
                data[:, layout.difference :][:, :channels].astype(np.int8).astype(np.int64),
                scales(layout.difference_scales),
            )
        )
    if bits == 4:
        pairs = data[:, layout.difference :][:, : (channels + 1) // 2]
        codes = np.stack([pairs & 15, pairs >> 4], -1).reshape(len(data), -1)[:, :channels].astype(np.int64)
        found.append((np.where(codes > 7, codes - 16, codes), scales(layout.difference_scales)))
    return found


def decoded(ring: torch.Tensor, channels: int, bits: int) -> list[torch.Tensor]:
    """Newest output and difference, float64 `[lines, channels]`."""
    return [
        torch.from_numpy(codes * np.repeat(scales, 128, axis=-1)[:, :channels])
        for codes, scales in codes_and_scales(ring, channels, bits)
    ]


def poisoned_ring(shape, bits: int) -> torch.Tensor:
    """A ring whose scales are NaN: nothing may be read from it before it is written."""
    return torch.full((*shape[:-1], PackedLine(shape[-1], bits).bytes), 255, dtype=torch.uint8)


def pushed(push, outputs, bits) -> torch.Tensor:
    ring = poisoned_ring(outputs[0].shape, bits)
    for x in outputs:
        push.packed_push(ring, x, bits)
    return ring


def two_outputs(shape, dtype, seed, layout="contiguous"):
    rng = generator(seed)
    return [randn(shape, dtype, rng, layout), randn(shape, dtype, rng, layout)]


@each_push
@few
@given(shape=shapes, bits=bits, dtype=st.sampled_from(PACKED_DTYPES), layout=layouts, seed=seeds)
def test_codes_are_the_nearest_ones(push, shape, bits, dtype, layout, seed):
    """Scales are the block's largest magnitude over the largest code, and no other code would be nearer."""
    before, newest = two_outputs(shape, dtype, seed, layout)
    ring = pushed(push, [before], bits)
    old = decoded(ring, shape[-1], bits)[0]
    push.packed_push(ring, newest, bits)
    targets = [newest.double().reshape(-1, shape[-1])]
    targets.append(targets[0] - old)
    for (codes, scales), target, largest in zip(
        codes_and_scales(ring, shape[-1], bits), targets, (127, 7 if bits == 4 else 127), strict=False
    ):
        assert np.abs(codes).max() == largest
        blocks = np.pad(np.abs(target.numpy()), ((0, 0), (0, -shape[-1] % 128))).reshape(len(codes), -1, 128)
        assert np.allclose(scales, blocks.max(-1) / largest, rtol=1e-6, atol=1e-7)
        steps = np.repeat(scales, 128, axis=-1)[:, : shape[-1]]
        error = np.abs(codes * steps - target.numpy())
        assert (error <= steps * (0.5 + 1e-4)).all()


@each_push
@few
@given(shape=shapes, bits=bits, dtype=st.sampled_from(PACKED_DTYPES), seed=seeds)
def test_every_push_writes_what_the_reference_does(push, shape, bits, dtype, seed):
    outputs = two_outputs(shape, dtype, seed)
    mine, theirs = pushed(push, outputs, bits), pushed(REFERENCE, outputs, bits)
    moved = 0.0  # how far the newest result of one may lie from the other's, from which the difference is taken
    for (codes, scales), (other_codes, other_scales) in zip(
        codes_and_scales(mine, shape[-1], bits), codes_and_scales(theirs, shape[-1], bits), strict=True
    ):
        # Of a small difference, which a fused multiply-add rounds less.
        assert np.allclose(scales, other_scales, rtol=1e-6, atol=1e-7 + moved)
        # A code halfway between two may fall either way; of values drawn at random hardly any is.
        moved = scales.max() / (7 if bits == 4 else 127) if (codes != other_codes).any() else 0.0
        assert np.abs(codes - other_codes).max() <= 1 and (codes != other_codes).sum() <= 1 + 0.01 * codes.size


@each_push
@few
@given(shape=shapes, bits=bits, dtype=st.sampled_from(PACKED_DTYPES), layout=layouts, entry_layout=layouts, seed=seeds)
def test_a_residual_push_is_a_push_of_the_difference(push, shape, bits, dtype, layout, entry_layout, seed):
    """Of `x - entry` in float32, unrounded: the same bytes as a push of that, but for codes half-way between two."""
    mine, theirs = poisoned_ring(shape, bits), poisoned_ring(shape, bits)
    for x, entry in zip(
        two_outputs(shape, dtype, seed, layout), two_outputs(shape, dtype, seed + 1, entry_layout), strict=True
    ):
        push.packed_push_residual(mine, x, entry, bits)
        push.packed_push(theirs, x.float() - entry.float(), bits)
    for (codes, scales), (other_codes, other_scales) in zip(
        codes_and_scales(mine, shape[-1], bits), codes_and_scales(theirs, shape[-1], bits), strict=True
    ):
        assert np.allclose(scales, other_scales, rtol=1e-6, atol=1e-7)
        assert np.abs(codes - other_codes).max() <= 1 and (codes != other_codes).sum() <= 1 + 0.01 * codes.size


@each_push
@few
@given(shape=shapes, bits=bits, dtype=st.sampled_from(PACKED_DTYPES), layout=layouts, seed=seeds)
def test_a_residual_is_stored_to_half_a_code(push, shape, bits, dtype, layout, seed):
    rng = generator(seed)
    x, entry = randn(shape, dtype, rng), randn(shape, dtype, rng, layout)
    ring = poisoned_ring(shape, bits)
    push.packed_push_residual(ring, x, entry, bits)
    exact = (x.double() - entry.double()).reshape(-1, shape[-1]).numpy()
    codes, scales = codes_and_scales(ring, shape[-1], bits)[0]
    steps = np.repeat(scales, 128, axis=-1)[:, : shape[-1]]
    assert (np.abs(codes * steps - exact) <= steps * (0.5 + 1e-4)).all()


@each_blend
@few
@given(shape=shapes, bits=bits, dtype=st.sampled_from(PACKED_DTYPES), w=weights, seed=seeds)
def test_blend(blend, shape, bits, dtype, w, seed):
    ring = pushed(REFERENCE, two_outputs(shape, dtype, seed), bits)
    weights = [1 + w, -w] if bits else [1 + w]
    coefficients = make_coefficients(weights)
    first, second = coefficients[0].double(), coefficients[1].double() if bits else 0.0
    parts = decoded(ring, shape[-1], bits)
    terms = [(first + second) * parts[0]] + ([-second * parts[1]] if bits else [])
    exact, magnitude = sum(terms).reshape(shape), sum(term.abs() for term in terms).reshape(shape)
    out = blend.packed_blend(ring, coefficients, nan(shape, dtype), bits)
    assert_close(out, exact, magnitude)

    x, gate = (
        randn(shape, dtype, generator(seed + 1)),
        randn((shape[0], 1, shape[-1]), torch.float32, generator(seed + 2)),
    )
    expected, size = x.double() + gate.double() * exact, x.double().abs() + gate.double().abs() * magnitude
    blend.packed_blend_add(x, gate, ring, coefficients, bits)
    assert_close(x, expected, size)


@each_blend
@pytest.mark.parametrize("bits", [4, 8])
def test_one_tap_leaves_the_difference_unread(blend, bits):
    """After a first push the difference is to bytes that nobody wrote."""
    x = randn((3, 130), torch.float32, generator(0))
    ring = pushed(REFERENCE, [x], bits)
    out = blend.packed_blend(ring, make_coefficients([1.0]), nan((3, 130), torch.float32), bits)
    assert (out - x).abs().max() <= x.abs().max() / 127


@each_push
@pytest.mark.parametrize("bits", [0, 4, 8])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_poisons_its_block_alone(push, bits, bad):
    x = randn((2, 300), torch.float32, generator(0))
    x[1, 140] = bad
    ring = pushed(push, [x], bits)
    out = REFERENCE.packed_blend(ring, make_coefficients([1.0]), nan((2, 300), torch.float32), bits)
    assert out[1, 128:256].isnan().all()
    assert out.isnan().sum() == 128
    # The next push replaces it; only the difference, which was taken to it, is lost once more.
    push.packed_push(ring, x.nan_to_num(0, 0, 0), bits)
    assert REFERENCE.packed_blend(ring, make_coefficients([1.0]), nan((2, 300), torch.float32), bits).isfinite().all()


@each_push
@pytest.mark.parametrize("bits", [0, 4, 8])
def test_zeros_and_tiny_values(push, bits):
    x = torch.zeros(1, 256)
    x[0, :128] = 1e-38
    ring = pushed(push, [x, x], bits)
    out = REFERENCE.packed_blend(
        ring, make_coefficients([2.0, -1.0] if bits else [1.0]), nan((1, 256), torch.float32), bits
    )
    assert (out.abs() <= 1e-37).all()


@needs_cpp
def test_a_branch_of_a_ring_is_pushed_alone():
    """Rows of one branch are a narrowed view of dimension 0; the others stay as they were."""
    x = randn((4, 3, 20), torch.bfloat16, generator(0))
    ring = pushed(ops, [x, x], 8)
    before = ring.clone()
    ops.packed_push(ring[2:], x[2:] * 2, 8)
    assert torch.equal(ring[:2], before[:2]) and not torch.equal(ring[2:], before[2:])


@pytest.mark.parametrize("channels", [1152, 1920, 3072])
def test_bytes_a_cached_branch_takes(channels):
    """Against two slots in bfloat16, at the widths of Open-Sora 1.2 and Latte, CogVideoX-2B and HunyuanVideo."""
    slots = 2 * 2 * channels
    assert PackedLine(channels, 8).bytes / slots <= 0.52
    assert PackedLine(channels, 4).bytes / slots <= 0.40


def test_header_and_python_agree():
    """The numbers of csrc/packed_layout.h, and its layout as the extension gives it."""
    header = (Path(__file__).parents[2] / "csrc" / "packed_layout.h").read_text()
    constants = {name: int(value) for name, value in re.findall(r"constexpr int (\w+) = (\d+);", header)}
    from fastercache.triton_kernels import packed

    assert constants == {"PACKED_BLOCK": packed.BLOCK, "PACKED_ALIGNMENT": packed.ALIGNMENT}
    layout = pytest.importorskip("fastercache._layout", exc_type=ImportError)
    for channels in (1, 2, 15, 16, 17, 127, 128, 129, 192, 1152, 1920):
        for bits in packed.BITS:
            mine, theirs = PackedLine(channels, bits), layout.PackedLine(channels, bits)
            for part in ("blocks", "difference", "newest_scales", "difference_scales", "bytes"):
                assert getattr(mine, part) == getattr(theirs, part), (channels, bits, part)


@pytest.mark.parametrize("wrong, message", [((0, 8), "channels is 0"), ((4, 3), "bits is 3, expected one of 0, 4, 8")])
def test_a_line_that_cannot_be(wrong, message):
    with pytest.raises(ValueError, match=message):
        PackedLine(*wrong)
