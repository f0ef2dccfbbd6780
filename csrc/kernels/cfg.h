// CFG-Cache: the low-pass split of one plane, and the reconstruction of one run of elements. No torch.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "dtypes.h"
#include "tiles.h"

namespace fastercache {

// out[m, n] = a[m, k] b[k, n], row-major. Four rows of b per pass: one store per four multiply-adds instead of one each.
template <class A>
FASTERCACHE_CPU_CLONES void matmul(A* __restrict out, const A* a, const A* b, int64_t m, int64_t k, int64_t n) {
  for (int64_t i = 0; i < m; ++i, a += k, out += n) {
    for (int64_t j = 0; j < n; ++j) out[j] = 0;
    int64_t p = 0;
    for (; p + 4 <= k; p += 4) {
      const A a0 = a[p], a1 = a[p + 1], a2 = a[p + 2], a3 = a[p + 3];
      const A *b0 = b + p * n, *b1 = b0 + n, *b2 = b1 + n, *b3 = b2 + n;
      for (int64_t j = 0; j < n; ++j) out[j] += a0 * b0[j] + a1 * b1[j] + a2 * b2[j] + a3 * b3[j];
    }
    for (; p < k; ++p)
      for (int64_t j = 0; j < n; ++j) out[j] += a[p] * b[p * n + j];
  }
}

// The orthonormal real Fourier basis of n points: 1, then a cosine and a sine of each frequency up to `radius`.
template <class A>
struct FourierBasis {
  int64_t modes;
  std::vector<A> by_point;  // [n, modes]
  std::vector<A> by_mode;   // [modes, n]

  FourierBasis(int64_t n, int64_t radius) : modes(2 * radius + 1), by_point(n * modes), by_mode(n * modes) {
    std::vector<double> cosine(n), sine(n);  // every angle is a multiple of 2 pi / n: n of each, in double, serve all modes
    for (int64_t j = 0; j < n; ++j) {
      cosine[j] = std::cos(2 * 3.14159265358979323846 * double(j) / double(n));
      sine[j] = std::sin(2 * 3.14159265358979323846 * double(j) / double(n));
    }
    for (int64_t mode = 0; mode < modes; ++mode) {
      const int64_t frequency = (mode + 1) / 2;
      const double scale = std::sqrt((mode == 0 ? 1.0 : 2.0) / double(n));
      for (int64_t j = 0; j < n; ++j) {
        const int64_t angle = frequency * j % n;
        const double value = mode == 0 ? 1.0 : mode % 2 ? cosine[angle] : sine[angle];
        by_point[j * modes + mode] = by_mode[mode * n + j] = A(scale * value);
      }
    }
  }
};

// Splits planes of H x W: low = B_H (M * (B_H^T d B_W)) B_W^T with M the disc ky^2 + kx^2 <= radius^2, high = d - low.
template <class A>
class LowPass {
 public:
  LowPass(int64_t height, int64_t width, int64_t radius)
      : height_(height), width_(width), radius_(radius), rows_(height, radius), columns_(width, radius) {}

  bool is_for(int64_t height, int64_t width, int64_t radius) const { return height == height_ && width == width_ && radius == radius_; }

  int64_t scratch_size() const { return rows_.modes * (width_ + columns_.modes) + height_ * columns_.modes; }

  // `high` holds d on entry and d - low on return.
  void operator()(A* low, A* high, A* scratch) const {
    const int64_t modes = rows_.modes;
    A* half = scratch;                   // [modes, W]
    A* spectrum = half + modes * width_;   // [modes, modes]
    A* rebuilt = spectrum + modes * modes;  // [H, modes]
    matmul(half, rows_.by_mode.data(), high, modes, height_, width_);
    matmul(spectrum, half, columns_.by_point.data(), modes, width_, modes);
    for (int64_t y = 0; y < modes; ++y) {
      for (int64_t x = 0; x < modes; ++x) {
        const int64_t ky = (y + 1) / 2, kx = (x + 1) / 2;
        if (ky * ky + kx * kx > radius_ * radius_) spectrum[y * modes + x] = 0;
      }
    }
    matmul(rebuilt, rows_.by_point.data(), spectrum, height_, modes, modes);
    matmul(low, rebuilt, columns_.by_mode.data(), height_, modes, width_);
    for (int64_t i = 0; i < height_ * width_; ++i) high[i] -= low[i];
  }

 private:
  int64_t height_, width_, radius_;
  FourierBasis<A> rows_, columns_;
};

// out[i] = uncond[i * uncond_step] - cond[i * cond_step], in the type of the maps
template <class T>
FASTERCACHE_CPU_CLONES void difference_run(
    compute_t<T>* __restrict out, const T* uncond, int64_t uncond_step, const T* cond, int64_t cond_step, int64_t count) {
  if (uncond_step == 1 && cond_step == 1) {
    Tile<T> uncond_tile, cond_tile;
    each_tile<T>(count, [&](int64_t at, int64_t size) FASTERCACHE_INLINE_LAMBDA {
      const auto *u = uncond_tile.read(uncond + at, size), *c = cond_tile.read(cond + at, size);
      for (int64_t i = 0; i < size; ++i) out[at + i] = load(u[i]) - load(c[i]);
    });
  } else {
    for (int64_t i = 0; i < count; ++i) out[i] = load(uncond[i * uncond_step]) - load(cond[i * cond_step]);
  }
}

// What a reconstruction adds to the conditional branch: maps and their weights. `previous` is null where it is not in use.
template <class A>
struct WeightedMaps {
  const A *low, *high, *previous;
  A w_low, w_high, w_previous;

  WeightedMaps from(int64_t begin) const { return {low + begin, high + begin, previous ? previous + begin : nullptr, w_low, w_high, w_previous}; }

  template <bool PREVIOUS>
  FASTERCACHE_INLINE A added_to(A value, int64_t i) const {
    value = value + w_low * low[i] + w_high * high[i];
    return PREVIOUS ? value + w_previous * previous[i] : value;
  }
};

template <bool PREVIOUS, class T>
FASTERCACHE_INLINE void reconstruct(
    T* __restrict rebuilt, const T* cond, int64_t step, const WeightedMaps<compute_t<T>>& in, int64_t count, bool streaming) {
  const WeightedMaps<compute_t<T>> maps = in;  // a local copy, which no store to `rebuilt` can change
  if (step != 1) {
    for (int64_t i = 0; i < count; ++i) store(rebuilt + i, maps.template added_to<PREVIOUS>(load(cond[i * step]), i));
    return;
  }
  Tile<T> cond_tile, rebuilt_tile;
  const auto span = [&](T* out, int64_t at, int64_t size) FASTERCACHE_INLINE_LAMBDA {
    const auto* c = cond_tile.read(cond + at, size);
    auto* to = rebuilt_tile.target(out);
#pragma GCC ivdep
    for (int64_t i = 0; i < size; ++i) store(to + i, maps.template added_to<PREVIOUS>(load(c[i]), at + i));
    rebuilt_tile.written(out, size);
  };
  write_tiles(rebuilt, count, streaming, span);
}

// rebuilt[i] = cond[i * step] + w_low low[i] + w_high high[i] (+ w_previous previous[i]), rounded once; `streaming` past the caches
template <class T>
FASTERCACHE_CPU_CLONES void reconstruct_run(
    T* rebuilt, const T* cond, int64_t step, const WeightedMaps<compute_t<T>>& maps, int64_t count, bool streaming = false) {
  if (maps.previous) return reconstruct<true>(rebuilt, cond, step, maps, count, streaming);
  reconstruct<false>(rebuilt, cond, step, maps, count, streaming);
}

}  // namespace fastercache
