"""Device code of a ViL block's backward pass between mLSTM cell and up-projection; names as in `block_kernels`.

A token is a row n of N = B * S; `pre` (N, E) is the convolution's output with its bias, so that c = SiLU(pre). Sums
over tokens are written per program, one row of partial sums each, and added up by `sum_kernel`:

    mix row     dWq, dWk (E, QB)   their biases (E)   dgate' c (2 NH, E)   dgate (2 NH)
    value row   dWv (E, QB)        its bias (E)       dgate' a (2 NH, E)   taps (E, TAPS), bias and a's own sum (E)
"""

import triton
import triton.language as tl

from .block_kernels import _block_matrix, _gate_matrix, _load_row, _load_shifted, _token, _weigh3

__all__ = [
    'conv1d_backward_kernel',
    'conv2d_backward_kernel',
    'finish_kernel',
    'gate_map_kernel',
    'mix_backward_kernel',
    'query_kernel',
    'sum_kernel',
]


@triton.jit
def _turned_matrix(w_ptr, first, E, QB: tl.constexpr, BC: tl.constexpr):
    """Block-diagonal (BC, BC) matrix of one projection, [out, in]."""
    o = tl.arange(0, BC)[:, None]
    i = tl.arange(0, BC)[None, :]
    return tl.load(w_ptr + (first + o) * QB + i % QB, mask=(i // QB == o // QB) & (first + o < E), other=0.0)


@triton.jit
def _diagonal_blocks(full, QB: tl.constexpr, BC: tl.constexpr):
    """Blocks of a (BC, BC) matrix [out, in] as (BC, QB)."""
    i = tl.arange(0, BC)[:, None]
    o = tl.arange(0, BC)[None, :]
    masked = tl.where(i // QB == o // QB, full, 0.0)
    return tl.sum(tl.reshape(masked, (BC, BC // QB, QB)), 1)


@triton.jit
def _gate_gradients(di_ptr, df_ptr, image, t, valid, S, HEADS: tl.constexpr, BG: tl.constexpr):
    """Gradients of the input gates and, after them, the forget gates: (BM, BG) float32."""
    g = tl.arange(0, BG)[None, :]
    place = (image * HEADS + g % HEADS) * S + t
    dgate = tl.load(di_ptr + place, mask=valid & (g < HEADS), other=0.0)
    return dgate + tl.load(df_ptr + place, mask=valid & (g >= HEADS) & (g < 2 * HEADS), other=0.0)


@triton.jit
def gate_map_kernel(
    wq_ptr, wk_ptr, wv_ptr, wg_ptr, map_ptr, E,
    QB: tl.constexpr, HEADS: tl.constexpr, BC: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """(2, E, BG): the gates as linear maps of c and of a, through q, k and v."""
    part = tl.program_id(0)
    channel = part * BC + tl.arange(0, BC)
    place = channel[:, None] * BG + tl.arange(0, BG)[None, :]
    inside = (channel < E)[:, None]
    mq = _block_matrix(wq_ptr, part * BC, E, QB, BC).to(tl.float32)
    mk = _block_matrix(wk_ptr, part * BC, E, QB, BC).to(tl.float32)
    mv = _block_matrix(wv_ptr, part * BC, E, QB, BC).to(tl.float32)
    gq = _gate_matrix(wg_ptr, 0, channel, E, 2 * HEADS, BG).to(tl.float32)
    gk = _gate_matrix(wg_ptr, 1, channel, E, 2 * HEADS, BG).to(tl.float32)
    gv = _gate_matrix(wg_ptr, 2, channel, E, 2 * HEADS, BG).to(tl.float32)
    gc = tl.dot(mq, gq, input_precision='tf32x3') + tl.dot(mk, gk, input_precision='tf32x3')
    ga = tl.dot(mv, gv, input_precision='tf32x3')
    tl.store(map_ptr + place, gc.to(map_ptr.dtype.element_ty), mask=inside)
    tl.store(map_ptr + E * BG + place, ga.to(map_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=['N', 'steps'])
def query_kernel(
    pre_ptr, wq_ptr, bq_ptr, q_ptr, N, E, steps,
    QB: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """q = Wq SiLU(pre) + bq."""
    part = tl.program_id(0)
    program = tl.program_id(1)
    channel = part * BC + tl.arange(0, BC)
    inside = channel < E
    dtype = pre_ptr.dtype.element_ty
    mq = _block_matrix(wq_ptr, part * BC, E, QB, BC).to(dtype)
    bias = tl.zeros((BC,), tl.float32)
    if HAS_BIAS:
        bias += tl.load(bq_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        n = (program * steps + step) * BM + tl.arange(0, BM)
        mask = (n < N)[:, None] & inside[None, :]
        place = n.to(tl.int64)[:, None] * E + channel[None, :]
        pre = tl.load(pre_ptr + place, mask=mask, other=0.0).to(tl.float32)
        c = (pre * tl.sigmoid(pre)).to(dtype)
        q = tl.dot(c, mq, input_precision=PRECISION) + bias[None, :]
        tl.store(q_ptr + place, q.to(dtype), mask=mask)


@triton.jit(do_not_specialize=['N', 'S', 'steps', 'pitch'])
def mix_backward_kernel(
    pre_ptr, dq_ptr, dk_ptr, dc_ptr, di_ptr, df_ptr, wq_ptr, wk_ptr, map_ptr, dpre_ptr, sums_ptr,
    N, S, E, steps, pitch,
    QB: tl.constexpr, HEADS: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BG: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dpre = (dc + Wq' dq + Wk' dk + Gc' dgate) * SiLU'(pre), the gates a linear map Gc of c; writes a mix row."""
    part = tl.program_id(0)
    program = tl.program_id(1)
    channel = part * BC + tl.arange(0, BC)
    inside = channel < E
    g = tl.arange(0, BG)
    dtype = pre_ptr.dtype.element_ty
    mq = _turned_matrix(wq_ptr, part * BC, E, QB, BC).to(dtype)
    mk = _turned_matrix(wk_ptr, part * BC, E, QB, BC).to(dtype)
    gc = tl.load(map_ptr + channel[None, :] * BG + g[:, None], mask=inside[None, :], other=0.0)
    dwq = tl.zeros((BC, BC), tl.float32)
    dwk = tl.zeros((BC, BC), tl.float32)
    dbq = tl.zeros((BM, BC), tl.float32)
    dbk = tl.zeros((BM, BC), tl.float32)
    gate_c = tl.zeros((BG, BC), tl.float32)
    gate_sum = tl.zeros((BM, BG), tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        n = (program * steps + step) * BM + tl.arange(0, BM)
        mask = (n < N)[:, None] & inside[None, :]
        place = n.to(tl.int64)[:, None] * E + channel[None, :]
        pre = tl.load(pre_ptr + place, mask=mask, other=0.0).to(tl.float32)
        dq = tl.load(dq_ptr + place, mask=mask, other=0.0)
        dk = tl.load(dk_ptr + place, mask=mask, other=0.0)
        dc = tl.load(dc_ptr + place, mask=mask, other=0.0).to(tl.float32)
        image = n // S
        t = n - image * S
        dgate = _gate_gradients(di_ptr, df_ptr, image[:, None], t[:, None], (n < N)[:, None], S, HEADS, BG)
        sigma = tl.sigmoid(pre)
        c = (pre * sigma).to(dtype)
        gate_sum += dgate
        dgate = dgate.to(dtype)
        dbq += dq.to(tl.float32)
        dbk += dk.to(tl.float32)
        gate_c = tl.dot(tl.trans(dgate), c, gate_c, input_precision=PRECISION)
        dwq = tl.dot(tl.trans(dq), c, dwq, input_precision=PRECISION)
        dwk = tl.dot(tl.trans(dk), c, dwk, input_precision=PRECISION)
        dc = tl.dot(dq, mq, dc, input_precision=PRECISION)
        dc = tl.dot(dk, mk, dc, input_precision=PRECISION)
        dc = tl.dot(dgate, gc, dc, input_precision=PRECISION)
        dpre = dc * (sigma + pre * sigma * (1.0 - sigma))
        tl.store(dpre_ptr + place, dpre.to(dtype), mask=mask)
    sums_ptr += program.to(tl.int64) * pitch
    wide = channel[:, None] * QB + tl.arange(0, QB)[None, :]
    tl.store(sums_ptr + wide, _diagonal_blocks(dwq, QB, BC), mask=inside[:, None])
    tl.store(sums_ptr + E * QB + wide, _diagonal_blocks(dwk, QB, BC), mask=inside[:, None])
    sums_ptr += 2 * E * QB
    tl.store(sums_ptr + channel, tl.sum(dbq, 0), mask=inside)
    tl.store(sums_ptr + E + channel, tl.sum(dbk, 0), mask=inside)
    sums_ptr += 2 * E
    tl.store(sums_ptr + g[:, None] * E + channel[None, :], gate_c, mask=(g < 2 * HEADS)[:, None] & inside[None, :])
    if part == 0:
        tl.store(sums_ptr + 2 * HEADS * E + g, tl.sum(gate_sum, 0), mask=g < 2 * HEADS)


@triton.jit
def _tap(w_ptr, channel, E, last, TAPS: tl.constexpr, i: tl.constexpr):
    """Tap i of the depthwise weights (E, TAPS), (1, BC) float32; `last` is TAPS - 1 to count from the end, else 0."""
    place = channel * TAPS + tl.where(last > 0, last - i, i)
    return tl.load(w_ptr + place, mask=channel < E, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _store_tap(sums_ptr, tile, channel, E, last, TAPS: tl.constexpr, i: tl.constexpr):
    """Sum of a tile over its tokens, written where `_tap` reads."""
    tl.store(sums_ptr + channel * TAPS + tl.where(last > 0, last - i, i), tl.sum(tile, 0), mask=channel < E)


@triton.jit
def _value_step(
    da, dasum, dwv, dbv, gate_a, mv, ga, a_ptr, a_row, dv_ptr, di_ptr, df_ptr, da_ptr, da_row, batch, t, valid, channel,
    S, E, HEADS: tl.constexpr, PRECISION: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """Add what comes through v and the gates to da, store it, and add to the sums; a in float32 comes back too."""
    mask = valid[:, None] & (channel < E)[None, :]
    n = (batch * S + t)[:, None]
    a = tl.load(a_ptr + n * a_row + channel[None, :], mask=mask, other=0.0)
    dv = tl.load(dv_ptr + n * E + channel[None, :], mask=mask, other=0.0)
    dgate = _gate_gradients(di_ptr, df_ptr, batch, t[:, None], valid[:, None], S, HEADS, BG).to(a.dtype)
    through = tl.dot(dv, mv, input_precision=PRECISION)
    through = tl.dot(dgate, ga, through, input_precision=PRECISION)
    da = tl.where(mask, da + through, 0.0)
    tl.store(da_ptr + n * da_row + channel[None, :], da.to(a.dtype), mask=mask)
    dwv = tl.dot(tl.trans(dv), a, dwv, input_precision=PRECISION)
    gate_a = tl.dot(tl.trans(dgate), a, gate_a, input_precision=PRECISION)
    return a.to(tl.float32), dasum + da, dwv, dbv + dv.to(tl.float32), gate_a


@triton.jit
def _store_value_row(sums_ptr, dwv, dbv, gate_a, channel, E, QB: tl.constexpr, HEADS: tl.constexpr):
    """First half of a value row."""
    inside = channel < E
    g = tl.arange(0, gate_a.shape[0])
    wide = channel[:, None] * QB + tl.arange(0, QB)[None, :]
    tl.store(sums_ptr + wide, _diagonal_blocks(dwv, QB, dwv.shape[0]), mask=inside[:, None])
    sums_ptr += E * QB
    tl.store(sums_ptr + channel, tl.sum(dbv, 0), mask=inside)
    sums_ptr += E
    tl.store(sums_ptr + g[:, None] * E + channel[None, :], gate_a, mask=(g < 2 * HEADS)[:, None] & inside[None, :])


@triton.jit
def _row_float(ptr, stride, row, col, channel, GW, S, GH, E):
    """Tiles of a grid row at columns col - 1, col and col + 1, float32."""
    left, middle, right = _load_row(ptr, stride, row, col, channel, GW, S, GH, E)
    return left.to(tl.float32), middle.to(tl.float32), right.to(tl.float32)


@triton.jit(do_not_specialize=['B', 'S', 'GH', 'GW', 'ROWS', 'row_blocks', 'strips', 'batches', 'last', 'pitch'])
def conv2d_backward_kernel(
    a_ptr, a_row, dpre_ptr, dv_ptr, di_ptr, df_ptr, conv_ptr, wv_ptr, map_ptr, da_ptr, da_row, sums_ptr,
    B, S, GH, GW, E, ROWS, row_blocks, strips, batches, last, pitch,
    QB: tl.constexpr, HEADS: tl.constexpr, PRECISION: tl.constexpr,
    BW: tl.constexpr, BC: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """da = transposed 3 x 3 convolution of dpre + Wv' dv + Ga' dgate; writes a value row."""
    part = tl.program_id(0)
    strip = tl.program_id(1)
    group = tl.program_id(2)
    channel = part * BC + tl.arange(0, BC)
    inside = channel < E
    col = (strip // row_blocks) * BW + tl.arange(0, BW)
    first_row = (strip % row_blocks) * ROWS
    dtype = a_ptr.dtype.element_ty
    mv = _turned_matrix(wv_ptr, part * BC, E, QB, BC).to(dtype)
    g = tl.arange(0, BG)
    ga = tl.load(map_ptr + E * BG + channel[None, :] * BG + g[:, None], mask=inside[None, :], other=0.0)
    w0, w1, w2 = (
        _tap(conv_ptr, channel, E, last, 9, 0),
        _tap(conv_ptr, channel, E, last, 9, 1),
        _tap(conv_ptr, channel, E, last, 9, 2),
    )
    w3, w4, w5 = (
        _tap(conv_ptr, channel, E, last, 9, 3),
        _tap(conv_ptr, channel, E, last, 9, 4),
        _tap(conv_ptr, channel, E, last, 9, 5),
    )
    w6, w7, w8 = (
        _tap(conv_ptr, channel, E, last, 9, 6),
        _tap(conv_ptr, channel, E, last, 9, 7),
        _tap(conv_ptr, channel, E, last, 9, 8),
    )
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
    dbv = tl.zeros((BW, BC), tl.float32)
    dwv = tl.zeros((BC, BC), tl.float32)
    gate_a = tl.zeros((BG, BC), tl.float32)
    for item in range(batches):
        batch = tl.minimum(group * batches + item, B - 1).to(tl.int64)
        live = group * batches + item < B
        base = dpre_ptr + batch * S * E
        u0, u1, u2 = _row_float(base, E, first_row - 1, col, channel, GW, S, GH, E)
        m0, m1, m2 = _row_float(base, E, first_row, col, channel, GW, S, GH, E)
        for step in range(ROWS):
            row = first_row + step
            t, valid = _token(row, col, GW, S, GH)
            valid = valid & live
            d0, d1, d2 = _row_float(base, E, row + 1, col, channel, GW, S, GH, E)
            # Token t was read by its neighbours: by the one below through the upper tap, and so on.
            da = _weigh3(u0, u1, u2, w8, w7, w6) + _weigh3(m0, m1, m2, w5, w4, w3) + _weigh3(d0, d1, d2, w2, w1, w0)
            a, dasum, dwv, dbv, gate_a = _value_step(
                da, dasum, dwv, dbv, gate_a, mv, ga, a_ptr, a_row, dv_ptr, di_ptr, df_ptr, da_ptr, da_row, batch, t,
                valid, channel, S, E, HEADS, PRECISION, BG,
            )  # fmt: skip
            s8 += u0 * a
            s7 += u1 * a
            s6 += u2 * a
            s5 += m0 * a
            s4 += m1 * a
            s3 += m2 * a
            s2 += d0 * a
            s1 += d1 * a
            s0 += d2 * a
            dbias += tl.where(valid[:, None], m1, 0.0)
            u0, u1, u2 = m0, m1, m2
            m0, m1, m2 = d0, d1, d2
    sums_ptr += (group * strips + strip).to(tl.int64) * pitch
    _store_value_row(sums_ptr, dwv, dbv, gate_a, channel, E, QB, HEADS)
    sums_ptr += E * (QB + 1 + 2 * HEADS)
    _store_tap(sums_ptr, s0, channel, E, last, 9, 0)
    _store_tap(sums_ptr, s1, channel, E, last, 9, 1)
    _store_tap(sums_ptr, s2, channel, E, last, 9, 2)
    _store_tap(sums_ptr, s3, channel, E, last, 9, 3)
    _store_tap(sums_ptr, s4, channel, E, last, 9, 4)
    _store_tap(sums_ptr, s5, channel, E, last, 9, 5)
    _store_tap(sums_ptr, s6, channel, E, last, 9, 6)
    _store_tap(sums_ptr, s7, channel, E, last, 9, 7)
    _store_tap(sums_ptr, s8, channel, E, last, 9, 8)
    tl.store(sums_ptr + 9 * E + channel, tl.sum(dbias, 0), mask=inside)
    tl.store(sums_ptr + 10 * E + channel, tl.sum(dasum, 0), mask=inside)


@triton.jit(do_not_specialize=['B', 'S', 'ROWS', 'strips', 'batches', 'first', 'last', 'pitch'])
def conv1d_backward_kernel(
    a_ptr, a_row, dpre_ptr, dv_ptr, di_ptr, df_ptr, conv_ptr, wv_ptr, map_ptr, da_ptr, da_row, sums_ptr,
    B, S, E, ROWS, strips, batches, first, last, pitch,
    QB: tl.constexpr, HEADS: tl.constexpr, PRECISION: tl.constexpr,
    BW: tl.constexpr, BC: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """da = transposed causal convolution of dpre + Wv' dv + Ga' dgate; writes a value row.

    A strip is ROWS x BW tokens.
    """
    part = tl.program_id(0)
    strip = tl.program_id(1)
    group = tl.program_id(2)
    channel = part * BC + tl.arange(0, BC)
    inside = channel < E
    dtype = a_ptr.dtype.element_ty
    mv = _turned_matrix(wv_ptr, part * BC, E, QB, BC).to(dtype)
    g = tl.arange(0, BG)
    ga = tl.load(map_ptr + E * BG + channel[None, :] * BG + g[:, None], mask=inside[None, :], other=0.0)
    w0, w1 = _tap(conv_ptr, channel, E, last, 4, 0), _tap(conv_ptr, channel, E, last, 4, 1)
    w2, w3 = _tap(conv_ptr, channel, E, last, 4, 2), _tap(conv_ptr, channel, E, last, 4, 3)
    s0 = tl.zeros((BW, BC), tl.float32)
    s1 = tl.zeros((BW, BC), tl.float32)
    s2 = tl.zeros((BW, BC), tl.float32)
    s3 = tl.zeros((BW, BC), tl.float32)
    dbias = tl.zeros((BW, BC), tl.float32)
    dasum = tl.zeros((BW, BC), tl.float32)
    dbv = tl.zeros((BW, BC), tl.float32)
    dwv = tl.zeros((BC, BC), tl.float32)
    gate_a = tl.zeros((BG, BC), tl.float32)
    for item in range(batches):
        batch = tl.minimum(group * batches + item, B - 1).to(tl.int64)
        live = group * batches + item < B
        base = dpre_ptr + batch * S * E
        for step in range(ROWS):
            t = (strip * ROWS + step) * BW + tl.arange(0, BW)
            valid = (t < S) & live
            # Token t was read through tap i by the token at t - first - i.
            d0 = _load_shifted(base, E, t - first, channel, S, E).to(tl.float32)
            d1 = _load_shifted(base, E, t - first - 1, channel, S, E).to(tl.float32)
            d2 = _load_shifted(base, E, t - first - 2, channel, S, E).to(tl.float32)
            d3 = _load_shifted(base, E, t - first - 3, channel, S, E).to(tl.float32)
            a, dasum, dwv, dbv, gate_a = _value_step(
                d0 * w0 + d1 * w1 + d2 * w2 + d3 * w3, dasum, dwv, dbv, gate_a, mv, ga, a_ptr, a_row, dv_ptr, di_ptr,
                df_ptr, da_ptr, da_row, batch, t, valid, channel, S, E, HEADS, PRECISION, BG,
            )  # fmt: skip
            s0 += d0 * a
            s1 += d1 * a
            s2 += d2 * a
            s3 += d3 * a
            own = _load_shifted(base, E, t, channel, S, E).to(tl.float32)
            dbias += tl.where(valid[:, None], own, 0.0)
    sums_ptr += (group * strips + strip).to(tl.int64) * pitch
    _store_value_row(sums_ptr, dwv, dbv, gate_a, channel, E, QB, HEADS)
    sums_ptr += E * (QB + 1 + 2 * HEADS)
    _store_tap(sums_ptr, s0, channel, E, last, 4, 0)
    _store_tap(sums_ptr, s1, channel, E, last, 4, 1)
    _store_tap(sums_ptr, s2, channel, E, last, 4, 2)
    _store_tap(sums_ptr, s3, channel, E, last, 4, 3)
    tl.store(sums_ptr + 4 * E + channel, tl.sum(dbias, 0), mask=inside)
    tl.store(sums_ptr + 5 * E + channel, tl.sum(dasum, 0), mask=inside)


@triton.jit(do_not_specialize=['rows0', 'rows1', 'rows2', 'rows3', 'rows4'])
def sum_kernel(
    part_ptr, total_ptr, rows0, rows1, rows2, rows3, rows4, width0, width1, width2, width3, width4,
    BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Column sums of five float32 matrices (rows, width) that lie behind each other, likewise laid out."""
    block = tl.program_id(0)
    rows, width = rows0, width0
    base = tl.zeros((), tl.int64)
    target = tl.zeros((), tl.int32)
    for i in tl.static_range(4):
        after = tl.cdiv(width, BC)
        rows_next = rows1 if i == 0 else (rows2 if i == 1 else (rows3 if i == 2 else rows4))
        width_next = width1 if i == 0 else (width2 if i == 1 else (width3 if i == 2 else width4))
        # Widths before the one that holds this block are stepped over; `block` then counts within the next matrix.
        over = block >= after
        base = tl.where(over, base + rows.to(tl.int64) * width, base)
        target = tl.where(over, target + width, target)
        rows = tl.where(over, rows_next, rows)
        width = tl.where(over, width_next, width)
        block = tl.where(over, block - after, block)
    col = block * BC + tl.arange(0, BC)
    total = tl.zeros((BM, BC), tl.float32)
    for first in range(0, rows, BM):
        row = first + tl.arange(0, BM)
        mask = (row < rows)[:, None] & (col < width)[None, :]
        total += tl.load(part_ptr + base + row.to(tl.int64)[:, None] * width + col[None, :], mask=mask, other=0.0)
    tl.store(total_ptr + target + col, tl.sum(total, 0), mask=col < width)


@triton.jit
def finish_kernel(
    mix_ptr, value_ptr, wq_ptr, wk_ptr, wv_ptr, wg_ptr, bq_ptr, bk_ptr, bv_ptr, dw_ptr, db_ptr, dwg_ptr, E,
    QB: tl.constexpr, HEADS: tl.constexpr, HAS_BIAS: tl.constexpr, BC: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """Gradients of projections and gates from the total mix and value rows.

    What Wq sees as dq is dq + Gq' dgate, and what Gq sees as q is Wq c + bq; likewise for k and v.
    """
    part = tl.program_id(0)
    channel = part * BC + tl.arange(0, BC)
    inside = channel < E
    g = tl.arange(0, BG)
    i = tl.arange(0, QB)
    gates = (g < 2 * HEADS)[:, None] & inside[None, :]
    map_place = g[:, None] * E + channel[None, :]
    gate_c = tl.load(mix_ptr + 2 * E * (QB + 1) + map_place, mask=gates, other=0.0)
    gate_a = tl.load(value_ptr + E * (QB + 1) + map_place, mask=gates, other=0.0)
    gate_sum = tl.load(mix_ptr + 2 * E * (QB + 1 + HEADS) + g, mask=g < 2 * HEADS, other=0.0)
    wide = channel[:, None] * QB + i[None, :]
    for which in tl.static_range(3):
        weights = _gate_matrix(wg_ptr, which, channel, E, 2 * HEADS, BG).to(tl.float32)  # (BC, BG)
        seen = gate_c if which < 2 else gate_a
        dw_sum = mix_ptr + which * E * QB if which < 2 else value_ptr
        db_sum = mix_ptr + 2 * E * QB + which * E if which < 2 else value_ptr + E * QB
        w_ptr = wq_ptr if which == 0 else (wk_ptr if which == 1 else wv_ptr)
        dw = _diagonal_blocks(tl.dot(weights, seen, input_precision='tf32x3'), QB, BC)
        dw += tl.load(dw_sum + wide, mask=inside[:, None], other=0.0)
        tl.store(dw_ptr + which * E * QB + wide, dw, mask=inside[:, None])
        db = tl.sum(weights * gate_sum[None, :], 1)
        db += tl.load(db_sum + channel, mask=inside, other=0.0)
        tl.store(db_ptr + which * E + channel, db, mask=inside)
        square = _block_matrix(w_ptr, part * BC, E, QB, BC).to(tl.float32)
        dwg = tl.dot(seen, square, input_precision='tf32x3')
        if HAS_BIAS:
            b_ptr = bq_ptr if which == 0 else (bk_ptr if which == 1 else bv_ptr)
            dwg += gate_sum[:, None] * tl.load(b_ptr + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
        place = g[:, None] * (3 * E) + which * E + channel[None, :]
        tl.store(dwg_ptr + place, dwg, mask=gates)
