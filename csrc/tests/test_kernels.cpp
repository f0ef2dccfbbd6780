// Tests of the headers under csrc/, without torch. Every buffer has its exact size, so AddressSanitizer ends the program at the first access
// outside one. tests/ops/test_sanitizers.py compiles and runs it.
//
//   test_kernels                           every case on fixed random shapes
//   test_kernels --fuzz SECONDS --seed N   the same cases on others, until the time is up

#include <array>
#include <chrono>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "../kernels/cfg.h"
#include "../kernels/packed.h"
#include "../kernels/prediction.h"
#include "../kernels/ring.h"
#include "../kernels/strided.h"

namespace {

using namespace fastercache;

std::string running;  // the case and its seed, for the message of a failure

[[noreturn]] void fail(int line, const char* format, ...) {
  std::fprintf(stderr, "%s:%d: %s: ", __FILE__, line, running.c_str());
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  va_end(arguments);
  std::fputc('\n', stderr);
  std::exit(1);
}

#define CHECK(condition, ...) \
  do {                        \
    if (!(condition)) fail(__LINE__, #condition ": " __VA_ARGS__); \
  } while (false)

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}

  uint32_t bits() { return uint32_t(engine_()); }
  bool chance() { return engine_() & 1; }
  int64_t integer(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(engine_); }
  double normal() { return std::normal_distribution<double>()(engine_); }

 private:
  std::mt19937_64 engine_;
};

// ---- storage types -----------------------------------------------------------------------------------------------------------------

template <class T> constexpr int MANTISSA = 0;  // stored bits
template <> constexpr int MANTISSA<bfloat16> = 7;
template <> constexpr int MANTISSA<float16> = 10;
template <> constexpr int MANTISSA<float> = 23;
template <> constexpr int MANTISSA<double> = 52;
template <class T> constexpr int SMALLEST_EXPONENT = -126;  // of a normal number
template <> constexpr int SMALLEST_EXPONENT<float16> = -14;
template <> constexpr int SMALLEST_EXPONENT<double> = -1022;
template <class T> constexpr double LARGEST = 0;
template <> constexpr double LARGEST<bfloat16> = 0x1.FEp127;
template <> constexpr double LARGEST<float16> = 65504;

// The value of `T` nearest to `value`, ties to even, from the definition.
template <class T>
double nearest(double value) {
  if (value == 0 || !std::isfinite(value)) return value;
  int exponent;
  std::frexp(value, &exponent);
  const double step = std::ldexp(1, std::max(exponent - 1, SMALLEST_EXPONENT<T>) - MANTISSA<T>);
  const double rounded = std::nearbyint(value / step) * step;
  return std::fabs(rounded) > LARGEST<T> ? std::copysign(INFINITY, value) : rounded;
}

// The value of a 16-bit pattern, from its fields.
template <class T>
double decoded(uint16_t bits) {
  constexpr int exponent_bits = 15 - MANTISSA<T>, largest = (1 << exponent_bits) - 1;
  const int exponent = bits >> MANTISSA<T> & largest, mantissa = bits & ((1 << MANTISSA<T>) - 1);
  double magnitude;
  if (exponent == largest) {
    magnitude = mantissa ? NAN : INFINITY;
  } else {
    const int significand = exponent ? mantissa | 1 << MANTISSA<T> : mantissa;
    magnitude = std::ldexp(significand, std::max(exponent, 1) - largest / 2 - MANTISSA<T>);
  }
  return std::copysign(magnitude, bits >> 15 ? -1.0 : 1.0);
}

bool same(double a, double b) { return (std::isnan(a) && std::isnan(b)) || (a == b && std::signbit(a) == std::signbit(b)); }

template <class T>
void check_store(float value) {
  T stored;
  store(&stored, value);
  CHECK(same(load(stored), nearest<T>(value)), "%a became %a, expected %a", value, load(stored), nearest<T>(value));
}

