// Ring push, blend and blend-add over one run of elements. No torch: raw pointers in, raw pointers out.
#pragma once

#include <cstdint>
#include <cstring>

#include "dtypes.h"
#include "stream.h"
#include "tiles.h"
#include "../row_layout.h"

namespace fastercache {

// out[i] = in[i * step], `streaming` as below; T is any type of the element's size, as the bits are not looked at.
template <class T>
void copy_run(T* out, const T* in, int64_t step, int64_t count, bool streaming = false) {
  if (step == 1) {
    if (out == in) return;
    if (streaming) {
      stream(out, in, size_t(count) * sizeof(T));
      stream_fence();
    } else {
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

// The taps of a tile: `count` elements from number `begin` on. A copy, which no store to the output can change.
template <int K, class T>
FASTERCACHE_INLINE Taps<tiled_t<T>> tile_taps(Tile<T>* tiles, const Taps<T>& in, int64_t begin, int64_t count) {
  Taps<tiled_t<T>> taps;
  for (int k = 0; k < K; ++k) {
    taps.slot[k] = tiles[k].read(in.slot[k] + begin, count);
    taps.coefficient[k] = in.coefficient[k];
  }
  return taps;
}

template <int K, class T>
FASTERCACHE_INLINE void blend_taps(T* __restrict out, const Taps<T>& in, int64_t begin, int64_t count, bool streaming) {
  Tile<T> tiles[K + 1];
  const auto blend = [&](T* to, int64_t at, int64_t size) FASTERCACHE_INLINE_LAMBDA {
    const auto taps = tile_taps<K>(tiles, in, begin + at, size);
    auto* sums = tiles[K].target(to);
    for (int64_t i = 0; i < size; ++i) store(sums + i, blend_at<K>(taps, i));
    tiles[K].written(to, size);
  };
  int64_t done = 0;
  if (streaming) {
    // Small lines: reading and streaming overlap. With 8 KiB instead of 256 bytes a blend takes twice as long.
    constexpr int64_t LINE = (std::is_same_v<T, float16> ? 512 : 256) / sizeof(T);
    alignas(64) T line[LINE];
    for (; done + LINE <= count; done += LINE) {
      blend(line, done, LINE);
      stream(out + done, line, sizeof line);
    }
    stream_fence();
  }
  each_tile<T>(count - done, [&](int64_t at, int64_t size) FASTERCACHE_INLINE_LAMBDA { blend(out + done + at, done + at, size); });
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
  if (x_step != 1 || gate_step > 1) {
    const Taps<T> taps = in;
    for (int64_t i = 0; i < count; ++i) add_at<K>(x + i * x_step, gate + i * gate_step, taps, begin + i);
    return;
  }
  constexpr int64_t LINE = 64 / sizeof(T);
  Tile<T> tiles[K + 1];
  Tile<G> gates;
  each_tile<T>(count, [&](int64_t at, int64_t size) FASTERCACHE_INLINE_LAMBDA {
    const auto taps = tile_taps<K>(tiles, in, begin + at, size);
    tiles[K].read(x + at, size);
    auto* to = tiles[K].target(x + at);
    const auto* factors = gates.read(gate + at * gate_step, gate_step ? size : 1);
    const auto add = [&](int64_t i, int64_t end) FASTERCACHE_INLINE_LAMBDA {
      // Constant steps let the two usual layouts vectorise: a gate per channel, and one gate for the whole run.
      if (gate_step) {
#pragma GCC ivdep
#pragma GCC unroll 1
        for (int64_t j = i; j < end; ++j) add_at<K>(to + j, factors + j, taps, j);
      } else {
#pragma GCC ivdep
#pragma GCC unroll 1
        for (int64_t j = i; j < end; ++j) add_at<K>(to + j, factors, taps, j);
      }
    };
    int64_t i = 0;
    for (; i + LINE <= size; i += LINE) {
      prefetch(to + i + LINE);
      for (int k = 0; k < K; ++k) prefetch(taps.slot[k] + i + LINE);
      add(i, i + LINE);
    }
    add(i, size);
    tiles[K].written(x + at, size);
  });
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
