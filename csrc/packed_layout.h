// The packed storage formats: two taps of a site's output in a line of bytes for each vector of channels. No torch, no CUDA.
// triton_kernels/packed.py holds the same numbers for Python; tests/ops/test_packed.py compares the two.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FASTERCACHE_HOST_DEVICE __host__ __device__
#else
#define FASTERCACHE_HOST_DEVICE
#endif

namespace fastercache {

constexpr int PACKED_BLOCK = 128;     // channels that share a scale
constexpr int PACKED_ALIGNMENT = 16;  // bytes: every part begins where the widest load may

// A line of `channels`: newest output in int8 | difference to the one before it in `bits` bits | float32 scales of either, one a block.
// With 4 bits, channels 2i and 2i + 1 are the low and the high half of byte i. With 0 bits there is no difference, and one tap.
struct PackedLine {
  int64_t channels;
  int bits;

  static FASTERCACHE_HOST_DEVICE constexpr int64_t aligned(int64_t bytes) {
    return (bytes + PACKED_ALIGNMENT - 1) / PACKED_ALIGNMENT * PACKED_ALIGNMENT;
  }
  FASTERCACHE_HOST_DEVICE constexpr int64_t blocks() const { return (channels + PACKED_BLOCK - 1) / PACKED_BLOCK; }
  FASTERCACHE_HOST_DEVICE constexpr int64_t difference() const { return aligned(channels); }
  FASTERCACHE_HOST_DEVICE constexpr int64_t newest_scales() const { return difference() + aligned((channels * bits + 7) / 8); }
  FASTERCACHE_HOST_DEVICE constexpr int64_t difference_scales() const { return newest_scales() + 4 * blocks(); }
  FASTERCACHE_HOST_DEVICE constexpr int64_t bytes() const { return aligned(difference_scales() + (bits ? 4 * blocks() : 0)); }
};

}  // namespace fastercache
