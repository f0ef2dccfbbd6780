// CUDA implementations of the two pushes, registered through torch's stable ABI, in a library of its own beside that of the CPU ops.
// The schemas are defined and their arguments validated in fastercache/ops.py; what is checked here guards memory.

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/version.h>

#include <algorithm>
#include <cstdint>

#include "../cuda/launch.h"
#include "../packed_layout.h"
#include "../row_layout.h"

#define STRING_OF(x) #x
#define STRING(x) STRING_OF(x)

// fastercache/ops.py finds this text in the file, so it can name the version even when the library does not load.
extern "C" __attribute__((used, visibility("default"))) const char fastercache_built_with[] =
    "fastercache built with torch " STRING(TORCH_VERSION_MAJOR) "." STRING(TORCH_VERSION_MINOR) "." STRING(TORCH_VERSION_PATCH);

namespace {

using namespace fastercache;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

Shape shape_of(const Tensor& tensor) { return {int(tensor.dim()), tensor.sizes().data(), tensor.strides().data()}; }

void check_size(const Tensor& tensor, int64_t expected, const char* name) {
  STD_TORCH_CHECK(tensor.numel() == expected, name, " has ", tensor.numel(), " elements, expected ", expected);
}

void check_device(const Tensor& tensor, const Tensor& ring, const char* name) {
  STD_TORCH_CHECK(
      ring.is_cuda() && tensor.is_cuda() && tensor.get_device_index() == ring.get_device_index(), name, " and ring must be on one GPU");
}

// Returns the number of elements in each of the ring's slots.
int64_t check_slots(const Tensor& ring) {
  int64_t elements = 1;
  for (int64_t d = ring.dim() - 1; d > 0; --d) {
    STD_TORCH_CHECK(ring.size(d) == 1 || ring.stride(d) == elements, "each slot of ring must be contiguous");
    elements *= std::max<int64_t>(ring.size(d), 1);  // torch counts an empty dimension as 1 in strides
  }
  STD_TORCH_CHECK(ring.dim() > 0 && ring.size(0) > 0, "ring must have at least one slot");
  STD_TORCH_CHECK(ring.size(0) == 1 || ring.stride(0) >= elements, "the slots of ring must not overlap");
  return ring.numel() / ring.size(0);
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

void ring_push(Tensor ring, Tensor x, Tensor row) {
  check_size(x, check_slots(ring), "x");
  const auto element = int(x.element_size());
  STD_TORCH_CHECK(element == 2 || element == 4 || element == 8, "x has elements of ", element, " bytes, expected 2, 4 or 8");
  STD_TORCH_CHECK(ring.scalar_type() == x.scalar_type(), "x and ring differ in dtype");
  STD_TORCH_CHECK(
      row.scalar_type() == ScalarType::Float && row.numel() == ROW_SIZE && row.is_contiguous(),
      "row must be ", ROW_SIZE, " contiguous float32 values");
  check_device(x, ring, "x");
  check_device(row, ring, "row");
  const DeviceGuard guard(ring.get_device_index());
  check_launch(
      launch_ring_push(
          ring.data_ptr(), ring.size(0), ring.stride(0), x.const_data_ptr(), shape_of(x), element,
          static_cast<const float*>(row.const_data_ptr()), current_stream(ring)),
      x);
}

void packed_push(Tensor ring, Tensor x, int64_t bits) {
  STD_TORCH_CHECK(bits == 0 || bits == 4 || bits == 8, "bits is ", bits, ", expected 0, 4 or 8");
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) >= 1, "expected [..., channels] with at least one channel");
  STD_TORCH_CHECK(ring.scalar_type() == ScalarType::Byte && ring.is_contiguous(), "a packed ring must be contiguous uint8");
  const int64_t channels = x.size(x.dim() - 1);
  check_size(ring, x.numel() / channels * PackedRow{channels, int(bits)}.bytes(), "ring");
  STD_TORCH_CHECK(
      reinterpret_cast<uintptr_t>(ring.data_ptr()) % PACKED_ALIGNMENT == 0, "ring must begin at a multiple of ", PACKED_ALIGNMENT,
      " bytes, as new tensors and their rows do");
  check_device(x, ring, "x");
  const DeviceGuard guard(ring.get_device_index());
  const auto push = [&](auto type) {
    auto* to = static_cast<uint8_t*>(ring.data_ptr());
    const auto* from = static_cast<const decltype(type)*>(x.const_data_ptr());
    check_launch(launch_packed_push(to, from, shape_of(x), int(bits), current_stream(ring)), x);
  };
  switch (x.scalar_type()) {
    case ScalarType::Float: return push(float{});
    case ScalarType::BFloat16: return push(bfloat16{});
    case ScalarType::Half: return push(float16{});
    default: STD_TORCH_CHECK(false, "a packed ring holds float32, bfloat16 or float16");
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastercache, CUDA, m) {
  m.impl("ring_push", TORCH_BOX(&ring_push));
  m.impl("packed_push", TORCH_BOX(&packed_push));
}
