"""Device code of a ViL block's backward pass at its ends: drop path, weights, norm, the gated output after the cell.

Names as in `block_norm_kernels.py`; a token is a row n of N = B * S. Sums over tokens are written per program, one row
of partial sums each, and added up by `sum_kernel` of `block_backward_kernels.py`.
"""

import triton
import triton.language as tl

from .block_kernels import _fold_gates, _load_block, _store_block
from .triton_gates import fast_sigmoid

__all__ = ['layer_norm_backward_kernel', 'output_backward_kernel', 'prepare_backward_kernel']


@triton.jit
def _branch(
    dout_ptr, scale_ptr, branch_ptr, sums_ptr, program, N, S, D, steps,
    SCALED: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradient of the branch, dout times the image's drop path factor, in the branch's type; its sum over tokens."""
    col = tl.arange(0, BD)
    total = tl.zeros((BM, BD), tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        n = (program * steps + step) * BM + tl.arange(0, BM)
        mask = (n < N)[:, None] & (col < D)[None, :]
        place = n.to(tl.int64)[:, None] * D + col[None, :]
        dout = tl.load(dout_ptr + place, mask=mask, other=0.0).to(tl.float32)
        if SCALED:
            dout *= tl.load(scale_ptr + n // S, mask=n < N, other=0.0).to(tl.float32)[:, None]
        total += dout
        tl.store(branch_ptr + place, dout.to(branch_ptr.dtype.element_ty), mask=mask)
    tl.store(sums_ptr + program.to(tl.int64) * D + col, tl.sum(total, 0), mask=col < D)


@triton.jit
def _store_map(map_ptr, channel, E, gate, BG: tl.constexpr):
    """Write a part's map to the gates."""
    place = channel[:, None] * BG + tl.arange(0, BG)[None, :]
    tl.store(map_ptr + place, gate.to(map_ptr.dtype.element_ty), mask=(channel < E)[:, None])


@triton.jit(do_not_specialize=['N', 'S', 'steps', 'parts', 'others'])
def prepare_backward_kernel(
    dout_ptr, scale_ptr, branch_ptr, sums_ptr, wq_ptr, wk_ptr, wv_ptr, wi_ptr, wf_ptr, map_ptr, up_ptr, down_ptr,
    up_copy_ptr, down_copy_ptr, up_size, down_size, parts, others, E, N, S, D, steps, QB: tl.constexpr,
    HEADS: tl.constexpr, BC: tl.constexpr, BG: tl.constexpr, BLOCK: tl.constexpr, SCALED: tl.constexpr,
    BM: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The gates as linear maps of c and of a, through q, k and v: (2, E, BG); copies of weights; the branch's gradient.

    Two programs for each part of BC channels, `others` in all with those that copy the outer projections' weights in
    the activations' dtype; the rest take dout through the drop path and do not wait for that.
    """
    program = tl.program_id(0)
    if program >= others:
        _branch(
            dout_ptr, scale_ptr, branch_ptr, sums_ptr, program - others, N, S, D, steps, SCALED, BM, BD, STAGES
        )  # fmt: skip
    elif program >= 2 * parts:
        first = (program - 2 * parts) * BLOCK
        up = _load_block(up_ptr, first, up_size, BLOCK)
        down = _load_block(down_ptr, first, down_size, BLOCK)
        _store_block(up_copy_ptr, first, up_size, up, BLOCK)
        _store_block(down_copy_ptr, first, down_size, down, BLOCK)
    elif program >= parts:
        channel = (program - parts) * BC + tl.arange(0, BC)
        gate = _fold_gates(wv_ptr, wi_ptr, wf_ptr, 2, channel, E, QB, HEADS, BG)
        _store_map(map_ptr + E * BG, channel, E, gate, BG)
    else:
        channel = program * BC + tl.arange(0, BC)
        gate = _fold_gates(wq_ptr, wi_ptr, wf_ptr, 0, channel, E, QB, HEADS, BG)
        gate += _fold_gates(wk_ptr, wi_ptr, wf_ptr, 1, channel, E, QB, HEADS, BG)
        _store_map(map_ptr, channel, E, gate, BG)


@triton.jit(do_not_specialize=['N', 'steps'])
def layer_norm_backward_kernel(
    x_ptr, w_ptr, b_ptr, dn_ptr, dout_ptr, dx_ptr, norm_ptr, sums_ptr, N, D, eps, steps,
    HAS_BIAS: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx = dout + norm'(dn), and the norm's output again; sums over the rows: dn * normalised, dn."""
    program = tl.program_id(0)
    col = tl.arange(0, BD)
    w = tl.load(w_ptr + col, mask=col < D, other=0.0).to(tl.float32) + 1.0
    bias = tl.zeros((BD,), tl.float32)
    if HAS_BIAS:
        bias += tl.load(b_ptr + col, mask=col < D, other=0.0).to(tl.float32)
    dw = tl.zeros((BD,), tl.float32)
    db = tl.zeros((BD,), tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        n = (program * steps + step) * BM + tl.arange(0, BM)
        mask = (n < N)[:, None] & (col < D)[None, :]
        place = n.to(tl.int64)[:, None] * D + col[None, :]
        x = tl.load(x_ptr + place, mask=mask, other=0.0).to(tl.float32)
        dn = tl.load(dn_ptr + place, mask=mask, other=0.0).to(tl.float32)
        dx = tl.load(dout_ptr + place, mask=mask, other=0.0).to(tl.float32)
        mean = tl.sum(x, 1) / D
        centred = tl.where(mask, x - mean[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, 1) / D + eps)
        normalised = centred * rstd[:, None]
        tl.store(norm_ptr + place, (normalised * w[None, :] + bias[None, :]).to(norm_ptr.dtype.element_ty), mask=mask)
        dw += tl.sum(dn * normalised, 0)
        db += tl.sum(dn, 0)
        g = dn * w[None, :]
        dx += rstd[:, None] * (g - (tl.sum(g, 1) / D)[:, None] - normalised * (tl.sum(g * normalised, 1) / D)[:, None])
        tl.store(dx_ptr + place, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    sums_ptr += program.to(tl.int64) * 2 * D + col
    tl.store(sums_ptr, dw, mask=col < D)
    tl.store(sums_ptr + D, db, mask=col < D)


@triton.jit(do_not_specialize=['N', 'S', 'steps'])
def output_backward_kernel(
    h_ptr, pre_ptr, z_ptr, z_row, w_ptr, b_ptr, skip_ptr, dy_ptr, y_ptr, dz_ptr, dz_row, dh_ptr, dc_ptr, product_ptr,
    sums_ptr, N, S, E, eps, steps,
    HAS_BIAS: tl.constexpr, DH: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y again; dz, dh, dc through the gated output of one head; sums over tokens for the bias of z, w, b and skip.

    And dh.h of each row, (B, NH, S), with dh as it is stored: the cell's backward pass begins with it.
    """
    program = tl.program_id(0)
    head = tl.program_id(1)
    d = tl.arange(0, BD)
    channel = head * DH + d
    w = tl.load(w_ptr + channel, mask=d < DH, other=0.0).to(tl.float32) + 1.0
    skip = tl.load(skip_ptr + channel, mask=d < DH, other=0.0).to(tl.float32)
    bias = tl.zeros((BD,), tl.float32)
    if HAS_BIAS:
        bias += tl.load(b_ptr + channel, mask=d < DH, other=0.0).to(tl.float32)
    dw = tl.zeros((BM, BD), tl.float32)
    db = tl.zeros((BM, BD), tl.float32)
    dskip = tl.zeros((BM, BD), tl.float32)
    dzsum = tl.zeros((BM, BD), tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        token = (program * steps + step) * BM + tl.arange(0, BM)
        mask = (token < N)[:, None] & (d < DH)[None, :]
        n = token.to(tl.int64)[:, None]
        place = n * E + channel[None, :]
        h = tl.load(h_ptr + place, mask=mask, other=0.0).to(tl.float32)
        pre = tl.load(pre_ptr + place, mask=mask, other=0.0).to(tl.float32)
        z = tl.load(z_ptr + n * z_row + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + place, mask=mask, other=0.0).to(tl.float32)
        c = pre * fast_sigmoid(pre)
        mean = tl.sum(h, 1) / DH
        centred = tl.where(mask, h - mean[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, 1) / DH + eps)
        normalised = centred * rstd[:, None]
        inner = normalised * w[None, :] + skip[None, :] * c + bias[None, :]
        sigma = fast_sigmoid(z)
        gate = z * sigma
        tl.store(y_ptr + place, (inner * gate).to(y_ptr.dtype.element_ty), mask=mask)
        dz = dy * inner * (sigma + gate * (1.0 - sigma))
        dzsum += dz
        tl.store(dz_ptr + n * dz_row + channel[None, :], dz.to(dz_ptr.dtype.element_ty), mask=mask)
        dinner = dy * gate
        tl.store(dc_ptr + place, (dinner * skip[None, :]).to(dc_ptr.dtype.element_ty), mask=mask)
        dskip += dinner * c
        dw += dinner * normalised
        db += dinner
        g = dinner * w[None, :]
        dh = rstd[:, None] * (g - (tl.sum(g, 1) / DH)[:, None] - normalised * (tl.sum(g * normalised, 1) / DH)[:, None])
        dh = dh.to(dh_ptr.dtype.element_ty)
        tl.store(dh_ptr + place, dh, mask=mask)
        image = token // S
        row = (image * tl.num_programs(1) + head).to(tl.int64) * S + (token - image * S)
        tl.store(product_ptr + row, tl.sum(dh.to(tl.float32) * h, 1), mask=token < N)
    sums_ptr += program.to(tl.int64) * 4 * E + channel
    tl.store(sums_ptr, tl.sum(dzsum, 0), mask=d < DH)
    tl.store(sums_ptr + E, tl.sum(dw, 0), mask=d < DH)
    tl.store(sums_ptr + 2 * E, tl.sum(db, 0), mask=d < DH)
    tl.store(sums_ptr + 3 * E, tl.sum(dskip, 0), mask=d < DH)
