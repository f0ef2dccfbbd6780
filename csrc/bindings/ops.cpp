// CPU implementations of the fastercache ops, registered through torch's stable ABI: one build serves torch 2.11 and later.
// The schemas are defined and their arguments validated in fastercache/ops/; what is checked here guards memory.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <type_traits>
#include <vector>

#include "../kernels/cfg.h"
#include "../kernels/packed.h"
#include "../kernels/prediction.h"
#include "../kernels/ring.h"
#include "../kernels/strided.h"
#include "../coefficient_layout.h"
#include "checks.h"

namespace {

using namespace fastercache;
// Elements below which another thread costs more than it saves; at::parallel_for uses the same number.
constexpr int64_t kGrain = 32768;

template <class T> struct Type { using type = T; };

template <class F>
void dispatch(ScalarType dtype, F&& call) {
  switch (dtype) {
    case ScalarType::Float: return call(Type<float>{});
    case ScalarType::Double: return call(Type<double>{});
    case ScalarType::BFloat16: return call(Type<bfloat16>{});
    case ScalarType::Half: return call(Type<float16>{});
    default: STD_TORCH_CHECK(false, "fastercache: the dtype must be float32, float64, bfloat16 or float16");
  }
}

template <class T> T* data(const Tensor& tensor) { return static_cast<T*>(tensor.data_ptr()); }
template <class T> const T* const_data(const Tensor& tensor) { return static_cast<const T*>(tensor.const_data_ptr()); }

// A map of CFG-Cache for values like `like`: as many elements, contiguous, in the type that those are computed in.
void check_map(const Tensor& map, const Tensor& like, const char* name) {
  check_size(map, like.numel(), name);
  const auto expected = like.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(map.scalar_type() == expected && map.is_contiguous(), name, " must be contiguous, and float64 for float64, else float32");
}

int64_t slot_index(float value, int64_t slots) {
  STD_TORCH_CHECK(value >= 0 && value < float(slots), "the coefficients name ring slot ", value, ", the ring has ", slots);
  return int64_t(value);
}

template <class T>
Taps<T> read_taps(const Tensor& ring, const Tensor& tensor) {
  const float* coefficients = coefficient_data(tensor);
  const float count = coefficients[COEFFICIENT_TAPS];
  STD_TORCH_CHECK(count >= 0 && count <= MAX_TAPS, "the coefficients use ", count, " taps, at most ", MAX_TAPS);
  Taps<T> taps;
  taps.count = int(count);
  for (int k = 0; k < taps.count; ++k) {
    taps.coefficient[k] = coefficients[COEFFICIENT_OF_TAP + k];
    taps.slot[k] = const_data<T>(ring) + slot_index(coefficients[COEFFICIENT_READ_SLOT + k], ring.size(0)) * ring.stride(0);
  }
  return taps;
}

template <int N>
StridedWalk<N> walk(const Tensor& shape, const std::array<const int64_t*, N>& strides) {
  return StridedWalk<N>(int(shape.dim()), shape.sizes().data(), strides);
}

// The strides of `tensor` broadcast to the shape of `like`: 0 wherever it has one element.
std::vector<int64_t> broadcast_strides(const Tensor& tensor, const Tensor& like) {
  const int64_t dims = like.dim();
  std::vector<int64_t> strides(size_t(dims), 0);
  const int64_t missing = dims - tensor.dim();
  STD_TORCH_CHECK(missing >= 0, "gate has ", tensor.dim(), " dimensions, more than x with ", dims);
  for (int64_t d = 0; d < tensor.dim(); ++d) {
    STD_TORCH_CHECK(tensor.size(d) == 1 || tensor.size(d) == like.size(missing + d), "gate does not broadcast to x");
    if (tensor.size(d) != 1) strides[size_t(missing + d)] = tensor.stride(d);
  }
  return strides;
}

void ring_push(Tensor ring, Tensor x, Tensor coefficients) {
  check_size(x, slot_size(ring), "x");
  STD_TORCH_CHECK(x.scalar_type() == ring.scalar_type(), "x and ring differ in dtype");
  const int64_t slot = slot_index(coefficient_data(coefficients)[COEFFICIENT_WRITE_SLOT], ring.size(0));
  const auto source = walk<1>(x, {x.strides().data()});
  const auto copy = [&](auto type) {
    using T = typename decltype(type)::type;
    T* out = data<T>(ring) + slot * ring.stride(0);
    const T* in = const_data<T>(x);
    const bool streaming = x.numel() * int64_t(sizeof(T)) >= STREAM_BYTES;
    torch::stable::parallel_for(0, x.numel(), kGrain, [&](int64_t begin, int64_t end) {
      source(begin, end, [&](int64_t position, const auto& offset, int64_t count) {
        copy_run(out + position, in + offset[0], source.step()[0], count, streaming);
      });
    });
  };
  switch (x.element_size()) {
    case 2: return copy(Type<uint16_t>{});
    case 4: return copy(Type<uint32_t>{});
    case 8: return copy(Type<uint64_t>{});
    default: STD_TORCH_CHECK(false, "x has elements of ", x.element_size(), " bytes, expected 2, 4 or 8");
  }
}

void ring_push_residual(Tensor ring, Tensor x, Tensor entry, Tensor coefficients) {
  check_size(x, slot_size(ring), "x");
  STD_TORCH_CHECK(x.scalar_type() == ring.scalar_type(), "x and ring differ in dtype");
  check_like(entry, x, "entry");
  const int64_t slot = slot_index(coefficient_data(coefficients)[COEFFICIENT_WRITE_SLOT], ring.size(0));
  const auto both = walk<2>(x, {x.strides().data(), entry.strides().data()});
  dispatch(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    T* out = data<T>(ring) + slot * ring.stride(0);
    const T *in = const_data<T>(x), *before = const_data<T>(entry);
    const bool streaming = x.numel() * int64_t(sizeof(T)) >= STREAM_BYTES;
    torch::stable::parallel_for(0, x.numel(), kGrain, [&](int64_t begin, int64_t end) {
      both(begin, end, [&](int64_t position, const auto& offset, int64_t count) {
        residual_run(out + position, in + offset[0], both.step()[0], before + offset[1], both.step()[1], count, streaming);
      });
    });
  });
}

