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


@triton.jit(do_not_specialize=['S'])
def output_kernel(
    h_ptr, h_batch, h_head, h_row, pre_ptr, z_ptr, z_batch, z_row, w_ptr, b_ptr, skip_ptr, y_ptr, S, E, eps,
    HAS_BIAS: tl.constexpr, DH: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """y = ((1 + w) * norm(h) + b + skip * c) * SiLU(z) for BM tokens of one head."""
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
    pre = tl.load(pre_ptr + (batch * S + t[:, None]) * E + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    z = tl.load(z_ptr + batch * z_batch + t[:, None] * z_row + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(h, 1) / DH
    centred = tl.where(mask, h - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / DH + eps)
    w = tl.load(w_ptr + channel, mask=d < DH, other=0.0).to(tl.float32) + 1.0
    skip = tl.load(skip_ptr + channel, mask=d < DH, other=0.0).to(tl.float32)
    inner = centred * rstd[:, None] * w[None, :] + skip[None, :] * pre * tl.sigmoid(pre)
    if HAS_BIAS:
        inner += tl.load(b_ptr + channel, mask=d < DH, other=0.0).to(tl.float32)[None, :]
    y = inner * z * tl.sigmoid(z)
    tl.store(y_ptr + (batch * S + t[:, None]) * E + channel[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)
