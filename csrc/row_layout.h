// The coefficient row: ROW_SIZE contiguous float32 values that hold everything a step may change.
// triton_kernels/row.py is the same list for Python; tests/ops/test_row.py compares the two.
#pragma once

constexpr int ROW_COEFFICIENT = 0;  // [0:4] coefficient of each tap, newest first
constexpr int ROW_READ_SLOT = 4;    // [4:8] ring slot each tap is read from
constexpr int ROW_WRITE_SLOT = 8;   // ring slot a push writes
constexpr int ROW_LOW = 9;          // weight of the low-frequency CFG map
constexpr int ROW_HIGH = 10;        // weight of the high-frequency CFG map
constexpr int ROW_TAPS = 11;        // number of taps in use, 0 to MAX_TAPS
constexpr int ROW_SIZE = 16;        // [12:16] are reserved and 0
constexpr int MAX_TAPS = 4;
