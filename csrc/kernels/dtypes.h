// Storage types, and the type each is computed in: float, but double for double.
#pragma once

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#endif

#include <cstdint>
#include <cstring>

#include "../packed_layout.h"  // FASTERCACHE_HOST_DEVICE

// One clone per x86-64 level, chosen when the library is loaded: a wheel runs on any CPU and still uses AVX2 or AVX-512.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define FASTERCACHE_CPU_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FASTERCACHE_CPU_CLONES
#endif
#if defined(__GNUC__)
#define FASTERCACHE_INLINE inline __attribute__((always_inline))  // a body must be compiled inside each clone
#define FASTERCACHE_INLINE_LAMBDA __attribute__((always_inline))
#else
#define FASTERCACHE_INLINE inline
#define FASTERCACHE_INLINE_LAMBDA
#endif

namespace fastercache {

struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };

template <class T> struct compute { using type = float; };
template <> struct compute<double> { using type = double; };
template <class T> using compute_t = typename compute<T>::type;

FASTERCACHE_INLINE FASTERCACHE_HOST_DEVICE uint32_t float_bits(float value) { uint32_t bits; std::memcpy(&bits, &value, 4); return bits; }
FASTERCACHE_INLINE FASTERCACHE_HOST_DEVICE float bits_float(uint32_t bits) { float value; std::memcpy(&value, &bits, 4); return value; }

FASTERCACHE_INLINE double load(double value) { return value; }
FASTERCACHE_INLINE FASTERCACHE_HOST_DEVICE float load(float value) { return value; }
FASTERCACHE_INLINE FASTERCACHE_HOST_DEVICE float load(bfloat16 value) { return bits_float(uint32_t(value.bits) << 16); }

// float16 has 5 bits of exponent with bias 15 and 10 of mantissa, float 8 with bias 127 and 23: exponents differ by 112, mantissas by 13
// bits. All cases are computed and one is selected, without a branch, so that loops over the conversions vectorise.
constexpr uint32_t EXPONENT_SHIFT = 112u << 23;

FASTERCACHE_INLINE FASTERCACHE_HOST_DEVICE float load(float16 value) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(value.bits));  // one instruction; the rest of this takes ten
#endif
  const uint32_t magnitude = value.bits & 0x7FFFu;
  const uint32_t normal = (magnitude << 13) + EXPONENT_SHIFT;
  const uint32_t infinite = normal + EXPONENT_SHIFT;  // exponent 31 becomes 255: infinity or NaN
  const uint32_t subnormal = float_bits(float(int32_t(magnitude)) * 0x1p-24f);
  const uint32_t bits = magnitude < 0x0400u ? subnormal : magnitude < 0x7C00u ? normal : infinite;
  return bits_float(bits | uint32_t(value.bits & 0x8000u) << 16);
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
  const uint32_t magnitude = bits & 0x7FFFFFFFu;
  // To nearest, ties to even: add just under half of the last place kept, and one more where that place is odd.
  const uint32_t rounded = (magnitude - EXPONENT_SHIFT + 0x0FFFu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t normal = magnitude >= 0x47800000u ? 0x7C00u : rounded;  // 65536 and beyond is infinity
  const uint32_t subnormal = float_bits(bits_float(magnitude) + 0.5f) - float_bits(0.5f);  // a float near 0.5 steps by 2^-24, as they do
  const uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;  // below 2^-14
  out->bits = uint16_t((bits >> 16 & 0x8000u) | (magnitude > 0x7F800000u ? 0x7E00u : finite));
}

}  // namespace fastercache
