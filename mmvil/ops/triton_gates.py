"""Device functions on gates that the kernels of both forms use."""

import triton
import triton.language as tl


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