template <class T>
void test_16_bit_type(Random& random) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const T value{uint16_t(bits)};
    CHECK(same(load(value), decoded<T>(value.bits)), "%04x is %a, expected %a", bits, load(value), decoded<T>(value.bits));
    check_store<T>(load(value));
    const float next = load(T{uint16_t(bits + 1)});
    if (std::isfinite(load(value)) && std::isfinite(next)) {
      const float tie = float((double(load(value)) + double(next)) / 2);
      for (float near : {std::nextafter(tie, -INFINITY), tie, std::nextafter(tie, INFINITY)}) check_store<T>(near);
    }
  }
  for (int i = 0; i < 100000; ++i) check_store<T>(bits_float(random.bits()));
}

template <class T>
T narrowed(double value) {
  T stored;
  store(&stored, compute_t<T>(value));
  return stored;
}

template <class T>
std::vector<T> normals(Random& random, int64_t count) {
  std::vector<T> values;
  values.reserve(size_t(count));
  for (int64_t i = 0; i < count; ++i) values.push_back(narrowed<T>(random.normal()));
  return values;
}

// `actual` is `exact` but for one rounding to T and eight in the type it is computed in; `magnitude` bounds the terms of the sum.
template <class T>
void check_close(double actual, double exact, double magnitude, int line) {
  const double storage = std::ldexp(1, -MANTISSA<T> - 1), arithmetic = std::ldexp(1, -MANTISSA<compute_t<T>> - 1);
  const double tolerance = storage * std::fabs(exact) + 8 * arithmetic * magnitude + std::ldexp(1, SMALLEST_EXPONENT<T> - MANTISSA<T>);
  if (!(std::fabs(actual - exact) <= tolerance)) fail(line, "%.9g, expected %.9g within %.3g", actual, exact, tolerance);
}

// ---- strided walks ------------------------------------------------------------------------------------------------------------------

void test_walk(Random& random) {
  constexpr int N = 3;
  const int dims = int(random.integer(0, 5));
  std::vector<int64_t> sizes(size_t(dims), 0);
  std::array<std::vector<int64_t>, N> strides;
  int64_t elements = 1;
  for (auto& size : sizes) elements *= size = random.integer(random.integer(0, 9) ? 1 : 0, 4);
  for (auto& one : strides) {
    one.resize(size_t(dims));
    int64_t next = random.integer(1, 2);
    for (int d = dims - 1; d >= 0; --d) {
      one[size_t(d)] = random.integer(0, 3) ? next : random.integer(0, 30);  // mostly contiguous: only then dimensions merge
      next = one[size_t(d)] * sizes[size_t(d)];
    }
  }
  const StridedWalk<N> walk(dims, sizes.data(), {strides[0].data(), strides[1].data(), strides[2].data()});
  const int64_t begin = random.integer(0, elements), end = random.integer(begin, elements);
  int64_t expected = begin;
  walk(begin, end, [&](int64_t position, const auto& offsets, int64_t count) {
    CHECK(position == expected && count > 0 && position + count <= end, "a run of %ld from %ld", long(count), long(position));
    for (int64_t i = 0; i < count; ++i) {
      for (int o = 0; o < N; ++o) {
        int64_t rest = position + i, offset = 0;
        for (int d = dims - 1; d >= 0; --d) {
          offset += rest % sizes[size_t(d)] * strides[size_t(o)][size_t(d)];
          rest /= sizes[size_t(d)];
        }
        CHECK(offsets[size_t(o)] + i * walk.step()[size_t(o)] == offset, "element %ld of operand %d", long(position + i), o);
      }
    }
    expected += count;
  });
  CHECK(expected == end, "walked to %ld of %ld", long(expected), long(end));
}

// ---- rings --------------------------------------------------------------------------------------------------------------------------

