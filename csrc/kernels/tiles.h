// How the loops over elements see their operands: in place, or float16 as a tile of floats in the L1 cache. No torch.
#pragma once

#include <algorithm>
#include <cstdint>

#include "dtypes.h"
#include "stream.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__CUDACC__)
#include <immintrin.h>
#endif

namespace fastercache {

// The compiler vectorises float16's conversions as integer arithmetic, a dozen operations each. The processors of the last ten years
// convert eight in one instruction, which has to be asked for by name: a blend of two taps takes 2.8 ms instead of 9.6 (64 MB, Zen 4, two
// cores).
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__CUDACC__)
#define FASTERCACHE_F16C __attribute__((target("avx,f16c")))
inline const bool HAS_F16C = __builtin_cpu_supports("avx") && __builtin_cpu_supports("f16c");

FASTERCACHE_F16C FASTERCACHE_INLINE __m256 load_eight(const float16* in) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in)));
}
FASTERCACHE_F16C FASTERCACHE_INLINE __m256 load_eight(const float* in) { return _mm256_loadu_ps(in); }
FASTERCACHE_F16C FASTERCACHE_INLINE void store_eight(float16* out, __m256 values) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT));
}

// Each converts as many as fill whole vectors, and returns how many.
FASTERCACHE_F16C inline int64_t widen_f16c(float* out, const float16* in, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) _mm256_storeu_ps(out + i, load_eight(in + i));
  return i;
}
FASTERCACHE_F16C inline int64_t narrow_f16c(float16* out, const float* in, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) store_eight(out + i, load_eight(in + i));
  return i;
}

inline int64_t widen_vectors(float* out, const float16* in, int64_t count) { return HAS_F16C ? widen_f16c(out, in, count) : 0; }
inline int64_t narrow_vectors(float16* out, const float* in, int64_t count) { return HAS_F16C ? narrow_f16c(out, in, count) : 0; }
#else
inline int64_t widen_vectors(float*, const float16*, int64_t) { return 0; }
inline int64_t narrow_vectors(float16*, const float*, int64_t) { return 0; }
#endif

FASTERCACHE_INLINE void widen(float* out, const float16* in, int64_t count) {
  for (int64_t i = widen_vectors(out, in, count); i < count; ++i) out[i] = load(in[i]);
}

FASTERCACHE_INLINE void narrow(float16* out, const float* in, int64_t count) {
  for (int64_t i = narrow_vectors(out, in, count); i < count; ++i) store(out + i, in[i]);
}

FASTERCACHE_INLINE void prefetch(const void* line) {
#if defined(__GNUC__)
  __builtin_prefetch(line);
#endif
}

// An operand of a loop over at most SIZE elements at a time: the elements themselves, or a copy of them in float.
template <class T>
struct Tile {
  static constexpr int64_t SIZE = INT64_MAX;
  const T* read(const T* in, int64_t) { return in; }
  T* target(T* out) { return out; }  // what the loop writes; `written` then brings it to `out`
  void written(T*, int64_t) {}
};

template <>
struct Tile<float16> {
  static constexpr int64_t SIZE = 256;
  alignas(64) float values[SIZE];
  const float* read(const float16* in, int64_t count) {
    widen(values, in, count);
    return values;
  }
  float* target(float16*) { return values; }
  void written(float16* out, int64_t count) { narrow(out, values, count); }
};

// span(at, count) for the tiles of `count` elements of T
template <class T, class F>
FASTERCACHE_INLINE void each_tile(int64_t count, F&& span) {
  for (int64_t at = 0, size; at < count; at += size) span(at, size = std::min(Tile<T>::SIZE, count - at));
}

// span(to, at, size) for tiles of all that is written: `to` is where those from number `at` on belong or, if they are `streaming`, a line of
// the L1 cache, which then goes past the caches.
template <class T, class F>
FASTERCACHE_INLINE void write_tiles(T* out, int64_t count, bool streaming, F&& span) {
  int64_t done = 0;
  if (streaming) {
    // Small lines: reading and streaming overlap. With 8 KiB instead of 256 bytes a blend takes twice as long.
    constexpr int64_t LINE = 256 / sizeof(T);
    static_assert(LINE <= Tile<T>::SIZE);
    alignas(64) T line[LINE];
    for (; done + LINE <= count; done += LINE) {
      span(line, done, LINE);
      stream(out + done, line, sizeof line);
    }
    stream_fence();
  }
  each_tile<T>(count - done, [&](int64_t at, int64_t size) FASTERCACHE_INLINE_LAMBDA { span(out + done + at, done + at, size); });
}

}  // namespace fastercache
