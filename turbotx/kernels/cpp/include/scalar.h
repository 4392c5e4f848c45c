// What generated kernels need beside float32 vector math: integers, bool, double, conversions.
//   in:  scalars of any storage type
//   out: PyTorch's meaning of floor division, remainder, rounding, NaN in max and min, casts
//   example:  ttx::remainder(-7, 3) == 2;   ttx::cast<int64_t>(2.9f) == 2
#pragma once

#include <cstdint>
#include <cstdlib>
#include <limits>
#include <type_traits>

#include "libm.h"
#include "storage.h"
#include "vecmath.h"

namespace ttx {

template <class T>
concept integer = std::is_integral_v<T>;
template <class T>
concept real = std::is_floating_point_v<T>;

// Memory: 16-bit floats become float, everything else is itself. storage.h has the halves.
template <class T>
  requires std::is_arithmetic_v<T>
inline T read(const T* p) { return *p; }
inline float read(const bf16* p) { return to_float(*p); }
inline float read(const f16* p) { return to_float(*p); }
template <class T>
  requires std::is_arithmetic_v<T>
inline void write(T* p, T x) { *p = x; }
inline void write(bf16* p, float x) { *p = from_float<bf16>(x); }
inline void write(f16* p, float x) { *p = from_float<f16>(x); }

// A constant that the compiler does not know: a mask made of it stays a mask (see kernels/cpp/barriers.py).
template <class T>
inline T hidden(T x) {
  asm("" : "+r"(x));
  return x;
}

// A float that something is added to, and that may end in a product: the two stay operations of
// their own, however a compiler contracts others. GCC folds no fma; -0 added changes no number.
#if defined(__clang__)
template <class T>
inline T rounded(T x) { return __arithmetic_fence(x); }
#elif defined(__FMA__) || defined(__ARM_FEATURE_FMA)
inline float rounded(float x) { return __builtin_fmaf(x, 1.0f, -0.0f); }
inline double rounded(double x) { return __builtin_fma(x, 1.0, -0.0); }
#else
template <class T>
inline T rounded(T x) { return x; }
#endif
template <class T>
inline T product(T a, T b) {
#if !defined(__clang__) && (defined(__FMA__) || defined(__ARM_FEATURE_FMA))
  if constexpr (std::is_same_v<T, float>) return __builtin_fmaf(a, b, -0.0f);
  else return __builtin_fma(a, b, -0.0);
#else
  return rounded(a * b);
#endif
}
// a * b + c, rounded once where the processor can.
template <class T>
inline T fma(T a, T b, T c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  if constexpr (std::is_same_v<T, float>) return __builtin_fmaf(a, b, c);
  else return __builtin_fma(a, b, c);
#else
  return rounded(a * b) + c;
#endif
}

// Every element of an array becomes one value.
template <class T, long N>
inline void fill(T (&elements)[N], T value) {
  for (T& element : elements) element = value;
}

template <class To, class From>
inline To cast(From x) { return static_cast<To>(x); }

// Integers: division by zero gives zero instead of a trap; PyTorch raises there.
template <integer T>
inline T floordiv(T a, T b) {
  if (b == 0) return 0;
  T q = static_cast<T>(a / b);
  return static_cast<T>(q - (a % b != 0 && (a < 0) != (b < 0)));
}
template <integer T>
inline T truncdiv(T a, T b) { return b == 0 ? T(0) : static_cast<T>(a / b); }
template <integer T>
inline T fmod(T a, T b) { return b == 0 ? T(0) : static_cast<T>(a % b); }
template <integer T>
inline T remainder(T a, T b) { return static_cast<T>(a - floordiv(a, b) * b); }
template <integer T>
inline T abs(T x) { return static_cast<T>(x < 0 ? -x : x); }
template <integer T>
inline T sign(T x) { return static_cast<T>((x > 0) - (x < 0)); }
template <integer T>
inline T maximum(T a, T b) { return a > b ? a : b; }
template <integer T>
inline T minimum(T a, T b) { return a < b ? a : b; }
template <integer T>
inline T bitwise_not(T x) {
  if constexpr (std::is_same_v<T, bool>) return !x;
  else return static_cast<T>(~x);
}
template <integer T>
inline T shl(T a, T b) { return b < 0 || b >= T(8 * sizeof(T)) ? T(0) : static_cast<T>(static_cast<std::make_unsigned_t<T>>(a) << b); }
template <integer T>
inline T shr(T a, T b) { return b < 0 || b >= T(8 * sizeof(T)) ? static_cast<T>(a < 0 ? -1 : 0) : static_cast<T>(a >> b); }
template <integer T>
inline T pow(T base, T exponent) {
  if (exponent < 0) return base == 1 ? T(1) : base == T(-1) ? (exponent % 2 ? T(-1) : T(1)) : T(0);
  T result = 1;
  for (; exponent > 0; exponent /= 2, base = static_cast<T>(base * base))
    if (exponent % 2) result = static_cast<T>(result * base);
  return result;
}

// Floats: a NaN in either argument of maximum and minimum comes out; of equal ones the first, so
// that relu(-0.0) is -0.0.
template <real T>
inline T maximum(T a, T b) { return b != b || b > a ? b : a; }
template <real T>
inline T minimum(T a, T b) { return b != b || b < a ? b : a; }
template <real T>
inline T floordiv(T a, T b) {
  T remains = libm::fmod(a, b), quotient = (a - remains) / b;
  if (b == 0) return a / b;
  if (remains != 0 && (b < 0) != (remains < 0)) quotient -= 1;
  if (quotient == 0) return libm::copysign(T(0), a / b);
  T whole = libm::floor(quotient);
  return quotient - whole > T(0.5) ? whole + 1 : whole;
}
template <real T>
inline T truncdiv(T a, T b) { return libm::trunc(a / b); }
template <real T>
inline T remainder(T a, T b) {
  T remains = libm::fmod(a, b);
  return remains != 0 && (b < 0) != (remains < 0) ? remains + b : remains;
}
template <real T>
inline T sign(T x) { return x != x ? T(0) : static_cast<T>((x > 0) - (x < 0)); }
template <real T>
inline T round(T x) { return libm::nearbyint(x); }
template <real T>
inline bool isnan(T x) { return x != x; }
template <real T>
inline bool isinf(T x) { return x - x != x - x && x == x; }
template <integer T>
inline bool isnan(T) { return false; }
template <integer T>
inline bool isinf(T) { return false; }
template <integer T>
inline T floor(T x) { return x; }
template <integer T>
inline T ceil(T x) { return x; }
template <integer T>
inline T trunc(T x) { return x; }
template <integer T>
inline T round(T x) { return x; }

// Rarely needed functions: the C library's own, for float as for double.
using libm::acos, libm::acosh, libm::asin, libm::asinh, libm::atan, libm::atan2, libm::atanh,
    libm::ceil, libm::copysign, libm::cosh, libm::erfc, libm::floor, libm::fmod, libm::hypot,
    libm::log10, libm::sinh, libm::tan, libm::trunc;

// double: the C library's functions.
inline double exp(double x) { return libm::exp(x); }
inline double exp2(double x) { return libm::exp2(x); }
inline double expm1(double x) { return libm::expm1(x); }
inline double log(double x) { return libm::log(x); }
inline double log2(double x) { return libm::log2(x); }
inline double log1p(double x) { return libm::log1p(x); }
inline double sqrt(double x) { return libm::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / libm::sqrt(x); }
inline double sin(double x) { return libm::sin(x); }
inline double cos(double x) { return libm::cos(x); }
inline double tanh(double x) { return libm::tanh(x); }
inline double erf(double x) { return libm::erf(x); }
inline double sigmoid(double x) { return 1.0 / (1.0 + libm::exp(-x)); }
inline double pow(double x, double y) { return libm::pow(x, y); }
inline double abs(double x) { return libm::fabs(x); }

}  // namespace ttx
