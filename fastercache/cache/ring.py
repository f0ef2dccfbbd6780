"""Rings: where the newest results of a site are kept, and what a cache format has to do with them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

import torch

from fastercache.schedule.branches import Branch


def half(tensor: torch.Tensor, which: int | None, dim: int = 0) -> torch.Tensor:
    """That half of a dimension, as a view; all of it for `None`."""
    if which is None:
        return tensor
    size = tensor.shape[dim] // 2
    return tensor.narrow(dim, which * size, size)


@lru_cache(maxsize=64)
def one(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The number 1 as a tensor `[1]`: the gate of a blend that is added as it is."""
    with torch.inference_mode(False), torch.no_grad():
        return torch.ones(1, dtype=dtype, device=device)


@dataclass(frozen=True)
class RingSpec:
    """What a ring is to hold: `slots` results of one tensor of a site, each of `shape`, for the rows of `branches`.

    site: its index in the model's tree.
    """

    site: int
    branches: tuple[Branch, ...]
    slots: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class Ring(ABC):
    """The newest results of one tensor of a site, kept in some format.

    `coefficients` is the float32 vector of `fastercache.triton_kernels.coefficients`, on the ring's device: which slot
    a push writes, which taps a blend sums. `which`: the half of the rows that a call is about, `None` for all of them.
        output_shape, dtype: of a blend of all rows.
    """

    output_shape: torch.Size
    dtype: torch.dtype

    @abstractmethod
    def push(self, x: torch.Tensor, coefficients: torch.Tensor, which: int | None) -> None:
        """Store `x` as the newest result."""

    def push_residual(
        self, x: torch.Tensor, entry: torch.Tensor, coefficients: torch.Tensor, which: int | None
    ) -> None:
        """Store `x - entry` as the newest result. A format that has an op for it makes no difference first."""
        self.push(x - entry, coefficients, which)

    @abstractmethod
    def blend(self, coefficients: torch.Tensor, which: int | None, out: torch.Tensor | None = None) -> torch.Tensor:
        """The weighted sum of the newest results, in `out` if it is given (contiguous), else in a new tensor."""

    def blend_add(self, x: torch.Tensor, coefficients: torch.Tensor, which: int | None) -> None:
        """Add the weighted sum to `x`, in place. A format that has an op for it makes no sum first."""
        x.add_(self.blend(coefficients, which))

    def new_output(self) -> torch.Tensor:
        """An uninitialised tensor for a blend of all rows."""
        return torch.empty(self.output_shape, dtype=self.dtype, device=next(iter(self.tensors())).device)

    @abstractmethod
    def tensors(self) -> Iterable[torch.Tensor]:
        """All that the ring keeps on the device."""


class CacheFormat(ABC):
    """A way to keep results. One is one file and one line in a registry (`fastercache.register_cache_format`).

    name: as users write it. ops: the prefix of the ops it calls, for the summary; "" if it calls none of
        `fastercache.ops`.
    """

    name: str
    ops: str = ""

    @abstractmethod
    def bytes(self, spec: RingSpec) -> int:
        """Bytes that a ring of this format takes, known before it is allocated."""

    @abstractmethod
    def allocate(self, spec: RingSpec, device: torch.device) -> Ring:
        """The ring, empty."""

    def bits(self, spec: RingSpec) -> int:
        """Bits of a packed difference, 0 where nothing is packed: what the ops on such a ring are prepared for."""
        return 0

    def refusal(self, spec: RingSpec, device: torch.device) -> str | None:
        """Why such a ring cannot be kept in this format, or `None`."""
        return None
