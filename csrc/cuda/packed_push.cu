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

// Where a tensor's lines of channels lie.
template <class T>
struct Lines {
  const T* data;
  int64_t channel_stride;
  Strided<uint32_t> starts;
};

// The bits of a lane's channels, 0 for those that it does not have.
template <class T, int MINE, bool WIDE>
__device__ void read_mine(T* raw, const Lines<T>& lines, uint32_t r, int64_t begin, int count) {
  const T* in = lines.data + lines.starts(r) + begin * lines.channel_stride;
  if (WIDE) {
    constexpr int ELEMENTS = ACCESS / int(sizeof(T));
#pragma unroll
    for (int i = 0; i < MINE; i += ELEMENTS)
      if (i < count) *reinterpret_cast<uint4*>(raw + i) = *reinterpret_cast<const uint4*>(in + i);
  } else {
#pragma unroll
    for (int i = 0; i < MINE; ++i, in += lines.channel_stride)
      if (i < count) raw[i] = *in;
  }
}

// Each block of 128 channels is quantized by 8 lanes of a warp, 16 channels each, or with 4 bits by 4 lanes, 32 channels each: then every
// access to the payload has 16 bytes. The registers this takes, at most 72 and 104 a thread, leave room for 896 and 512 threads on a
// multiprocessor. Their loads of x and the newest output, 48 and 96 bytes a thread for 16-bit x, all issued at the start, keep more than
// twice the 18 KB under way that ring_push.cu argues for.
//
// A lane reads and replaces its own bytes alone, and a block's first lane its scales, so no lane sees what another has already replaced.
// WIDE: the channels of x lie side by side, in lines that begin and end at multiples of 16 bytes. RESIDUAL: what is stored is x less `entry`,
// which WIDE then describes too.
template <class T, int BITS, bool WIDE, bool RESIDUAL>
__global__ void __launch_bounds__(THREADS) packed_push_kernel(
    uint8_t* ring, const __grid_constant__ Lines<T> x, const __grid_constant__ Lines<T> entry, int64_t channels, uint32_t blocks) {
  constexpr int LANES = BITS == 4 ? 4 : 8;
  constexpr int MINE = PACKED_BLOCK / LANES;
  const PackedLine line{channels, BITS};
  const uint32_t index = blockIdx.x * (THREADS / LANES) + threadIdx.x / LANES;  // of the block, counted over all lines
  const int lane = int(threadIdx.x) % LANES;
  const auto line_blocks = uint32_t(line.blocks());
  const uint32_t r = index / line_blocks, block = index % line_blocks;
  const int64_t begin = int64_t(block) * PACKED_BLOCK + lane * MINE;
  // Lanes beyond the last block go on with no channels, as the exchange between lanes needs the whole warp.
  const int count = index < blocks ? int(min(max(channels - begin, int64_t(0)), int64_t(MINE))) : 0;

  alignas(ACCESS) T raw[MINE] = {}, before[MINE] = {};
  read_mine<T, MINE, WIDE>(raw, x, r, begin, count);
  if (RESIDUAL) read_mine<T, MINE, WIDE>(before, entry, r, begin, count);

  uint8_t* packed = ring + r * line.bytes();
  uint8_t* newest = packed + begin;
  auto* newest_scale = reinterpret_cast<float*>(packed + line.newest_scales()) + block;
  auto* difference_scale = reinterpret_cast<float*>(packed + line.difference_scales()) + block;
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
  for (int i = 0; i < MINE; ++i) values[i] = RESIDUAL ? load(raw[i]) - load(before[i]) : load(raw[i]);

  if (BITS) {
    scale = __shfl_sync(ALL_LANES, scale, 0, LANES);
    float changes[MINE];
#pragma unroll
    for (int i = 0; i < MINE; ++i) changes[i] = i < count ? values[i] - scale * float(codes[i]) : 0.0f;
    const Quantizer q = quantizer(largest_of_lanes<LANES>(largest_magnitude<MINE>(changes)), largest_code(BITS));
#pragma unroll
    for (int i = 0; i < MINE; ++i) codes[i] = int8_t(quantize(changes[i], q.inverse));
    if (first) *difference_scale = q.scale;
    uint8_t* difference = packed + line.difference() + begin * BITS / 8;
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

// Whether `shape`, of channels last, fits `out`.
template <class T>
bool lines_of(const T* data, const Shape& shape, Lines<T>* out) {
  const int last = shape.dims - 1;
  out->data = data;
  out->channel_stride = shape.strides[last];
  return collapse({last, shape.sizes, shape.strides}, &out->starts);
}

template <class T>
bool is_wide(const Lines<T>& lines, int64_t channels) {
  uint64_t distances = reinterpret_cast<uintptr_t>(lines.data) | uint64_t(channels * int64_t(sizeof(T)));
  for (int d = 0; d < lines.starts.dims; ++d) distances |= uint64_t(lines.starts.stride[d] * int64_t(sizeof(T)));
  return (lines.channel_stride == 1 || channels == 1) && distances % ACCESS == 0;
}

template <class T>
struct PackedPush {
  uint8_t* ring;
  Lines<T> x, entry;
  int64_t channels, blocks;
  cudaStream_t stream;

  template <int BITS>
  cudaError_t run() const {
    return entry.data ? run<BITS, true>(is_wide(x, channels) && is_wide(entry, channels)) : run<BITS, false>(is_wide(x, channels));
  }

  template <int BITS, bool RESIDUAL>
  cudaError_t run(bool wide) const {
    const auto kernel = wide ? packed_push_kernel<T, BITS, true, RESIDUAL> : packed_push_kernel<T, BITS, false, RESIDUAL>;
    const int lanes = BITS == 4 ? 4 : 8;
    return launch(kernel, blocks * lanes, THREADS, stream, ring, x, entry, channels, uint32_t(blocks));
  }
};

}  // namespace

template <class T>
cudaError_t launch_packed_push(
    uint8_t* ring, const T* x, const Shape& shape, const T* entry, const int64_t* entry_strides, int bits, cudaStream_t stream) {
  PackedPush<T> push{ring, {}, {}, shape.sizes[shape.dims - 1], 0, stream};
  if (!lines_of(x, shape, &push.x)) return cudaErrorInvalidValue;
  if (entry && !lines_of(entry, {shape.dims, shape.sizes, entry_strides}, &push.entry)) return cudaErrorInvalidValue;
  int64_t lines = 1;
  for (int d = 0; d < shape.dims - 1; ++d) lines *= shape.sizes[d];
  push.blocks = lines * PackedLine{push.channels, bits}.blocks();
  if (push.blocks == 0) return cudaSuccess;
  if (push.blocks > UINT32_MAX - THREADS) return cudaErrorInvalidValue;

  switch (bits) {
    case 0: return push.template run<0>();
    case 4: return push.template run<4>();
    default: return push.template run<8>();
  }
}

template cudaError_t launch_packed_push(uint8_t*, const float*, const Shape&, const float*, const int64_t*, int, cudaStream_t);
template cudaError_t launch_packed_push(uint8_t*, const bfloat16*, const Shape&, const bfloat16*, const int64_t*, int, cudaStream_t);
template cudaError_t launch_packed_push(uint8_t*, const float16*, const Shape&, const float16*, const int64_t*, int, cudaStream_t);

}  // namespace fastercache