template <class T>
void test_copy(Random& random) {
  const int64_t count = random.integer(1, 300), step = random.integer(0, 4), offset = random.integer(0, 15);
  const bool streaming = random.chance();
  std::vector<T> in(size_t((count - 1) * step + 1)), out(size_t(offset + count), T(0));
  for (T& value : in) value = T(random.bits());
  copy_run(out.data() + offset, in.data(), step, count, streaming);
  for (int64_t i = 0; i < offset; ++i) CHECK(out[size_t(i)] == T(0), "element %ld lies before the output", long(i));
  for (int64_t i = 0; i < count; ++i) CHECK(out[size_t(offset + i)] == in[size_t(i * step)], "element %ld", long(i));
  const std::vector<T> copied = out;
  copy_run(out.data(), out.data(), 1, offset + count, streaming);  // a tensor already in place
  CHECK(out == copied, "a copy to itself");
}

template <class T>
void test_residual(Random& random) {
  const int64_t count = random.integer(1, 700), x_step = random.integer(0, 2), entry_step = random.integer(0, 2), offset = random.integer(0, 15);
  const auto x = normals<T>(random, (count - 1) * x_step + 1), entry = normals<T>(random, (count - 1) * entry_step + 1);
  std::vector<T> out(size_t(offset + count), narrowed<T>(NAN));
  residual_run(out.data() + offset, x.data(), x_step, entry.data(), entry_step, count, random.chance());
  for (int64_t i = 0; i < offset; ++i) CHECK(std::isnan(double(load(out[size_t(i)]))), "element %ld lies before the output", long(i));
  for (int64_t i = 0; i < count; ++i) {
    const double expected = double(load(narrowed<T>(load(x[size_t(i * x_step)]) - load(entry[size_t(i * entry_step)]))));
    CHECK(double(load(out[size_t(offset + i)])) == expected, "element %ld", long(i));
  }
}

template <class T>
struct RandomTaps {
  int64_t begin, count;
  std::vector<std::vector<T>> slots;
  Taps<T> taps;  // of the slots that no tap uses there is no memory at all

  explicit RandomTaps(Random& random) : begin(random.integer(0, 40)), count(random.integer(1, 700)) {
    taps.count = int(random.integer(0, MAX_TAPS));
    for (int k = 0; k < taps.count; ++k) {
      slots.push_back(normals<T>(random, begin + count));
      taps.slot[k] = slots.back().data();
      taps.coefficient[k] = compute_t<T>(random.normal());
    }
  }

  double exact(int64_t i, double* magnitude) const {
    double sum = 0;
    *magnitude = 0;
    for (int k = 0; k < taps.count; ++k) {
      const double term = double(taps.coefficient[k]) * double(load(taps.slot[k][begin + i]));
      sum += term;
      *magnitude += std::fabs(term);
    }
    return sum;
  }
};

template <class T>
void test_blend(Random& random) {
  const RandomTaps<T> in(random);
  const int64_t offset = random.integer(0, 15);
  std::vector<T> out(size_t(offset + in.count), narrowed<T>(NAN));
  blend_run(out.data() + offset, in.taps, in.begin, in.count, random.chance());
  for (int64_t i = 0; i < offset; ++i) CHECK(std::isnan(double(load(out[size_t(i)]))), "element %ld lies before the output", long(i));
  for (int64_t i = 0; i < in.count; ++i) {
    double magnitude;
    const double exact = in.exact(i, &magnitude);
    check_close<T>(double(load(out[size_t(offset + i)])), exact, magnitude, __LINE__);
  }
}

template <class T, class G>
void test_blend_add(Random& random) {
  const RandomTaps<T> in(random);
  const int64_t x_step = random.integer(1, 3), gate_step = random.integer(0, 2);
  const auto before = normals<T>(random, (in.count - 1) * x_step + 1);
  const auto gate = normals<G>(random, (in.count - 1) * gate_step + 1);
  auto x = before;
  blend_add_run(x.data(), x_step, gate.data(), gate_step, in.taps, in.begin, in.count);
  for (int64_t i = 0; i < int64_t(x.size()); ++i) {
    const double old = double(load(before[size_t(i)])), now = double(load(x[size_t(i)]));
    if (i % x_step) {
      CHECK(now == old, "element %ld lies between those of x", long(i));
      continue;
    }
    double magnitude;
    const double exact = in.exact(i / x_step, &magnitude), factor = double(load(gate[size_t(i / x_step * gate_step)]));
    check_close<T>(now, old + factor * exact, std::fabs(old) + std::fabs(factor) * magnitude, __LINE__);
  }
}

