"""Matrix products of a ViL block that take neighbouring steps along."""

import triton
import triton.language as tl

__all__ = ['down_kernel', 'up_kernel']


@triton.jit(do_not_specialize=['rows', 'S'])
def down_kernel(
    y_ptr, w_ptr, b_ptr, x_ptr, scale_ptr, out_ptr, rows, S, E, D,
    HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out = x + scale * (y W^T + b), the sum in float32.

    y (rows, E) and W (D, E) in the activations' dtype; x and out (rows, D) in that of the residual stream; scale per
    image of S rows. Grid: column blocks by row blocks, so that neighbours read the same y.
    """
    row = tl.program_id(1) * BM + tl.arange(0, BM)
    col = tl.program_id(0) * BN + tl.arange(0, BN)
    y = y_ptr + row.to(tl.int64)[:, None] * E
    total = tl.zeros((BM, BN), tl.float32)
    for start in range(0, E, BK):
        e = start + tl.arange(0, BK)
        left = tl.load(y + e[None, :], mask=(row < rows)[:, None] & (e < E)[None, :], other=0.0)
        right = tl.load(w_ptr + col[:, None] * E + e[None, :], mask=(col < D)[:, None] & (e < E)[None, :], other=0.0)
        total = tl.dot(left, tl.trans(right), total, input_precision=PRECISION)
    if HAS_BIAS:
        total += tl.load(b_ptr + col, mask=col < D, other=0.0).to(tl.float32)[None, :]
    if HAS_SCALE:
        total *= tl.load(scale_ptr + row // S, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    mask = (row < rows)[:, None] & (col < D)[None, :]
    place = row.to(tl.int64)[:, None] * D + col[None, :]
    x = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, (x + total).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _normalised(x_ptr, w_ptr, b_ptr, row, rows, D, FIRST: tl.constexpr, COLUMNS: tl.constexpr):
    """A piece of the rows, float32, and the norm's weight and bias of its columns, zero beyond D."""
    col = FIRST + tl.arange(0, COLUMNS)
    exists = col < D
    place = tl.minimum(row, rows - 1).to(tl.int64)[:, None] * D + col[None, :]
    return (
        tl.load(x_ptr + place, mask=exists[None, :], other=0.0).to(tl.float32),
        tl.load(w_ptr + col, mask=exists, other=0.0).to(tl.float32) + 1.0,
        tl.load(b_ptr + col, mask=exists, other=0.0).to(tl.float32),
        exists,
    )


@triton.jit
def _weight_piece(w_ptr, n, N, D, FIRST: tl.constexpr, COLUMNS: tl.constexpr, EVEN: tl.constexpr):
    """Columns FIRST .. FIRST + COLUMNS of rows n of the weight."""
    d = FIRST + tl.arange(0, COLUMNS)
    place = w_ptr + n[:, None] * D + d[None, :]
    if EVEN:
        return tl.load(place)
    return tl.load(place, mask=(n < N)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit(do_not_specialize=['rows'])
def up_kernel(
    x_ptr, norm_w_ptr, norm_b_ptr, w_ptr, b_ptr, out_ptr, rows, N, D, eps,
    NORM_BIAS: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out = ((x - mean) * rstd * (1 + norm_w) + norm_b) W^T + b.

    x (rows, D) in the dtype of the residual stream, W (N, D) and out (rows, N) in the activations' dtype. A program
    normalises BM rows, D = DA + DB columns, keeps them and goes through all of W: x is read and out written once, the
    normalised rows never leave the chip. EVEN: D is DA + DB and N a multiple of BN. Grid: ceil(rows / BM).
    """
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    x_a, scale_a, shift_a, has_a = _normalised(x_ptr, norm_w_ptr, norm_b_ptr, row, rows, D, 0, DA)
    total = tl.sum(x_a, 1)
    x_b, scale_b, shift_b, has_b = x_a, scale_a, shift_a, has_a
    if DB > 0:
        x_b, scale_b, shift_b, has_b = _normalised(x_ptr, norm_w_ptr, norm_b_ptr, row, rows, D, DA, DB)
        total += tl.sum(x_b, 1)
    mean = total / D
    x_a = tl.where(has_a[None, :], x_a - mean[:, None], 0.0)
    squares = tl.sum(x_a * x_a, 1)
    if DB > 0:
        x_b = tl.where(has_b[None, :], x_b - mean[:, None], 0.0)
        squares += tl.sum(x_b * x_b, 1)
    rstd = tl.rsqrt(squares / D + eps)
    x_a = x_a * rstd[:, None] * scale_a[None, :]
    x_b = x_b * rstd[:, None] * scale_b[None, :]
    if NORM_BIAS:
        x_a += shift_a[None, :]
        x_b += shift_b[None, :]
    x_a, x_b = x_a.to(w_ptr.dtype.element_ty), x_b.to(w_ptr.dtype.element_ty)
    for start in range(0, N, BN):
        n = start + tl.arange(0, BN)
        w = _weight_piece(w_ptr, n, N, D, 0, DA, EVEN)
        out = tl.dot(x_a, tl.trans(w), input_precision=PRECISION)
        if DB > 0:
            w = _weight_piece(w_ptr, n, N, D, DA, DB, EVEN)
            out = tl.dot(x_b, tl.trans(w), out, input_precision=PRECISION)
        if HAS_BIAS:
            out += tl.load(b_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        place = row.to(tl.int64)[:, None] * N + n[None, :]
        tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=(row < rows)[:, None] & (n < N)[None, :])
