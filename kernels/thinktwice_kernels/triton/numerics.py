"""Elementary functions in forms that neither cancel near 0 nor overflow; NaN goes in and comes out.

The interpreter has no libdevice, so these stand on exp alone.
"""

import triton
import triton.language as tl

INFINITY = tl.constexpr(float("inf"))
# Replaces -inf where it would meet a 0 that it is multiplied by.
FAR_BELOW = tl.constexpr(-1e30)
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def number(value, TYPE: tl.constexpr):
    """A float64 argument, or a literal, as a scalar of the given type.

    In comparisons and tl.where, literals would be fp32, and the interpreter takes float arguments for literals.
    """
    return tl.full((), value, TYPE)


@triton.jit
def expm1_minus(x):
    """e^x - 1 - x of fp32 or float64."""
    # Taylor's series is exact to the last bits for |x| < 0.5; there, exp(x) - 1 - x would lose all of them.
    TERMS: tl.constexpr = 10 if x.dtype == tl.float32 else 18
    series = x * (1.0 / TERMS) + 1.0
    for k in tl.static_range(TERMS - 1, 2, -1):
        series = series * x * (1.0 / k) + 1.0
    return tl.where(tl.abs(x) < 0.5, x * x * 0.5 * series, tl.exp(x) - 1.0 - x)


@triton.jit
def expm1(x):
    """e^x - 1 of fp32 or float64."""
    return tl.where(tl.abs(x) < 0.5, x + expm1_minus(x), tl.exp(x) - 1.0)


@triton.jit
def soft_cap(x, cap):
    """cap tanh(x / cap), and its derivative with respect to x."""
    scaled = x / cap
    rest = expm1(-2.0 * tl.abs(scaled))
    size = -rest / (rest + 2.0)
    slope = 4.0 * (rest + 1.0) / ((rest + 2.0) * (rest + 2.0))
    return cap * tl.where(scaled < 0, -size, size), slope
