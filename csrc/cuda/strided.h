// Where the elements of a tensor with any strides lie: collapsed on the host, walked on the device. No torch.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fastercache {

constexpr int MAX_STRIDED_DIMS = 8;  // that no merging has removed; kernel arguments have a fixed size

// A tensor's sizes and strides as torch holds them, outermost first.
struct Shape {
  int dims;
  const int64_t* sizes;
  const int64_t* strides;
};

// The same as a kernel argument: innermost first, sizes of 1 left out, and dimensions that memory steps through evenly made one, so a
// contiguous tensor has a single dimension. A position is divided once for each dimension beyond the first, in `Index`: 64-bit division
// takes several times as long. Offsets have 64 bits always, which multiplication does not mind.
template <class I>
struct Strided {
  using Index = I;

  int dims = 0;
  Index size[MAX_STRIDED_DIMS] = {};
  int64_t stride[MAX_STRIDED_DIMS] = {};

  // The loop is unrolled, because an array indexed by a variable would be copied to local memory.
  __device__ int64_t operator()(Index position) const {
    int64_t offset = 0;
#pragma unroll
    for (int d = 0; d < MAX_STRIDED_DIMS - 1; ++d) {
      if (d + 1 >= dims) return offset + int64_t(position) * stride[d];
      offset += int64_t(position % size[d]) * stride[d];
      position /= size[d];
    }
    return offset + int64_t(position) * stride[MAX_STRIDED_DIMS - 1];
  }
};

// Whether `shape` fits, with its dimensions collapsed into `out`.
template <class Index>
bool collapse(const Shape& shape, Strided<Index>* out) {
  out->dims = 0;
  for (int d = shape.dims - 1; d >= 0; --d) {
    if (shape.sizes[d] == 1) continue;
    const int last = out->dims - 1;
    if (last >= 0 && shape.strides[d] == out->stride[last] * int64_t(out->size[last])) {
      out->size[last] *= Index(shape.sizes[d]);
      continue;
    }
    if (out->dims == MAX_STRIDED_DIMS) return false;
    out->size[out->dims] = Index(shape.sizes[d]);
    out->stride[out->dims++] = shape.strides[d];
  }
  if (out->dims == 0) {
    out->size[0] = out->stride[0] = 1;
    out->dims = 1;
  }
  return true;
}

}  // namespace fastercache