// ---- predictions --------------------------------------------------------------------------------------------------------------------

template <class T>
void test_prediction(Random& random) {
  const int64_t count = random.integer(1, 1200), offset = random.integer(0, 15);
  std::vector<T> out = normals<T>(random, offset + count);  // maybe a term itself
  const std::vector<T> before = out;
  std::vector<std::vector<T>> values;
  std::vector<double> factors;
  std::vector<int64_t> steps;
  Terms<T> terms;
  const auto add = [&](const T* from, int64_t step, double factor) { terms.add(compute_t<T>(factor), from, step); };
  const int given = int(random.integer(0, Terms<T>::MOST - 1));
  for (int k = 0; k < given; ++k) {
    const double factor = random.integer(0, 3) ? random.normal() : 0;
    const int64_t step = random.chance() ? 1 : random.integer(0, 3);
    values.push_back(normals<T>(random, (count - 1) * step + 1));
    factors.push_back(factor);
    steps.push_back(step);
    if (factor == 0) values.back().clear();  // of a term that is not in use there is no memory at all
    values.back().shrink_to_fit();
    add(values.back().data(), step, factor);
  }
  if (random.chance()) {
    values.push_back({before.begin() + offset, before.end()});
    factors.push_back(0.5);
    steps.push_back(1);
    add(out.data() + offset, 1, 0.5);
  }
  prediction_run(out.data() + offset, terms, count, random.chance());
  for (int64_t i = 0; i < offset; ++i) CHECK(double(load(out[size_t(i)])) == double(load(before[size_t(i)])), "element %ld", long(i));
  for (int64_t i = 0; i < count; ++i) {
    double exact = 0, magnitude = 0;
    for (size_t k = 0; k < values.size(); ++k) {
      if (factors[k] == 0) continue;
      const double term = double(compute_t<T>(factors[k])) * double(load(values[k][size_t(i * steps[k])]));
      exact += term;
      magnitude += std::fabs(term);
    }
    check_close<T>(double(load(out[size_t(offset + i)])), exact, magnitude, __LINE__);
  }
}

// ---- packed rings -------------------------------------------------------------------------------------------------------------------

// A line read by the words of packed_layout.h: every offset is worked out here again.
struct ReadLine {
  int64_t channels;
  int bits;
  std::vector<uint8_t> bytes;

  static int64_t aligned(int64_t size) { return size % 16 ? size + 16 - size % 16 : size; }
  int64_t blocks() const { return (channels + 127) / 128; }
  int64_t codes() const { return bits == 8 ? channels : bits == 4 ? (channels + 1) / 2 : 0; }
  int64_t scales() const { return aligned(channels) + aligned(codes()); }
  int64_t size() const { return aligned(scales() + (bits ? 8 : 4) * blocks()); }
  bool in_use(int64_t i) const {
    return i < channels || (i >= aligned(channels) && i < aligned(channels) + codes()) ||
        (i >= scales() && i < scales() + (bits ? 8 : 4) * blocks());
  }

  float scale(int64_t number) const { float value; std::memcpy(&value, &bytes[size_t(scales() + 4 * number)], 4); return value; }
  void set_scale(int64_t number, float value) { std::memcpy(&bytes[size_t(scales() + 4 * number)], &value, 4); }
  float newest_scale(int64_t c) const { return scale(c / 128); }
  float difference_scale(int64_t c) const { return scale(blocks() + c / 128); }
  int newest_code(int64_t c) const { return int8_t(bytes[size_t(c)]); }
  int difference_code(int64_t c) const {
    if (bits == 8) return int8_t(bytes[size_t(aligned(channels) + c)]);
    const int half = bytes[size_t(aligned(channels) + c / 2)] >> (c % 2 ? 4 : 0) & 15;
    return half < 8 ? half : half - 16;
  }

