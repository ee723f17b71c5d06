"""The end of a ViL block: down-projection, drop path and residual, in one kernel or behind a product of cuBLAS."""

import triton
import triton.language as tl

__all__ = ['down_kernel', 'residual_kernel']


@triton.jit
def _store_sum(
    branch, b_ptr, x_ptr, scale_ptr, out_ptr, row, col, rows, S, D, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr
):
    """Write x + scale * (branch + b) for a tile of the residual stream, summed in float32."""
    if HAS_BIAS:
        branch += tl.load(b_ptr + col, mask=col < D, other=0.0).to(tl.float32)[None, :]
    if HAS_SCALE:
        branch *= tl.load(scale_ptr + row // S, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    mask = (row < rows)[:, None] & (col < D)[None, :]
    place = row.to(tl.int64)[:, None] * D + col[None, :]
    x = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, (x + branch).to(out_ptr.dtype.element_ty), mask=mask)


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
    _store_sum(total, b_ptr, x_ptr, scale_ptr, out_ptr, row, col, rows, S, D, HAS_BIAS, HAS_SCALE)


@triton.jit(do_not_specialize=['rows', 'S'])
def residual_kernel(
    branch_ptr, b_ptr, x_ptr, scale_ptr, out_ptr, rows, S, D, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The last step of `down_kernel` behind a product made elsewhere, branch (rows, D), for BM rows."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    col = tl.arange(0, BD)
    mask = (row < rows)[:, None] & (col < D)[None, :]
    branch = tl.load(branch_ptr + row.to(tl.int64)[:, None] * D + col[None, :], mask=mask, other=0.0).to(tl.float32)
    _store_sum(branch, b_ptr, x_ptr, scale_ptr, out_ptr, row, col, rows, S, D, HAS_BIAS, HAS_SCALE)
