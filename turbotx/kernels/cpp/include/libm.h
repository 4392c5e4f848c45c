// The C library's math functions for float and double, by the compiler's own names for them.
//   in:  a float or a double
//   out: what <cmath> returns; reading that header takes longer than compiling a small kernel
//   example:  ttx::libm::exp(1.0f)
#pragma once

namespace ttx::libm {

#define TTX_OF_ONE(name)                                            \
  inline float name(float x) { return __builtin_##name##f(x); }     \
  inline double name(double x) { return __builtin_##name(x); }
#define TTX_OF_TWO(name)                                                       \
  inline float name(float x, float y) { return __builtin_##name##f(x, y); }    \
  inline double name(double x, double y) { return __builtin_##name(x, y); }

TTX_OF_ONE(acos) TTX_OF_ONE(acosh) TTX_OF_ONE(asin) TTX_OF_ONE(asinh) TTX_OF_ONE(atan)
TTX_OF_ONE(atanh) TTX_OF_ONE(ceil) TTX_OF_ONE(cos) TTX_OF_ONE(cosh) TTX_OF_ONE(erf)
TTX_OF_ONE(erfc) TTX_OF_ONE(exp) TTX_OF_ONE(exp2) TTX_OF_ONE(expm1) TTX_OF_ONE(fabs)
TTX_OF_ONE(floor) TTX_OF_ONE(log) TTX_OF_ONE(log10) TTX_OF_ONE(log1p) TTX_OF_ONE(log2)
TTX_OF_ONE(nearbyint) TTX_OF_ONE(sin) TTX_OF_ONE(sinh) TTX_OF_ONE(sqrt) TTX_OF_ONE(tan)
TTX_OF_ONE(tanh) TTX_OF_ONE(trunc)
TTX_OF_TWO(atan2) TTX_OF_TWO(copysign) TTX_OF_TWO(fmod) TTX_OF_TWO(hypot) TTX_OF_TWO(pow)

#undef TTX_OF_ONE
#undef TTX_OF_TWO

}  // namespace ttx::libm