void ring_blend(Tensor out, Tensor ring, Tensor coefficients) {
  check_size(out, slot_size(ring), "out");
  STD_TORCH_CHECK(out.scalar_type() == ring.scalar_type() && out.is_contiguous(), "out must be contiguous and of the ring's dtype");
  dispatch(ring.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const Taps<T> taps = read_taps<T>(ring, coefficients);
    T* to = data<T>(out);
    const bool streaming = out.numel() * int64_t(sizeof(T)) >= STREAM_BYTES;
    torch::stable::parallel_for(0, out.numel(), kGrain, [&](int64_t begin, int64_t end) {
      blend_run(to + begin, taps, begin, end - begin, streaming);
    });
  });
}

void ring_blend_add(Tensor x, Tensor gate, Tensor ring, Tensor coefficients) {
  check_size(x, slot_size(ring), "x");
  STD_TORCH_CHECK(x.scalar_type() == ring.scalar_type(), "x and ring differ in dtype");
  const auto gate_strides = broadcast_strides(gate, x);
  const auto both = walk<2>(x, {x.strides().data(), gate_strides.data()});
  dispatch(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const Taps<T> taps = read_taps<T>(ring, coefficients);
    const auto add = [&](auto gate_type) {
      using G = typename decltype(gate_type)::type;
      T* to = data<T>(x);
      const G* factor = const_data<G>(gate);
      torch::stable::parallel_for(0, x.numel(), kGrain, [&](int64_t begin, int64_t end) {
        both(begin, end, [&](int64_t position, const auto& offset, int64_t count) {
          blend_add_run(to + offset[0], both.step()[0], factor + offset[1], both.step()[1], taps, position, count);
        });
      });
    };
    if (gate.scalar_type() == x.scalar_type()) return add(type);
    STD_TORCH_CHECK(gate.scalar_type() == ScalarType::Float, "gate must have the dtype of x, or float32");
    add(Type<float>{});
  });
}

