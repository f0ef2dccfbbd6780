"""The layout of the coefficients is written down twice, for Python and for C++: the two must agree."""

import re
from pathlib import Path

import pytest

from fastercache import ops


def test_header_and_python_agree() -> None:
    header = Path(__file__).parents[2] / "csrc" / "coefficient_layout.h"
    constants = {name: int(value) for name, value in re.findall(r"constexpr int (\w+) = (\d+);", header.read_text())}
    expected = {f"COEFFICIENT_{field.name}": int(field) for field in ops.Coefficient}
    assert constants == expected | {"COEFFICIENT_COUNT": ops.COEFFICIENT_COUNT, "MAX_TAPS": ops.MAX_TAPS}


def test_fields_do_not_overlap() -> None:
    width = dict.fromkeys(ops.Coefficient, 1) | {
        ops.Coefficient.OF_TAP: ops.MAX_TAPS,
        ops.Coefficient.READ_SLOT: ops.MAX_TAPS,
    }
    used = [int(field) + i for field in ops.Coefficient for i in range(width[field])]
    assert len(set(used)) == len(used) and max(used) < ops.COEFFICIENT_COUNT


def test_ring_layout() -> None:
    layout = pytest.importorskip("fastercache._layout", exc_type=ImportError)
    ring = layout.RingLayout(slots=3, lines=2, line_bytes=100)
    assert (ring.slot_stride_bytes, ring.bytes) == (256, 768)
    assert repr(ring) == "RingLayout(slots=3, lines=2, line_bytes=100, alignment=256)"
    tight = layout.RingLayout(slots=3, lines=2, line_bytes=100, alignment=1)
    assert (tight.slot_stride_bytes, tight.bytes) == (200, 600)
    for name, value in {"slots": 0, "lines": -1, "line_bytes": 2**62, "alignment": 3}.items():
        with pytest.raises(ValueError, match=f"{name} is {value}"):
            layout.RingLayout(**({"slots": 3, "lines": 2, "line_bytes": 100} | {name: value}))
