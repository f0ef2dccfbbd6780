// Ring push, blend and blend-add over one run of elements. No torch: raw pointers in, raw pointers out.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "dtypes.h"
#include "stream.h"
#include "tiles.h"
#include "../coefficient_layout.h"

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

// What a blend reads from its coefficients: only the taps in use, so an unused slot is never touched.
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

// Blend-add goes line by line, each asked for before it is used: 3.2 ms instead of 3.6 (float32, 64 MB, Zen 4, two cores).
constexpr int64_t LINE_BYTES = 64, FLOAT16_LINE = LINE_BYTES / sizeof(float16);

#if defined(FASTERCACHE_F16C)
// Blends of float16 as the loops below have them, of as many elements as fill whole vectors. In one pass: with tiles of floats in between they
// take longer than memory does.
template <int K>
FASTERCACHE_F16C FASTERCACHE_INLINE __m256 blend_eight(const Taps<float16>& taps, int64_t i) {
  __m256 sum = _mm256_setzero_ps();
  for (int k = 0; k < K; ++k) sum = _mm256_add_ps(sum, _mm256_mul_ps(_mm256_set1_ps(taps.coefficient[k]), load_eight(taps.slot[k] + i)));
  return sum;
}

template <int K>
FASTERCACHE_F16C int64_t blend_f16c(float16* out, const Taps<float16>& in, int64_t begin, int64_t count) {
  const Taps<float16> taps = in;
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) store_eight(out + i, blend_eight<K>(taps, begin + i));
  return i;
}

template <int K, class G>
FASTERCACHE_F16C int64_t blend_add_f16c(
    float16* x, const G* gate, int64_t gate_step, const Taps<float16>& in, int64_t begin, int64_t count) {
  const Taps<float16> taps = in;
  const __m256 one = _mm256_set1_ps(load(*gate));
  int64_t i = 0;
  for (; i + FLOAT16_LINE <= count; i += FLOAT16_LINE) {
    prefetch(x + i + FLOAT16_LINE);
    for (int k = 0; k < K; ++k) prefetch(taps.slot[k] + begin + i + FLOAT16_LINE);
    for (int64_t j = i; j < i + FLOAT16_LINE; j += 8) {
      const __m256 factor = gate_step ? load_eight(gate + j) : one;
      store_eight(x + j, _mm256_add_ps(load_eight(x + j), _mm256_mul_ps(factor, blend_eight<K>(taps, begin + j))));
    }
  }
  return i;
}
#endif

template <int K, class T>
FASTERCACHE_INLINE int64_t blend_vectors(T* out, const Taps<T>& taps, int64_t begin, int64_t count) {
#if defined(FASTERCACHE_F16C)
  if constexpr (std::is_same_v<T, float16>) return HAS_F16C ? blend_f16c<K>(out, taps, begin, count) : 0;
#endif
  return 0;
}

template <int K, class T, class G>
FASTERCACHE_INLINE int64_t blend_add_vectors(T* x, const G* gate, int64_t gate_step, const Taps<T>& taps, int64_t begin, int64_t count) {
#if defined(FASTERCACHE_F16C)
  if constexpr (std::is_same_v<T, float16>) return HAS_F16C ? blend_add_f16c<K>(x, gate, gate_step, taps, begin, count) : 0;
#endif
  return 0;
}

template <int K, class T>
FASTERCACHE_INLINE void blend_taps(T* __restrict out, const Taps<T>& in, int64_t begin, int64_t count, bool streaming) {
  const Taps<T> taps = in;  // a local copy, which no store to `out` can change
  write_tiles(out, count, streaming, [&](T* to, int64_t at, int64_t size) FASTERCACHE_INLINE_LAMBDA {
    const int64_t done = blend_vectors<K>(to, taps, begin + at, size);
#pragma GCC ivdep
    for (int64_t i = done; i < size; ++i) store(to + i, blend_at<K>(taps, begin + at + i));
  });
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

// out[i] = x[i * x_step] - entry[i * entry_step], rounded once; `streaming` as above
template <class T>
void residual_run(T* out, const T* x, int64_t x_step, const T* entry, int64_t entry_step, int64_t count, bool streaming = false) {
  if (x_step == 1 && entry_step == 1) return blend_run(out, Taps<T>{2, {x, entry}, {1, -1}}, 0, count, streaming);
  for (int64_t i = 0; i < count; ++i) store(out + i, load(x[i * x_step]) - load(entry[i * entry_step]));
}

template <int K, class T, class G>
FASTERCACHE_INLINE void add_at(T* x, const G* gate, const Taps<T>& taps, int64_t i) {
  store(x, load(*x) + compute_t<T>(load(*gate)) * blend_at<K>(taps, i));
}

template <int K, class T, class G>
FASTERCACHE_INLINE void blend_add_taps(
    T* __restrict x, int64_t x_step, const G* gate, int64_t gate_step, const Taps<T>& in, int64_t begin, int64_t count) {
  const Taps<T> taps = in;
  if (x_step != 1 || gate_step > 1) {
    for (int64_t i = 0; i < count; ++i) add_at<K>(x + i * x_step, gate + i * gate_step, taps, begin + i);
    return;
  }
  const auto add = [&](int64_t i, int64_t end) FASTERCACHE_INLINE_LAMBDA {
    // Constant steps let the two usual layouts vectorise: a gate per channel, and one gate for the whole run.
    if (gate_step) {
#pragma GCC ivdep
#pragma GCC unroll 1
      for (int64_t j = i; j < end; ++j) add_at<K>(x + j, gate + j, taps, begin + j);
    } else {
#pragma GCC ivdep
#pragma GCC unroll 1
      for (int64_t j = i; j < end; ++j) add_at<K>(x + j, gate, taps, begin + j);
    }
  };
  constexpr int64_t LINE = LINE_BYTES / sizeof(T);
  int64_t i = blend_add_vectors<K>(x, gate, gate_step, taps, begin, count);
  for (; i + LINE <= count; i += LINE) {
    prefetch(x + i + LINE);
    for (int k = 0; k < K; ++k) prefetch(taps.slot[k] + begin + i + LINE);
    add(i, i + LINE);
  }
  add(i, count);
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
