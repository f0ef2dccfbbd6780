// Prediction blend: a weighted sum of cached predictions, latents and a fresh prediction, over one run of elements. No torch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "../coefficient_layout.h"
#include "dtypes.h"
#include "tiles.h"

namespace fastercache {

// The tensors in use, each with its step and coefficient. One whose coefficient is 0 is never touched.
template <class T>
struct Terms {
  static constexpr int MOST = MAX_TAPS + 3;
  int count = 0;
  const T* values[MOST] = {};
  int64_t step[MOST] = {};
  compute_t<T> coefficient[MOST] = {};

  void add(compute_t<T> factor, const T* from, int64_t its_step = 1) {
    if (factor == 0) return;
    values[count] = from;
    step[count] = its_step;
    coefficient[count++] = factor;
  }
};

#if defined(FASTERCACHE_F16C)
// Adds as many as fill whole vectors, and returns how many.
FASTERCACHE_F16C inline int64_t add_f16c(float* sum, float coefficient, const float16* values, int64_t count) {
  const __m256 factor = _mm256_set1_ps(coefficient);
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) _mm256_storeu_ps(sum + i, _mm256_add_ps(_mm256_loadu_ps(sum + i), _mm256_mul_ps(factor, load_eight(values + i))));
  return i;
}
#endif

// sum[i] += coefficient * values[i * step]
template <class T>
FASTERCACHE_INLINE void add_term(compute_t<T>* sum, compute_t<T> coefficient, const T* values, int64_t step, int64_t count) {
  if (step != 1) {
    for (int64_t i = 0; i < count; ++i) sum[i] += coefficient * load(values[i * step]);
    return;
  }
  int64_t i = 0;
#if defined(FASTERCACHE_F16C)
  if constexpr (std::is_same_v<T, float16>) i = HAS_F16C ? add_f16c(sum, coefficient, values, count) : 0;
#endif
#pragma GCC ivdep
  for (; i < count; ++i) sum[i] += coefficient * load(values[i]);
}

template <class T>
FASTERCACHE_INLINE void store_rounded(T* out, const compute_t<T>* values, int64_t count) {
  if constexpr (std::is_same_v<T, float16>) {
    narrow(out, values, count);
  } else {
    for (int64_t i = 0; i < count; ++i) store(out + i, values[i]);
  }
}

// out[i] = sum_k c_k values_k[i * step_k], rounded once; `streaming` past the caches. Sums wait in the L1 cache for their next term, so any
// number of them in any steps takes one loop each. `out` may be one of the terms, of step 1.
template <class T>
FASTERCACHE_CPU_CLONES void prediction_run(T* out, const Terms<T>& terms, int64_t count, bool streaming = false) {
  constexpr int64_t SIZE = 256;
  write_tiles(out, count, streaming, [&](T* to, int64_t at, int64_t size) FASTERCACHE_INLINE_LAMBDA {
    for (int64_t done = 0; done < size; done += SIZE) {
      const int64_t part = std::min(SIZE, size - done);
      alignas(64) compute_t<T> sum[SIZE] = {};
      for (int k = 0; k < terms.count; ++k)
        add_term(sum, terms.coefficient[k], terms.values[k] + (at + done) * terms.step[k], terms.step[k], part);
      store_rounded(to + done, sum, part);
    }
  });
}

}  // namespace fastercache
