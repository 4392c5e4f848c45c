// The machine's float vectors, as GCC/clang vector extensions: no intrinsics, every target.
//   in:  pointers of any alignment to float, bf16 or f16
//   out: ttx::vec, kLanes floats, with the usual operators; kRegisters says how many fit
//   example:  ttx::vec x = ttx::load_vec(p);  ttx::store_vec(out, x * 2.0f + ttx::load_vec(q));
#pragma once

#include <cstring>
#include <utility>

#include "storage.h"

#ifndef TTX_INLINE
#define TTX_INLINE inline __attribute__((always_inline))
#endif

namespace ttx {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kRegisters = 32;
#elif defined(__AVX__)
constexpr int kLanes = 8, kRegisters = 16;
#elif defined(__aarch64__)
constexpr int kLanes = 4, kRegisters = 32;
#else
constexpr int kLanes = 4, kRegisters = 16;
#endif

typedef float vec __attribute__((vector_size(kLanes * 4)));
typedef std::int32_t int_vec __attribute__((vector_size(kLanes * 4)));
typedef std::uint32_t uint_vec __attribute__((vector_size(kLanes * 4)));
typedef std::uint16_t half_vec __attribute__((vector_size(kLanes * 2)));

TTX_INLINE vec broadcast(float x) { return x - vec{}; }

TTX_INLINE vec load_vec(const float* p) {
  vec x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
TTX_INLINE void store_vec(float* p, vec x) { std::memcpy(p, &x, sizeof x); }

TTX_INLINE vec load_vec(const bf16* p) {
  half_vec h;
  std::memcpy(&h, p, sizeof h);
  return __builtin_bit_cast(vec, __builtin_convertvector(h, uint_vec) << 16);
}
#if defined(__AVX512F__) || (defined(__AVX__) && defined(__F16C__))
// These conversions are exact about denormals; as instructions, for their headers compile slowly.
TTX_INLINE vec load_vec(const f16* p) {
  half_vec h;
  vec x;
  std::memcpy(&h, p, sizeof h);
  asm("vcvtph2ps %1, %0" : "=v"(x) : "v"(h));
  return x;
}
TTX_INLINE void store_vec(f16* p, vec x) {
  half_vec h;
  asm("vcvtps2ph $0, %1, %0" : "=v"(h) : "v"(x));
  std::memcpy(p, &h, sizeof h);
}
#else
TTX_INLINE vec load_vec(const f16* p) {
  half_vec h;
  std::memcpy(&h, p, sizeof h);
  uint_vec wide = __builtin_convertvector(h, uint_vec);
  uint_vec magnitude = (wide & 0x7fffu) << 13, sign = (wide & 0x8000u) << 16;
  uint_vec finite = __builtin_bit_cast(uint_vec, __builtin_bit_cast(vec, magnitude) * 0x1p+112f);
  uint_vec answer = magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : finite;
  return __builtin_bit_cast(vec, answer | sign);
}
TTX_INLINE void store_vec(f16* p, vec x) {
  for (int i = 0; i < kLanes; ++i) p[i] = from_float<f16>(x[i]);
}
#endif

TTX_INLINE void store_vec(bf16* p, vec x) {
  uint_vec b = __builtin_bit_cast(uint_vec, x);
  uint_vec rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16;
  uint_vec chosen = (b & 0x7fffffffu) > 0x7f800000u ? (b >> 16) | 0x40u : rounded;
  half_vec h = __builtin_convertvector(chosen, half_vec);
  std::memcpy(p, &h, sizeof h);
}

// The first `count` lanes; the others are zero when loaded and untouched when stored.
template <class T>
inline vec load_part(const T* p, int count) {
  vec x = {};
  for (int i = 0; i < count; ++i) x[i] = to_float(p[i]);
  return x;
}
template <class T>
inline void store_part(T* p, vec x, int count) {
  for (int i = 0; i < count; ++i) p[i] = from_float<T>(x[i]);
}

template <class T>
TTX_INLINE vec load_some(const T* p, int count) {
  return count == kLanes ? load_vec(p) : load_part(p, count);
}
template <class T>
TTX_INLINE void store_some(T* p, vec x, int count) {
  if (count == kLanes) store_vec(p, x);
  else store_part(p, x, count);
}

namespace detail {

// Lane i gets lane (i + SHIFT) % kLanes.
template <int SHIFT, int... I>
TTX_INLINE vec rotate(vec x, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(x, x, ((I + SHIFT) % kLanes)...);
}

// a0 b0 a1 b1 ... of the first halves, or of the second.
template <int HALF, int... I>
TTX_INLINE vec interleave(vec a, vec b, std::integer_sequence<int, I...>) {
  constexpr int first = HALF * kLanes / 2;
  return __builtin_shufflevector(a, b, (first + I / 2 + I % 2 * kLanes)...);
}

template <int WIDTH, class Combine>
TTX_INLINE vec fold(vec x, Combine combine) {
  if constexpr (WIDTH == 0) return x;
  else {
    vec other = rotate<WIDTH>(x, std::make_integer_sequence<int, kLanes>{});
    return fold<WIDTH / 2>(combine(x, other), combine);
  }
}

}  // namespace detail

// Lane i of row j becomes lane j of row i: log2(kLanes) perfect shuffles of the rows.
TTX_INLINE void transpose(vec (&rows)[kLanes]) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes>{};
#pragma GCC unroll 4
  for (int step = 1; step < kLanes; step *= 2) {
    vec mixed[kLanes];
#pragma GCC unroll 8
    for (int i = 0; i < kLanes / 2; ++i) {
      mixed[2 * i] = detail::interleave<0>(rows[i], rows[i + kLanes / 2], lanes);
      mixed[2 * i + 1] = detail::interleave<1>(rows[i], rows[i + kLanes / 2], lanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = mixed[i];
  }
}

// Lane i of the result is the sum of rows[i]: the shuffles of `transpose`, half of them summed away
// at each step. Changes the rows.
TTX_INLINE vec sum_rows(vec (&rows)[kLanes]) {
  constexpr auto lanes = std::make_integer_sequence<int, kLanes>{};
#pragma GCC unroll 4
  for (int half = kLanes / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i)
      rows[i] = detail::interleave<0>(rows[i], rows[i + half], lanes) +
                detail::interleave<1>(rows[i], rows[i + half], lanes);
  return rows[0];
}

TTX_INLINE float sum_lanes(vec x) {
  return detail::fold<kLanes / 2>(x, [](vec a, vec b) { return a + b; })[0];
}
TTX_INLINE float max_lanes(vec x) {
  return detail::fold<kLanes / 2>(x, [](vec a, vec b) { return a > b ? a : b; })[0];
}

}  // namespace ttx
