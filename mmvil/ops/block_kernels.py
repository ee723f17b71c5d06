"""Device code before the mLSTM cell of a ViL block: convolution, projections, gates. After it: `block_norm_kernels.py`.

Names, all in the kernels' own units (a token is one row of S, a channel one column of E):

    a, z     (B, S, E)       halves of the up-projection, rows 2E apart
    conv     (E, taps)       depthwise weights, already turned for the reading direction
    pre, c   (B, S, E)       conv(a) + bias, and SiLU of that; pre is what is stored
    q, k, v  (B, S, E)       block-diagonal projections of c, c and a; blocks of QB x QB
    gate     (parts, 2, B, NH, S)   partial sums of the input and forget gates, one part per block of BC channels

Tokens are walked in strips: a strip is BW columns of the grid by ROWS rows. A causal 1-D convolution walks the sequence
as rows of GW = BW tokens. Sums over tokens are written per program and added up outside, so results do not depend on
the order in which programs run. Source: Vision-LSTM (arXiv 2406.04303) section 3, with the gates as linear maps of c
and a, since q, k and v are linear in these.
"""

import triton
import triton.language as tl

__all__ = ['mix_kernel', 'prepare_kernel']


@triton.jit
def _token(row, col, GW, S, GH):
    """Place of grid cell (row, col) in the sequence, and whether there is one."""
    t = row * GW + col
    return t, (row >= 0) & (row < GH) & (col >= 0) & (col < GW) & (t < S)


@triton.jit
def _load_cell(ptr, stride, row, col, channel, GW, S, GH, E):
    """Tile (BW, BC) of a token-major tensor at grid cells (row, col), zero outside of the grid."""
    t, valid = _token(row, col, GW, S, GH)
    return tl.load(
        ptr + t.to(tl.int64)[:, None] * stride + channel[None, :],
        mask=valid[:, None] & (channel < E)[None, :],
        other=0.0,
    )


@triton.jit
def _load_shifted(ptr, stride, t, channel, S, E):
    """Tile (BW, BC) of a token-major tensor at places t, zero outside of the sequence."""
    valid = (t >= 0) & (t < S)
    return tl.load(
        ptr + t.to(tl.int64)[:, None] * stride + channel[None, :],
        mask=valid[:, None] & (channel < E)[None, :],
        other=0.0,
    )


@triton.jit
def _load_row(ptr, stride, row, col, channel, GW, S, GH, E):
    """Tiles of a grid row at columns col - 1, col and col + 1."""
    left = _load_cell(ptr, stride, row, col - 1, channel, GW, S, GH, E)
    middle = _load_cell(ptr, stride, row, col, channel, GW, S, GH, E)
    right = _load_cell(ptr, stride, row, col + 1, channel, GW, S, GH, E)
    return left, middle, right


@triton.jit
def _load_four(ptr, stride, t, first, channel, S, E):
    """Tiles at the four successive places that a causal convolution sees, float32."""
    t0 = _load_shifted(ptr, stride, t + first, channel, S, E).to(tl.float32)
    t1 = _load_shifted(ptr, stride, t + first + 1, channel, S, E).to(tl.float32)
    t2 = _load_shifted(ptr, stride, t + first + 2, channel, S, E).to(tl.float32)
    t3 = _load_shifted(ptr, stride, t + first + 3, channel, S, E).to(tl.float32)
    return t0, t1, t2, t3


@triton.jit
def _weigh3(x0, x1, x2, w0, w1, w2):
    """One row of a 3 x 3 convolution, float32."""
    return x0.to(tl.float32) * w0 + x1.to(tl.float32) * w1 + x2.to(tl.float32) * w2


