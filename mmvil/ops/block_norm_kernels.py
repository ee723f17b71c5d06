"""Device code at both ends of a ViL block: the norm before it, and head norm, skip and gate after the mLSTM cell.

x   (B, S, D)       residual stream
z   (B, S, E)       second half of the up-projection
pre (B, S, E)       convolved first half, c = SiLU(pre)
h   (B, NH, S, DH)  output of the cell
y   (B, S, E)       (norm(h) + skip * c) * SiLU(z)
"""

import triton
import triton.language as tl

__all__ = ['normalise', 'output_kernel']


@triton.jit
def normalise(
    x_ptr, w_ptr, b_ptr, out_ptr, block, rows, D, eps, HAS_BIAS: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr
):
    """out = (x - mean) * rstd * (1 + w) + b for a block of BM rows."""
    row = block * BM + tl.arange(0, BM)
    col = tl.arange(0, BD)
    mask = (row < rows)[:, None] & (col < D)[None, :]
    place = row.to(tl.int64)[:, None] * D + col[None, :]
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
def _block_row(x0, x1, x2, x3, w, pitch, exists, row: tl.constexpr):
    """One row of every block times four neighbouring channels. Weights (4, 4, E / 4), so that loads are adjacent."""
    w += row * 4 * pitch
    w0, w1 = tl.load(w, mask=exists, other=0.0), tl.load(w + pitch, mask=exists, other=0.0)
    w2, w3 = tl.load(w + 2 * pitch, mask=exists, other=0.0), tl.load(w + 3 * pitch, mask=exists, other=0.0)
    return x0 * w0[None, :] + x1 * w1[None, :] + x2 * w2[None, :] + x3 * w3[None, :]


@triton.jit
def _through_blocks(x, w, pitch, DH: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr):
    """Block-diagonal matrix times each row of x, (BM, BD). No value changes its thread."""
    x0, x1, x2, x3 = _every_fourth(x, BM, BD)
    g = tl.arange(0, BD // 4)
    w, exists = w + g, g * 4 < DH
    y0, y1 = _block_row(x0, x1, x2, x3, w, pitch, exists, 0), _block_row(x0, x1, x2, x3, w, pitch, exists, 1)
    y2, y3 = _block_row(x0, x1, x2, x3, w, pitch, exists, 2), _block_row(x0, x1, x2, x3, w, pitch, exists, 3)
    return tl.reshape(tl.join(tl.join(y0, y2), tl.join(y1, y3)), (BM, BD))


@triton.jit(do_not_specialize=['S', 'pitch', 'reverse'])
def output_kernel(
    h_ptr, h_batch, h_head, h_row, pre_ptr, z_ptr, z_batch, z_row, w_ptr, b_ptr, skip_ptr, wv_ptr, bv_ptr, share_ptr,
    y_ptr, S, E, pitch, reverse, eps, FOLDED: tl.constexpr, QKV_BIAS: tl.constexpr, HAS_BIAS: tl.constexpr,
    DH: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """y = ((1 + w) * norm(h) + b + skip * c) * SiLU(z) for BM tokens of one head.

    pre holds what c is the SiLU of. FOLDED: it holds c, and h is what the blocks of Wv, (4, 4, E / 4), and bv times the
    row's share (B * NH, pitch), in reading order, make of it.
    """
    t = tl.program_id(0) * BM + tl.arange(0, BM)
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    d = tl.arange(0, BD)
    channel = head * DH + d
    mask = (t < S)[:, None] & (d < DH)[None, :]
    t = t.to(tl.int64)
    h = tl.load(h_ptr + batch * h_batch + head * h_head + t[:, None] * h_row + d[None, :], mask=mask, other=0.0).to(
        tl.float32
    )
    c = tl.load(pre_ptr + (batch * S + t[:, None]) * E + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    z = tl.load(z_ptr + batch * z_batch + t[:, None] * z_row + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    if FOLDED:
        h = _through_blocks(h, wv_ptr + head * (DH // 4), E // 4, DH, BM, BD)
        if QKV_BIAS:
            position = tl.where(reverse != 0, S - 1 - t, t)
            share = tl.load(share_ptr + (batch * (E // DH) + head) * pitch + position, mask=t < S, other=0.0)
            h += share[:, None] * tl.load(bv_ptr + channel, mask=d < DH, other=0.0).to(tl.float32)[None, :]
    else:
        c *= tl.sigmoid(c)
    mean = tl.sum(h, 1) / DH
    centred = tl.where(mask, h - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / DH + eps)
    w = tl.load(w_ptr + channel, mask=d < DH, other=0.0).to(tl.float32) + 1.0
    skip = tl.load(skip_ptr + channel, mask=d < DH, other=0.0).to(tl.float32)
    inner = centred * rstd[:, None] * w[None, :] + skip[None, :] * c
    if HAS_BIAS:
        inner += tl.load(b_ptr + channel, mask=d < DH, other=0.0).to(tl.float32)[None, :]
    y = inner * z * tl.sigmoid(z)
    tl.store(y_ptr + (batch * S + t[:, None]) * E + channel[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)
