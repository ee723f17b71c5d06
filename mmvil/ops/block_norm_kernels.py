"""Device code at both ends of a ViL block: the norm before it, and head norm, skip and gate after the mLSTM cell.

    x   (B, S, D)       residual stream
    z   (B, S, E)       second half of the up-projection
    c   (B, S, E)       convolved and activated first half
    h   (B, NH, S, DH)  output of the cell
    y   (B, S, E)       (norm(h) + skip * c) * SiLU(z)

Sums over tokens are written per program and added up outside, so results do not depend on the order in which programs
run.
"""

import triton
import triton.language as tl

__all__ = ['layer_norm_backward_kernel', 'layer_norm_kernel', 'output_backward_kernel', 'output_kernel']


@triton.jit
def layer_norm_kernel(
    x_ptr, w_ptr, b_ptr, out_ptr, rows, D, eps, HAS_BIAS: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr
):
    """out = (x - mean) * rstd * (1 + w) + b, BM rows per program."""
    row = tl.program_id(0) * BM + tl.arange(0, BM)
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
def layer_norm_backward_kernel(
    x_ptr, w_ptr, dn_ptr, dout_ptr, branch_ptr, dx_ptr, sums_ptr, rows, D, eps, steps,
    BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dx = dout + norm'(dn); sums over the rows: dn * normalised, dn, and the branch's gradient for its bias."""
    program = tl.program_id(0)
    col = tl.arange(0, BD)
    w = tl.load(w_ptr + col, mask=col < D, other=0.0).to(tl.float32) + 1.0
    dw = tl.zeros((BD,), tl.float32)
    db = tl.zeros((BD,), tl.float32)
    dbranch = tl.zeros((BD,), tl.float32)
    for step in range(steps):
        row = (program * steps + step) * BM + tl.arange(0, BM)
        mask = (row < rows)[:, None] & (col < D)[None, :]
        place = row.to(tl.int64)[:, None] * D + col[None, :]
        x = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
        mean = tl.sum(x, 1) / D
        centred = tl.where(mask, x - mean[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, 1) / D + eps)
        normalised = centred * rstd[:, None]
        dn = tl.load(dn_ptr + place, mask=mask, other=0.0).to(tl.float32)
        dw += tl.sum(dn * normalised, 0)
        db += tl.sum(dn, 0)
        g = dn * w[None, :]
        dx = rstd[:, None] * (g - (tl.sum(g, 1) / D)[:, None] - normalised * (tl.sum(g * normalised, 1) / D)[:, None])
        dx += tl.load(dout_ptr + place, mask=mask, other=0.0).to(tl.float32)
        dbranch += tl.sum(tl.load(branch_ptr + place, mask=mask, other=0.0).to(tl.float32), 0)
        tl.store(dx_ptr + place, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    sums_ptr += program * 3 * D + col
    tl.store(sums_ptr, dw, mask=col < D)
    tl.store(sums_ptr + D, db, mask=col < D)
    tl.store(sums_ptr + 2 * D, dbranch, mask=col < D)


@triton.jit
def output_kernel(
    h_ptr, h_batch, h_head, h_row, c_ptr, z_ptr, z_batch, z_row, w_ptr, b_ptr, skip_ptr, y_ptr, S, E, eps,
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
    c = tl.load(c_ptr + (batch * S + t[:, None]) * E + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    z = tl.load(z_ptr + batch * z_batch + t[:, None] * z_row + channel[None, :], mask=mask, other=0.0).to(tl.float32)
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


@triton.jit
def output_backward_kernel(
    h_ptr, h_batch, h_head, h_row, c_ptr, z_ptr, z_batch, z_row, w_ptr, b_ptr, skip_ptr, dy_ptr,
    y_ptr, dz_ptr, dz_batch, dz_row, dh_ptr, dc_ptr, sums_ptr, S, E, eps, token_steps, token_blocks,
    HAS_BIAS: tl.constexpr, DH: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """y again; dz, dh, dc through the gated output; sums over tokens for w, b, skip and the bias of z."""
    block = tl.program_id(0)
    head = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    d = tl.arange(0, BD)
    channel = head * DH + d
    w = tl.load(w_ptr + channel, mask=d < DH, other=0.0).to(tl.float32) + 1.0
    skip = tl.load(skip_ptr + channel, mask=d < DH, other=0.0).to(tl.float32)
    dw = tl.zeros((BD,), tl.float32)
    db = tl.zeros((BD,), tl.float32)
    dskip = tl.zeros((BD,), tl.float32)
    dzsum = tl.zeros((BD,), tl.float32)
    for step in range(token_steps):
        t = (block * token_steps + step) * BM + tl.arange(0, BM)
        mask = (t < S)[:, None] & (d < DH)[None, :]
        t = t.to(tl.int64)
        place = (batch * S + t[:, None]) * E + channel[None, :]
        h = tl.load(h_ptr + batch * h_batch + head * h_head + t[:, None] * h_row + d[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
        c = tl.load(c_ptr + place, mask=mask, other=0.0).to(tl.float32)
        z = tl.load(z_ptr + batch * z_batch + t[:, None] * z_row + channel[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
        dy = tl.load(dy_ptr + place, mask=mask, other=0.0).to(tl.float32)
        mean = tl.sum(h, 1) / DH
        centred = tl.where(mask, h - mean[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, 1) / DH + eps)
        normalised = centred * rstd[:, None]
        inner = normalised * w[None, :] + skip[None, :] * c
        if HAS_BIAS:
            inner += tl.load(b_ptr + channel, mask=d < DH, other=0.0).to(tl.float32)[None, :]
        sigma = tl.sigmoid(z)
        gate = z * sigma
        tl.store(y_ptr + place, (inner * gate).to(y_ptr.dtype.element_ty), mask=mask)
        dz = dy * inner * (sigma + gate * (1.0 - sigma))
        dzsum += tl.sum(dz, 0)
        tl.store(
            dz_ptr + batch * dz_batch + t[:, None] * dz_row + channel[None, :],
            dz.to(dz_ptr.dtype.element_ty),
            mask=mask,
        )
        dinner = dy * gate
        tl.store(dc_ptr + place, (dinner * skip[None, :]).to(dc_ptr.dtype.element_ty), mask=mask)
        dskip += tl.sum(dinner * c, 0)
        dw += tl.sum(dinner * normalised, 0)
        db += tl.sum(dinner, 0)
        g = dinner * w[None, :]
        dh = rstd[:, None] * (g - (tl.sum(g, 1) / DH)[:, None] - normalised * (tl.sum(g * normalised, 1) / DH)[:, None])
        tl.store(dh_ptr + place, dh.to(dh_ptr.dtype.element_ty), mask=mask)
    sums_ptr += (batch * token_blocks + block) * 4 * E + channel
    tl.store(sums_ptr, dw, mask=d < DH)
    tl.store(sums_ptr + E, db, mask=d < DH)
    tl.store(sums_ptr + 2 * E, dskip, mask=d < DH)
    tl.store(sums_ptr + 3 * E, dzsum, mask=d < DH)
