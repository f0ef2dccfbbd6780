// Push into the packed formats: quantizes a site's newest output, and its difference to the one before, in a single pass over the ring.
#include <cstdint>

#include "../kernels/packed.h"
#include "launch.h"

namespace fastercache {
namespace {

constexpr int THREADS = 128;  // few, so that what blocks of many registers leave free on a multiprocessor is small
constexpr int ACCESS = 16;    // bytes of the widest load and store, and channels in one of int8
constexpr unsigned ALL_LANES = 0xFFFFFFFFu;

// The largest magnitude that any of a block's lanes holds, in each of them. As in the header: compared as bits, so that a NaN is found.
template <int LANES>
__device__ float largest_of_lanes(float mine) {
  uint32_t bits = float_bits(mine);
#pragma unroll
  for (int distance = 1; distance < LANES; distance *= 2) bits = max(bits, __shfl_xor_sync(ALL_LANES, bits, distance));
  return bits_float(bits);
}

// Each block of 128 channels is quantized by 8 lanes of a warp, 16 channels each, or with 4 bits by 4 lanes, 32 channels each: then every
// access to the payload has 16 bytes. The registers this takes, at most 72 and 104 a thread, leave room for 896 and 512 threads on a
// multiprocessor. Their loads of x and the newest output, 48 and 96 bytes a thread for 16-bit x, all issued at the start, keep more than
// twice the 18 KB under way that ring_push.cu argues for.
//
// A lane reads and replaces its own bytes alone, and a block's first lane its scales, so no lane sees what another has already replaced.
// WIDE: the channels of x lie side by side, in rows that begin and end at multiples of 16 bytes.
template <class T, int BITS, bool WIDE>
__global__ void __launch_bounds__(THREADS) packed_push_kernel(
    uint8_t* ring, const T* x, int64_t channels, int64_t channel_stride, const __grid_constant__ Strided<uint32_t> rows, uint32_t blocks) {
  constexpr int LANES = BITS == 4 ? 4 : 8;
  constexpr int MINE = PACKED_BLOCK / LANES;
  const PackedRow row{channels, BITS};
  const uint32_t index = blockIdx.x * (THREADS / LANES) + threadIdx.x / LANES;  // of the block, counted over all rows
  const int lane = int(threadIdx.x) % LANES;
  const auto row_blocks = uint32_t(row.blocks());
  const uint32_t r = index / row_blocks, block = index % row_blocks;
  const int64_t begin = int64_t(block) * PACKED_BLOCK + lane * MINE;
  // Lanes beyond the last block go on with no channels, as the exchange between lanes needs the whole warp.
  const int count = index < blocks ? int(min(max(channels - begin, int64_t(0)), int64_t(MINE))) : 0;

  const T* in = x + rows(r) + begin * channel_stride;
  alignas(ACCESS) T raw[MINE] = {};
  if (WIDE) {
    constexpr int ELEMENTS = ACCESS / int(sizeof(T));
#pragma unroll
    for (int i = 0; i < MINE; i += ELEMENTS)
      if (i < count) *reinterpret_cast<uint4*>(raw + i) = *reinterpret_cast<const uint4*>(in + i);
  } else {
#pragma unroll
    for (int i = 0; i < MINE; ++i)
      if (i < count) raw[i] = in[i * channel_stride];
  }

  uint8_t* packed = ring + r * row.bytes();
  uint8_t* newest = packed + begin;
  auto* newest_scale = reinterpret_cast<float*>(packed + row.newest_scales()) + block;
  auto* difference_scale = reinterpret_cast<float*>(packed + row.difference_scales()) + block;
  const bool first = count > 0 && lane == 0;

  alignas(ACCESS) int8_t codes[MINE] = {};
  float scale = 0;
  if (BITS) {
#pragma unroll
    for (int i = 0; i < MINE; i += ACCESS)
      if (i < count) *reinterpret_cast<uint4*>(codes + i) = *reinterpret_cast<const uint4*>(newest + i);
    if (first) scale = *newest_scale;
  }

  float values[MINE];
#pragma unroll
  for (int i = 0; i < MINE; ++i) values[i] = load(raw[i]);

  if (BITS) {
    scale = __shfl_sync(ALL_LANES, scale, 0, LANES);
    float changes[MINE];
#pragma unroll
    for (int i = 0; i < MINE; ++i) changes[i] = i < count ? values[i] - scale * float(codes[i]) : 0.0f;
    const Quantizer q = quantizer(largest_of_lanes<LANES>(largest_magnitude<MINE>(changes)), largest_code(BITS));
#pragma unroll
    for (int i = 0; i < MINE; ++i) codes[i] = int8_t(quantize(changes[i], q.inverse));
    if (first) *difference_scale = q.scale;
    uint8_t* difference = packed + row.difference() + begin * BITS / 8;
    if (BITS == 4) {
#pragma unroll
      for (int i = 0; i < MINE / 2; ++i) codes[i] = int8_t((codes[2 * i] & 0xF) | (codes[2 * i + 1] << 4));
    }
#pragma unroll
    for (int i = 0; i < MINE * BITS / 8; i += ACCESS)
      if (i * 8 < count * BITS) *reinterpret_cast<uint4*>(difference + i) = *reinterpret_cast<const uint4*>(codes + i);
  }

  const Quantizer q = quantizer(largest_of_lanes<LANES>(largest_magnitude<MINE>(values)), largest_code(8));
#pragma unroll
  for (int i = 0; i < MINE; ++i) codes[i] = int8_t(quantize(values[i], q.inverse));
  if (first) *newest_scale = q.scale;
#pragma unroll
  for (int i = 0; i < MINE; i += ACCESS)
    if (i < count) *reinterpret_cast<uint4*>(newest + i) = *reinterpret_cast<const uint4*>(codes + i);
}

template <class T>
struct PackedPush {
  uint8_t* ring;
  const T* x;
  int64_t channels, channel_stride;
  Strided<uint32_t> rows;
  int64_t blocks;
  bool wide;
  cudaStream_t stream;

