"""CFG-Cache on a full step: split the difference of the two branches into low and high frequencies.

FasterCache keeps, for each H x W plane, the difference of the unconditional and the conditional output below and above
a cutoff (Eq. 6-8):

    d = uncond - cond,      low = P d,      high = d - low

where `P` keeps the Fourier modes with `ky^2 + kx^2 <= radius^2`. The disc is symmetric in ky and in kx, so `P` maps
real planes to real planes and no complex number is needed: take the orthonormal *real* Fourier basis `B_n` of n points
up to frequency r, n x (2r + 1), with

    1 / sqrt(n),   sqrt(2 / n) cos(2 pi k j / n),   sqrt(2 / n) sin(2 pi k j / n)        k = 1 .. r

as columns (column c has frequency (c + 1) // 2). Then, exactly,

    low = B_H (M * (B_H^T d B_W)) B_W^T          M = 1 where ky^2 + kx^2 <= r^2, else 0

as long as r < min(H, W) / 2. These are four small matrix products, and only (2r + 1)^2 of the H W modes are ever
computed.

The kernel gives one program a whole plane, and walks it twice in tiles: first to gather the spectrum, which is small
and stays in registers, then to subtract what it stands for. The second reading of a tile finds it in the cache.
`tl.dot` takes its operands through shared memory and registers, so the tiles bound both: 20 KiB, and at most 128
registers a thread, at 60 x 90 and radius 12. Two programs then fit a multiprocessor, and an H100 works on all 208
planes of CogVideoX's latent at once. `tl.dot` wants sizes that are powers of two and at least 16: tiles at the border,
and bases, are padded with zeros, which add nothing. `input_precision="ieee"` keeps the products in float32: the
default, TF32, has 10 bits of mantissa.

Larger planes, higher cutoffs and float64 go to torch.fft, which is cuFFT on CUDA: a program runs on one multiprocessor,
which is little for a plane that large.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch

from ._triton import FUSED, MISSING, collapse, compute_dtype, on_device_of, strided_offset, tl, triton

MAX_SIDE, MAX_RADIUS = 128, 31
STRIP = 32  # columns of a tile
BASIS_TILE = (
    2048  # elements of a basis in use at once, rows x modes; with 64 columns or twice as many rows, registers spill
)


@lru_cache(maxsize=64)  # a model has one latent size at a time: two bases for each
def fourier_basis(n: int, radius: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The orthonormal real Fourier basis of `n` points up to frequency `radius`, computed in float64.

    Returns:
        `[n, 2 * radius + 1]`, contiguous, of `dtype` on `device`; shared between callers and not to be written to.
    """
    with torch.inference_mode(False):  # the cache outlives the mode of whoever asks first
        columns = torch.arange(2 * radius + 1)
        # (k j) mod n is exact in integers: the angle then lies in [0, 2 pi) and loses nothing to argument reduction.
        angle = torch.outer(torch.arange(n), (columns + 1) // 2).remainder(n).double() * (2 * math.pi / n)
        basis = torch.where(columns % 2 == 1, angle.cos(), angle.sin()) * math.sqrt(2 / n)
        basis[:, 0] = 1 / math.sqrt(n)
        return basis.to(device=device, dtype=dtype)


@lru_cache(maxsize=64)
def has_float64(device: torch.device) -> bool:
    """Whether a device computes in float64; `mps`, and `xpu` of some kinds, do not."""
    if device.type in ("cpu", "cuda"):
        return True
    try:
        return bool((torch.ones((), dtype=torch.float64, device=device) + 1).item() == 2)
    except Exception:
        return False


def disc(radius: int, device: torch.device) -> torch.Tensor:
    """Which products of two basis columns lie inside the disc: bool `[2 * radius + 1, 2 * radius + 1]`, compared in
    exact integers."""
    frequency = (torch.arange(2 * radius + 1, device=device) + 1) // 2
    return frequency[:, None] ** 2 + frequency**2 <= radius**2


def reference_cfg_split(
    low: torch.Tensor, high: torch.Tensor, uncond: torch.Tensor, cond: torch.Tensor, radius: int
) -> None:
    """The op in plain PyTorch, projecting in float64 where the device has it: `allow_tf32`, which a user may set, would
    spoil float32."""
    difference = uncond.to(low.dtype) - cond.to(low.dtype)
    dtype = torch.float64 if has_float64(low.device) else torch.float32
    rows, columns = (fourier_basis(n, radius, dtype, low.device) for n in low.shape[-2:])
    spectrum = rows.T @ difference.to(dtype) @ columns
    low.copy_(rows @ (spectrum * disc(radius, low.device)) @ columns.T)
    torch.sub(difference, low, out=high)


def fft_cfg_split(low: torch.Tensor, high: torch.Tensor, uncond: torch.Tensor, cond: torch.Tensor, radius: int) -> None:
    """The op by Fourier transforms of real planes, in the dtype of the maps."""
    difference = uncond.to(low.dtype) - cond.to(low.dtype)
    height, width = low.shape[-2:]
    ky, kx = torch.arange(height, device=low.device), torch.arange(width // 2 + 1, device=low.device)
    ky = torch.minimum(ky, height - ky)  # the upper half stands for negative frequencies
    spectrum = torch.fft.rfft2(difference) * (ky[:, None] ** 2 + kx**2 <= radius**2)
    low.copy_(torch.fft.irfft2(spectrum, s=(height, width)))
    torch.sub(difference, low, out=high)


@triton.jit
def load_tile(uncond, cond, y, x, height, width, uncond_steps, cond_steps):
    """The difference of the branches at rows `y` and columns `x`, in float32 and 0 outside the plane."""
    inside = (y < height) & (x < width)
    left = tl.load(uncond + y * uncond_steps[0] + x * uncond_steps[1], mask=inside, other=0.0).to(tl.float32)
    right = tl.load(cond + y * cond_steps[0] + x * cond_steps[1], mask=inside, other=0.0).to(tl.float32)
    return left - right


@triton.jit
def load_basis(basis, point, points, mode, modes):
    """Rows `point` of a basis, 0 beyond its points and modes."""
    return tl.load(basis + point * modes + mode, mask=(point < points) & (mode < modes), other=0.0)


@triton.jit
def cfg_split_kernel(
    low,
    high,
    uncond,
    cond,
    basis_h,
    basis_w,
    height,
    width,
    radius,
    sizes,
    uncond_strides,
    cond_strides,
    uncond_steps,
    cond_steps,
    ROWS: tl.constexpr,
    MODES: tl.constexpr,
    STRIP: tl.constexpr,
):
    plane = tl.program_id(0).to(tl.int64)
    uncond += strided_offset(plane, sizes, uncond_strides)
    cond += strided_offset(plane, sizes, cond_strides)
    low += plane * height * width
    high += plane * height * width

    modes = 2 * radius + 1
    mode = tl.arange(0, MODES)[None, :]
    y = tl.arange(0, ROWS)[:, None]

    spectrum = tl.zeros((MODES, MODES), tl.float32)
    for left in range(0, width, STRIP):
        x = left + tl.arange(0, STRIP)[None, :]
        half = tl.zeros((MODES, STRIP), tl.float32)
        for top in range(0, height, ROWS):
            tile = load_tile(uncond, cond, top + y, x, height, width, uncond_steps, cond_steps)
            rows = load_basis(basis_h, top + y, height, mode, modes)  # [ROWS, MODES]
            half = tl.dot(tl.trans(rows), tile, half, input_precision="ieee")
        columns = load_basis(basis_w, tl.trans(x), width, mode, modes)  # [STRIP, MODES]
        spectrum = tl.dot(half, columns, spectrum, input_precision="ieee")

    frequency = (tl.arange(0, MODES) + 1) // 2
    keep = frequency[:, None] * frequency[:, None] + frequency[None, :] * frequency[None, :] <= radius * radius
    spectrum = tl.where(keep, spectrum, 0.0)

    for top in range(0, height, ROWS):
        rows = load_basis(basis_h, top + y, height, mode, modes)
        rebuilt = tl.dot(rows, spectrum, input_precision="ieee")  # [ROWS, MODES]
        for left in range(0, width, STRIP):
            x = left + tl.arange(0, STRIP)[None, :]
            tile = load_tile(uncond, cond, top + y, x, height, width, uncond_steps, cond_steps)
            columns = load_basis(basis_w, tl.trans(x), width, mode, modes)
            smooth = tl.dot(rebuilt, tl.trans(columns), input_precision="ieee")  # [ROWS, STRIP]
            out = (top + y) * width + x
            inside = (top + y < height) & (x < width)
            tl.store(low + out, smooth, mask=inside)
            tl.store(high + out, tile - smooth, mask=inside)


def fits_kernel(height: int, width: int, radius: int, dtype: torch.dtype) -> bool:
    """Whether the kernel serves planes of this size, cutoff and type; Fourier transforms serve the others."""
    return max(height, width) <= MAX_SIDE and radius <= MAX_RADIUS and compute_dtype(dtype) == torch.float32


def prepare(height: int, width: int, radius: int, dtype: torch.dtype, device: torch.device) -> None:
    """Fills the cache of bases for inputs of `dtype` on `device`, so that no later call allocates or uploads one."""
    triton_serves = device.type == "cuda" and MISSING is None
    if triton_serves and not fits_kernel(height, width, radius, dtype):
        return  # Fourier transforms need none
    for n in (height, width):
        fourier_basis(n, radius, torch.float32 if triton_serves or not has_float64(device) else torch.float64, device)


def triton_cfg_split(
    low: torch.Tensor, high: torch.Tensor, uncond: torch.Tensor, cond: torch.Tensor, radius: int
) -> None:
    """Launches the kernel; arguments as in `fastercache.ops.cfg_split`, taken as valid. What it is not made for goes to
    torch.fft."""
    if uncond.numel() == 0:
        return
    height, width = uncond.shape[-2:]
    if not fits_kernel(height, width, radius, uncond.dtype):
        return fft_cfg_split(low, high, uncond, cond, radius)
    sizes, uncond_strides, cond_strides = collapse(uncond.shape[:-2], uncond.stride()[:-2], cond.stride()[:-2])
    modes = max(16, triton.next_power_of_2(2 * radius + 1))
    with on_device_of(low):
        cfg_split_kernel[(uncond.numel() // (height * width),)](
            low,
            high,
            uncond,
            cond,
            fourier_basis(height, radius, torch.float32, low.device),
            fourier_basis(width, radius, torch.float32, low.device),
            height,
            width,
            radius,
            sizes,
            uncond_strides,
            cond_strides,
            uncond.stride()[-2:],
            cond.stride()[-2:],
            ROWS=max(16, min(triton.next_power_of_2(height), BASIS_TILE // modes)),
            MODES=modes,
            STRIP=STRIP,
            num_warps=8,
            **FUSED,
            # loading ahead would take up to three times the registers; other programs fill the time instead
            num_stages=1,
        )


def bytes_moved(elements: int, itemsize: int, map_itemsize: int = 4) -> int:
    """Bytes a split of `elements` elements must move: both branches are read once, both maps written once."""
    return elements * (2 * itemsize + 2 * map_itemsize)