template <class F>
void dispatch_packed(ScalarType dtype, F&& call) {
  STD_TORCH_CHECK(dtype != ScalarType::Double, "a packed ring holds float32, bfloat16 or float16, not float64");
  dispatch(dtype, [&](auto type) {
    if constexpr (!std::is_same_v<decltype(type), Type<double>>) call(type);
  });
}

PackedTaps read_packed_taps(const Tensor& tensor, int64_t bits) {
  const float* coefficients = coefficient_data(tensor);
  const int taps = bits ? 2 : 1;
  const float count = coefficients[COEFFICIENT_TAPS];
  STD_TORCH_CHECK(
      count >= 0 && count <= taps, "the coefficients use ", count, " taps, a packed ring of these bits holds ", taps);
  const bool both = count > 1;
  const float first = count > 0 ? coefficients[COEFFICIENT_OF_TAP] : 0, second = both ? coefficients[COEFFICIENT_OF_TAP + 1] : 0;
  return {both, first + second, -second};
}

// run(line, offsets): one line of channels at a time, at `offsets` from the start of each of the N tensors whose strides are walked.
template <int N, class F>
void each_line(const PackedLines& shape, const Tensor& like, const std::array<const int64_t*, N>& strides, F&& run) {
  const StridedWalk<N> lines(int(like.dim()) - 1, like.sizes().data(), strides);
  torch::stable::parallel_for(0, shape.lines, std::max<int64_t>(1, kGrain / shape.channels), [&](int64_t begin, int64_t end) {
    lines(begin, end, [&](int64_t position, const auto& offsets, int64_t count) {
      auto at = offsets;
      for (int64_t i = 0; i < count; ++i) {
        run(position + i, at);
        for (int o = 0; o < N; ++o) at[size_t(o)] += lines.step()[size_t(o)];
      }
    });
  });
}

void packed_push(Tensor ring, Tensor x, int64_t bits) {
  const PackedLines shape = packed_lines(ring, x, bits);
  const int64_t step = x.stride(x.dim() - 1);
  dispatch_packed(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    auto* packed = data<uint8_t>(ring);
    const T* in = const_data<T>(x);
    each_line<1>(shape, x, {x.strides().data()}, [&](int64_t line, const auto& at) {
      push_packed(packed + line * shape.bytes, in + at[0], step, shape.channels, shape.bits);
    });
  });
}

void packed_push_residual(Tensor ring, Tensor x, Tensor entry, int64_t bits) {
  const PackedLines shape = packed_lines(ring, x, bits);
  check_like(entry, x, "entry");
  const int64_t step = x.stride(x.dim() - 1), entry_step = entry.stride(x.dim() - 1);
  dispatch_packed(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    auto* packed = data<uint8_t>(ring);
    const T *in = const_data<T>(x), *before = const_data<T>(entry);
    each_line<2>(shape, x, {x.strides().data(), entry.strides().data()}, [&](int64_t line, const auto& at) {
      push_packed(packed + line * shape.bytes, in + at[0], step, shape.channels, shape.bits, before + at[1], entry_step);
    });
  });
}

void packed_blend(Tensor out, Tensor ring, Tensor coefficients, int64_t bits) {
  const PackedLines shape = packed_lines(ring, out, bits);
  const PackedTaps taps = read_packed_taps(coefficients, bits);
  STD_TORCH_CHECK(out.is_contiguous(), "out must be contiguous");
  dispatch_packed(out.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    T* to = data<T>(out);
    const auto* packed = const_data<uint8_t>(ring);
    torch::stable::parallel_for(0, shape.lines, std::max<int64_t>(1, kGrain / shape.channels), [&](int64_t begin, int64_t end) {
      for (int64_t line = begin; line < end; ++line)
        blend_packed(to + line * shape.channels, packed + line * shape.bytes, shape.channels, shape.bits, taps);
    });
  });
}

