"""`RingLayout`: how many bytes a ring takes and how far apart its slots lie. The C++ class where it is built
(csrc/bindings/layout.cpp)."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["RingLayout"]


@dataclass(frozen=True)
class _RingLayout:
    """`slots` slots of `lines` lines of `line_bytes`, each slot aligned to `alignment` bytes; as the bound class,
    without its checks."""

    slots: int
    lines: int
    line_bytes: int
    alignment: int = 256

    @property
    def slot_stride_bytes(self) -> int:
        return -(-self.lines * self.line_bytes // self.alignment) * self.alignment

    @property
    def bytes(self) -> int:
        return self.slots * self.slot_stride_bytes


try:
    from fastercache._layout import RingLayout
except ImportError:
    RingLayout = _RingLayout  # type: ignore[assignment, misc]
