"""Device functions on gates that kernels of several files use."""

import triton
import triton.language as tl

from .triton_launch import interpreting

ON_DEVICE = tl.constexpr(not interpreting())
LARGEST_EXPONENT = tl.constexpr(88.2)
"""exp of more leaves float32; h is 0 where the denominator would."""


@triton.jit
def larger(first, second):
    """Combine two values of a running maximum."""
    return tl.maximum(first, second)


@triton.jit
def log_sigmoid(x):
    """Compute log(sigmoid(x)) in float32 with a small relative error.

    log1p(e) = 2 atanh(e / (2 + e)) as a series: log(1 + e) would round to multiples of 1e-7, a bias that grows with S.
    """
    decayed = tl.exp(-tl.abs(x))
    ratio = decayed / (2.0 + decayed)
    square = ratio * ratio
    series = 1.0 / 17.0 * square + 1.0 / 15.0
    series = series * square + 1.0 / 13.0
    series = series * square + 1.0 / 11.0
    series = series * square + 1.0 / 9.0
    series = series * square + 1.0 / 7.0
    series = series * square + 1.0 / 5.0
    series = series * square + 1.0 / 3.0
    series = series * square + 1.0
    return tl.minimum(x, 0.0) - 2.0 * ratio * series


@triton.jit
def inverse_denominator(normaliser, stabiliser, eps):
    """Compute 1 / (max(|n|, exp(-m)) + eps), 0 where exp(-m) overflows; and whether |n| is the larger."""
    floor = tl.exp(tl.minimum(-stabiliser, LARGEST_EXPONENT))
    inverse = 1.0 / (tl.maximum(tl.abs(normaliser), floor) + eps)
    return tl.where(-stabiliser > LARGEST_EXPONENT, 0.0, inverse), tl.abs(normaliser) > floor


@triton.jit
def fast_sigmoid(x):
    """1 / (1 + exp(-x)), float32, without the care for denormal numbers that makes up most of `tl.sigmoid`'s cost."""
    if ON_DEVICE:
        # t = 2 ** (-log2(e) * x); 1 / (t + 1)
        return tl.inline_asm_elementwise(
            """{ .reg .f32 t; mul.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t; add.f32 t, t, 0f3F800000;
            rcp.approx.ftz.f32 $0, t; }""",
            '=f,f', [x], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        return tl.sigmoid(x)
