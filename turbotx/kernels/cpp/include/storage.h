// Storage types: 16-bit floats in memory, float32 in registers.
//   in:  pointers to float, ttx::bf16 or ttx::f16 (each two bytes, torch's own bit layout)
//   out: load(p) gives the exact float; store(p, x) rounds to nearest, ties to even; NaN stays NaN,
//        f16 overflows to infinity, denormals are kept
//   example:  #pragma omp simd
//             for (long i = 0; i < n; ++i) ttx::store(y + i, ttx::exp(ttx::load(x + i)));
//
// All integer arithmetic without branches, so that such loops vectorise on every target. The
// processors' own conversions are not used here: vcvtneps2bf16 flushes denormals.
#pragma once

#include <cstdint>

namespace ttx {

struct bf16 { std::uint16_t bits; };
struct f16 { std::uint16_t bits; };

inline float to_float(float x) { return x; }

inline float to_float(bf16 x) {
  return __builtin_bit_cast(float, static_cast<std::uint32_t>(x.bits) << 16);
}

inline float to_float(f16 x) {
  std::uint32_t magnitude = (x.bits & 0x7fffu) << 13, sign = (x.bits & 0x8000u) << 16;
  // Exponents differ by 112; a product, not a sum, so that f16 denormals become normal floats.
  float scaled = __builtin_bit_cast(float, magnitude) * 0x1p+112f;
  std::uint32_t finite = __builtin_bit_cast(std::uint32_t, scaled);
  std::uint32_t special = magnitude | 0x7f800000u;
  return __builtin_bit_cast(float, (magnitude >= 0x0f800000u ? special : finite) | sign);
}

template <class T>
inline T from_float(float x);

template <>
inline float from_float<float>(float x) { return x; }

template <>
inline bf16 from_float<bf16>(float x) {
  std::uint32_t b = __builtin_bit_cast(std::uint32_t, x);
  std::uint32_t rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
  std::uint32_t nan = (b >> 16) | 0x40u;
  return {static_cast<std::uint16_t>((b & 0x7fffffffu) > 0x7f800000u ? nan : rounded)};
}

template <>
inline f16 from_float<f16>(float x) {
  std::uint32_t b = __builtin_bit_cast(std::uint32_t, x);
  std::uint32_t sign = (b >> 16) & 0x8000u, a = b & 0x7fffffffu;
  // From 65520 on, halfway past the largest f16, everything is infinity.
  std::uint32_t normal = (a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13;
  // Below 2^-14 the sum with 1/2 leaves the rounded f16 denormal in the low bits.
  float shifted = __builtin_bit_cast(float, a) + 0.5f;
  std::uint32_t denormal = __builtin_bit_cast(std::uint32_t, shifted) - 0x3f000000u;
  std::uint32_t h = a < 0x38800000u ? denormal : normal;
  h = a >= 0x477ff000u ? 0x7c00u : h;
  h = a > 0x7f800000u ? 0x7e00u | ((a >> 13) & 0x3ffu) : h;
  return {static_cast<std::uint16_t>(h | sign)};
}

// What memory of type T keeps of x.
template <class T>
inline float held(float x) { return to_float(from_float<T>(x)); }

template <class T>
inline float load(const T* p) { return to_float(*p); }

template <class T>
inline void store(T* p, float x) { *p = from_float<T>(x); }

}  // namespace ttx
