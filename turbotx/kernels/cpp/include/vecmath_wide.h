// sin, cos and pow: the functions whose inner steps need more than float32, taken in float64.
//   in:  floats; out: floats, within 1 ulp at any argument, also |x| near 3e38
//   example:  float y = ttx::cos(position * frequency);
// They vectorise at half the width of the others. Included by vecmath.h; not for vector types.
#pragma once

#include <cstdint>
#include <limits>

namespace ttx {
namespace detail {

// Entry k: 2^k modulo 2 pi, in [-pi, pi], as a head of 29 bits (times a float's 24 it is exact) and
// the rest. A float above 2^24 is m * 2^k with an integer m, so m times entry k is the same angle.
// Entry 0 is 1: smaller arguments pass through unchanged. Two flat arrays: GCC gathers from those.
inline constexpr double kPowerHead[105] = {
    1.0, 0x1.p+1, -0x1.243f6a9p+1, 0x1.b7812afp+0, -0x1.6cbe3fap+1, 0x1.2b0bad5p-1, 0x1.2b0bad5p+0,
    0x1.2b0bad5p+1, -0x1.9c501fcp+0, 0x1.87ef4adp+1, -0x1.460d4edp-3, -0x1.460d4edp-2,
    -0x1.460d4edp-1, -0x1.460d4edp+0, -0x1.460d4edp+1, 0x1.304999dp+0, 0x1.304999dp+1,
    -0x1.87586dep+0, -0x1.87586dep+1, 0x1.58e8ec1p-3, 0x1.58e8ec1p-2, 0x1.58e8ec1p-1,
    0x1.58e8ec1p+0, 0x1.58e8ec1p+1, -0x1.c9b6499p-1, -0x1.c9b6499p+0, 0x1.5a8921p+1,
    -0x1.bcb4a24p-1, -0x1.bcb4a24p+0, 0x1.678ac85p+1, -0x1.54a767dp-1, -0x1.54a767dp+0,
    -0x1.54a767dp+1, 0x1.ebc26b9p-1, 0x1.ebc26b9p+0, -0x1.387cfefp+1, 0x1.668ad94p+0,
    0x1.668ad94p+1, -0x1.5ca6dffp-1, -0x1.5ca6dffp+0, -0x1.5ca6dffp+1, 0x1.abc6aadp-1,
    0x1.abc6aadp+0, -0x1.7878bfcp+1, 0x1.9a6f588p-2, 0x1.9a6f588p-1, 0x1.9a6f588p+0, -0x1.89d012p+1,
    0x1.09f4684p-3, 0x1.09f4684p-2, 0x1.09f4684p-1, 0x1.09f4684p+0, 0x1.09f4684p+1, -0x1.10569a1p+1,
    0x1.0392367p+1, -0x1.1d1afdbp+1, 0x1.d412de5p+0, -0x1.502c8c4p+1, 0x1.07cca43p+0,
    0x1.07cca43p+1, -0x1.14a6223p+1, 0x1.f5e64c5p+0, -0x1.2e591e3p+1, 0x1.8f1a5c4p+0,
    0x1.8f1a5c4p+1, -0x1.82ac837p-5, -0x1.82ac837p-4, -0x1.82ac837p-3, -0x1.82ac837p-2,
    -0x1.82ac837p-1, -0x1.82ac837p+0, -0x1.82ac837p+1, 0x1.ee66399p-3, 0x1.ee66399p-2,
    0x1.ee66399p-1, 0x1.ee66399p+0, -0x1.35d931p+1, 0x1.711a111p+0, 0x1.711a111p+1, -0x1.082d21ap-1,
    -0x1.082d21ap+0, -0x1.082d21ap+1, 0x1.13e5275p+1, -0x1.f8ea37dp+0, 0x1.2b5532cp+1,
    -0x1.9b2a0a2p+0, 0x1.8915606p+1, -0x1.214a9b9p-3, -0x1.214a9b9p-2, -0x1.214a9b9p-1,
    -0x1.214a9b9p+0, -0x1.214a9b9p+1, 0x1.c35466dp+0, -0x1.60eb03cp+1, 0x1.89a58c4p-1,
    0x1.89a58c4p+0, 0x1.89a58c4p+1, -0x1.0f45205p-3, -0x1.0f45205p-2, -0x1.0f45205p-1,
    -0x1.0f45205p+0, -0x1.0f45205p+1, 0x1.05b529fp+1, -0x1.18d516bp+1, 0x1.e52a7a6p+0,
};
inline constexpr double kPowerRest[105] = {
    0.0, 0x0p+0, 0x1.de973dcb3b39ap-29, -0x1.0b4611a626331p-32, 0x1.9bc5b961b1acep-29,
    0x1.63d0d3e0a0805p-31, 0x1.63d0d3e0a0805p-30, 0x1.63d0d3e0a0805p-29, 0x1.4c71cb18f8747p-30,
    -0x1.244ae564858a6p-30, -0x1.6ce9e652942fbp-35, -0x1.6ce9e652942fbp-34, -0x1.6ce9e652942fbp-33,
    -0x1.6ce9e652942fbp-32, -0x1.6ce9e652942fbp-31, -0x1.2a1861e90aa2fp-30, -0x1.2a1861e90aa2fp-29,
    -0x1.d666181b6831p-31, -0x1.d666181b6831p-30, 0x1.6055432b92ab6p-34, 0x1.6055432b92ab6p-33,
    0x1.6055432b92ab6p-32, 0x1.6055432b92ab6p-31, 0x1.6055432b92ab6p-30, 0x1.f76407b66f27fp-32,
    0x1.f76407b66f27fp-31, -0x1.c5ca73e0074b5p-30, 0x1.8ccc9eb33ee4bp-33, 0x1.8ccc9eb33ee4bp-32,
    -0x1.7b64161e6b807p-29, -0x1.830ee719bc742p-33, -0x1.830ee719bc742p-32, -0x1.830ee719bc742p-31,
    0x1.7f853a9f9a315p-31, 0x1.7f853a9f9a315p-30, -0x1.43c70f2a552a3p-30, 0x1.bb436614df386p-30,
    0x1.bb436614df386p-29, 0x1.547827d3e6a98p-31, 0x1.547827d3e6a98p-30, 0x1.547827d3e6a98p-29,
    -0x1.ad37711b6f34fp-32, -0x1.ad37711b6f34fp-31, 0x1.07fb853d839f2p-29, 0x1.8afe657e60255p-32,
    0x1.8afe657e60255p-31, 0x1.8afe657e60255p-30, -0x1.2cd4b96cc9422p-30, -0x1.6d7ee7008f78ap-34,
    -0x1.6d7ee7008f78ap-33, -0x1.6d7ee7008f78ap-32, -0x1.6d7ee7008f78ap-31, -0x1.6d7ee7008f78ap-30,
    0x1.c4615b2aaf041p-31, -0x1.f8cd206bc76f2p-30, -0x1.a35e2a08c3589p-33, -0x1.303030c53a4afp-33,
    0x1.b89137b293f04p-29, -0x1.b5d339984d648p-31, -0x1.b5d339984d648p-30, 0x1.462021976ea92p-32,
    0x1.cbc32a6a81c2ap-31, -0x1.3b872cff83e51p-29, -0x1.56965f290c0efp-31, -0x1.56965f290c0efp-30,
    -0x1.ffc8577435554p-35, -0x1.ffc8577435554p-34, -0x1.ffc8577435554p-33, -0x1.ffc8577435554p-32,
    -0x1.ffc8577435554p-31, -0x1.ffc8577435554p-30, -0x1.ffc8577435554p-29, -0x1.e27ecb3a5e429p-33,
    -0x1.e27ecb3a5e429p-32, -0x1.e27ecb3a5e429p-31, -0x1.e27ecb3a5e429p-30, -0x1.f3c6b791847c5p-36,
    0x1.999a7567eb471p-33, 0x1.999a7567eb471p-32, 0x1.13f76c94d82d9p-31, 0x1.13f76c94d82d9p-30,
    0x1.13f76c94d82d9p-29, 0x1.255e6d79d485fp-31, 0x1.c519d22095f25p-31, -0x1.f814a975e080fp-30,
    -0x1.97d6baaa5474cp-33, 0x1.ee6deadf7a37dp-29, -0x1.233b1d7415b3ap-35, -0x1.233b1d7415b3ap-34,
    -0x1.233b1d7415b3ap-33, -0x1.233b1d7415b3ap-32, -0x1.233b1d7415b3ap-31, -0x1.c0d33215184dcp-31,
    0x1.fc5b49815e257p-30, 0x1.dc40bb622ebdap-33, 0x1.dc40bb622ebdap-32, 0x1.dc40bb622ebdap-31,
    0x1.96f36f8a530ep-34, 0x1.96f36f8a530ep-33, 0x1.96f36f8a530ep-32, 0x1.96f36f8a530ep-31,
    0x1.96f36f8a530ep-30, -0x1.1e8f3903a0ae8p-31, 0x1.4f4fa1496ae26p-29, 0x1.8010098f35163p-30,
};

struct Angle { float r; std::int32_t quadrant; };  // x = quadrant * pi/2 + r, |r| <= pi/4

TTX_INLINE Angle reduce_angle(float x) {
  std::int32_t b = __builtin_bit_cast(std::int32_t, x);
  std::int32_t k = ((b >> 23) & 255) - 127 - 23;
  k = k < 0 ? 0 : k;
  k = k > 104 ? 104 : k;  // infinities and NaN: their r is thrown away by the caller
  double m = static_cast<double>(__builtin_bit_cast(float, b - (k << 23)));
  double head = m * kPowerHead[k];
  double rest = m * kPowerRest[k];
  constexpr double round = 0x1.8p+52;
  double shifted = head * 0x1.45f306dc9c883p-1 + round;
  double n = shifted - round;
  // pi/2 = a head of 27 bits, so that n (up to 2^26) times it is exact, and the rest.
  double r = ((head - n * 0x1.921fb54p+0) + rest) - n * 0x1.10b4611a62633p-30;
  return {static_cast<float>(r),
          static_cast<std::int32_t>(__builtin_bit_cast(std::int64_t, shifted) & 3)};
}

// Quadrant 0 is sin r, 1 is cos r, 2 and 3 their negatives.
TTX_INLINE float sine_in_quadrant(float r, std::int32_t quadrant) {
  float z = r * r;
  float s = z * 0x1.7ccf16p-19f - 0x1.a05ba8p-13f;  // [0, pi/4], relative error 2^-32
  s = s * z + 0x1.111176p-7f;
  s = s * z - 0x1.555556p-3f;
  s = (s * z) * r + r;
  float c = z * 0x1.99e0e4p-16f - 0x1.6c0c1ap-10f;  // error 2^-33
  c = c * z + 0x1.55554ap-5f;
  c = (c * z) * z + (1.0f - 0.5f * z);
  float y = (quadrant & 1) != 0 ? c : s;
  return (quadrant & 2) != 0 ? -y : y;
}

// log2 of a positive finite double, absolute error 2^-40 beside its exponent.
TTX_INLINE double log2_wide(double x) {
  std::int64_t b = __builtin_bit_cast(std::int64_t, x);
  std::int64_t e = (b - 0x3fe6a09e667f3bcd) >> 52;
  double m = __builtin_bit_cast(double, b - (e << 52));
  double f = (m - 1.0) / (m + 1.0);  // log2 m = 2/ln2 (f + f^3/3 + f^5/5 + ...), |f| <= 0.1716
  double z = f * f;
  double p = z / 17.0 + 1.0 / 15.0;
  p = p * z + 1.0 / 13.0;
  p = p * z + 1.0 / 11.0;
  p = p * z + 1.0 / 9.0;
  p = p * z + 1.0 / 7.0;
  p = p * z + 1.0 / 5.0;
  p = p * z + 1.0 / 3.0;
  p = p * z + 1.0;
  return static_cast<double>(static_cast<std::int32_t>(e)) + f * p * 0x1.71547652b82fep+1;
}

TTX_INLINE double exp2_wide(double t) {
  constexpr double round = 0x1.8p+52;
  double shifted = t + round;
  double r = (t - (shifted - round)) * 0x1.62e42fefa39efp-1;  // Taylor series of e^r: 2^-38
  double p = r * (1.0 / 362880) + 1.0 / 40320;
  p = p * r + 1.0 / 5040;
  p = p * r + 1.0 / 720;
  p = p * r + 1.0 / 120;
  p = p * r + 1.0 / 24;
  p = p * r + 1.0 / 6;
  p = p * r + 0.5;
  p = p * r + 1.0;
  p = p * r + 1.0;
  std::int64_t n = __builtin_bit_cast(std::int64_t, shifted) + 1023;  // low bits: n + bias
  return p * __builtin_bit_cast(double, n << 52);
}

}  // namespace detail

TTX_INLINE float sin(float x) {
  detail::Angle a = detail::reduce_angle(x);
  float y = detail::sine_in_quadrant(a.r, a.quadrant);
  y = x == 0.0f ? x : y;
  return __builtin_fabsf(x) < std::numeric_limits<float>::infinity() ? y : x - x;
}

TTX_INLINE float cos(float x) {
  detail::Angle a = detail::reduce_angle(x);
  float y = detail::sine_in_quadrant(a.r, a.quadrant + 1);
  return __builtin_fabsf(x) < std::numeric_limits<float>::infinity() ? y : x - x;
}

// x^y with C's answers at 0, 1, infinities, NaN and negative x. For constant exponents 2, 3, 0.5,
// -0.5 and -1 the caller has cheaper forms.
TTX_INLINE float pow(float x, float y) {
  constexpr double inf = std::numeric_limits<double>::infinity();
  double ax = __builtin_fabs(static_cast<double>(x)), wide_y = static_cast<double>(y);
  double l = detail::log2_wide(ax);
  l = ax < inf ? l : (ax == inf ? 1e300 : ax);
  l = ax == 0.0 ? -1e300 : l;
  double t = l * wide_y;
  t = t > 300.0 ? 300.0 : t;
  t = t < -300.0 ? -300.0 : t;
  double p = detail::exp2_wide(t);
  p = t == t ? p : t;
  p = ((ax == 1.0) & (y == y)) ? 1.0 : p;
  double whole = __builtin_trunc(wide_y), half = 0.5 * wide_y;
  bool is_integer = whole == wide_y, is_odd = is_integer & (__builtin_trunc(half) != half);
  bool is_negative = __builtin_bit_cast(std::int32_t, x) < 0;
  p = (is_negative & is_odd) ? -p : p;
  p = ((x < 0.0f) & (ax < inf) & !is_integer) ? std::numeric_limits<double>::quiet_NaN() : p;
  float answer = static_cast<float>(p);
  answer = y == 0.0f ? 1.0f : answer;
  return x == 1.0f ? 1.0f : answer;
}

}  // namespace ttx
