// CPU implementations of the fastercache ops, registered through torch's stable ABI: one build serves torch 2.11 and later.
// The schemas are defined and their arguments validated in fastercache/ops.py; what is checked here guards memory.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/version.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "../kernels/cfg.h"
#include "../kernels/ring.h"
#include "../kernels/strided.h"
#include "../row_layout.h"

#define STRING_OF(x) #x
#define STRING(x) STRING_OF(x)

// fastercache/ops.py finds this text in the file, so it can name the version even when the library does not load.
extern "C" __attribute__((used, visibility("default"))) const char fastercache_built_with[] =
    "fastercache built with torch " STRING(TORCH_VERSION_MAJOR) "." STRING(TORCH_VERSION_MINOR) "." STRING(TORCH_VERSION_PATCH);

namespace {

using namespace fastercache;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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

void check_size(const Tensor& tensor, int64_t expected, const char* name) {
  STD_TORCH_CHECK(tensor.numel() == expected, name, " has ", tensor.numel(), " elements, expected ", expected);
}

const float* row_data(const Tensor& row) {
  STD_TORCH_CHECK(
      row.scalar_type() == ScalarType::Float && row.numel() == ROW_SIZE && row.is_contiguous(),
      "row must be ", ROW_SIZE, " contiguous float32 values");
  return const_data<float>(row);
}

int64_t slot_index(float value, int64_t slots) {
  STD_TORCH_CHECK(value >= 0 && value < float(slots), "the row names ring slot ", value, ", the ring has ", slots);
  return int64_t(value);
}

int64_t slot_size(const Tensor& ring) { return ring.size(0) ? ring.numel() / ring.size(0) : 0; }

template <class T>
Taps<T> read_taps(const Tensor& ring, const Tensor& row_tensor) {
  const float* row = row_data(row_tensor);
  STD_TORCH_CHECK(row[ROW_TAPS] >= 0 && row[ROW_TAPS] <= MAX_TAPS, "the row uses ", row[ROW_TAPS], " taps, at most ", MAX_TAPS);
  Taps<T> taps;
  taps.count = int(row[ROW_TAPS]);
  for (int k = 0; k < taps.count; ++k) {
    taps.coefficient[k] = row[ROW_COEFFICIENT + k];
    taps.slot[k] = const_data<T>(ring) + slot_index(row[ROW_READ_SLOT + k], ring.size(0)) * ring.stride(0);
  }
  return taps;
}

template <int N>
StridedWalk<N> walk(const Tensor& shape, const std::array<const int64_t*, N>& strides) {
  return StridedWalk<N>(int(shape.dim()), shape.sizes().data(), strides);
}

// The strides of `tensor` broadcast to `dims` dimensions: 0 wherever it has one element.
std::vector<int64_t> broadcast_strides(const Tensor& tensor, int64_t dims) {
  std::vector<int64_t> strides(size_t(dims), 0);
  const int64_t missing = dims - tensor.dim();
  STD_TORCH_CHECK(missing >= 0, "gate has ", tensor.dim(), " dimensions, more than x with ", dims);
  for (int64_t d = 0; d < tensor.dim(); ++d)
    if (tensor.size(d) != 1) strides[size_t(missing + d)] = tensor.stride(d);
  return strides;
}

void ring_push(Tensor ring, Tensor x, Tensor row) {
  check_size(x, slot_size(ring), "x");
  const int64_t slot = slot_index(row_data(row)[ROW_WRITE_SLOT], ring.size(0));
  const auto source = walk<1>(x, {x.strides().data()});
  const auto copy = [&](auto type) {
    using T = typename decltype(type)::type;
    T* out = data<T>(ring) + slot * ring.stride(0);
    const T* in = const_data<T>(x);
    torch::stable::parallel_for(0, x.numel(), kGrain, [&](int64_t begin, int64_t end) {
      source(begin, end, [&](int64_t position, const auto& offset, int64_t count) {
        copy_run(out + position, in + offset[0], source.step()[0], count);
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

Tensor ring_blend(Tensor ring, Tensor row) {
  const auto sizes = ring.sizes();
  const std::vector<int64_t> shape(sizes.begin() + 1, sizes.end());
  Tensor out = torch::stable::new_empty(ring, shape);
  dispatch(ring.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const Taps<T> taps = read_taps<T>(ring, row);
    T* to = data<T>(out);
    torch::stable::parallel_for(0, out.numel(), kGrain, [&](int64_t begin, int64_t end) {
      blend_run(to + begin, taps, begin, end - begin);
    });
  });
  return out;
}

void ring_blend_add(Tensor x, Tensor gate, Tensor ring, Tensor row) {
  check_size(x, slot_size(ring), "x");
  STD_TORCH_CHECK(x.scalar_type() == ring.scalar_type(), "x and ring differ in dtype");
  const auto gate_strides = broadcast_strides(gate, x.dim());
  const auto both = walk<2>(x, {x.strides().data(), gate_strides.data()});
  dispatch(x.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const Taps<T> taps = read_taps<T>(ring, row);
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

void cfg_split(Tensor low, Tensor high, Tensor uncond, Tensor cond, int64_t radius) {
  const int64_t dims = uncond.dim();
  STD_TORCH_CHECK(dims >= 2, "uncond has ", dims, " dimensions, expected [..., H, W]");
  const int64_t height = uncond.size(dims - 2), width = uncond.size(dims - 1), plane = height * width;
  STD_TORCH_CHECK(radius >= 0 && 2 * radius < std::min(height, width), "radius ", radius, " is too large for ", height, " x ", width);
  check_size(cond, uncond.numel(), "cond");
  check_size(low, uncond.numel(), "low");
  check_size(high, uncond.numel(), "high");
  const auto both = walk<2>(uncond, {uncond.strides().data(), cond.strides().data()});
  dispatch(uncond.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using A = compute_t<T>;
    const LowPass<A> split(height, width, radius);
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

void cfg_reconstruct(Tensor out, Tensor cond, Tensor low, Tensor high, Tensor row, int64_t cond_half) {
  const int64_t half = cond.numel();
  check_size(out, 2 * half, "out");
  check_size(low, half, "low");
  check_size(high, half, "high");
  STD_TORCH_CHECK(cond_half == 0 || cond_half == 1, "cond_half is ", cond_half, ", expected 0 or 1");
  const float* weights = row_data(row);
  const auto source = walk<1>(cond, {cond.strides().data()});
  dispatch(cond.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    using A = compute_t<T>;
    T* copied = data<T>(out) + cond_half * half;
    T* rebuilt = data<T>(out) + (1 - cond_half) * half;
    const T* in = const_data<T>(cond);
    const A *low_data = const_data<A>(low), *high_data = const_data<A>(high);
    const A w_low = weights[ROW_LOW], w_high = weights[ROW_HIGH];
    torch::stable::parallel_for(0, half, kGrain, [&](int64_t begin, int64_t end) {
      source(begin, end, [&](int64_t position, const auto& offset, int64_t count) {
        const T* from = in + offset[0];
        reconstruct_run(rebuilt + position, from, source.step()[0], low_data + position, high_data + position, w_low, w_high, count);
        copy_run(copied + position, from, source.step()[0], count);
      });
    });
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastercache, CPU, m) {
  m.impl("ring_push", TORCH_BOX(&ring_push));
  m.impl("ring_blend", TORCH_BOX(&ring_blend));
  m.impl("ring_blend_add", TORCH_BOX(&ring_blend_add));
  m.impl("cfg_split", TORCH_BOX(&cfg_split));
  m.impl("cfg_reconstruct", TORCH_BOX(&cfg_reconstruct));
}
