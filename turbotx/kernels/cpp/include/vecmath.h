// Elementary functions on float32, written so that a compiler turns the loops that call them into
// vector code: no branches, no tables but one, no library calls.
//   in:  a float, or a GCC/clang vector of floats (simd.h); any value, infinities and NaN included
//   out: the function's value to the ulp bounds below, over every float (denormal inputs included)
//   example:  #pragma omp simd
//             for (long i = 0; i < n; ++i) y[i] = ttx::gelu(x[i]);
//
// Compile without -ffinite-math-only; -ffp-contract=fast and -fno-trapping-math are expected.
// Worst error in ulp of the true value (tests/kernels/cpp/test_headers.py scans them): sqrt 0.5;
//   pow 0.6; log exp2 log2 1.0; exp 1.1; log1p expm1 rsqrt 1.5; sin cos softplus 1.6; erf 2.0;
//   sigmoid tanh 2.4; silu 3.1 (one rounding after another). gelu 3 down to x = -1; below, its error is
//   under 2^-24 of x (torch's own has 2^-21.8). gelu_tanh: 9 for x > -2, 90 at -8.
//
// The coefficients are minimax fits made for this file: iteratively re-weighted least squares on
// 1500 Chebyshev nodes in float64 against 40-digit values, each coefficient rounded to float32
// from the lowest power up and the rest fitted again. Interval and accuracy stand beside each.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

#ifndef TTX_INLINE
#define TTX_INLINE inline __attribute__((always_inline))
#endif

