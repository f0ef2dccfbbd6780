// CUDA implementations of the pushes, registered through torch's stable ABI, in a library of its own beside that of the CPU ops.
// The schemas are defined and their arguments validated in fastercache/ops/; what is checked here guards memory.

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

#include "../cuda/launch.h"
#include "checks.h"

namespace {

using namespace fastercache;
using torch::stable::accelerator::DeviceGuard;

Shape shape_of(const Tensor& tensor) { return {int(tensor.dim()), tensor.sizes().data(), tensor.strides().data()}; }

void check_device(const Tensor& tensor, const Tensor& ring, const char* name) {
  STD_TORCH_CHECK(
      ring.is_cuda() && tensor.is_cuda() && tensor.get_device_index() == ring.get_device_index(), name, " and ring must be on one GPU");
}

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// What a launcher refuses as an invalid value is a shape: the rest has been checked.
void check_launch(cudaError_t error, const Tensor& x) {
  STD_TORCH_CHECK(
      error != cudaErrorInvalidValue, "x has ", x.numel(), " elements in more than ", MAX_STRIDED_DIMS,
      " dimensions that do not merge, or too many for one launch: pass x.contiguous(), or parts of it");
  STD_CUDA_CHECK(error);
}

void ring_push(Tensor ring, Tensor x, Tensor coefficients) {
  check_size(x, slot_size(ring), "x");
  const auto element = int(x.element_size());
  STD_TORCH_CHECK(element == 2 || element == 4 || element == 8, "x has elements of ", element, " bytes, expected 2, 4 or 8");
  STD_TORCH_CHECK(ring.scalar_type() == x.scalar_type(), "x and ring differ in dtype");
  const float* values = coefficient_data(coefficients);
  check_device(x, ring, "x");
  check_device(coefficients, ring, "coefficients");
  const DeviceGuard guard(ring.get_device_index());
  check_launch(
      launch_ring_push(
          ring.data_ptr(), ring.size(0), ring.stride(0), x.const_data_ptr(), shape_of(x), element,
          values, current_stream(ring)),
      x);
}

// With `entry`, of x - entry.
void push_packed(const Tensor& ring, const Tensor& x, const Tensor* entry, int64_t bits) {
  packed_lines(ring, x, bits);
  check_device(x, ring, "x");
  if (entry) check_device(*entry, ring, "entry");
  const DeviceGuard guard(ring.get_device_index());
  const auto push = [&](auto type) {
    using T = decltype(type);
    auto* to = static_cast<uint8_t*>(ring.data_ptr());
    const auto* from = static_cast<const T*>(x.const_data_ptr());
    const auto* before = entry ? static_cast<const T*>(entry->const_data_ptr()) : nullptr;
    const int64_t* strides = entry ? entry->strides().data() : nullptr;
    check_launch(launch_packed_push(to, from, shape_of(x), before, strides, int(bits), current_stream(ring)), x);
  };
  switch (x.scalar_type()) {
    case ScalarType::Float: return push(float{});
    case ScalarType::BFloat16: return push(bfloat16{});
    case ScalarType::Half: return push(float16{});
    default: STD_TORCH_CHECK(false, "a packed ring holds float32, bfloat16 or float16");
  }
}

void packed_push(Tensor ring, Tensor x, int64_t bits) { push_packed(ring, x, nullptr, bits); }

void packed_push_residual(Tensor ring, Tensor x, Tensor entry, int64_t bits) {
  check_like(entry, x, "entry");
  push_packed(ring, x, &entry, bits);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastercache, CUDA, m) {
  m.impl("ring_push", TORCH_BOX(&ring_push));
  m.impl("packed_push", TORCH_BOX(&packed_push));
  m.impl("packed_push_residual", TORCH_BOX(&packed_push_residual));
}