  template <int BITS>
  cudaError_t run() const {
    const auto kernel = wide ? packed_push_kernel<T, BITS, true> : packed_push_kernel<T, BITS, false>;
    const int lanes = BITS == 4 ? 4 : 8;
    return launch(kernel, blocks * lanes, THREADS, stream, ring, x, channels, channel_stride, rows, uint32_t(blocks));
  }
};

}  // namespace

template <class T>
cudaError_t launch_packed_push(uint8_t* ring, const T* x, const Shape& shape, int bits, cudaStream_t stream) {
  const int last = shape.dims - 1;
  PackedPush<T> push{ring, x, shape.sizes[last], shape.strides[last], {}, 0, false, stream};
  if (!collapse({last, shape.sizes, shape.strides}, &push.rows)) return cudaErrorInvalidValue;
  int64_t rows = 1;
  for (int d = 0; d < last; ++d) rows *= shape.sizes[d];
  push.blocks = rows * PackedRow{push.channels, bits}.blocks();
  if (push.blocks == 0) return cudaSuccess;
  if (push.blocks > UINT32_MAX - THREADS) return cudaErrorInvalidValue;

  uint64_t distances = reinterpret_cast<uintptr_t>(x) | uint64_t(push.channels * int64_t(sizeof(T)));
  for (int d = 0; d < push.rows.dims; ++d) distances |= uint64_t(push.rows.stride[d] * int64_t(sizeof(T)));
  push.wide = (push.channel_stride == 1 || push.channels == 1) && distances % ACCESS == 0;

  switch (bits) {
    case 0: return push.template run<0>();
    case 4: return push.template run<4>();
    default: return push.template run<8>();
  }
}

template cudaError_t launch_packed_push(uint8_t*, const float*, const Shape&, int, cudaStream_t);
template cudaError_t launch_packed_push(uint8_t*, const bfloat16*, const Shape&, int, cudaStream_t);
template cudaError_t launch_packed_push(uint8_t*, const float16*, const Shape&, int, cudaStream_t);

}  // namespace fastercache
