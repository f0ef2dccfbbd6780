// Walks N tensors of one shape and different strides, in row-major order, as runs with a constant step each.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

namespace fastercache {

template <int N>
class StridedWalk {
 public:
  using Offsets = std::array<int64_t, N>;

  // Adjacent dimensions that every operand steps through evenly become one, so a contiguous tensor is a single run.
  StridedWalk(int dims, const int64_t* sizes, const std::array<const int64_t*, N>& strides) {
    for (int d = 0; d < dims; ++d) {
      if (sizes[d] == 1) continue;
      bool merges = !dims_.empty();
      for (int o = 0; merges && o < N; ++o) merges = dims_.back().step[o] == strides[o][d] * sizes[d];
      if (!merges) dims_.push_back({1, {}});
      dims_.back().size *= sizes[d];
      for (int o = 0; o < N; ++o) dims_.back().step[o] = strides[o][d];
    }
    if (dims_.empty()) {
      dims_.push_back({1, {}});
      dims_.back().step.fill(1);
    }
  }

  const Offsets& step() const { return dims_.back().step; }

  // run(position, offsets, count) for elements [begin, end): `position` is the row-major index of the run's first element.
  template <class F>
  void operator()(int64_t begin, int64_t end, F&& run) const {
    while (begin < end) {
      Offsets offsets{};
      int64_t rest = begin;
      for (int d = int(dims_.size()) - 1; d >= 0; --d) {
        const int64_t index = d > 0 ? rest % dims_[d].size : rest;
        rest = d > 0 ? rest / dims_[d].size : 0;
        for (int o = 0; o < N; ++o) offsets[o] += index * dims_[d].step[o];
      }
      const int64_t left = dims_.size() > 1 ? dims_.back().size - begin % dims_.back().size : end - begin;
      const int64_t count = std::min(end - begin, left);
      run(begin, offsets, count);
      begin += count;
    }
  }

 private:
  struct Dim {
    int64_t size;
    Offsets step;
  };
  std::vector<Dim> dims_;
};

}  // namespace fastercache
