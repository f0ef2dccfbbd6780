// Ring push, blend and blend-add over one run of elements. No torch: raw pointers in, raw pointers out.
#pragma once

#include <cstdint>
#include <cstring>

#include "dtypes.h"
#include "stream.h"
#include "../row_layout.h"

namespace fastercache {

// out[i] = in[i * step], `streaming` as below; T is any type of the element's size, as the bits are not looked at.
template <class T>
void copy_run(T* out, const T* in, int64_t step, int64_t count, bool streaming = false) {
  if (step == 1) {
    if (streaming) {
      stream(out, in, size_t(count) * sizeof(T));
      stream_fence();
    } else if (out != in) {
      std::memcpy(out, in, size_t(count) * sizeof(T));
    }
    return;
  }
  for (int64_t i = 0; i < count; ++i) out[i] = in[i * step];
}

// What a blend reads from its row: only the taps in use, so an unused slot is never touched.
template <class T>
struct Taps {
  int count = 0;
  const T* slot[MAX_TAPS] = {};
  compute_t<T> coefficient[MAX_TAPS] = {};
};

template <int K, class T>
FASTERCACHE_INLINE compute_t<T> blend_at(const Taps<T>& taps, int64_t i) {
  compute_t<T> sum = 0;
  for (int k = 0; k < K; ++k) sum += taps.coefficient[k] * load(taps.slot[k][i]);
  return sum;
}

template <int K, class T>
FASTERCACHE_INLINE void blend_taps(T* __restrict out, const Taps<T>& in, int64_t begin, int64_t count, bool streaming) {
  const Taps<T> taps = in;  // a local copy, which no store to `out` can change
  int64_t i = 0;
  if (streaming) {
    // Small tiles: reading and streaming overlap. With 8 KiB instead of 256 bytes a blend takes twice as long.
    constexpr int64_t TILE = 256 / sizeof(T);
    alignas(64) T tile[TILE];
    for (; i + TILE <= count; i += TILE) {
      for (int64_t j = 0; j < TILE; ++j) store(tile + j, blend_at<K>(taps, begin + i + j));
      stream(out + i, tile, sizeof tile);
    }
    stream_fence();
  }
  for (; i < count; ++i) store(out + i, blend_at<K>(taps, begin + i));
}

// out[i] = sum_k c_k slot_k[begin + i]; `streaming` past the caches, for an output of STREAM_BYTES and more
template <class T>
FASTERCACHE_CPU_CLONES void blend_run(T* out, const Taps<T>& taps, int64_t begin, int64_t count, bool streaming = false) {
  switch (taps.count) {
    case 0: return blend_taps<0>(out, taps, begin, count, streaming);
    case 1: return blend_taps<1>(out, taps, begin, count, streaming);
    case 2: return blend_taps<2>(out, taps, begin, count, streaming);
    case 3: return blend_taps<3>(out, taps, begin, count, streaming);
    default: return blend_taps<4>(out, taps, begin, count, streaming);
  }
}

template <int K, class T, class G>
FASTERCACHE_INLINE void add_at(T* x, const G* gate, const Taps<T>& taps, int64_t i) {
  store(x, load(*x) + compute_t<T>(load(*gate)) * blend_at<K>(taps, i));
}

template <int K, class T, class G>
FASTERCACHE_INLINE void blend_add_taps(
    T* __restrict x, int64_t x_step, const G* gate, int64_t gate_step, const Taps<T>& in, int64_t begin, int64_t count) {
  const Taps<T> taps = in;
  // Constant steps let the two usual layouts vectorise: a gate per channel, and one gate for the whole run.
  if (x_step == 1 && gate_step == 1) {
    for (int64_t i = 0; i < count; ++i) add_at<K>(x + i, gate + i, taps, begin + i);
  } else if (x_step == 1 && gate_step == 0) {
    for (int64_t i = 0; i < count; ++i) add_at<K>(x + i, gate, taps, begin + i);
  } else {
    for (int64_t i = 0; i < count; ++i) add_at<K>(x + i * x_step, gate + i * gate_step, taps, begin + i);
  }
}

// x[i] += gate[i] * sum_k c_k slot_k[begin + i], rounded once
template <class T, class G>
FASTERCACHE_CPU_CLONES void blend_add_run(
    T* x, int64_t x_step, const G* gate, int64_t gate_step, const Taps<T>& taps, int64_t begin, int64_t count) {
  switch (taps.count) {
    case 0: return blend_add_taps<0>(x, x_step, gate, gate_step, taps, begin, count);
    case 1: return blend_add_taps<1>(x, x_step, gate, gate_step, taps, begin, count);
    case 2: return blend_add_taps<2>(x, x_step, gate, gate_step, taps, begin, count);
    case 3: return blend_add_taps<3>(x, x_step, gate, gate_step, taps, begin, count);
    default: return blend_add_taps<4>(x, x_step, gate, gate_step, taps, begin, count);
  }
}

}  // namespace fastercache
