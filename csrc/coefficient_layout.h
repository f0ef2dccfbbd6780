// The coefficients: COEFFICIENT_COUNT contiguous float32 values that hold everything a step may change.
// triton_kernels/coefficients.py is the same list for Python; tests/ops/test_coefficients.py compares the two.
#pragma once

constexpr int COEFFICIENT_OF_TAP = 0;      // [0:4] coefficient of each tap, newest first
constexpr int COEFFICIENT_READ_SLOT = 4;   // [4:8] ring slot each tap is read from
constexpr int COEFFICIENT_WRITE_SLOT = 8;  // ring slot a push writes
constexpr int COEFFICIENT_LOW = 9;         // weight of the low-frequency CFG map
constexpr int COEFFICIENT_HIGH = 10;       // weight of the high-frequency CFG map
constexpr int COEFFICIENT_TAPS = 11;       // number of taps in use, 0 to MAX_TAPS
constexpr int COEFFICIENT_NOW = 12;        // coefficient of the latents of this step
constexpr int COEFFICIENT_NEWEST = 13;     // coefficient of the latents at the newest cached prediction
constexpr int COEFFICIENT_PREVIOUS = 14;   // weight of the CFG difference before the newest one
constexpr int COEFFICIENT_FRESH = 15;      // coefficient of a fresh prediction
constexpr int COEFFICIENT_COUNT = 16;
constexpr int MAX_TAPS = 4;
