"""What an op is, and the table of all ops.

A file `_<name>.py` beside this one holds what is particular to an op, or to a closely tied pair: its description,
examples of its arguments, and the public function. The underscore keeps `fastercache.ops.ring_push` the function. Such
a file, a kernel in `triton_kernels/` (and one in `csrc/`), and a line in `__init__.py` make an op.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from fastercache.triton_kernels.coefficients import COEFFICIENT_COUNT

Arguments: TypeAlias = Iterator[tuple[Any, ...]]
"""Arguments of calls of an op, in the order of its schema."""


@dataclass(frozen=True)
class Sizes:
    """What decides which kernels a run calls.

    Args:
        device: on which the ops will be called.
        dtype: of the results that are stored, and of the denoiser's output.
        rings: channels of each kind of ring, and bits of a packed difference.
        planes: height and width of a prediction's planes, and the radius, for the ops on guidance.
        prediction: shape of a kept prediction.
        lines: of channels, in the arguments that `Op.examples` gives.
    """

    device: torch.device
    dtype: torch.dtype
    rings: tuple[tuple[int, int], ...] = ()
    planes: tuple[int, int, int] | None = None
    prediction: tuple[int, ...] | None = None
    lines: int = 16

    @property
    def channels(self) -> list[int]:
        return sorted({channels for channels, _ in self.rings})

    def zeros(self, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype or self.dtype, device=self.device)

    def coefficients(self) -> torch.Tensor:
        """Coefficients without taps."""
        return self.zeros(COEFFICIENT_COUNT, dtype=torch.float32)


@dataclass(frozen=True)
class Op:
    """One operation.

    Args:
        name: `fastercache::name` of torch's dispatcher, and of the public function.
        schema: the rest of the dispatcher's declaration.
        reference: the op in plain PyTorch.
        examples: arguments as a run has them for these sizes, but small where the size does not matter; none where a
            run with these sizes does not call the op.
        triton: launches its Triton kernel; None if it has none.
        cpp: whether `csrc/bindings/ops.cpp` serves it on the CPU.
        cuda: whether `csrc/cuda/` serves it.
        fallback: whether `reference` serves it where nothing faster does.
    """

    name: str
    schema: str
    reference: Callable[..., None]
    examples: Callable[[Sizes], Arguments]
    triton: Callable[..., None] | None = None
    cpp: bool = True
    cuda: bool = False
    fallback: bool = True


OPS: dict[str, Op] = {}
"""By name, in the order in which they were defined; `fastercache.ops.dispatch.define` adds to it."""
