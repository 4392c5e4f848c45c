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
//   sigmoid tanh 2.4; silu 3.1 (one rounding after another). gelu 4.2 down to x = -4 and 5.4 to -5;
//   below, its error is under 1e-12 of x; results smaller than 2e-37 become -0 (torch's own
//   form, 1 + erf, has lost every digit at -5.4). gelu_tanh: 9 for x > -2, 90 at -8.
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

// The normal distribution's lower tail, Phi(-a) for a >= 0: exp(-a^2/2 - s(a)) / 2, where s is a
// times a polynomial on [0, 9] (error 2^-24 to 4, 2^-22 at 5, 2^-13 at 8, where the result is
// 6e-16). a^2 is split so that its rounding does not reach the exponential.
template <floats F>
TTX_INLINE F normal_tail(F a) {
  F b = at_most(a, 9.0f);
  F u = b - 3.0f;
  F s = u * 0x1.c27becp-34f - 0x1.d17db8p-30f;
  s = s * u + 0x1.6b49800p-27f;
  s = s * u - 0x1.e570eap-26f;
  s = s * u - 0x1.1c17220p-24f;
  s = s * u + 0x1.ea022ep-20f;
  s = s * u - 0x1.5311e8p-16f;
  s = s * u + 0x1.6ca300p-13f;
  s = s * u - 0x1.578ad6p-10f;
  s = s * u + 0x1.2cb280p-7f;
  s = s * u - 0x1.014440p-4f;
  s = s * u + 0x1.e2d7cep-2f;
  s = s * b;
  F c = at_most(a, 14.5f);
  // 12 bits, whose square is exact:
  F head = from_bits<F>(bits(c) & static_cast<std::int32_t>(0xfffff000));
  F square = 0.5f * head * head;
  F rest = 0.5f * (c - head) * (c + head) + s;
  auto t = split<F>((square + rest) * -kLog2E);
  F r = (-square - t.whole * kLn2Hi) - (t.whole * kLn2Lo + rest);
  int_like<F> n = t.n - 1;
  n = n < -127 ? splat_int<int_like<F>>(-127) : n;
  return (expm1_reduced<F>(r) + 1.0f) * pow2<F>(n);
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
template <floats F>
TTX_INLINE F gelu(F x) {
  F tail = detail::normal_tail<F>(abs(x));
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