void packed_blend_add(Tensor x, Tensor gate, Tensor ring, Tensor coefficients, int64_t bits) {
  const PackedLines shape = packed_lines(ring, x, bits);
  const PackedTaps taps = read_packed_taps(coefficients, bits);
  const auto gate_strides = broadcast_strides(gate, x);
  STD_TORCH_CHECK(shape.channels == 1 || x.stride(x.dim() - 1) == 1, "x must be contiguous in the last dimension");
  dispatch_packed(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const auto add = [&](auto gate_type) {
      using G = typename decltype(gate_type)::type;
      T* to = data<T>(x);
      const G* factor = const_data<G>(gate);
      const auto* packed = const_data<uint8_t>(ring);
      each_line<2>(shape, x, {x.strides().data(), gate_strides.data()}, [&](int64_t line, const auto& at) {
        blend_add_packed(
            to + at[0], factor + at[1], gate_strides.back(), packed + line * shape.bytes, shape.channels, shape.bits, taps);
      });
    };
    if (gate.scalar_type() == x.scalar_type()) return add(type);
    STD_TORCH_CHECK(gate.scalar_type() == ScalarType::Float, "gate must have the dtype of x, or float32");
    add(Type<float>{});
  });
}

// The filter of the last call of this thread, where it is the one wanted: a model's planes have one size, and the bases take longer to make
// than a small split.
template <class A>
std::shared_ptr<const LowPass<A>> last_low_pass(int64_t height, int64_t width, int64_t radius) {
  thread_local std::shared_ptr<const LowPass<A>> last;
  if (!last || !last->is_for(height, width, radius)) last = std::make_shared<const LowPass<A>>(height, width, radius);
  return last;
}

void cfg_split(Tensor low, Tensor high, Tensor uncond, Tensor cond, int64_t radius) {
  const int64_t dims = uncond.dim();
  STD_TORCH_CHECK(dims >= 2, "uncond has ", dims, " dimensions, expected [..., H, W]");
  const int64_t height = uncond.size(dims - 2), width = uncond.size(dims - 1), plane = height * width;
  const int64_t side = std::min(height, width);
  STD_TORCH_CHECK(radius >= 0 && radius < side && 2 * radius < side, "radius ", radius, " is too large for ", height, " x ", width);
  check_like(cond, uncond, "cond");
  check_map(low, uncond, "low");
  check_map(high, uncond, "high");
  const auto both = walk<2>(uncond, {uncond.strides().data(), cond.strides().data()});
  dispatch(uncond.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using A = compute_t<T>;
    const std::shared_ptr<const LowPass<A>> low_pass = last_low_pass<A>(height, width, radius);
    const LowPass<A>& split = *low_pass;
    A *low_data = data<A>(low), *high_data = data<A>(high);
    const T *uncond_data = const_data<T>(uncond), *cond_data = const_data<T>(cond);
    torch::stable::parallel_for(0, uncond.numel() / plane, std::max<int64_t>(1, kGrain / plane), [&](int64_t begin, int64_t end) {
      std::vector<A> scratch(size_t(split.scratch_size()));
      for (int64_t p = begin; p < end; ++p) {
        both(p * plane, (p + 1) * plane, [&](int64_t position, const auto& offset, int64_t count) {
          difference_run(
              high_data + position, uncond_data + offset[0], both.step()[0], cond_data + offset[1], both.step()[1], count);
        });
        split(low_data + p * plane, high_data + p * plane, scratch.data());
      }
    });
  });
}

// The maps of a reconstruction with their weights. One before the newest, which may never have been written, is in use where its weight is
// not 0.
template <class T>
WeightedMaps<compute_t<T>> read_maps(
    const Tensor& low, const Tensor& high, const std::optional<Tensor>& previous, const float* coefficients) {
  using A = compute_t<T>;
  const bool three = previous && coefficients[COEFFICIENT_PREVIOUS] != 0;
  return {
      const_data<A>(low), const_data<A>(high), three ? const_data<A>(*previous) : nullptr,
      A(coefficients[COEFFICIENT_LOW]), A(coefficients[COEFFICIENT_HIGH]), three ? A(coefficients[COEFFICIENT_PREVIOUS]) : A(0)};
}