  ReadLine(Random& random, int bits_) : channels(random_channels(random)), bits(bits_), bytes(size_t(size())) {
    for (auto& byte : bytes) byte = uint8_t(random.bits());
  }

  static int64_t random_channels(Random& random) {
    constexpr int64_t special[] = {1, 2, 3, 127, 128, 129, 255, 256, 257};
    return random.chance() ? special[random.integer(0, 8)] : random.integer(1, 400);
  }
};

// Codes of a block must be the nearest to `values`; scales below 1e-30 / 127 store zeros.
template <class Value, class Code>
void check_codes(int64_t begin, int64_t end, int largest_code, float scale, Value value, Code code, int line) {
  float largest = 0;
  for (int64_t c = begin; c < end; ++c) largest = std::max(largest, std::fabs(value(c)));
  if (scale != largest / float(largest_code)) fail(line, "scale %a of a block whose largest value is %a", scale, largest);
  for (int64_t c = begin; c < end; ++c) {
    if (largest <= 1e-30f) {
      if (code(c) != 0) fail(line, "channel %ld of a block of zeros has code %d", long(c), code(c));
    } else if (std::fabs(double(value(c)) - double(scale) * code(c)) > double(scale) * (0.5 + 1e-4) || std::abs(code(c)) > largest_code) {
      fail(line, "channel %ld: %a has code %d at scale %a", long(c), value(c), code(c), scale);
    }
  }
}

template <class T, int BITS>
void test_packed_push(Random& random) {
  ReadLine line(random, BITS);
  CHECK(line.size() == (PackedLine{line.channels, BITS}.bytes()), "%ld bytes of %ld channels", long(line.size()), long(line.channels));
  const int64_t step = random.integer(1, 3), entry_step = random.integer(0, 3);
  const bool residual = random.chance();
  for (int push = 0; push < 3; ++push) {
    const double size = random.integer(0, 4) ? 1 : std::ldexp(1, int(random.integer(-140, 10)));
    std::vector<T> x(size_t((line.channels - 1) * step + 1), narrowed<T>(NAN));
    for (int64_t c = 0; c < line.channels; ++c) x[size_t(c * step)] = narrowed<T>(size * random.normal());
    const auto entry = normals<T>(random, (line.channels - 1) * entry_step + 1);
    const ReadLine before = line;
    push_packed(line.bytes.data(), x.data(), step, line.channels, BITS, residual ? entry.data() : nullptr, entry_step);

    const auto value = [&](int64_t c) {
      return float(load(x[size_t(c * step)])) - (residual ? float(load(entry[size_t(c * entry_step)])) : 0.0f);
    };
    // The first push meets bytes that were never written: only from the second on is a difference defined.
    const auto change = [&](int64_t c) { return value(c) - before.newest_scale(c) * float(before.newest_code(c)); };
    for (int64_t begin = 0; begin < line.channels; begin += 128) {
      const int64_t end = std::min(begin + 128, line.channels);
      check_codes(begin, end, 127, line.newest_scale(begin), value, [&](int64_t c) { return line.newest_code(c); }, __LINE__);
      if (BITS && push)
        check_codes(
            begin, end, BITS == 4 ? 7 : 127, line.difference_scale(begin), change, [&](int64_t c) { return line.difference_code(c); },
            __LINE__);
    }
    if (BITS == 4 && line.channels % 2) CHECK(line.bytes[size_t(line.aligned(line.channels) + line.codes() - 1)] >> 4 == 0, "odd half");
    for (int64_t i = 0; i < line.size(); ++i)
      CHECK(line.in_use(i) || line.bytes[size_t(i)] == before.bytes[size_t(i)], "byte %ld lies between the parts", long(i));
  }
}