namespace ttx {

// The integers that share a float's (or a float vector's) shape.
template <class F>
using int_like = std::conditional_t<std::is_same_v<F, float>, std::int32_t, decltype(F{} < F{})>;

template <class F>
concept floats = std::is_same_v<F, float> ||
                 (!std::is_arithmetic_v<F> && sizeof(int_like<F>) == sizeof(F));

template <class I>
TTX_INLINE I splat_int(std::int32_t c) { return I{} + c; }

template <floats F>
TTX_INLINE F splat(float c) {
  if constexpr (std::is_same_v<F, float>) return c;
  else return c - F{};  // 0 is subtracted, not added: -0 stays -0
}
template <floats F>
TTX_INLINE int_like<F> bits(F x) { return __builtin_bit_cast(int_like<F>, x); }
template <floats F>
TTX_INLINE F from_bits(int_like<F> i) { return __builtin_bit_cast(F, i); }

// One instruction each in this order; a NaN in x comes through, its comparison is false.
template <floats F>
TTX_INLINE F at_most(F x, float c) { return splat<F>(c) < x ? splat<F>(c) : x; }
template <floats F>
TTX_INLINE F at_least(F x, float c) { return splat<F>(c) > x ? splat<F>(c) : x; }

template <floats F>
TTX_INLINE F abs(F x) { return from_bits<F>(bits(x) & 0x7fffffff); }
template <floats F>
TTX_INLINE F with_sign_of(F magnitude, F x) {
  return from_bits<F>(bits(magnitude) | (bits(x) & static_cast<std::int32_t>(0x80000000)));
}
// 2^n for n in [-126, 127]; n = -127 gives 0 and n = 128 infinity.
template <floats F>
TTX_INLINE F pow2(int_like<F> n) { return from_bits<F>((n + 127) << 23); }

namespace detail {

constexpr float kLog2E = 0x1.715476p+0f;
constexpr float kLn2Hi = 0x1.62e400p-1f;  // 15 bits: its product with an exponent is exact
constexpr float kLn2Lo = 0x1.7f7d1cp-20f;
constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: leaves the nearest integer in the low bits

template <floats F>
struct Split { F whole; int_like<F> n; };

// The integer nearest to t, |t| < 2^22, as a float and as an integer.
template <floats F>
TTX_INLINE Split<F> split(F t) {
  F shifted = t + splat<F>(kRound);
  return {shifted - splat<F>(kRound), bits(shifted) - bits(splat<F>(kRound))};
}

template <floats F>
TTX_INLINE F reduce_ln2(F x, F n) { return (x - n * kLn2Hi) - n * kLn2Lo; }

// e^r - 1 on |r| <= ln2/2, relative error 2^-26 against expm1, 2^-28 against exp.
template <floats F>
TTX_INLINE F expm1_reduced(F r) {
  F q = r * 0x1.6b9caap-10f + 0x1.122560p-7f;
  q = q * r + 0x1.5556f2p-5f;
  q = q * r + 0x1.5554b4p-3f;
  q = q * r + 0x1.fffffep-2f;
  return (r * r) * q + r;
}

// expm1 for x in [-20, 89].
template <floats F>
TTX_INLINE F expm1_bounded(F x) {
  auto s = split<F>(x * kLog2E);
  F p = expm1_reduced<F>(reduce_ln2<F>(x, s.whole));
  F half = pow2<F>(s.n - 1);  // half of 2^n, which may itself be out of range
  return 2.0f * (half * p + (half - 0.5f));
}

template <floats F>
struct LogParts { F exponent; F f; };  // x = 2^exponent * (1 + f), 1 + f in [sqrt(1/2), sqrt(2))

template <floats F>
TTX_INLINE LogParts<F> log_parts(F x) {
  auto small = x < splat<F>(std::numeric_limits<float>::min());
  F y = small ? x * 0x1p23f : x;
  constexpr std::int32_t root_half = 0x3f3504f3;
  int_like<F> e = (bits(y) - root_half) >> 23;
  F f = from_bits<F>(bits(y) - (e << 23)) - 1.0f;
  F exponent;
  if constexpr (std::is_same_v<F, float>) exponent = static_cast<float>(e);
  else exponent = __builtin_convertvector(e, F);
  return {small ? exponent - 23.0f : exponent, f};
}

// log(1 + f) + exponent * ln 2; the polynomial has relative error 2^-30 against log(1 + f).
template <floats F>
TTX_INLINE F log_join(F exponent, F f) {
  F p = f * 0x1.148cbcp-4f - 0x1.de4c5ep-4f;
  p = p * f + 0x1.e6db7cp-4f;
  p = p * f - 0x1.fc205ap-4f;
  p = p * f + 0x1.2339b0p-3f;
  p = p * f - 0x1.555c60p-3f;
  p = p * f + 0x1.99a486p-3f;
  p = p * f - 0x1.000006p-2f;
  p = p * f + 0x1.555548p-2f;
  F f2 = f * f;
  F tail = (f2 * f) * p + exponent * kLn2Lo;
  tail = tail - 0.5f * f2;
  return exponent * kLn2Hi + (f + tail);
}

// The four answers every logarithm shares: log 0, log of a negative, of infinity, of NaN.
template <floats F>
TTX_INLINE F log_edges(F x, F finite) {
  constexpr float inf = std::numeric_limits<float>::infinity();
  F y = x < splat<F>(inf) ? finite : x;  // +inf and NaN answer themselves
  y = x == splat<F>(0.0f) ? splat<F>(-inf) : y;
  return x < splat<F>(0.0f) ? splat<F>(std::numeric_limits<float>::quiet_NaN()) : y;
}

// 2^t for t <= 0, zero below 2^-126.5; NaN stays. Relative error 2^-28, or 2^-13 where 12 bits do.
template <int BITS = 24, floats F>
TTX_INLINE F exp2_nonpositive(F t) {
  t = splat<F>(-127.0f) > t ? splat<F>(-127.0f) : t;  // at -127 the exponent's bits are those of 0
  auto s = split<F>(t);
  F r = t - s.whole, p;
  if constexpr (BITS > 12) {
    p = r * 0x1.416d18p-13f + 0x1.5f09a6p-10f;
    p = p * r + 0x1.3b2de0p-7f;
    p = p * r + 0x1.c6af7ap-5f;
    p = p * r + 0x1.ebfbdcp-3f;
    p = p * r + 0x1.62e430p-1f;
  } else {
    p = r * 0x1.c2a254p-5f + 0x1.f00c4cp-3f;
    p = p * r + 0x1.62f5fap-1f;
  }
  return (p * r + 1.0f) * pow2<F>(s.n);
}

// log2 of the normal distribution's lower tail, Phi(-a) for a >= 0: -1 and a times a polynomial, which
// falls for all a. Phi has the error 2^-26; or, where 12 bits do, the relative error 2^-11.8 to a = 5.5.
template <int BITS, floats F>
TTX_INLINE F log2_normal_tail(F a) {
  F q;
  if constexpr (BITS > 12) {
    q = a * -0x1.211116p-19f + 0x1.0efe9cp-15f;
    q = q * a - 0x1.4a396ap-13f;
    q = q * a - 0x1.993fecp-13f;
    q = q * a + 0x1.d2fda4p-8f;
    q = q * a - 0x1.ae5414p-5f;
    q = q * a - 0x1.d63874p-2f;
    q = q * a - 0x1.26aeep+0f;
  } else {
    q = a * -0x1.f9d382p-13f + 0x1.46e94ep-8f;
    q = q * a - 0x1.729898p-5f;
    q = q * a - 0x1.df6ae0p-2f;
    q = q * a - 0x1.25ce10p+0f;
  }
  return q * a - 1.0f;
}

}  // namespace detail

template <floats F>
TTX_INLINE F exp(F x) {
  x = at_least(at_most(x, 89.0f), -104.0f);
  auto s = detail::split<F>(x * detail::kLog2E);
  F p = detail::expm1_reduced<F>(detail::reduce_ln2<F>(x, s.whole)) + 1.0f;
  int_like<F> half = s.n >> 1;  // two factors: 2^n may be denormal or beyond the largest float
  return p * pow2<F>(half) * pow2<F>(s.n - half);
}

template <floats F>
TTX_INLINE F exp2(F x) {
  x = at_least(at_most(x, 129.0f), -151.0f);
  auto s = detail::split<F>(x);
  F r = x - s.whole;  // |r| <= 1/2; (2^r - 1)/r, relative error 2^-28
  F p = r * 0x1.416d18p-13f + 0x1.5f09a6p-10f;
  p = p * r + 0x1.3b2de0p-7f;
  p = p * r + 0x1.c6af7ap-5f;
  p = p * r + 0x1.ebfbdcp-3f;
  p = p * r + 0x1.62e430p-1f;
  p = p * r + 1.0f;
  int_like<F> half = s.n >> 1;
  return p * pow2<F>(half) * pow2<F>(s.n - half);
}

template <floats F>
TTX_INLINE F expm1(F x) {
  F y = detail::expm1_bounded<F>(at_least(at_most(x, 89.0f), -20.0f));
  return x == splat<F>(0.0f) ? x : y;  // keeps -0
}

template <floats F>
TTX_INLINE F log(F x) {
  auto parts = detail::log_parts<F>(x);
  return detail::log_edges<F>(x, detail::log_join<F>(parts.exponent, parts.f));
}

template <floats F>
TTX_INLINE F log2(F x) {
  auto parts = detail::log_parts<F>(x);
  F f = parts.f;  // log2(1+f) = f*log2(e) + f^2 R(f), relative error 2^-27
  F p = f * -0x1.c3a1b8p-4f + 0x1.7f1fcap-3f;
  p = p * f - 0x1.87f2eep-3f;
  p = p * f + 0x1.a2caaap-3f;
  p = p * f - 0x1.eaa2dcp-3f;
  p = p * f + 0x1.277f42p-2f;
  p = p * f - 0x1.715afcp-2f;
  p = p * f + 0x1.ec7094p-2f;
  p = p * f - 0x1.715470p-1f;
  F low = (f * f) * p + f * 0x1.4ae0c0p-26f;  // log2(e) = kLog2E + 0x1.4ae0cp-26
  return detail::log_edges<F>(x, parts.exponent + (f * detail::kLog2E + low));
}

template <floats F>
TTX_INLINE F log1p(F x) {
  F u = x + 1.0f;
  F back = u - x;
  F lost = (x - (u - back)) + (1.0f - back);  // what the addition rounded away
  auto parts = detail::log_parts<F>(u);
  int_like<F> e;
  if constexpr (std::is_same_v<F, float>) e = static_cast<std::int32_t>(parts.exponent);
  else e = __builtin_convertvector(parts.exponent, int_like<F>);
  F f = parts.f + lost * pow2<F>(e < 126 ? -e : splat_int<int_like<F>>(-126));
  F y = detail::log_edges<F>(u, detail::log_join<F>(parts.exponent, f));
  return x == splat<F>(0.0f) ? x : y;
}

// erf(|x|) = 1 - exp(-q), q = -log(erfc(|x|)): accurate at 0 too, through expm1.
template <floats F>
TTX_INLINE F erf(F x) {
  F a = at_most(abs(x), 4.0f);  // q = 2/sqrt(pi) a + a^2 P(a) on [0, 3.95], relative error 2^-27
  F q = a * -0x1.38c3b4p-17f + 0x1.f00c72p-14f;
  q = q * a - 0x1.4d0ddap-11f;
  q = q * a + 0x1.b64180p-10f;
  q = q * a - 0x1.5b5962p-13f;
  q = q * a - 0x1.39c09ep-6f;
  q = q * a + 0x1.a4f95cp-4f;
  q = q * a + 0x1.45f2fep-1f;
  q = a * 0x1.20dd76p+0f + (q * (a * a) - a * 0x1.f7ac92p-25f);
  F y = -detail::expm1_bounded<F>(-q);
  return with_sign_of<F>(abs(y), x);
}

template <floats F>
TTX_INLINE F tanh(F x) {
  F e = detail::expm1_bounded<F>(2.0f * at_most(abs(x), 10.0f));
  return with_sign_of<F>(abs(e / (e + 2.0f)), x);
}

template <floats F>
TTX_INLINE F sigmoid(F x) {
  F e = ttx::exp<F>(-abs(x));
  return (x < splat<F>(0.0f) ? e : splat<F>(1.0f)) / (e + 1.0f);
}

template <floats F>
TTX_INLINE F silu(F x) { return x * ttx::sigmoid<F>(x); }

// x * Phi(x), the erf form: the tail is computed as a tail, not as 1 + erf.
template <int BITS = 24, floats F>
TTX_INLINE F gelu(F x) {
  F tail = detail::exp2_nonpositive<BITS>(detail::log2_normal_tail<BITS>(abs(x)));
  return x * (x > splat<F>(0.0f) ? 1.0f - tail : tail);
}

// x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) = x * sigmoid(2 sqrt(2/pi) (...))
template <floats F>
TTX_INLINE F gelu_tanh(F x) {
  F inner = x * 0x1.988454p+0f * ((x * x) * 0x1.6e4e26p-5f + 1.0f);
  return x * ttx::sigmoid<F>(inner);
}

// log(1 + e^x), and torch's form with its beta and its linear part above the threshold.
template <floats F>
TTX_INLINE F softplus(F x) {
  F e = ttx::exp<F>(-abs(x));
  return at_least(x, 0.0f) + ttx::log1p<F>(e);
}
template <floats F>
TTX_INLINE F softplus(F x, float beta, float threshold) {
  F scaled = x * beta;
  return scaled > splat<F>(threshold) ? x : ttx::softplus<F>(scaled) / beta;
}

TTX_INLINE float sqrt(float x) { return __builtin_sqrtf(x); }
TTX_INLINE float rsqrt(float x) { return 1.0f / __builtin_sqrtf(x); }

}  // namespace ttx

#include "vecmath_wide.h"
