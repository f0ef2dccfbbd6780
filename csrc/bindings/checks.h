// What the CPU and the CUDA bindings check before they touch memory, and the version they were built with. fastercache/ops/ validates
// arguments for people.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/version.h>

#include <algorithm>
#include <cstdint>

#include "../packed_layout.h"
#include "../coefficient_layout.h"

#define STRING_OF(x) #x
#define STRING(x) STRING_OF(x)

// fastercache/ops/dispatch.py finds this text in the file, so it can name the version even when the library does not load.
extern "C" __attribute__((used, visibility("default"))) const char fastercache_built_with[] =
    "fastercache built with torch " STRING(TORCH_VERSION_MAJOR) "." STRING(TORCH_VERSION_MINOR) "." STRING(TORCH_VERSION_PATCH);

namespace fastercache {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_size(const Tensor& tensor, int64_t expected, const char* name) {
  STD_TORCH_CHECK(tensor.numel() == expected, name, " has ", tensor.numel(), " elements, expected ", expected);
}

inline void check_like(const Tensor& tensor, const Tensor& like, const char* name) {
  bool same = tensor.dim() == like.dim() && tensor.scalar_type() == like.scalar_type();
  for (int64_t d = 0; same && d < like.dim(); ++d) same = tensor.size(d) == like.size(d);
  STD_TORCH_CHECK(same, name, " must have the shape and dtype of the tensor it goes with");
}

// Elements of each of a ring's slots, which must be contiguous and not overlap.
inline int64_t slot_size(const Tensor& ring) {
  STD_TORCH_CHECK(ring.dim() >= 1 && ring.size(0) >= 1, "a ring must be [slots, ...] with at least one slot");
  int64_t elements = 1;
  for (int64_t d = ring.dim() - 1; d > 0; --d) {
    STD_TORCH_CHECK(ring.size(d) == 1 || ring.stride(d) == elements, "each slot of a ring must be contiguous");
    elements *= std::max<int64_t>(ring.size(d), 1);  // as torch counts an empty dimension in strides
  }
  STD_TORCH_CHECK(ring.size(0) == 1 || ring.stride(0) >= elements, "the slots of a ring must not overlap");
  return ring.numel() / ring.size(0);
}

inline const float* coefficient_data(const Tensor& coefficients) {
  STD_TORCH_CHECK(
      coefficients.scalar_type() == ScalarType::Float && coefficients.numel() == COEFFICIENT_COUNT && coefficients.is_contiguous(),
      "coefficients must be ", COEFFICIENT_COUNT, " contiguous float32 values");
  return static_cast<const float*>(coefficients.const_data_ptr());
}

// How a packed ring lies beside a tensor of the same lines: `lines` vectors of `channels` elements, a line of `bytes` for each.
struct PackedLines {
  int64_t lines, channels, bytes;
  int bits;
};

inline PackedLines packed_lines(const Tensor& ring, const Tensor& values, int64_t bits) {
  STD_TORCH_CHECK(bits == 0 || bits == 4 || bits == 8, "bits is ", bits, ", expected 0, 4 or 8");
  STD_TORCH_CHECK(values.dim() >= 1 && values.size(values.dim() - 1) >= 1, "expected [..., channels] with at least one channel");
  STD_TORCH_CHECK(ring.scalar_type() == ScalarType::Byte && ring.is_contiguous(), "a packed ring must be contiguous uint8");
  STD_TORCH_CHECK(
      reinterpret_cast<uintptr_t>(ring.const_data_ptr()) % PACKED_ALIGNMENT == 0, "a packed ring must begin at a multiple of ",
      PACKED_ALIGNMENT, " bytes, as new tensors and their rows do");
  const int64_t channels = values.size(values.dim() - 1), bytes = PackedLine{channels, int(bits)}.bytes();
  const int64_t lines = values.numel() / channels;
  check_size(ring, lines * bytes, "ring");
  return {lines, channels, bytes, int(bits)};
}

}  // namespace fastercache
