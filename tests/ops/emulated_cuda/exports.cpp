// The CUDA launchers, and the CPU's packed push to hold them against, as plain C functions for ctypes. Compiled with the .cu files and the
// emulated CUDA beside this file.

#include "../../../csrc/cuda/launch.h"
#include "../../../csrc/kernels/packed.h"

using namespace fastercache;

namespace {

template <class F>
int with_type(int type, F&& call) {
  switch (type) {
    case 0: return call(float{});
    case 1: return call(bfloat16{});
    default: return call(float16{});
  }
}

}  // namespace

extern "C" int emulated_ring_push(
    void* ring, int64_t slots, int64_t slot_stride, const void* x, int dims, const int64_t* sizes, const int64_t* strides, int element_size,
    const float* coefficients) {
  return launch_ring_push(ring, slots, slot_stride, x, {dims, sizes, strides}, element_size, coefficients, nullptr);
}

// `entry` and its strides may be null.
extern "C" int emulated_packed_push(
    uint8_t* ring, const void* x, int dims, const int64_t* sizes, const int64_t* strides, const void* entry, const int64_t* entry_strides,
    int type, int bits) {
  return with_type(type, [&](auto element) {
    using T = decltype(element);
    const auto* before = static_cast<const T*>(entry);
    return launch_packed_push(ring, static_cast<const T*>(x), {dims, sizes, strides}, before, entry_strides, bits, nullptr);
  });
}

// x and `entry`, which may be null, are contiguous.
extern "C" int cpu_packed_push(uint8_t* ring, const void* x, const void* entry, int64_t lines, int64_t channels, int type, int bits) {
  return with_type(type, [&](auto element) {
    using T = decltype(element);
    const auto *in = static_cast<const T*>(x), *before = static_cast<const T*>(entry);
    const int64_t bytes = PackedLine{channels, bits}.bytes();
    for (int64_t line = 0; line < lines; ++line) {
      const int64_t begin = line * channels;
      push_packed(ring + line * bytes, in + begin, 1, channels, bits, before ? before + begin : nullptr, 1);
    }
    return 0;
  });
}
