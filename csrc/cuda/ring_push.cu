// Push: a copy whose target is named in device memory, so that one launch, and one CUDA graph, serves every step.
#include <cstdint>

#include "../coefficient_layout.h"
#include "launch.h"

namespace fastercache {
namespace {

constexpr int THREADS = 256;

// Accesses that each thread has in flight. An H100 moves 25 GB/s to and from each of its 132 multiprocessors and answers after about 700
// ns: 18 KB must be under way in each. 4 x 16 bytes for 2048 threads are 128 KB, so a quarter of the threads is enough.
constexpr int ACCESSES = 4;

struct Contiguous {
  using Index = int64_t;  // only added to, never divided
  __device__ int64_t operator()(int64_t position) const { return position; }
};

// Blocks cover x in one pass: the hardware hands out the next block when one ends, which balances the load as no loop over a fixed grid
// would. The loads do not wait for the slot; only the stores do.
template <class Unit, class Layout>
__global__ void __launch_bounds__(THREADS) ring_push_kernel(
    Unit* ring, int64_t slots, int64_t slot_stride, const Unit* x, const __grid_constant__ Layout layout, typename Layout::Index units,
    const float* coefficients) {
  using Index = typename Layout::Index;
  const Index first = Index(blockIdx.x) * (THREADS * ACCESSES) + threadIdx.x;
  Unit values[ACCESSES];
#pragma unroll
  for (int i = 0; i < ACCESSES; ++i)
    if (first + i * THREADS < units) values[i] = x[layout(first + i * THREADS)];
  const float slot = coefficients[COEFFICIENT_WRITE_SLOT];
  if (!(slot >= 0 && slot < float(slots))) __trap();
  Unit* out = ring + int64_t(slot) * slot_stride;
#pragma unroll
  for (int i = 0; i < ACCESSES; ++i)
    if (first + i * THREADS < units) out[first + i * THREADS] = values[i];
}

// All distances count units of type Unit.
struct Push {
  void* ring;
  int64_t slots, slot_stride;
  const void* x;
  Strided<int64_t> layout;
  int64_t units;
  const float* coefficients;
  cudaStream_t stream;

  template <class Unit, class Layout>
  cudaError_t run(const Layout& as) const {
    return launch(
        ring_push_kernel<Unit, Layout>, (units + ACCESSES - 1) / ACCESSES, THREADS, stream, static_cast<Unit*>(ring), slots, slot_stride,
        static_cast<const Unit*>(x), as, typename Layout::Index(units), coefficients);
  }

  template <class Unit>
  cudaError_t run_strided() const {
    if (units >= int64_t(1) << 31) return run<Unit>(layout);
    Strided<uint32_t> narrow;
    narrow.dims = layout.dims;
    for (int d = 0; d < layout.dims; ++d) {
      narrow.size[d] = uint32_t(layout.size[d]);
      narrow.stride[d] = layout.stride[d];
    }
    return run<Unit>(narrow);
  }
};

}  // namespace

cudaError_t launch_ring_push(
    void* ring, int64_t slots, int64_t slot_stride, const void* x, const Shape& shape, int element_size, const float* coefficients,
    cudaStream_t stream) {
  Push push{ring, slots, slot_stride, x, {}, 1, coefficients, stream};
  if (!collapse(shape, &push.layout)) return cudaErrorInvalidValue;
  for (int d = 0; d < shape.dims; ++d) push.units *= shape.sizes[d];
  if (push.units == 0) return cudaSuccess;

  // Elements that lie together are copied as units: the largest power of two, up to 16 bytes, that every address is a multiple of.
  Strided<int64_t>& layout = push.layout;
  const int64_t run = layout.stride[0] == 1 ? layout.size[0] : 1;
  uint64_t distances = 16 | reinterpret_cast<uintptr_t>(ring) | reinterpret_cast<uintptr_t>(x) | uint64_t(slot_stride * element_size) |
      uint64_t(run * element_size);
  for (int d = 1; d < layout.dims; ++d) distances |= uint64_t(layout.stride[d] * element_size);
  const int width = int(distances & (~distances + 1));
  const int elements = width / element_size;
  if (elements > 1) {
    layout.size[0] /= elements;
    for (int d = 1; d < layout.dims; ++d) layout.stride[d] /= elements;
    push.slot_stride /= elements;
    push.units /= elements;
  }

  switch (width) {
    case 16: return layout.dims == 1 ? push.run<uint4>(Contiguous{}) : push.run_strided<uint4>();
    case 8: return push.run_strided<uint2>();
    case 4: return push.run_strided<uint32_t>();
    default: return push.run_strided<uint16_t>();
  }
}

}  // namespace fastercache
