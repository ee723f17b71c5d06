"""Device code at both ends of a ViL block: residual and norm, and head norm, skip and gate after the mLSTM cell.

x      (B, S, D)       residual stream
branch (B, S, D)       down-projection of a block, without its bias
z      (B, S, E)       second half of the up-projection
pre    (B, S, E)       convolved first half, c = SiLU(pre)
h      (B, NH, S, DH)  output of the cell
y      (B, S, E)       (norm(h) + skip * c) * SiLU(z)
"""

import triton
import triton.language as tl

from .triton_gates import fast_sigmoid

__all__ = ['normalise', 'output_kernel', 'residual_kernel']


@triton.jit
def _add_branch(
    x_ptr, branch_ptr, b_ptr, scale_ptr, sum_ptr, row, rows, S, D,
    HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """x + scale * (branch + b) for some rows: written to sum, and given as others will read it there, in float32."""
    col = tl.arange(0, BD)
    mask = (row < rows)[:, None] & (col < D)[None, :]
    place = row.to(tl.int64)[:, None] * D + col[None, :]
    branch = tl.load(branch_ptr + place, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
    if HAS_BIAS:
        branch += tl.load(b_ptr + col, mask=col < D, other=0.0).to(tl.float32)[None, :]
    if HAS_SCALE:
        branch *= tl.load(scale_ptr + row // S, mask=row < rows, other=0.0).to(tl.float32)[:, None]
    total = tl.where(mask, x + branch, 0.0).to(sum_ptr.dtype.element_ty)
    tl.store(sum_ptr + place, total, mask=mask)
    return total.to(tl.float32)


@triton.jit(do_not_specialize=['rows', 'S'])
def residual_kernel(
    x_ptr, branch_ptr, b_ptr, scale_ptr, sum_ptr, rows, S, D, HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The end of a block that no other follows: x + scale * (branch + b), summed in float32, for BM rows.

    Scale is per image of S rows.
    """
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    _add_branch(x_ptr, branch_ptr, b_ptr, scale_ptr, sum_ptr, row, rows, S, D, HAS_BIAS, HAS_SCALE, BD)


@triton.jit
def normalise(
    x_ptr, branch_ptr, branch_b_ptr, scale_ptr, sum_ptr, w_ptr, b_ptr, out_ptr, block, rows, S, D, eps,
    ADDS: tl.constexpr, BRANCH_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_BIAS: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """out = (x - mean) * rstd * (1 + w) + b for a block of BM rows; ADDS: of what `_add_branch` makes of x."""
    row = block * BM + tl.arange(0, BM)
    col = tl.arange(0, BD)
    mask = (row < rows)[:, None] & (col < D)[None, :]
    place = row.to(tl.int64)[:, None] * D + col[None, :]
    if ADDS:
        x = _add_branch(
            x_ptr, branch_ptr, branch_b_ptr, scale_ptr, sum_ptr, row, rows, S, D, BRANCH_BIAS, HAS_SCALE, BD
        )
    else:
        x = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(x, 1) / D
    centred = tl.where(mask, x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / D + eps)
    w = tl.load(w_ptr + col, mask=col < D, other=0.0).to(tl.float32) + 1.0
    out = centred * rstd[:, None] * w[None, :]
    if HAS_BIAS:
        out += tl.load(b_ptr + col, mask=col < D, other=0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _every_fourth(x, BM: tl.constexpr, BD: tl.constexpr):
    """Channels 4 g, 4 g + 1, 4 g + 2, 4 g + 3 of (BM, BD), (BM, BD / 4) each."""
    even, odd = tl.split(tl.reshape(x, (BM, BD // 4, 2, 2)))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def _row_weights(w, pitch, exists, row: tl.constexpr):
    """One row of every block, four tensors (BD / 4,). Weights (4, 4, E / 4), so that loads are adjacent."""
    w += row * 4 * pitch
    return (
        tl.load(w, mask=exists, other=0.0),
        tl.load(w + pitch, mask=exists, other=0.0),
        tl.load(w + 2 * pitch, mask=exists, other=0.0),
        tl.load(w + 3 * pitch, mask=exists, other=0.0),
    )


@triton.jit
def _block_row(x0, x1, x2, x3, weights):
    """One row of every block times four neighbouring channels."""
    w0, w1, w2, w3 = weights
    return x0 * w0[None, :] + x1 * w1[None, :] + x2 * w2[None, :] + x3 * w3[None, :]


@triton.jit
def _through_blocks(x, weights, BM: tl.constexpr, BD: tl.constexpr):
    """Block-diagonal matrix times each row of x, (BM, BD). No value changes its thread."""
    x0, x1, x2, x3 = _every_fourth(x, BM, BD)
    first, second, third, fourth = weights
    y0, y1 = _block_row(x0, x1, x2, x3, first), _block_row(x0, x1, x2, x3, second)
    y2, y3 = _block_row(x0, x1, x2, x3, third), _block_row(x0, x1, x2, x3, fourth)
    return tl.reshape(tl.join(tl.join(y0, y2), tl.join(y1, y3)), (BM, BD))


@triton.jit(do_not_specialize=['N', 'S', 'pitch', 'reverse', 'steps'])
def output_kernel(
    h_ptr, pre_ptr, z_ptr, z_row, w_ptr, b_ptr, skip_ptr, wv_ptr, bv_ptr, sum_ptr, y_ptr,
    N, S, E, pitch, reverse, eps, steps, FOLDED: tl.constexpr, QKV_BIAS: tl.constexpr, HAS_BIAS: tl.constexpr,
    DH: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y = ((1 + w) * norm(h) + b + skip * c) * SiLU(z) for `steps` times BM of the N = B * S tokens, and one head.

    pre holds what c is the SiLU of. FOLDED: it holds c, and h is what the blocks of Wv, (4, 4, E / 4), and bv times the
    sum of the row's weights make of it; sums (B * NH, pitch) in reading order.
    """
    program = tl.program_id(0)
    head = tl.program_id(1)
    d = tl.arange(0, BD)
    channel = head * DH + d
    exists = d < DH
    w = tl.load(w_ptr + channel, mask=exists, other=0.0).to(tl.float32) + 1.0
    skip = tl.load(skip_ptr + channel, mask=exists, other=0.0).to(tl.float32)
    bias = tl.zeros((BD,), tl.float32)
    if HAS_BIAS:
        bias += tl.load(b_ptr + channel, mask=exists, other=0.0).to(tl.float32)
    wv, bv = bias, bias
    if FOLDED:
        g = tl.arange(0, BD // 4)
        block, held = wv_ptr + head * (DH // 4) + g, g * 4 < DH
        wv = (
            _row_weights(block, E // 4, held, 0), _row_weights(block, E // 4, held, 1),
            _row_weights(block, E // 4, held, 2), _row_weights(block, E // 4, held, 3),
        )  # fmt: skip
        if QKV_BIAS:
            bv = tl.load(bv_ptr + channel, mask=exists, other=0.0).to(tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        n = (program * steps + step) * BM + tl.arange(0, BM)
        mask = (n < N)[:, None] & exists[None, :]
        row = n.to(tl.int64)[:, None]
        place = row * E + channel[None, :]
        h = tl.load(h_ptr + place, mask=mask, other=0.0).to(tl.float32)
        c = tl.load(pre_ptr + place, mask=mask, other=0.0).to(tl.float32)
        z = tl.load(z_ptr + row * z_row + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        if FOLDED:
            h = _through_blocks(h, wv, BM, BD)
            if QKV_BIAS:
                image = n // S
                t = n - image * S
                position = tl.where(reverse != 0, S - 1 - t, t)
                position += (image.to(tl.int64) * tl.num_programs(1) + head) * pitch
                h += tl.load(sum_ptr + position, mask=n < N, other=0.0)[:, None] * bv[None, :]
        else:
            c *= fast_sigmoid(c)
        mean = tl.sum(h, 1) / DH
        centred = tl.where(mask, h - mean[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, 1) / DH + eps)
        inner = centred * rstd[:, None] * w[None, :] + bias[None, :] + skip[None, :] * c
        y = inner * (z * fast_sigmoid(z))
        tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=mask)