@triton.jit
def _tap(w_ptr, channel, E, TAPS: tl.constexpr, i: tl.constexpr):
    """Weight of tap i, (1, BC) float32."""
    return tl.load(w_ptr + channel * TAPS + i, mask=channel < E, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _taps4(w_ptr, channel, E):
    """The four taps of a causal convolution."""
    return (
        _tap(w_ptr, channel, E, 4, 0),
        _tap(w_ptr, channel, E, 4, 1),
        _tap(w_ptr, channel, E, 4, 2),
        _tap(w_ptr, channel, E, 4, 3),
    )


@triton.jit
def _taps3(w_ptr, channel, E, row: tl.constexpr):
    """Three taps of one kernel row."""
    return (
        _tap(w_ptr, channel, E, 9, 3 * row),
        _tap(w_ptr, channel, E, 9, 3 * row + 1),
        _tap(w_ptr, channel, E, 9, 3 * row + 2),
    )


@triton.jit
def _block_matrix(w_ptr, first, E, QB: tl.constexpr, BC: tl.constexpr):
    """Block-diagonal (BC, BC) matrix of one projection, [in, out]."""
    i = tl.arange(0, BC)[:, None]
    o = tl.arange(0, BC)[None, :]
    return tl.load(w_ptr + (first + o) * QB + i % QB, mask=(i // QB == o // QB) & (first + o < E), other=0.0)


@triton.jit
def _gate_matrix(w_ptr, part, channel, E, GATES: tl.constexpr, BG: tl.constexpr):
    """(BC, BG) slice of the gates' weights (GATES, 3E) for q (part 0), k (1) or v (2)."""
    g = tl.arange(0, BG)
    return tl.load(
        w_ptr + g[None, :] * (3 * E) + part * E + channel[:, None],
        mask=(channel < E)[:, None] & (g < GATES)[None, :], other=0.0,
    )  # fmt: skip


@triton.jit
def _add_bias(x, ptr, channel, E):
    """x + bias, the bias read from ptr."""
    return x + tl.load(ptr + channel, mask=channel < E, other=0.0).to(tl.float32)[None, :]


@triton.jit
def prepare_kernel(
    wq_ptr, wk_ptr, wv_ptr, bq_ptr, bk_ptr, bv_ptr, wg_ptr, square_ptr, tall_ptr, constant_ptr, E,
    QB: tl.constexpr, HEADS: tl.constexpr, HAS_BIAS: tl.constexpr, BC: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """Weights of one block of BC channels as the other kernels read them.

    square (parts, 3, BC, BC): Wq, Wk, Wv as block-diagonal matrices [in, out]. The gates are linear in q, k and v, and
    these in c and a: tall (parts, 2, BC, BG) maps c and a straight to the gates, constant (parts, BG) is what the
    projections' biases add.
    """
    part = tl.program_id(0)
    channel = part * BC + tl.arange(0, BC)
    inside = channel < E
    i = tl.arange(0, BC)
    g = tl.arange(0, BG)
    mq = _block_matrix(wq_ptr, part * BC, E, QB, BC).to(tl.float32)
    mk = _block_matrix(wk_ptr, part * BC, E, QB, BC).to(tl.float32)
    mv = _block_matrix(wv_ptr, part * BC, E, QB, BC).to(tl.float32)
    gq = _gate_matrix(wg_ptr, 0, channel, E, 2 * HEADS, BG).to(tl.float32)
    gk = _gate_matrix(wg_ptr, 1, channel, E, 2 * HEADS, BG).to(tl.float32)
    gv = _gate_matrix(wg_ptr, 2, channel, E, 2 * HEADS, BG).to(tl.float32)
    dtype = square_ptr.dtype.element_ty
    square = square_ptr + part * 3 * BC * BC + i[:, None] * BC + i[None, :]
    tl.store(square, mq.to(dtype))
    tl.store(square + BC * BC, mk.to(dtype))
    tl.store(square + 2 * BC * BC, mv.to(dtype))
    tall = tall_ptr + part * 2 * BC * BG + i[:, None] * BG + g[None, :]
    gc = tl.dot(mq, gq, input_precision='tf32x3') + tl.dot(mk, gk, input_precision='tf32x3')
    tl.store(tall, gc.to(dtype))
    tl.store(tall + BC * BG, tl.dot(mv, gv, input_precision='tf32x3').to(dtype))
    constant = tl.zeros((BG,), tl.float32)
    if HAS_BIAS:
        constant += tl.sum(tl.load(bq_ptr + channel, mask=inside, other=0.0).to(tl.float32)[:, None] * gq, 0)
        constant += tl.sum(tl.load(bk_ptr + channel, mask=inside, other=0.0).to(tl.float32)[:, None] * gk, 0)
        constant += tl.sum(tl.load(bv_ptr + channel, mask=inside, other=0.0).to(tl.float32)[:, None] * gv, 0)
    tl.store(constant_ptr + part * BG + g, constant)


@triton.jit
def _square(ptr, part, which: tl.constexpr, BC: tl.constexpr, TURNED: tl.constexpr):
    """Block-diagonal matrix of Wq (0), Wk (1) or Wv (2): [in, out], or [out, in] if TURNED."""
    i = tl.arange(0, BC)
    place = i[None, :] * BC + i[:, None] if TURNED else i[:, None] * BC + i[None, :]
    return tl.load(ptr + (part * 3 + which) * BC * BC + place)


@triton.jit
def _tall(ptr, part, which: tl.constexpr, BC: tl.constexpr, BG: tl.constexpr, TURNED: tl.constexpr):
    """Map from c (0) or a (1) to the gates: (BC, BG), or (BG, BC) if TURNED."""
    i = tl.arange(0, BC)
    g = tl.arange(0, BG)
    place = i[None, :] * BG + g[:, None] if TURNED else i[:, None] * BG + g[None, :]
    return tl.load(ptr + (part * 2 + which) * BC * BG + place)


@triton.jit
def _mix_row(
    pre, a, t, valid, channel, part, plane, batch, conv_b_ptr, mq, mk, mv, bq_ptr, bk_ptr, bv_ptr, gc, ga, constant,
    pre_ptr, q_ptr, k_ptr, v_ptr, gate_ptr, B, S, E,
    HEADS: tl.constexpr, HAS_BIAS: tl.constexpr, WITH_GATES: tl.constexpr, PRECISION: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """Everything behind the convolution for one row of a strip."""
    dtype = q_ptr.dtype.element_ty
    pre = _add_bias(pre, conv_b_ptr, channel, E)
    mask = valid[:, None] & (channel < E)[None, :]
    place = plane + t.to(tl.int64)[:, None] * E + channel[None, :]
    pre = pre.to(dtype)
    tl.store(pre_ptr + place, pre, mask=mask)
    pre = pre.to(tl.float32)  # c is that of the rounded value, which is all that the other kernels know
    c = (pre * tl.sigmoid(pre)).to(dtype)
    q = tl.dot(c, mq, input_precision=PRECISION)
    k = tl.dot(c, mk, input_precision=PRECISION)
    v = tl.dot(a, mv, input_precision=PRECISION)
    if HAS_BIAS:
        q = _add_bias(q, bq_ptr, channel, E)
        k = _add_bias(k, bk_ptr, channel, E)
        v = _add_bias(v, bv_ptr, channel, E)
    tl.store(q_ptr + place, q.to(dtype), mask=mask)
    tl.store(k_ptr + place, k.to(dtype), mask=mask)
    tl.store(v_ptr + place, v.to(dtype), mask=mask)
    if WITH_GATES:
        gate = tl.dot(c, gc, input_precision=PRECISION) + tl.dot(a, ga, input_precision=PRECISION) + constant[None, :]
        g = tl.arange(0, BG)
        target = (((part * 2 + g // HEADS).to(tl.int64) * B + batch) * HEADS + g % HEADS) * S
        tl.store(gate_ptr + target[None, :] + t[:, None], gate, mask=valid[:, None] & (g < 2 * HEADS)[None, :])


@triton.jit
def mix_kernel(
    a_ptr, a_batch, a_row, conv_ptr, conv_b_ptr, square_ptr, tall_ptr, constant_ptr, bq_ptr, bk_ptr, bv_ptr,
    pre_ptr, q_ptr, k_ptr, v_ptr, gate_ptr, B, S, GH, GW, E, ROWS, row_blocks, first,
    IS_2D: tl.constexpr, HEADS: tl.constexpr, HAS_BIAS: tl.constexpr,
    WITH_GATES: tl.constexpr, PRECISION: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """pre = conv(a) + b, c = SiLU(pre), q = Wq c, k = Wk c, v = Wv a, and this channel block's part of the gates."""
    part = tl.program_id(0)
    strip = tl.program_id(1)
    batch = tl.program_id(2).to(tl.int64)
    channel = part * BC + tl.arange(0, BC)
    col = (strip // row_blocks) * BW + tl.arange(0, BW)
    first_row = (strip % row_blocks) * ROWS
    a_ptr += batch * a_batch
    plane = batch * S * E
    mq = _square(square_ptr, part, 0, BC, False)
    mk = _square(square_ptr, part, 1, BC, False)
    mv = _square(square_ptr, part, 2, BC, False)
    gc = _tall(tall_ptr, part, 0, BC, BG, False)
    ga = _tall(tall_ptr, part, 1, BC, BG, False)
    constant = tl.load(constant_ptr + part * BG + tl.arange(0, BG))
    if IS_2D:
        w0, w1, w2 = _taps3(conv_ptr, channel, E, 0)
        w3, w4, w5 = _taps3(conv_ptr, channel, E, 1)
        w6, w7, w8 = _taps3(conv_ptr, channel, E, 2)
        u0, u1, u2 = _load_row(a_ptr, a_row, first_row - 1, col, channel, GW, S, GH, E)
        m0, m1, m2 = _load_row(a_ptr, a_row, first_row, col, channel, GW, S, GH, E)
        d0, d1, d2 = _load_row(a_ptr, a_row, first_row + 1, col, channel, GW, S, GH, E)
        for step in range(ROWS):
            row = first_row + step
            n0, n1, n2 = _load_row(a_ptr, a_row, row + 2, col, channel, GW, S, GH, E)  # ahead of their use
            pre = _weigh3(u0, u1, u2, w0, w1, w2) + _weigh3(m0, m1, m2, w3, w4, w5) + _weigh3(d0, d1, d2, w6, w7, w8)
            t, valid = _token(row, col, GW, S, GH)
            _mix_row(
                pre, m1, t, valid, channel, part, plane, batch, conv_b_ptr, mq, mk, mv, bq_ptr, bk_ptr, bv_ptr,
                gc, ga, constant, pre_ptr, q_ptr, k_ptr, v_ptr, gate_ptr, B, S, E,
                HEADS, HAS_BIAS, WITH_GATES, PRECISION, BG,
            )  # fmt: skip
            u0, u1, u2 = m0, m1, m2
            m0, m1, m2 = d0, d1, d2
            d0, d1, d2 = n0, n1, n2
    else:
        w0, w1, w2, w3 = _taps4(conv_ptr, channel, E)
        for step in range(ROWS):
            t, valid = _token(first_row + step, col, GW, S, GH)
            t0, t1, t2, t3 = _load_four(a_ptr, a_row, t, first, channel, S, E)
            a = _load_shifted(a_ptr, a_row, t, channel, S, E)
            _mix_row(
                t0 * w0 + t1 * w1 + t2 * w2 + t3 * w3, a, t, valid, channel, part, plane, batch, conv_b_ptr, mq, mk, mv,
                bq_ptr, bk_ptr, bv_ptr, gc, ga, constant, pre_ptr, q_ptr, k_ptr, v_ptr, gate_ptr, B, S, E,
                HEADS, HAS_BIAS, WITH_GATES, PRECISION, BG,
            )  # fmt: skip
