// The CUDA kernels as the bindings see them: raw pointers and a stream in, an error code out. Arguments are taken as valid.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "../kernels/dtypes.h"
#include "strided.h"

namespace fastercache {

// ring[coefficients[COEFFICIENT_WRITE_SLOT]] = x, for elements of 2, 4 or 8 bytes. `slot_stride` and the strides of x count elements.
// `coefficients` lies in device memory and is read there. A slot that the ring does not have traps: the launch fails, as an index out of
// range does in PyTorch's kernels, and nothing is written.
cudaError_t launch_ring_push(
    void* ring, int64_t slots, int64_t slot_stride, const void* x, const Shape& shape, int element_size, const float* coefficients,
    cudaStream_t stream);

// Quantizes x, of float, bfloat16 or float16 with the channels last, into the packed lines at `ring` (packed_layout.h), which lie end to end
// and begin at a multiple of PACKED_ALIGNMENT. `bits` is 0, 4 or 8. With `entry`, of the sizes of x and strides of its own, x - entry in place
// of x; otherwise both are null. Byte for byte what push_packed on the CPU writes.
template <class T>
cudaError_t launch_packed_push(
    uint8_t* ring, const T* x, const Shape& shape, const T* entry, const int64_t* entry_strides, int bits, cudaStream_t stream);

// One thread for each of `threads`, in blocks of `block`.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), int64_t threads, int block, cudaStream_t stream, Arguments... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned((threads + block - 1) / block));
  config.blockDim = dim3(unsigned(block));
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace fastercache
