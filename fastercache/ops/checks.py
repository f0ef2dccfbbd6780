"""What the public functions say of wrong arguments, shared by the ops.

The checks accept what is right in as few tensor attributes as they can, about 0.1 us each, and then look for what is
wrong: a run calls the ops some hundred times a step, and what they do may take less than 5 us.
"""

from __future__ import annotations

import torch

from fastercache.triton_kernels import _triton
from fastercache.triton_kernels.coefficients import COEFFICIENT_COUNT
from fastercache.triton_kernels.packed import ALIGNMENT, line_bytes
from fastercache.triton_kernels.packed import DTYPES as PACKED_DTYPES

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def map_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of `dtype` are computed and CFG maps are kept: float32, but float64 for float64."""
    return _triton.compute_dtype(dtype)


_ONE = torch.Size((1,))
_SHAPE_OF_COEFFICIENTS = torch.Size((COEFFICIENT_COUNT,))
_MAP_DTYPES = {dtype: map_dtype(dtype) for dtype in DTYPES}


def check_dtype(name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} has dtype {tensor.dtype}, expected one of {', '.join(str(dtype) for dtype in DTYPES)}")


def check_tensor(
    name: str, tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")
    if tensor.dtype != dtype:
        raise TypeError(f"{name} has dtype {tensor.dtype}, expected {dtype}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, expected {device}")


def check_contiguous(name: str, tensor: torch.Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(
            f"{name} has strides {list(tensor.stride())} for shape {list(tensor.shape)}, expected a contiguous tensor"
        )


def check_coefficients(coefficients: torch.Tensor, device: torch.device) -> None:
    if (
        coefficients.shape == _SHAPE_OF_COEFFICIENTS
        and coefficients.dtype is torch.float32
        and coefficients.device == device
        and coefficients.is_contiguous()
    ):
        return
    if coefficients.dim() != 1 or coefficients.shape[0] != COEFFICIENT_COUNT:
        raise ValueError(f"coefficients has shape {list(coefficients.shape)}, expected [{COEFFICIENT_COUNT}]")
    if coefficients.dtype != torch.float32:
        raise TypeError(f"coefficients has dtype {coefficients.dtype}, expected torch.float32")
    if coefficients.device != device:
        raise ValueError(f"coefficients is on {coefficients.device}, expected {device}")
    check_contiguous("coefficients", coefficients)


def check_ring(ring: torch.Tensor, coefficients: torch.Tensor) -> None:
    check_dtype("ring", ring)
    if ring.dim() < 1 or ring.shape[0] < 1:
        raise ValueError(f"ring has shape {list(ring.shape)}, expected [slots, ...] with at least one slot")
    if not ring.is_contiguous():
        check_slots(ring)
    check_coefficients(coefficients, ring.device)


def check_slots(ring: torch.Tensor) -> None:
    elements = 1
    for size, stride in zip(reversed(ring.shape[1:]), reversed(ring.stride()[1:]), strict=True):
        if size != 1 and stride != elements:
            raise ValueError(
                f"ring has strides {list(ring.stride())} for shape {list(ring.shape)}, expected each slot contiguous"
            )
        elements *= max(size, 1)  # torch counts an empty dimension as 1 in strides
    if ring.shape[0] > 1 and ring.stride(0) < elements:
        raise ValueError(
            f"ring has slots of {elements} elements {ring.stride(0)} apart, expected slots that do not overlap"
        )


def check_gated(x: torch.Tensor, gate: torch.Tensor) -> None:
    if not x.is_contiguous():
        if x.shape[-1] > 1 and x.stride(-1) != 1:
            raise ValueError(f"x has strides {list(x.stride())}, expected 1 in the last dimension")
        if any(size > 1 and stride == 0 for size, stride in zip(x.shape, x.stride(), strict=True)):
            raise ValueError(
                f"x has strides {list(x.stride())} for shape {list(x.shape)}, expected no broadcast dimension"
            )
    if gate.dtype is not torch.float32 and gate.dtype is not x.dtype:
        raise TypeError(f"gate has dtype {gate.dtype}, expected {x.dtype} or torch.float32")
    if gate.device != x.device:
        raise ValueError(f"gate is on {gate.device}, expected {x.device}")
    mine, sizes = gate.shape, x.shape
    if mine == sizes or (mine == _ONE and sizes):
        return
    missing = len(sizes) - len(mine)
    if missing < 0 or any(size not in (1, whole) for size, whole in zip(mine, sizes[missing:], strict=True)):
        raise ValueError(f"gate has shape {list(mine)}, expected one that broadcasts to x, {list(sizes)}")


def check_packed(ring: torch.Tensor, values: torch.Tensor, name: str, bits: int) -> None:
    if values.dtype not in PACKED_DTYPES:
        raise TypeError(
            f"{name} has dtype {values.dtype}, expected one of {', '.join(str(dtype) for dtype in PACKED_DTYPES)}"
        )
    shape = values.shape
    if not shape or shape[-1] < 1:
        raise ValueError(f"{name} has shape {list(shape)}, expected [..., channels] with at least one channel")
    check_tensor("ring", ring, (*shape[:-1], line_bytes(shape[-1], bits)), torch.uint8, values.device)
    # Dynamo does not trace the offset; the kernels check it again.
    if not torch.compiler.is_compiling() and ring.storage_offset() % ALIGNMENT:
        raise ValueError(
            f"ring begins {ring.storage_offset()} bytes into its storage, expected a multiple of {ALIGNMENT}"
        )
    check_contiguous("ring", ring)


def check_maps(
    low: torch.Tensor, high: torch.Tensor, shape: torch.Size, dtype: torch.dtype, device: torch.device
) -> None:
    """Of values of that shape, dtype and device."""
    kept = _MAP_DTYPES[dtype]
    if low is high:
        raise ValueError("low and high are one tensor, expected two")
    alike = low.shape == shape == high.shape and low.dtype is kept is high.dtype and low.device == device == high.device
    if alike and low.is_contiguous() and high.is_contiguous():
        return
    check_map("low", low, shape, dtype, device)
    check_map("high", high, shape, dtype, device)


def check_map(name: str, one: torch.Tensor, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> None:
    check_tensor(name, one, shape, _MAP_DTYPES[dtype], device)
    check_contiguous(name, one)


def check_radius(radius: int, height: int, width: int) -> None:
    if not isinstance(radius, int) or isinstance(radius, bool):
        raise TypeError(f"radius is {radius!r}, expected an int")
    if not 0 <= 2 * radius < min(height, width):
        raise ValueError(f"radius is {radius} for planes of {height} x {width}, expected 0 <= radius < min(H, W) / 2")
