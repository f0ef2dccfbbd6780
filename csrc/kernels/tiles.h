// How the loops over elements see their operands: in place, or float16 as a tile of floats in the L1 cache. No torch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "dtypes.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__CUDACC__)
#include <immintrin.h>
#endif

namespace fastercache {

// The compiler vectorises float16's conversions as integer arithmetic, a dozen operations each. The processors of the last ten years convert
// 8 or 16 in one instruction, which has to be asked for by name: a blend of two taps takes 4.8 ms instead of 9.6 (64 MB, Zen 4, two cores).
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__CUDACC__)
enum class HardwareFloat16 { NONE, F16C, AVX512 };
inline const HardwareFloat16 HARDWARE_FLOAT16 = __builtin_cpu_supports("avx512f") ? HardwareFloat16::AVX512
    : __builtin_cpu_supports("avx") && __builtin_cpu_supports("f16c")              ? HardwareFloat16::F16C
                                                                                   : HardwareFloat16::NONE;

// Each converts as many as fill whole vectors, and returns how many.
__attribute__((target("avx,f16c"))) inline int64_t widen_f16c(float* out, const float16* in, int64_t count) {
  int64_t i = 0;
#pragma GCC unroll 4
  for (; i + 8 <= count; i += 8) _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
  return i;
}

__attribute__((target("avx,f16c"))) inline int64_t narrow_f16c(float16* out, const float* in, int64_t count) {
  int64_t i = 0;
#pragma GCC unroll 4
  for (; i + 8 <= count; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT));
  return i;
}

__attribute__((target("avx512f"))) inline int64_t widen_avx512(float* out, const float16* in, int64_t count) {
  int64_t i = 0;
#pragma GCC unroll 4
  for (; i + 16 <= count; i += 16) _mm512_storeu_ps(out + i, _mm512_maskz_cvtph_ps(0xFFFF, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + i))));
  return i;
}

__attribute__((target("avx512f"))) inline int64_t narrow_avx512(float16* out, const float* in, int64_t count) {
  int64_t i = 0;
#pragma GCC unroll 4
  for (; i + 16 <= count; i += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), _mm512_maskz_cvtps_ph(0xFFFF, _mm512_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT));
  return i;
}

inline int64_t widen_vectors(float* out, const float16* in, int64_t count) {
  switch (HARDWARE_FLOAT16) {
    case HardwareFloat16::AVX512: return widen_avx512(out, in, count);
    case HardwareFloat16::F16C: return widen_f16c(out, in, count);
    default: return 0;
  }
}

inline int64_t narrow_vectors(float16* out, const float* in, int64_t count) {
  switch (HARDWARE_FLOAT16) {
    case HardwareFloat16::AVX512: return narrow_avx512(out, in, count);
    case HardwareFloat16::F16C: return narrow_f16c(out, in, count);
    default: return 0;
  }
}
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

template <class T> using tiled_t = std::conditional_t<std::is_same_v<T, float16>, float, T>;

// span(at, count) for the tiles of `count` elements of T
template <class T, class F>
FASTERCACHE_INLINE void each_tile(int64_t count, F&& span) {
  for (int64_t at = 0, size; at < count; at += size) span(at, size = std::min(Tile<T>::SIZE, count - at));
}

}  // namespace fastercache
