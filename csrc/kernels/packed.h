// The packed formats on the CPU: push quantizes one line of channels in place, blend and blend-add read it back. No torch.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "../packed_layout.h"
#include "dtypes.h"
#include "tiles.h"

namespace fastercache {

FASTERCACHE_HOST_DEVICE constexpr int largest_code(int bits) { return bits == 4 ? 7 : 127; }

// Magnitude of the largest value. Compared as bits, so that a NaN, whose bits exceed infinity's, is found and not skipped.
template <int COUNT>
FASTERCACHE_INLINE FASTERCACHE_HOST_DEVICE float largest_magnitude(const float* values) {
  uint32_t largest = 0;
  for (int i = 0; i < COUNT; ++i) {
    const uint32_t magnitude = float_bits(values[i]) & 0x7FFFFFFFu;
    largest = magnitude > largest ? magnitude : largest;
  }
  return bits_float(largest);
}

struct Quantizer {
  float scale;    // value of one code; NaN or infinite where the block holds such a value, which then poisons the whole block
  float inverse;  // codes a unit; 0 where the block is not finite, or so small that the inverse would not be
};

FASTERCACHE_INLINE FASTERCACHE_HOST_DEVICE Quantizer quantizer(float largest, int code) {
  const bool usable = largest > 1e-30f && largest <= 3.402823466e+38f;
  return {largest / float(code), usable ? float(code) / largest : 0.0f};
}

// To the nearest code, ties to even: adding 1.5 * 2^23 leaves no bit for a fraction, and works without a change of rounding mode.
FASTERCACHE_INLINE FASTERCACHE_HOST_DEVICE int32_t quantize(float value, float inverse) {
  constexpr float INTEGERS = 12582912.0f;
  const float scaled = inverse > 0 ? value * inverse : 0.0f;
  return int32_t(float_bits(scaled + INTEGERS)) - int32_t(float_bits(INTEGERS));
}

template <class T>
FASTERCACHE_INLINE void read_block(float* values, const T* in, int64_t step, int count) {
  if (step == 1) {
    Tile<T> tile;
    const auto* from = tile.read(in, count);
    for (int i = 0; i < count; ++i) values[i] = float(load(from[i]));
  } else {
    for (int i = 0; i < count; ++i) values[i] = float(load(in[i * step]));
  }
}

// Reads `channels` from `in`, less those of `entry` for a RESIDUAL, and replaces the line's newest output by them, and its difference by theirs
// to the newest before.
template <int BITS, bool RESIDUAL, class T>
FASTERCACHE_INLINE void push_packed_line(
    uint8_t* packed, const T* in, int64_t step, const T* entry, int64_t entry_step, int64_t channels) {
  const PackedLine line{channels, BITS};
  auto* newest = reinterpret_cast<int8_t*>(packed);
  uint8_t* difference = packed + line.difference();
  auto* newest_scales = reinterpret_cast<float*>(packed + line.newest_scales());
  auto* difference_scales = reinterpret_cast<float*>(packed + line.difference_scales());
  for (int64_t block = 0, begin = 0; begin < channels; ++block, begin += PACKED_BLOCK) {
    const int count = int(std::min<int64_t>(PACKED_BLOCK, channels - begin));
    alignas(64) float values[PACKED_BLOCK] = {};
    alignas(64) float changes[PACKED_BLOCK] = {};
    alignas(64) int8_t codes[PACKED_BLOCK];
    read_block(values, in + begin * step, step, count);
    if (RESIDUAL) {
      alignas(64) float before[PACKED_BLOCK];
      read_block(before, entry + begin * entry_step, entry_step, count);
      for (int i = 0; i < count; ++i) values[i] -= before[i];
    }
    if (BITS) {
      const float scale = newest_scales[block];
      for (int i = 0; i < count; ++i) changes[i] = values[i] - scale * float(newest[begin + i]);
      const Quantizer q = quantizer(largest_magnitude<PACKED_BLOCK>(changes), largest_code(BITS));
      for (int i = 0; i < PACKED_BLOCK; ++i) codes[i] = int8_t(quantize(changes[i], q.inverse));
      difference_scales[block] = q.scale;
      if (BITS == 8) {
        std::memcpy(difference + begin, codes, size_t(count));
      } else {
        for (int i = 0; i < (count + 1) / 2; ++i)
          difference[begin / 2 + i] = uint8_t((codes[2 * i] & 0xF) | (codes[2 * i + 1] << 4));
      }
    }
    const Quantizer q = quantizer(largest_magnitude<PACKED_BLOCK>(values), largest_code(8));
    for (int i = 0; i < PACKED_BLOCK; ++i) codes[i] = int8_t(quantize(values[i], q.inverse));
    newest_scales[block] = q.scale;
    std::memcpy(newest + begin, codes, size_t(count));
  }
}

// What a blend reads from its coefficients: with the difference D of the taps A and B, c_0 A + c_1 B = (c_0 + c_1) A - c_1 D.
struct PackedTaps {
  bool both = false;                 // whether D is read at all: after a single push it says nothing
  float newest = 0, difference = 0;  // factors of A and D
};

// Gives `write(begin, count, values)` the blend of each block of a line, in float32.
template <int BITS, class W>
FASTERCACHE_INLINE void blend_packed_line(const uint8_t* packed, int64_t channels, PackedTaps taps, W&& write) {
  const PackedLine line{channels, BITS};
  const auto* newest = reinterpret_cast<const int8_t*>(packed);
  const uint8_t* difference = packed + line.difference();
  const auto* newest_scales = reinterpret_cast<const float*>(packed + line.newest_scales());
  const auto* difference_scales = reinterpret_cast<const float*>(packed + line.difference_scales());
  for (int64_t block = 0, begin = 0; begin < channels; ++block, begin += PACKED_BLOCK) {
    const int count = int(std::min<int64_t>(PACKED_BLOCK, channels - begin));
    alignas(64) float values[PACKED_BLOCK];
    const float a = taps.newest * newest_scales[block];
    for (int i = 0; i < count; ++i) values[i] = a * float(newest[begin + i]);
    if (BITS && taps.both) {
      const float d = taps.difference * difference_scales[block];
      if (BITS == 8) {
        const auto* codes = reinterpret_cast<const int8_t*>(difference) + begin;
        for (int i = 0; i < count; ++i) values[i] += d * float(codes[i]);
      } else {
        const uint8_t* codes = difference + begin / 2;
        alignas(64) int8_t halves[PACKED_BLOCK];  // sign extended by the shift back; in a loop of its own, which vectorises
        for (int i = 0; i < (count + 1) / 2; ++i) {
          halves[2 * i] = int8_t(int8_t(codes[i] << 4) >> 4);
          halves[2 * i + 1] = int8_t(int8_t(codes[i]) >> 4);
        }
        for (int i = 0; i < count; ++i) values[i] += d * float(halves[i]);
      }
    }
    write(begin, count, values);
  }
}

template <bool RESIDUAL, class T>
FASTERCACHE_INLINE void push_packed_bits(
    uint8_t* packed, const T* in, int64_t step, const T* entry, int64_t entry_step, int64_t channels, int bits) {
  switch (bits) {
    case 0: return push_packed_line<0, RESIDUAL>(packed, in, step, entry, entry_step, channels);
    case 4: return push_packed_line<4, RESIDUAL>(packed, in, step, entry, entry_step, channels);
    default: return push_packed_line<8, RESIDUAL>(packed, in, step, entry, entry_step, channels);
  }
}

// With `entry`, of in - entry.
template <class T>
FASTERCACHE_CPU_CLONES void push_packed(
    uint8_t* packed, const T* in, int64_t step, int64_t channels, int bits, const T* entry = nullptr, int64_t entry_step = 0) {
  if (entry) return push_packed_bits<true>(packed, in, step, entry, entry_step, channels, bits);
  push_packed_bits<false>(packed, in, step, entry, entry_step, channels, bits);
}

// out[i] = blend[i]
template <class T>
FASTERCACHE_CPU_CLONES void blend_packed(T* out, const uint8_t* packed, int64_t channels, int bits, PackedTaps taps) {
  const auto write = [=](int64_t begin, int count, const float* values) FASTERCACHE_INLINE_LAMBDA {
    Tile<T> tile;
    auto* to = tile.target(out + begin);
    for (int i = 0; i < count; ++i) store(to + i, values[i]);
    tile.written(out + begin, count);
  };
  switch (bits) {
    case 0: return blend_packed_line<0>(packed, channels, taps, write);
    case 4: return blend_packed_line<4>(packed, channels, taps, write);
    default: return blend_packed_line<8>(packed, channels, taps, write);
  }
}

// x[i] += gate[i * gate_step] * blend[i], rounded once
template <class T, class G>
FASTERCACHE_CPU_CLONES void blend_add_packed(
    T* x, const G* gate, int64_t gate_step, const uint8_t* packed, int64_t channels, int bits, PackedTaps taps) {
  const auto write = [=](int64_t begin, int count, const float* values) FASTERCACHE_INLINE_LAMBDA {
    if (gate_step == 1) {
      Tile<T> x_tile;
      Tile<G> gate_tile;
      x_tile.read(x + begin, count);
      auto* to = x_tile.target(x + begin);
      const auto* factors = gate_tile.read(gate + begin, count);
      for (int i = 0; i < count; ++i) store(to + i, float(load(to[i])) + float(load(factors[i])) * values[i]);
      x_tile.written(x + begin, count);
    } else {
      for (int i = 0; i < count; ++i)
        store(x + begin + i, float(load(x[begin + i])) + float(load(gate[(begin + i) * gate_step])) * values[i]);
    }
  };
  switch (bits) {
    case 0: return blend_packed_line<0>(packed, channels, taps, write);
    case 4: return blend_packed_line<4>(packed, channels, taps, write);
    default: return blend_packed_line<8>(packed, channels, taps, write);
  }
}

}  // namespace fastercache
