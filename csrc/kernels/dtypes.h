// Storage types, and the type each is computed in: float, but double for double.
#pragma once

#include <cstdint>
#include <cstring>

// One clone per x86-64 level, chosen when the library is loaded: a wheel runs on any CPU and still uses AVX2 or AVX-512.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define FASTERCACHE_CPU_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FASTERCACHE_CPU_CLONES
#endif
#if defined(__GNUC__)
#define FASTERCACHE_INLINE inline __attribute__((always_inline))  // a body must be compiled inside each clone
#else
#define FASTERCACHE_INLINE inline
#endif

namespace fastercache {

struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };

template <class T> struct compute { using type = float; };
template <> struct compute<double> { using type = double; };
template <class T> using compute_t = typename compute<T>::type;

FASTERCACHE_INLINE uint32_t float_bits(float value) { uint32_t bits; std::memcpy(&bits, &value, 4); return bits; }
FASTERCACHE_INLINE float bits_float(uint32_t bits) { float value; std::memcpy(&value, &bits, 4); return value; }

FASTERCACHE_INLINE double load(double value) { return value; }
FASTERCACHE_INLINE float load(float value) { return value; }
FASTERCACHE_INLINE float load(bfloat16 value) { return bits_float(uint32_t(value.bits) << 16); }

// The float16 conversions have no branch (both cases are computed, one is selected), so that loops over them vectorise.
FASTERCACHE_INLINE float load(float16 value) {
  const uint32_t word = uint32_t(value.bits) << 16;
  const uint32_t sign = word & 0x80000000u;
  const uint32_t shifted = word + word;  // exponent and mantissa, at the top of the word
  const float normal = bits_float((shifted >> 4) + (0xE0u << 23)) * 0x1.0p-112f;
  const float subnormal = bits_float((shifted >> 17) | (126u << 23)) - 0.5f;
  return bits_float(sign | (shifted < (1u << 27) ? float_bits(subnormal) : float_bits(normal)));
}

FASTERCACHE_INLINE void store(double* out, double value) { *out = value; }
FASTERCACHE_INLINE void store(float* out, float value) { *out = value; }

FASTERCACHE_INLINE void store(bfloat16* out, float value) {
  const uint32_t bits = float_bits(value);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  out->bits = uint16_t((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}

FASTERCACHE_INLINE void store(float16* out, float value) {
  const uint32_t bits = float_bits(value);
  const uint32_t sign = bits & 0x80000000u;
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  // Multiplying up and down turns what overflows float16 into infinity; adding a power of two then rounds the mantissa.
  const float saturated = (bits_float(magnitude) * 0x1.0p+112f) * 0x1.0p-110f;
  const uint32_t exponent = (magnitude + magnitude) & 0xFF000000u;
  const uint32_t bias = exponent < 0x71000000u ? 0x71000000u : exponent;
  const uint32_t sum = float_bits(bits_float((bias >> 1) + 0x07800000u) + saturated);
  const uint32_t half = ((sum >> 13) & 0x7C00u) + (sum & 0x0FFFu);
  out->bits = uint16_t((sign >> 16) | (magnitude > 0x7F800000u ? 0x7E00u : half));
}

}  // namespace fastercache
