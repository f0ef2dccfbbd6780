"""CFG split and reconstruction, each implementation against the paper's formula with a complex FFT in float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastercache.ops import map_dtype
from fastercache.triton_kernels.cfg_split import fft_cfg_split, fourier_basis, triton_cfg_split

from .helpers import (
    IMPLEMENTATIONS,
    assert_close,
    dtypes,
    few,
    generator,
    layouts,
    make_coefficients,
    nan,
    randn,
    seeds,
    shapes,
)

each_implementation = pytest.mark.parametrize("ops", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS.keys())


def low_band(height, width, radius):
    """Mask of the disc after fftshift, where frequency 0 lies at n // 2."""
    ky, kx = (torch.arange(n) - n // 2 for n in (height, width))
    return ky[:, None] ** 2 + kx**2 <= radius**2


def spectrum(x):
    return torch.fft.fftshift(torch.fft.fft2(x.double()), dim=(-2, -1))


def plane(x):
    return torch.fft.ifft2(torch.fft.ifftshift(x, dim=(-2, -1)))


def paper(uncond, cond, later, radius, w_low, w_high):
    """Eq. 6-11 as the paper writes them: deltas of the two bands at a full step, then the rebuilt branch at a later
    step."""
    mask = low_band(*uncond.shape[-2:], radius)
    delta = spectrum(uncond) - spectrum(cond)
    now = spectrum(later)
    rebuilt = plane(mask * now + w_low * (mask * delta) + ~mask * now + w_high * (~mask * delta))
    assert rebuilt.imag.abs().max() < 1e-12  # the disc is symmetric: real planes stay real
    return rebuilt.real


@each_implementation
@pytest.mark.parametrize(
    "height,width", [(60, 90), (45, 80), (32, 32), (31, 37), (16, 7), (5, 8), (1, 1), (1, 6), (130, 20)]
)
@pytest.mark.parametrize("cond_half", [0, 1])
def test_split_and_reconstruct_are_the_papers_formula(ops, height, width, cond_half):
    radius = min(height, width) // 5
    rng = generator(height * width)
    uncond, cond, later = (randn([2, 3, height, width], torch.float64, rng) for _ in range(3))
    low, high, out = nan(cond.shape, cond.dtype), nan(cond.shape, cond.dtype), nan([4, 3, height, width], cond.dtype)
    ops.cfg_split(low, high, uncond, cond, radius)
    ops.cfg_reconstruct(out, later, low, high, make_coefficients(low=1.25, high=1.0), cond_half)
    halves = out.chunk(2)
    assert torch.equal(halves[cond_half], later)
    assert (halves[1 - cond_half] - paper(uncond, cond, later, radius, 1.25, 1.0)).abs().max() <= 1e-12


@each_implementation
@few
@given(
    leading=st.lists(st.integers(1, 3), max_size=2),
    height=st.integers(1, 19),
    width=st.integers(1, 19),
    fraction=st.floats(0, 1),
    dtype=dtypes,
    first=layouts,
    second=layouts,
    seed=seeds,
)
def test_split(ops, leading, height, width, fraction, dtype, first, second, seed):
    shape = [*leading, height, width]
    radius = round(fraction * ((min(height, width) - 1) // 2))
    rng = generator(seed)
    uncond, cond = randn(shape, dtype, rng, first), randn(shape, dtype, rng, second)
    low, high = nan(shape, map_dtype(dtype)), nan(shape, map_dtype(dtype))
    ops.cfg_split(low, high, uncond, cond, radius)
    difference = uncond.double() - cond.double()
    exact = plane(spectrum(difference) * low_band(height, width, radius)).real
    # Orthonormal products neither grow nor shrink a plane: its root of the sum of squares bounds what each element can
    # lose.
    magnitude = difference.square().sum((-2, -1), keepdim=True).sqrt().expand(shape)
    assert_close(low, exact, magnitude)
    assert_close(high, difference - exact, magnitude)


@each_implementation
@pytest.mark.parametrize("height,width", [(60, 90), (128, 128)])
def test_split_of_a_whole_latent_is_accurate_to_float32(ops, height, width):
    rng = generator(0)
    uncond, cond = (randn([2, height, width], torch.bfloat16, rng) for _ in range(2))
    low, high = nan(cond.shape, torch.float32), nan(cond.shape, torch.float32)
    radius = min(height, width) // 5
    ops.cfg_split(low, high, uncond, cond, radius)
    exact = plane(spectrum(uncond.double() - cond.double()) * low_band(height, width, radius)).real
    assert (low - exact).abs().max() <= 16 * torch.finfo(torch.float32).eps * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "height,width,radius", [(130, 200, 26), (129, 257, 25), (257, 130, 13), (96, 100, 40), (3, 5, 1), (4, 4, 0)]
)
def test_split_by_fourier_transforms_is_accurate_to_float32(height, width, radius, dtype):
    """Odd and even sides, and the cutoffs beyond the kernel's."""
    rng = generator(height)
    uncond, cond = (randn([2, height, width], dtype, rng) for _ in range(2))
    low, high = nan(cond.shape, torch.float32), nan(cond.shape, torch.float32)
    fft_cfg_split(low, high, uncond, cond, radius)
    difference = uncond.double() - cond.double()
    exact = plane(spectrum(difference) * low_band(height, width, radius)).real
    tolerance = 16 * torch.finfo(torch.float32).eps * difference.abs().max()
    assert (low - exact).abs().max() <= tolerance
    assert (high - (difference - exact)).abs().max() <= tolerance


@pytest.mark.skipif("triton" not in IMPLEMENTATIONS, reason="Triton cannot be imported")
@pytest.mark.parametrize(
    "height,width,radius,dtype", [(129, 16, 3, torch.float32), (80, 90, 32, torch.float16), (16, 16, 3, torch.float64)]
)
def test_what_the_kernel_is_not_made_for_goes_to_fourier_transforms(height, width, radius, dtype):
    rng = generator(0)
    uncond, cond = (randn([2, height, width], dtype, rng) for _ in range(2))
    ours, theirs = ([nan(cond.shape, map_dtype(dtype)) for _ in range(2)] for _ in range(2))
    triton_cfg_split(*ours, uncond, cond, radius)
    fft_cfg_split(*theirs, uncond, cond, radius)
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


@each_implementation
def test_radius_zero_keeps_the_mean(ops):
    uncond, cond = randn([2, 6, 9], torch.float64, generator(0)), torch.zeros(2, 6, 9, dtype=torch.float64)
    low, high = torch.empty_like(cond), torch.empty_like(cond)
    ops.cfg_split(low, high, uncond, cond, 0)
    assert (low - uncond.mean((-2, -1), keepdim=True)).abs().max() < 1e-14


@each_implementation
@few
@given(shape=shapes, dtype=dtypes, layout=layouts, in_place=st.booleans(), cond_half=st.integers(0, 1), seed=seeds)
def test_reconstruct(ops, shape, dtype, layout, in_place, cond_half, seed):
    rng = generator(seed)
    cond = randn(shape, dtype, rng, layout)
    low, high = (randn(shape, map_dtype(dtype), rng) for _ in range(2))
    out = nan([2 * shape[0], *shape[1:]], dtype)
    expected = cond.clone()
    if in_place:
        half = out.chunk(2)[cond_half]
        half.copy_(cond)
        cond = half
    coefficients = make_coefficients(low=1.2, high=0.7)
    ops.cfg_reconstruct(out, cond, low, high, coefficients, cond_half)
    halves = out.chunk(2)
    assert torch.equal(halves[cond_half], expected)
    terms = [expected.double(), coefficients[9].double() * low.double(), coefficients[10].double() * high.double()]
    assert_close(halves[1 - cond_half], sum(terms), sum(term.abs() for term in terms))


@each_implementation
@few
@given(shape=shapes, dtype=dtypes, layout=layouts, in_place=st.booleans(), cond_half=st.integers(0, 1), seed=seeds)
def test_reconstruct_with_a_third_map(ops, shape, dtype, layout, in_place, cond_half, seed):
    rng = generator(seed)
    cond = randn(shape, dtype, rng, layout)
    low, high, previous = (randn(shape, map_dtype(dtype), rng) for _ in range(3))
    coefficients = make_coefficients(low=1.2, high=0.7, previous=-0.4)
    out = nan([2 * shape[0], *shape[1:]], dtype)
    source = cond
    if in_place:
        source = out.chunk(2)[cond_half]
        source.copy_(cond)
    ops.cfg_reconstruct(out, source, low, high, coefficients, cond_half, previous)
    halves = out.chunk(2)
    assert torch.equal(halves[cond_half], cond)
    terms = [
        coefficients[9].double() * low.double(),
        coefficients[10].double() * high.double(),
        coefficients[14].double() * previous.double(),
    ]
    magnitude = sum(term.abs() for term in terms)
    assert_close(halves[1 - cond_half], cond.double() + sum(terms), cond.double().abs() + magnitude)


@each_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_third_map_without_weight_may_hold_anything(ops, dtype):
    rng = generator(0)
    cond, previous = randn([3, 41], dtype, rng), nan([3, 41], map_dtype(dtype))
    low, high = (randn([3, 41], map_dtype(dtype), rng) for _ in range(2))
    coefficients = make_coefficients(low=1.2, high=0.7, previous=0.0)
    two, three = nan([6, 41], dtype), nan([6, 41], dtype)
    ops.cfg_reconstruct(two, cond, low, high, coefficients, 1)
    ops.cfg_reconstruct(three, cond, low, high, coefficients, 1, previous)
    assert torch.equal(two, three)


@pytest.mark.parametrize("n,radius", [(1, 0), (2, 0), (7, 3), (60, 12), (90, 12), (128, 63)])
def test_basis_is_orthonormal(n, radius):
    basis = fourier_basis(n, radius, torch.float64, torch.device("cpu"))
    assert (basis.T @ basis - torch.eye(2 * radius + 1, dtype=torch.float64)).abs().max() < 1e-14
    assert fourier_basis(n, radius, torch.float64, torch.device("cpu")) is basis
