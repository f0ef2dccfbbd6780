"""The coefficients: everything a denoising step may change, in 16 contiguous float32 values on the device.

Kernels read them with loads. A coefficient or slot passed as a Python number would instead be compiled into the graph,
one graph per value, and frozen into a CUDA graph. `csrc/coefficient_layout.h` is the same list for C++, and a test
compares the two.
"""

from enum import IntEnum

MAX_TAPS = 4
COEFFICIENT_COUNT = 16  # 64 bytes, one half of a cache line


class Coefficient(IntEnum):
    """Index of each in the vector."""

    OF_TAP = 0  # [0:4] coefficient of each tap, newest first; 0 for unused taps
    READ_SLOT = 4  # [4:8] ring slot each tap is read from; any valid slot for unused taps
    WRITE_SLOT = 8  # ring slot a push writes
    LOW = 9  # weight of the low-frequency CFG map
    HIGH = 10  # weight of the high-frequency CFG map
    TAPS = 11  # number of taps in use, 0 to MAX_TAPS
    NOW = 12  # coefficient of the latents of this step
    NEWEST = 13  # coefficient of the latents at the newest cached prediction
    PREVIOUS = 14  # weight of the CFG difference before the newest one
    FRESH = 15  # coefficient of a fresh prediction