// A value that is not finite spoils its block of 128, and no other.
template <class T, int BITS>
void test_packed_poison(Random& random) {
  ReadLine line(random, BITS);
  const std::vector<T> good = normals<T>(random, line.channels);
  push_packed(line.bytes.data(), good.data(), 1, line.channels, BITS);
  std::vector<T> bad = good;
  const int64_t poisoned = random.integer(0, line.channels - 1);
  bad[size_t(poisoned)] = narrowed<T>(random.chance() ? NAN : random.chance() ? INFINITY : -INFINITY);
  push_packed(line.bytes.data(), bad.data(), 1, line.channels, BITS);
  std::vector<float> out(size_t(line.channels), 0.0f);
  blend_packed(out.data(), line.bytes.data(), line.channels, BITS, PackedTaps{true, 1.5f, 0.5f});
  for (int64_t c = 0; c < line.channels; ++c)
    CHECK(std::isnan(out[size_t(c)]) == (c / 128 == poisoned / 128), "channel %ld is %g, poisoned %ld", long(c), out[size_t(c)], long(poisoned));
}

struct RandomPacked {
  ReadLine line;
  PackedTaps taps;

  RandomPacked(Random& random, int bits) : line(random, bits) {
    for (int64_t number = 0; number < (bits ? 2 : 1) * line.blocks(); ++number)
      line.set_scale(number, random.integer(0, 5) ? float(std::fabs(random.normal())) : 0.0f);
    taps = {random.chance(), float(random.normal()), float(random.normal())};
    if (bits && !taps.both)  // before the second push a difference is anything, and must not be looked at
      for (int64_t number = line.blocks(); number < 2 * line.blocks(); ++number) line.set_scale(number, NAN);
  }

  double exact(int64_t c, double* magnitude) const {
    double sum = double(taps.newest) * double(line.newest_scale(c)) * line.newest_code(c);
    *magnitude = std::fabs(sum);
    if (line.bits && taps.both) {
      const double term = double(taps.difference) * double(line.difference_scale(c)) * line.difference_code(c);
      sum += term;
      *magnitude += std::fabs(term);
    }
    return sum;
  }
};

template <class T, int BITS>
void test_packed_blend(Random& random) {
  const RandomPacked in(random, BITS);
  std::vector<T> out(size_t(in.line.channels), narrowed<T>(NAN));
  blend_packed(out.data(), in.line.bytes.data(), in.line.channels, BITS, in.taps);
  for (int64_t c = 0; c < in.line.channels; ++c) {
    double magnitude;
    const double exact = in.exact(c, &magnitude);
    check_close<T>(double(load(out[size_t(c)])), exact, magnitude, __LINE__);
  }
}

template <class T, class G, int BITS>
void test_packed_blend_add(Random& random) {
  const RandomPacked in(random, BITS);
  const int64_t gate_step = random.integer(0, 2);
  const auto before = normals<T>(random, in.line.channels);
  const auto gate = normals<G>(random, (in.line.channels - 1) * gate_step + 1);
  auto x = before;
  blend_add_packed(x.data(), gate.data(), gate_step, in.line.bytes.data(), in.line.channels, BITS, in.taps);
  for (int64_t c = 0; c < in.line.channels; ++c) {
    double magnitude;
    const double exact = in.exact(c, &magnitude), old = double(load(before[size_t(c)])), factor = double(load(gate[size_t(c * gate_step)]));
    check_close<T>(double(load(x[size_t(c)])), old + factor * exact, std::fabs(old) + std::fabs(factor) * magnitude, __LINE__);
  }
}

template <class T, int BITS>
void test_packed(Random& random) {
  test_packed_push<T, BITS>(random);
  test_packed_poison<T, BITS>(random);
  test_packed_blend<T, BITS>(random);
  test_packed_blend_add<T, T, BITS>(random);
  test_packed_blend_add<T, float, BITS>(random);
}

// ---- CFG ----------------------------------------------------------------------------------------------------------------------------

