"""Device code of a ViL block's backward pass around the mLSTM cell; names as in `block_kernels.py`."""

import triton
import triton.language as tl

from .block_kernels import (
    _add_bias,
    _gate_matrix,
    _load_four,
    _load_row,
    _load_shifted,
    _square,
    _tall,
    _taps3,
    _taps4,
    _token,
    _weigh3,
)

__all__ = ['conv1d_backward_kernel', 'conv2d_backward_kernel', 'finish_kernel', 'mix_backward_kernel']


@triton.jit
def _diagonal_blocks(full, QB: tl.constexpr, BC: tl.constexpr):
    """Blocks of a (BC, BC) matrix [out, in] as (BC, QB)."""
    i = tl.arange(0, BC)[:, None]
    o = tl.arange(0, BC)[None, :]
    masked = tl.where(i // QB == o // QB, full, 0.0)
    return tl.sum(tl.reshape(masked, (BC, BC // QB, QB)), 1)


@triton.jit
def mix_backward_kernel(
    a_ptr, a_batch, a_row, conv_ptr, conv_b_ptr, square_ptr, tall_ptr,
    dq_ptr, dk_ptr, dv_ptr, dg_batch, dg_head, dg_row, dgate_ptr, dc_ptr, dpre_ptr, da_ptr, da_batch, da_row,
    sums_ptr, B, S, GH, GW, E, DH, ROWS, row_blocks, strips, batches, first,
    IS_2D: tl.constexpr, QB: tl.constexpr, HEADS: tl.constexpr, PRECISION: tl.constexpr,
    BW: tl.constexpr, BC: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """Gradients of q, k, v and the gates taken back to conv(a) + b and, through v alone, to a.

    dpre = (dc + Wq' dq + Wk' dk + Gc' dgate) * SiLU'(pre);  da = Wv' dv + Ga' dgate, with the gates as linear maps Gc
    of c and Ga of a. Sums over the tokens of this program for Wq, Wk, Wv, their biases, and the gates' weights.
    """
    part = tl.program_id(0)
    strip = tl.program_id(1)
    group = tl.program_id(2)
    channel = part * BC + tl.arange(0, BC)
    inside = channel < E
    in_head = (channel // DH) * dg_head + channel % DH
    col = (strip // row_blocks) * BW + tl.arange(0, BW)
    first_row = (strip % row_blocks) * ROWS
    g = tl.arange(0, BG)
    dtype = a_ptr.dtype.element_ty
    mq = _square(square_ptr, part, 0, BC, True)
    mk = _square(square_ptr, part, 1, BC, True)
    mv = _square(square_ptr, part, 2, BC, True)
    gc = _tall(tall_ptr, part, 0, BC, BG, True)
    ga = _tall(tall_ptr, part, 1, BC, BG, True)
    dwq = tl.zeros((BC, BC), tl.float32)
    dwk = tl.zeros((BC, BC), tl.float32)
    dwv = tl.zeros((BC, BC), tl.float32)
    gate_c = tl.zeros((BG, BC), tl.float32)
    gate_a = tl.zeros((BG, BC), tl.float32)
    gate_sum = tl.zeros((BG,), tl.float32)
    dbq = tl.zeros((BC,), tl.float32)
    dbk = tl.zeros((BC,), tl.float32)
    dbv = tl.zeros((BC,), tl.float32)
    if IS_2D:
        w0, w1, w2 = _taps3(conv_ptr, channel, E, 0)
        w3, w4, w5 = _taps3(conv_ptr, channel, E, 1)
        w6, w7, w8 = _taps3(conv_ptr, channel, E, 2)
    else:
        w0, w1, w2, w3 = _taps4(conv_ptr, channel, E)
    for item in range(batches):
        batch = tl.minimum(group * batches + item, B - 1).to(tl.int64)
        live = group * batches + item < B
        a_base = a_ptr + batch * a_batch
        if IS_2D:
            u0, u1, u2 = _load_row(a_base, a_row, first_row - 1, col, channel, GW, S, GH, E)
            m0, m1, m2 = _load_row(a_base, a_row, first_row, col, channel, GW, S, GH, E)
        for step in range(ROWS):
            row = first_row + step
            t, valid = _token(row, col, GW, S, GH)
            valid = valid & live
            mask = valid[:, None] & inside[None, :]
            flat = (batch * S + t.to(tl.int64))[:, None] * E + channel[None, :]
            gate_place = (((g // HEADS) * B + batch) * HEADS + g % HEADS) * S
            gate_mask = valid[:, None] & (g < 2 * HEADS)[None, :]
            place = batch * dg_batch + t.to(tl.int64)[:, None] * dg_row + in_head[None, :]
            dgate = tl.load(dgate_ptr + gate_place[None, :] + t[:, None], mask=gate_mask, other=0.0)
            dq = tl.load(dq_ptr + place, mask=mask, other=0.0)
            dk = tl.load(dk_ptr + place, mask=mask, other=0.0)
            dv = tl.load(dv_ptr + place, mask=mask, other=0.0)
            dc = tl.load(dc_ptr + flat, mask=mask, other=0.0).to(tl.float32)
            if IS_2D:
                d0, d1, d2 = _load_row(a_base, a_row, row + 1, col, channel, GW, S, GH, E)
                pre = (
                    _weigh3(u0, u1, u2, w0, w1, w2) + _weigh3(m0, m1, m2, w3, w4, w5) + _weigh3(d0, d1, d2, w6, w7, w8)
                )
                a = m1
                u0, u1, u2 = m0, m1, m2
                m0, m1, m2 = d0, d1, d2
            else:
                t0, t1, t2, t3 = _load_four(a_base, a_row, t, first, channel, S, E)
                pre = t0 * w0 + t1 * w1 + t2 * w2 + t3 * w3
                a = _load_shifted(a_base, a_row, t, channel, S, E)
            pre = _add_bias(pre, conv_b_ptr, channel, E)
            sigma = tl.sigmoid(pre)
            c = (pre * sigma).to(dtype)
            gate_sum += tl.sum(dgate, 0)
            dgate = dgate.to(dtype)
            turned = tl.trans(dgate)
            gate_c += tl.dot(turned, c, input_precision=PRECISION)
            gate_a += tl.dot(turned, a, input_precision=PRECISION)
            dbq += tl.sum(dq.to(tl.float32), 0)
            dbk += tl.sum(dk.to(tl.float32), 0)
            dbv += tl.sum(dv.to(tl.float32), 0)
            dwq += tl.dot(tl.trans(dq), c, input_precision=PRECISION)
            dwk += tl.dot(tl.trans(dk), c, input_precision=PRECISION)
            dwv += tl.dot(tl.trans(dv), a, input_precision=PRECISION)
            dc += tl.dot(dq, mq, input_precision=PRECISION)
            dc += tl.dot(dk, mk, input_precision=PRECISION)
            dc += tl.dot(dgate, gc, input_precision=PRECISION)
            da = tl.dot(dv, mv, input_precision=PRECISION) + tl.dot(dgate, ga, input_precision=PRECISION)
            dpre = dc * (sigma + pre * sigma * (1.0 - sigma))
            tl.store(dpre_ptr + flat, dpre.to(dtype), mask=mask)
            da_place = batch * da_batch + t.to(tl.int64)[:, None] * da_row + channel[None, :]
            tl.store(da_ptr + da_place, da.to(dtype), mask=mask)
    # Per program: Wq, Wk, Wv (E, QB) each, their biases (E) each, dgate' c and dgate' a (BG, E) each, dgate (BG).
    sums_ptr += (group * strips + strip).to(tl.int64) * (3 * E * (QB + 1) + 2 * BG * E + BG)
    wide = channel[:, None] * QB + tl.arange(0, QB)[None, :]
    tl.store(sums_ptr + wide, _diagonal_blocks(dwq, QB, BC), mask=inside[:, None])
    tl.store(sums_ptr + E * QB + wide, _diagonal_blocks(dwk, QB, BC), mask=inside[:, None])
    tl.store(sums_ptr + 2 * E * QB + wide, _diagonal_blocks(dwv, QB, BC), mask=inside[:, None])
    sums_ptr += 3 * E * QB
    tl.store(sums_ptr + channel, dbq, mask=inside)
    tl.store(sums_ptr + E + channel, dbk, mask=inside)
    tl.store(sums_ptr + 2 * E + channel, dbv, mask=inside)
    sums_ptr += 3 * E
    gates = g[:, None] * E + channel[None, :]
    tl.store(sums_ptr + gates, gate_c, mask=inside[None, :])
    tl.store(sums_ptr + BG * E + gates, gate_a, mask=inside[None, :])
    if part == 0:
        tl.store(sums_ptr + 2 * BG * E + g, gate_sum)


@triton.jit
def finish_kernel(
    sums_ptr, square_ptr, wg_ptr, bq_ptr, bk_ptr, bv_ptr, dw_ptr, db_ptr, dwg_ptr, E,
    QB: tl.constexpr, HEADS: tl.constexpr, HAS_BIAS: tl.constexpr, BC: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """Gradients of projections and gates from the sums of `mix_backward_kernel`.

    What Wq sees as dq is dq + Gq' dgate, and what Gq sees as q is Wq c + bq; likewise for k and v.
    """
    part = tl.program_id(0)
    channel = part * BC + tl.arange(0, BC)
    inside = channel < E
    g = tl.arange(0, BG)
    i = tl.arange(0, QB)
    gate_c = tl.load(sums_ptr + 3 * E * (QB + 1) + g[:, None] * E + channel[None, :], mask=inside[None, :], other=0.0)
    gate_a = tl.load(
        sums_ptr + 3 * E * (QB + 1) + BG * E + g[:, None] * E + channel[None, :], mask=inside[None, :], other=0.0
    )
    gate_sum = tl.load(sums_ptr + 3 * E * (QB + 1) + 2 * BG * E + g)
    wide = channel[:, None] * QB + i[None, :]
    for which in tl.static_range(3):
        weights = _gate_matrix(wg_ptr, which, channel, E, 2 * HEADS, BG).to(tl.float32)  # (BC, BG)
        seen = gate_c if which < 2 else gate_a
        full = tl.dot(weights, seen, input_precision='tf32x3')
        dw = _diagonal_blocks(full, QB, BC)
        dw += tl.load(sums_ptr + which * E * QB + wide, mask=inside[:, None], other=0.0)
        tl.store(dw_ptr + which * E * QB + wide, dw, mask=inside[:, None])
        db = tl.sum(weights * gate_sum[None, :], 1)
        db += tl.load(sums_ptr + 3 * E * QB + which * E + channel, mask=inside, other=0.0)
        tl.store(db_ptr + which * E + channel, db, mask=inside)
        square = _square(square_ptr, part, which, BC, False).to(tl.float32)
        dwg = tl.dot(seen, square, input_precision='tf32x3')
        if HAS_BIAS:
            b_ptr = bq_ptr if which == 0 else (bk_ptr if which == 1 else bv_ptr)
            dwg += gate_sum[:, None] * tl.load(b_ptr + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
        place = g[:, None] * (3 * E) + which * E + channel[None, :]
        tl.store(dwg_ptr + place, dwg, mask=(g < 2 * HEADS)[:, None] & inside[None, :])


@triton.jit
def _add_da(da, dpre_sum, target, da_ptr, t, da_row, channel, mask):
    """Read what is in da, add, write back; the new value."""
    place = target + t.to(tl.int64)[:, None] * da_row + channel[None, :]
    da += tl.load(da_ptr + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(da_ptr + place, da.to(da_ptr.dtype.element_ty), mask=mask)
    return tl.where(mask, da, 0.0) + dpre_sum


@triton.jit
def _store_sum(sums_ptr, tile, channel, inside, E, i: tl.constexpr):
    """Sum of a tile over its tokens, written as row i of this program's sums."""
    tl.store(sums_ptr + i * E + channel, tl.sum(tile, 0), mask=inside)


@triton.jit
def conv2d_backward_kernel(
    a_ptr, a_batch, a_row, dpre_ptr, conv_ptr, da_ptr, da_batch, da_row, sums_ptr,
    B, S, GH, GW, E, ROWS, row_blocks, strips, batches, BW: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """da += transposed 3 x 3 convolution of dpre; sums over tokens for the taps, the bias, and da itself."""
    part = tl.program_id(0)
    strip = tl.program_id(1)
    group = tl.program_id(2)
    channel = part * BC + tl.arange(0, BC)
    inside = channel < E
    col = (strip // row_blocks) * BW + tl.arange(0, BW)
    first_row = (strip % row_blocks) * ROWS
    w0, w1, w2 = _taps3(conv_ptr, channel, E, 0)
    w3, w4, w5 = _taps3(conv_ptr, channel, E, 1)
    w6, w7, w8 = _taps3(conv_ptr, channel, E, 2)
    s0 = tl.zeros((BW, BC), tl.float32)
    s1 = tl.zeros((BW, BC), tl.float32)
    s2 = tl.zeros((BW, BC), tl.float32)
    s3 = tl.zeros((BW, BC), tl.float32)
    s4 = tl.zeros((BW, BC), tl.float32)
    s5 = tl.zeros((BW, BC), tl.float32)
    s6 = tl.zeros((BW, BC), tl.float32)
    s7 = tl.zeros((BW, BC), tl.float32)
    s8 = tl.zeros((BW, BC), tl.float32)
    dbias = tl.zeros((BW, BC), tl.float32)
    dasum = tl.zeros((BW, BC), tl.float32)
    for item in range(batches):
        batch = tl.minimum(group * batches + item, B - 1).to(tl.int64)
        live = group * batches + item < B
        dpre_base = dpre_ptr + batch * S * E
        u0, u1, u2 = _load_row(dpre_base, E, first_row - 1, col, channel, GW, S, GH, E)
        m0, m1, m2 = _load_row(dpre_base, E, first_row, col, channel, GW, S, GH, E)
        for step in range(ROWS):
            row = first_row + step
            t, valid = _token(row, col, GW, S, GH)
            mask = (valid & live)[:, None] & inside[None, :]
            d0, d1, d2 = _load_row(dpre_base, E, row + 1, col, channel, GW, S, GH, E)
            # Token t was read by its neighbours: by the one below through the upper tap, and so on.
            da = _weigh3(u0, u1, u2, w8, w7, w6) + _weigh3(m0, m1, m2, w5, w4, w3) + _weigh3(d0, d1, d2, w2, w1, w0)
            dasum = _add_da(da, dasum, batch * da_batch, da_ptr, t, da_row, channel, mask)
            a = tl.load(
                a_ptr + batch * a_batch + t.to(tl.int64)[:, None] * a_row + channel[None, :], mask=mask, other=0.0
            )
            a = a.to(tl.float32)
            s8 += u0.to(tl.float32) * a
            s7 += u1.to(tl.float32) * a
            s6 += u2.to(tl.float32) * a
            s5 += m0.to(tl.float32) * a
            s4 += m1.to(tl.float32) * a
            s3 += m2.to(tl.float32) * a
            s2 += d0.to(tl.float32) * a
            s1 += d1.to(tl.float32) * a
            s0 += d2.to(tl.float32) * a
            dbias += tl.where(mask, m1.to(tl.float32), 0.0)
            u0, u1, u2 = m0, m1, m2
            m0, m1, m2 = d0, d1, d2
    sums_ptr += (group * strips + strip).to(tl.int64) * 11 * E
    _store_sum(sums_ptr, s0, channel, inside, E, 0)
    _store_sum(sums_ptr, s1, channel, inside, E, 1)
    _store_sum(sums_ptr, s2, channel, inside, E, 2)
    _store_sum(sums_ptr, s3, channel, inside, E, 3)
    _store_sum(sums_ptr, s4, channel, inside, E, 4)
    _store_sum(sums_ptr, s5, channel, inside, E, 5)
    _store_sum(sums_ptr, s6, channel, inside, E, 6)
    _store_sum(sums_ptr, s7, channel, inside, E, 7)
    _store_sum(sums_ptr, s8, channel, inside, E, 8)
    _store_sum(sums_ptr, dbias, channel, inside, E, 9)
    _store_sum(sums_ptr, dasum, channel, inside, E, 10)


@triton.jit
def conv1d_backward_kernel(
    a_ptr, a_batch, a_row, dpre_ptr, conv_ptr, da_ptr, da_batch, da_row, sums_ptr,
    B, S, GH, GW, E, ROWS, row_blocks, strips, batches, first, BW: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """da += transposed causal convolution of dpre; sums over tokens for the taps, the bias, and da itself."""
    part = tl.program_id(0)
    strip = tl.program_id(1)
    group = tl.program_id(2)
    channel = part * BC + tl.arange(0, BC)
    inside = channel < E
    col = tl.arange(0, BW)
    first_row = strip * ROWS
    w0, w1, w2, w3 = _taps4(conv_ptr, channel, E)
    s0 = tl.zeros((BW, BC), tl.float32)
    s1 = tl.zeros((BW, BC), tl.float32)
    s2 = tl.zeros((BW, BC), tl.float32)
    s3 = tl.zeros((BW, BC), tl.float32)
    dbias = tl.zeros((BW, BC), tl.float32)
    dasum = tl.zeros((BW, BC), tl.float32)
    for item in range(batches):
        batch = tl.minimum(group * batches + item, B - 1).to(tl.int64)
        live = group * batches + item < B
        dpre_base = dpre_ptr + batch * S * E
        for step in range(ROWS):
            t, valid = _token(first_row + step, col, GW, S, GH)
            mask = (valid & live)[:, None] & inside[None, :]
            # Token t was read through tap i by the token at t - first - i.
            d3, d2, d1, d0 = _load_four(dpre_base, E, t, -first - 3, channel, S, E)
            da = d0 * w0 + d1 * w1 + d2 * w2 + d3 * w3
            dasum = _add_da(da, dasum, batch * da_batch, da_ptr, t, da_row, channel, mask)
            a = tl.load(
                a_ptr + batch * a_batch + t.to(tl.int64)[:, None] * a_row + channel[None, :], mask=mask, other=0.0
            )
            a = a.to(tl.float32)
            s0 += d0 * a
            s1 += d1 * a
            s2 += d2 * a
            s3 += d3 * a
            own = _load_shifted(dpre_base, E, t, channel, S, E).to(tl.float32)
            dbias += tl.where(mask, own, 0.0)
    sums_ptr += (group * strips + strip).to(tl.int64) * 6 * E
    _store_sum(sums_ptr, s0, channel, inside, E, 0)
    _store_sum(sums_ptr, s1, channel, inside, E, 1)
    _store_sum(sums_ptr, s2, channel, inside, E, 2)
    _store_sum(sums_ptr, s3, channel, inside, E, 3)
    _store_sum(sums_ptr, dbias, channel, inside, E, 4)
    _store_sum(sums_ptr, dasum, channel, inside, E, 5)
