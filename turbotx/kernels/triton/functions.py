"""Device functions that generated Triton kernels may need, as source text.

In: the name of a function. Out: its text, added to the kernels that call it, so that each printed
file stands alone and imports nothing but Triton, for example::

    functions_in("y = tanh(x)")  ->  ["@triton.jit\\ndef tanh(x): ..."]

They hold for float32 and float64 (`variant` names those for whole numbers), and run in Triton's
interpreter, where libdevice's do not.
"""

from __future__ import annotations

import re

import torch

FUNCTIONS = {
    "maximum": '''
def maximum(a, b):
    """The larger one, NaN where either is NaN."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
''',
    "minimum": '''
def minimum(a, b):
    """The smaller one, NaN where either is NaN."""
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)
''',
    "gelu": '''
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
''',
    "tanh": '''
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
''',
    "tanh_float64": '''
def tanh_float64(x):
    """Hyperbolic tangent in double precision, where a short polynomial is not enough."""
    less = expm1(-2.0 * tl.abs(x))
    size = -less / (less + 2.0)
    return tl.where(x < 0, -size, size)
''',
    "expm1": '''
def expm1(x):
    """exp(x) - 1 without cancellation near zero (Kahan)."""
    u = tl.exp(x)
    near = (u - 1.0) * x / tl.where(u == 1.0, 1.0, tl.log(u))
    result = tl.where(u == 1.0, x, near)
    result = tl.where(u == 0.0, -1.0, result)
    return tl.where(u == float("inf"), u, result)
''',
    "log1p": '''
def log1p(x):
    """log(1 + x) without cancellation near zero (Kahan)."""
    u = 1.0 + x
    below = u - 1.0
    near = tl.log(u) * (x / tl.where(below == 0.0, 1.0, below))
    result = tl.where(below == 0.0, x, near)
    return tl.where(u == float("inf"), u, result)
''',
    "truncate": '''
def truncate(x):
    """Rounded towards zero."""
    return tl.where(x < 0, tl.ceil(x), tl.floor(x))
''',
    "round_half_even": '''
def round_half_even(x):
    """The nearest whole number, the even one of two equally near."""
    low = tl.floor(x)
    rest = x - low
    odd = low - 2.0 * tl.floor(low * 0.5) == 1.0
    return tl.where((rest > 0.5) | ((rest == 0.5) & odd), low + 1.0, low)
''',
    "sign": '''
def sign(x):
    """-1, 0 or 1; 0 for NaN."""
    return (x > 0).to(x.dtype) - (x < 0).to(x.dtype)
''',
    "truncdiv": '''
def truncdiv(a, b):
    """The quotient rounded towards zero."""
    return truncate(a / b)
''',
    "truncdiv_int": '''
def truncdiv_int(a, b):
    """The quotient rounded towards zero; 0 over zero."""
    return tl.where(b == 0, 0, a // tl.where(b == 0, 1, b))
''',
    "fmod": '''
def fmod(a, b):
    """The remainder of truncdiv, with the sign of a."""
    return a % b
''',
    "fmod_int": '''
def fmod_int(a, b):
    """The remainder of truncdiv_int, with the sign of a; 0 over zero."""
    return tl.where(b == 0, 0, a % tl.where(b == 0, 1, b))
''',
    "floordiv": '''
def floordiv(a, b):
    """The quotient rounded down, as Python's //."""
    rest = fmod(a, b)
    crossed = (rest != 0) & ((rest < 0) != (b < 0))
    quotient = (a - rest) / b
    quotient = tl.where(crossed, quotient - 1.0, quotient)
    low = tl.floor(quotient)
    low = tl.where(quotient - low > 0.5, low + 1.0, low)
    return tl.where(b == 0.0, a / b, low)
''',
    "floordiv_int": '''
def floordiv_int(a, b):
    """The quotient rounded down, as Python's //; 0 over zero."""
    rest = fmod_int(a, b)
    crossed = (rest != 0) & ((rest < 0) != (b < 0))
    return truncdiv_int(a, b) - crossed.to(a.dtype)
''',
    "remainder": '''
def remainder(a, b):
    """The remainder of floordiv, with the sign of b, as Python's %."""
    rest = fmod(a, b)
    return tl.where((rest != 0) & ((rest < 0) != (b < 0)), rest + b, rest)
''',
    "remainder_int": '''
def remainder_int(a, b):
    """The remainder of floordiv_int, with the sign of b, as Python's %."""
    rest = fmod_int(a, b)
    return tl.where((rest != 0) & ((rest < 0) != (b < 0)), rest + b, rest)
''',
    "power": '''
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
''',
    "power_int": '''
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
''',
}


def variant(name: str, dtype: torch.dtype) -> str:
    """Return the name of the function that does `name` for values of `dtype`."""
    if name == "tanh" and dtype is torch.float64:
        return "tanh_float64"
    return f"{name}_int" if not dtype.is_floating_point and f"{name}_int" in FUNCTIONS else name


def functions_in(text: str) -> list[str]:
    """Return the texts of the functions that `text` calls, each after those that it needs."""
    found: dict[str, str] = {}

    def visit(caller: str, after: str) -> None:
        for name, body in FUNCTIONS.items():
            if name not in found and re.search(rf"(?<![\w.]){name}{after}", caller):
                visit(body.split(":", 1)[1], after=r"\(")
                found[name] = "@triton.jit" + body

    visit(text, after=r"\b")  # a reduction is given its function by name alone
    return list(found.values())
