"""The coefficient row: everything a denoising step may change, in 16 contiguous float32 values on the device.

Kernels read the row with loads. A coefficient or slot passed as a Python number would instead be compiled into the graph, one graph per
value, and frozen into a CUDA graph. `csrc/row_layout.h` is the same list for C++, and a test compares the two.
"""

from enum import IntEnum

MAX_TAPS = 4
ROW_SIZE = 16  # 64 bytes, one half of a cache line; [12:16] are reserved and 0


class Row(IntEnum):
    """Index of each field in a row."""

    COEFFICIENT = 0  # [0:4] coefficient of each tap, newest first; 0 for unused taps
    READ_SLOT = 4  # [4:8] ring slot each tap is read from; any valid slot for unused taps
    WRITE_SLOT = 8  # ring slot a push writes
    LOW = 9  # weight of the low-frequency CFG map
    HIGH = 10  # weight of the high-frequency CFG map
    TAPS = 11  # number of taps in use, 0 to MAX_TAPS