template <class A>
void test_low_pass(Random& random) {
  const int64_t height = random.integer(1, 12), width = random.integer(1, 12), radius = random.integer(0, (std::min(height, width) - 1) / 2);
  const auto difference = normals<A>(random, height * width);
  auto high = difference;
  std::vector<A> low(difference.size(), A(NAN));
  const LowPass<A> split(height, width, radius);
  std::vector<A> scratch(size_t(split.scratch_size()), A(NAN));
  split(low.data(), high.data(), scratch.data());

  // The projection as a convolution with the sum of the waves in the disc, each taken from the definition of the DFT.
  std::vector<double> kernel(size_t(height * width), 0);
  for (int64_t y = 0; y < height; ++y)
    for (int64_t x = 0; x < width; ++x)
      for (int64_t ky = -radius; ky <= radius; ++ky)
        for (int64_t kx = -radius; kx <= radius; ++kx)
          if (ky * ky + kx * kx <= radius * radius)
            kernel[size_t(y * width + x)] +=
                std::cos(2 * M_PI * (double(ky * y) / double(height) + double(kx * x) / double(width))) / double(height * width);
  double norm = 0;  // the split is orthonormal, so the norm of the plane bounds what an element can lose
  for (A value : difference) norm += double(value) * double(value);
  for (int64_t y = 0; y < height; ++y) {
    for (int64_t x = 0; x < width; ++x) {
      double exact = 0;
      for (int64_t v = 0; v < height; ++v)
        for (int64_t u = 0; u < width; ++u)
          exact += kernel[size_t((y - v + height) % height * width + (x - u + width) % width)] * double(difference[size_t(v * width + u)]);
      const size_t i = size_t(y * width + x);
      check_close<A>(double(low[i]), exact, std::sqrt(norm), __LINE__);
      check_close<A>(double(high[i]), double(difference[i]) - exact, std::sqrt(norm), __LINE__);
    }
  }
}

template <class T>
void test_difference(Random& random) {
  using A = compute_t<T>;
  const int64_t count = random.integer(1, 700), uncond_step = random.integer(1, 2), cond_step = random.integer(1, 2);
  const auto uncond = normals<T>(random, (count - 1) * uncond_step + 1), cond = normals<T>(random, (count - 1) * cond_step + 1);
  std::vector<A> out(size_t(count), A(NAN));
  difference_run(out.data(), uncond.data(), uncond_step, cond.data(), cond_step, count);
  for (int64_t i = 0; i < count; ++i)
    CHECK(out[size_t(i)] == load(uncond[size_t(i * uncond_step)]) - load(cond[size_t(i * cond_step)]), "element %ld", long(i));
}

template <class T>
void test_reconstruct(Random& random) {
  using A = compute_t<T>;
  const int64_t count = random.integer(1, 700), step = random.integer(0, 3);
  const auto cond = normals<T>(random, (count - 1) * step + 1);
  const auto low = normals<A>(random, count), high = normals<A>(random, count), previous = normals<A>(random, count);
  const A w_low = A(random.normal()), w_high = A(random.normal()), w_previous = A(random.normal());
  const bool three = random.chance();
  const WeightedMaps<A> maps{low.data(), high.data(), three ? previous.data() : nullptr, w_low, w_high, w_previous};
  std::vector<T> out(size_t(count), narrowed<T>(NAN));
  reconstruct_run(out.data(), cond.data(), step, maps, count, random.chance());
  for (int64_t i = 0; i < count; ++i) {
    const double terms[] = {
        double(load(cond[size_t(i * step)])), double(w_low) * double(low[size_t(i)]), double(w_high) * double(high[size_t(i)]),
        three ? double(w_previous) * double(previous[size_t(i)]) : 0};
    double exact = 0, magnitude = 0;
    for (double term : terms) exact += term, magnitude += std::fabs(term);
    check_close<T>(double(load(out[size_t(i)])), exact, magnitude, __LINE__);
  }
}

// ---- which cases, and how often ----------------------------------------------------------------------------------------------------

struct Case {
  const char* name;
  void (*run)(Random&);
  int repeats;
};