void cfg_reconstruct(
    Tensor out, Tensor cond, Tensor low, Tensor high, Tensor coefficients, int64_t cond_half, std::optional<Tensor> previous) {
  const int64_t half = cond.numel();
  check_size(out, 2 * half, "out");
  STD_TORCH_CHECK(out.scalar_type() == cond.scalar_type() && out.is_contiguous(), "out must be contiguous and of the dtype of cond");
  check_map(low, cond, "low");
  check_map(high, cond, "high");
  if (previous) check_map(*previous, cond, "previous");
  STD_TORCH_CHECK(cond_half == 0 || cond_half == 1, "cond_half is ", cond_half, ", expected 0 or 1");
  const float* weights = coefficient_data(coefficients);
  const auto source = walk<1>(cond, {cond.strides().data()});
  dispatch(cond.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    T* copied = data<T>(out) + cond_half * half;
    T* rebuilt = data<T>(out) + (1 - cond_half) * half;
    const T* in = const_data<T>(cond);
    const auto maps = read_maps<T>(low, high, previous, weights);
    const bool streaming = out.numel() * int64_t(sizeof(T)) >= CFG_STREAM_BYTES;
    torch::stable::parallel_for(0, half, kGrain, [&](int64_t begin, int64_t end) {
      source(begin, end, [&](int64_t position, const auto& offset, int64_t count) {
        const T* from = in + offset[0];
        reconstruct_run(rebuilt + position, from, source.step()[0], maps.from(position), count, streaming);
        copy_run(copied + position, from, source.step()[0], count, streaming);
      });
    });
  });
}

void prediction_blend(Tensor out, Tensor ring, Tensor newest, Tensor now, Tensor coefficients, std::optional<Tensor> fresh) {
  check_size(out, slot_size(ring), "out");
  STD_TORCH_CHECK(out.scalar_type() == ring.scalar_type() && out.is_contiguous(), "out must be contiguous and of the ring's dtype");
  check_like(newest, out, "newest");
  STD_TORCH_CHECK(newest.is_contiguous(), "newest must be contiguous");
  check_like(now, out, "now");
  if (fresh) check_like(*fresh, out, "fresh");
  const float* weights = coefficient_data(coefficients);
  const Tensor& second = fresh ? *fresh : now;
  const auto both = walk<2>(out, {now.strides().data(), second.strides().data()});
  dispatch(ring.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const Taps<T> taps = read_taps<T>(ring, coefficients);
    T* to = data<T>(out);
    const T *newest_data = const_data<T>(newest), *now_data = const_data<T>(now), *fresh_data = const_data<T>(second);
    const bool streaming = out.numel() * int64_t(sizeof(T)) >= CFG_STREAM_BYTES;
    torch::stable::parallel_for(0, out.numel(), kGrain, [&](int64_t begin, int64_t end) {
      both(begin, end, [&](int64_t position, const auto& offset, int64_t count) {
        Terms<T> terms;
        for (int k = 0; k < taps.count; ++k) terms.add(taps.coefficient[k], taps.slot[k] + position);
        terms.add(weights[COEFFICIENT_NOW], now_data + offset[0], both.step()[0]);
        terms.add(weights[COEFFICIENT_NEWEST], newest_data + position);
        if (fresh) terms.add(weights[COEFFICIENT_FRESH], fresh_data + offset[1], both.step()[1]);
        prediction_run(to + position, terms, count, streaming);
      });
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastercache, CPU, m) {
  m.impl("ring_push", TORCH_BOX(&ring_push));
  m.impl("ring_push_residual", TORCH_BOX(&ring_push_residual));
  m.impl("ring_blend", TORCH_BOX(&ring_blend));
  m.impl("ring_blend_add", TORCH_BOX(&ring_blend_add));
  m.impl("packed_push", TORCH_BOX(&packed_push));
  m.impl("packed_push_residual", TORCH_BOX(&packed_push_residual));
  m.impl("packed_blend", TORCH_BOX(&packed_blend));
  m.impl("packed_blend_add", TORCH_BOX(&packed_blend_add));
  m.impl("cfg_split", TORCH_BOX(&cfg_split));
  m.impl("cfg_reconstruct", TORCH_BOX(&cfg_reconstruct));
  m.impl("prediction_blend", TORCH_BOX(&prediction_blend));
}
