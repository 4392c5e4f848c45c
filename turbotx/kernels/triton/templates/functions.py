"""Device functions that generated Triton kernels may need, copied into each that calls them.

They hold for float32 and float64; those for whole numbers end in `_int`. They run in Triton's
interpreter, where libdevice's do not. A file that calls one of them imports nothing but Triton.
"""

import triton
import triton.language as tl


@triton.jit
def maximum(a, b):
    """The larger one, NaN where either is NaN."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def minimum(a, b):
    """The smaller one, NaN where either is NaN."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def gelu(x):
    """x Phi(x) for results of 16 bits: Phi(-|x|) is a power of two, to 2^-17, and to 2^-8 at 8."""
    a = tl.abs(x)
    power = -1.75619198e-06 * a + 6.00929161e-05
    power = power * a - 9.19088430e-04
    power = power * a + 8.46408308e-03
    power = power * a - 5.38713522e-02
    power = power * a - 4.58554953e-01
    power = power * a - 1.15121150
    tail = tl.exp2(power * a - 1.0)
    return x * tl.where(x > 0, 1.0 - tail, tail)


@triton.jit
def tanh(x):
    """Hyperbolic tangent to 2 ulp: a polynomial near zero, the exponential elsewhere."""
    z = x * x
    near = -0.00570498 * z + 0.02063908
    near = near * z - 0.05373971
    near = near * z + 0.13331442
    near = near * z - 0.33333282
    near = x + x * z * near
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(tl.abs(x) < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def tanh_float64(x):
    """Hyperbolic tangent in double precision, where a short polynomial is not enough."""
    less = expm1(-2.0 * tl.abs(x))
    size = -less / (less + 2.0)
    return tl.where(x < 0, -size, size)


@triton.jit
def expm1(x):
    """exp(x) - 1 without cancellation near zero (Kahan)."""
    u = tl.exp(x)
    near = (u - 1.0) * x / tl.where(u == 1.0, 1.0, tl.log(u))
    result = tl.where(u == 1.0, x, near)
    result = tl.where(u == 0.0, -1.0, result)
    return tl.where(u == float("inf"), u, result)


@triton.jit
def log1p(x):
    """log(1 + x) without cancellation near zero (Kahan)."""
    u = 1.0 + x
    below = u - 1.0
    near = tl.log(u) * (x / tl.where(below == 0.0, 1.0, below))
    result = tl.where(below == 0.0, x, near)
    return tl.where(u == float("inf"), u, result)


@triton.jit
def truncate(x):
    """Rounded towards zero."""
    return tl.where(x < 0, tl.ceil(x), tl.floor(x))


@triton.jit
def round_half_even(x):
    """The nearest whole number, the even one of two equally near, with the sign of x."""
    size = tl.abs(x)
    near = (size + 8388608.0) - 8388608.0  # between 2^23 and 2^24 steps are 1
    near = tl.where(size < 8388608.0, near, size).to(tl.int32, bitcast=True)
    return (near | (x.to(tl.int32, bitcast=True) & -2147483648)).to(tl.float32, bitcast=True)


@triton.jit
def round_half_even_float64(x):
    """round_half_even in double precision."""
    size = tl.abs(x)
    near = (size + 4503599627370496.0) - 4503599627370496.0
    near = tl.where(size < 4503599627370496.0, near, size).to(tl.int64, bitcast=True)
    sign = x.to(tl.int64, bitcast=True) & -9223372036854775808
    return (near | sign).to(tl.float64, bitcast=True)


@triton.jit
def round_to_int8(x):
    """The nearest integer to x in [-127.5, 127.5], halves to even: the low byte of x + 3 * 2^22,
    where steps of float32 are 1."""
    return (x + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def sign(x):
    """-1, 0 or 1; 0 for NaN."""
    return (x > 0).to(x.dtype) - (x < 0).to(x.dtype)


@triton.jit
def truncdiv(a, b):
    """The quotient rounded towards zero."""
    return truncate(a / b)


@triton.jit
def truncdiv_int(a, b):
    """The quotient rounded towards zero; 0 over zero."""
    return tl.where(b == 0, 0, a // tl.where(b == 0, 1, b))


@triton.jit
def fmod(a, b):
    """The remainder of truncdiv, with the sign of a."""
    return a % b


@triton.jit
def fmod_int(a, b):
    """The remainder of truncdiv_int, with the sign of a; 0 over zero."""
    return tl.where(b == 0, 0, a % tl.where(b == 0, 1, b))


@triton.jit
def floordiv(a, b):
    """The quotient rounded down, as Python's //."""
    rest = fmod(a, b)
    crossed = (rest != 0) & ((rest < 0) != (b < 0))
    quotient = (a - rest) / b
    quotient = tl.where(crossed, quotient - 1.0, quotient)
    low = tl.floor(quotient)
    low = tl.where(quotient - low > 0.5, low + 1.0, low)
    return tl.where(b == 0.0, a / b, low)


@triton.jit
def floordiv_int(a, b):
    """The quotient rounded down, as Python's //; 0 over zero."""
    rest = fmod_int(a, b)
    crossed = (rest != 0) & ((rest < 0) != (b < 0))
    return truncdiv_int(a, b) - crossed.to(a.dtype)


@triton.jit
def remainder(a, b):
    """The remainder of floordiv, with the sign of b, as Python's %."""
    rest = fmod(a, b)
    return tl.where((rest != 0) & ((rest < 0) != (b < 0)), rest + b, rest)


@triton.jit
def remainder_int(a, b):
    """The remainder of floordiv_int, with the sign of b, as Python's %."""
    rest = fmod_int(a, b)
    return tl.where((rest != 0) & ((rest < 0) != (b < 0)), rest + b, rest)


@triton.jit
def power(x, y):
    """x to the power y, through float64: exp2(y * log2(x)) keeps float32's digits there."""
    wide = tl.abs(x).to(tl.float64)
    size = tl.exp2(y.to(tl.float64) * tl.log2(wide))
    size = tl.where((y == 0.0) | (x == 1.0), 1.0, size)
    whole = tl.floor(y) == y
    odd = whole & (y - 2.0 * tl.floor(y * 0.5) == 1.0)
    size = tl.where((x < 0.0) & odd, -size, size)
    impossible = (x < 0.0) & (whole == 0) & (tl.abs(x) != float("inf"))
    return tl.where(impossible, float("nan"), size).to(x.dtype)


@triton.jit
def power_int(x, y):
    """x to the power y by repeated squaring; below zero only powers of 1 and -1 are whole."""
    result = tl.where(y < 0, 0, 1).to(x.dtype) + 0 * x
    inverse = tl.where((x == -1) & (y % 2 != 0), -1, tl.where((x == 1) | (x == -1), 1, 0))
    result = tl.where(y < 0, inverse.to(x.dtype), result)
    base = x
    rest = tl.where(y < 0, 0, y)
    for _ in tl.static_range(63):
        result = tl.where(rest % 2 == 1, result * base, result)
        base = base * base
        rest = rest // 2
    return result