constexpr Case EXHAUSTIVE[] = {
    {"every bfloat16", test_16_bit_type<bfloat16>, 1},
    {"every float16", test_16_bit_type<float16>, 1},
};

constexpr Case CASES[] = {
    {"walk", test_walk, 2000},
    {"copy 2 bytes", test_copy<uint16_t>, 100},
    {"copy 4 bytes", test_copy<uint32_t>, 100},
    {"copy 8 bytes", test_copy<uint64_t>, 100},
    {"residual float", test_residual<float>, 50},
    {"residual double", test_residual<double>, 50},
    {"residual bfloat16", test_residual<bfloat16>, 50},
    {"residual float16", test_residual<float16>, 50},
    {"prediction float", test_prediction<float>, 100},
    {"prediction double", test_prediction<double>, 100},
    {"prediction bfloat16", test_prediction<bfloat16>, 100},
    {"prediction float16", test_prediction<float16>, 100},
    {"blend float", test_blend<float>, 100},
    {"blend double", test_blend<double>, 100},
    {"blend bfloat16", test_blend<bfloat16>, 100},
    {"blend float16", test_blend<float16>, 100},
    {"blend-add float", test_blend_add<float, float>, 100},
    {"blend-add double", test_blend_add<double, double>, 100},
    {"blend-add double, float gate", test_blend_add<double, float>, 100},
    {"blend-add bfloat16", test_blend_add<bfloat16, bfloat16>, 100},
    {"blend-add bfloat16, float gate", test_blend_add<bfloat16, float>, 100},
    {"blend-add float16", test_blend_add<float16, float16>, 100},
    {"packed float, 0 bits", test_packed<float, 0>, 100},
    {"packed float, 4 bits", test_packed<float, 4>, 100},
    {"packed float, 8 bits", test_packed<float, 8>, 100},
    {"packed bfloat16, 0 bits", test_packed<bfloat16, 0>, 100},
    {"packed bfloat16, 4 bits", test_packed<bfloat16, 4>, 100},
    {"packed bfloat16, 8 bits", test_packed<bfloat16, 8>, 100},
    {"packed float16, 4 bits", test_packed<float16, 4>, 100},
    {"packed float16, 8 bits", test_packed<float16, 8>, 100},
    {"low pass float", test_low_pass<float>, 100},
    {"low pass double", test_low_pass<double>, 100},
    {"difference float", test_difference<float>, 50},
    {"difference double", test_difference<double>, 50},
    {"difference bfloat16", test_difference<bfloat16>, 50},
    {"difference float16", test_difference<float16>, 50},
    {"reconstruct float", test_reconstruct<float>, 50},
    {"reconstruct double", test_reconstruct<double>, 50},
    {"reconstruct bfloat16", test_reconstruct<bfloat16>, 50},
    {"reconstruct float16", test_reconstruct<float16>, 50},
};

void run(const Case& one, uint64_t seed) {
  running = std::string(one.name) + ", seed " + std::to_string(seed);
  Random random(seed);
  one.run(random);
}

}  // namespace

int main(int count, char** arguments) {
  double seconds = 0;
  uint64_t seed = 0;
  for (int i = 1; i + 1 < count; i += 2) {
    const std::string name = arguments[i];
    if (name == "--fuzz") seconds = std::atof(arguments[i + 1]);
    if (name == "--seed") seed = std::strtoull(arguments[i + 1], nullptr, 10);
  }
  int64_t runs = 0;
  if (seconds == 0) {
    for (const Case& one : EXHAUSTIVE) run(one, 0), ++runs;
    for (const Case& one : CASES)
      for (int i = 0; i < one.repeats; ++i, ++runs) run(one, uint64_t(i));
  } else {
    const auto start = std::chrono::steady_clock::now();
    while (std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() < seconds) {
      for (const Case& one : CASES) run(one, seed), ++runs;
      ++seed;
    }
  }
  std::printf("%ld runs passed\n", long(runs));
}
