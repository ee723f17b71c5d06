"""Device code between up-projection and mLSTM cell of a ViL block: convolution, SiLU, projections, gates in one pass.

Names as in `block_kernels`. One program is one warp with 32 channels and eight *pairs* of neighbouring tokens, an even
one and an odd one. It walks down the grid (or along the sequence) and keeps running sums of the convolution, so that
each token is read about once. Each thread holds 8 adjacent channels of a pair, 16 bytes of a 16-bit type.

The projections' blocks go through the matrix unit as block-diagonal matrices. A thread of it holds other columns than
8 adjacent ones; since these columns may come in any order if the matrices' rows and columns are ordered likewise, no
value ever changes its thread and nothing passes through shared memory. With channel = 8 t + 4 h + 2 m + l inside of a
part, row 16 h + 4 t + 2 m + l and column 16 h + 8 m + 2 t + l stand for it: `prepare_kernel` writes the matrices so,
and the permutations below are written for it; they change no result.
"""

import triton
import triton.language as tl

__all__ = ['mix1d_kernel', 'mix2d_kernel']

WIDTH = tl.constexpr(32)
MINUS_LOG2_E = tl.constexpr(-1.4426950408889634)


@triton.jit
def _stack(even, odd, PAIRS: tl.constexpr):
    """Two (PAIRS, 32) tiles above each other."""
    return tl.reshape(tl.permute(tl.join(even, odd), (2, 0, 1)), (2 * PAIRS, WIDTH))


@triton.jit
def _unstack(x, PAIRS: tl.constexpr):
    """The two tiles of `_stack`."""
    return tl.split(tl.permute(tl.reshape(x, (2, PAIRS, WIDTH)), (1, 2, 0)))


@triton.jit
def _as_rows(x, BM: tl.constexpr):
    """Columns of (BM, 32) in the order of the matrices' rows."""
    return tl.reshape(tl.permute(tl.reshape(x, (BM, 4, 2, 4)), (0, 2, 1, 3)), (BM, WIDTH))


@triton.jit
def _halves(x, BM: tl.constexpr):
    """The two halves of `_as_rows`, (BM, 16) each: blocks of up to four channels do not mix them."""
    return tl.split(tl.reshape(tl.permute(tl.reshape(x, (BM, 4, 2, 4)), (0, 1, 3, 2)), (BM, WIDTH // 2, 2)))


@triton.jit
def _from_columns(x, BM: tl.constexpr):
    """Columns of a product, in the order of channels."""
    return tl.reshape(tl.permute(tl.reshape(x, (BM, 2, 2, 4, 2)), (0, 3, 1, 2, 4)), (BM, WIDTH))


@triton.jit
def _from_halves(low, high, BM: tl.constexpr):
    """Like `_from_columns`, from the products of both halves."""
    both = tl.reshape(tl.join(low, high), (BM, 2, 4, 2, 2))
    return tl.reshape(tl.permute(both, (0, 2, 4, 1, 3)), (BM, WIDTH))


@triton.jit
def _silu(x):
    """x * sigmoid(x); the square of a reciprocal root is faster than a division and as exact."""
    root = tl.rsqrt(1.0 + tl.exp2(x * MINUS_LOG2_E))
    return x * (root * root)


@triton.jit
def _load_live(ptr, mask):
    return tl.load(ptr, mask=mask, other=0.0)


@triton.jit
def _inside(channel, E, EVEN: tl.constexpr):
    """Channels that exist, (1, 32). A constant if all do, written as one that also the oldest interpreters know."""
    inside = channel < E
    if EVEN:
        inside = inside | (channel >= E)
    return inside[None, :]


@triton.jit
def _per_channel(ptr, channel, E, EVEN: tl.constexpr, PAIRS: tl.constexpr):
    """One number per channel as a tile (PAIRS, 32), so that it comes in the activations' layout."""
    place = tl.broadcast_to(channel[None, :], (PAIRS, WIDTH))
    number = tl.load(ptr + place) if EVEN else tl.load(ptr + place, mask=place < E, other=0.0)
    return number.to(tl.float32)


@triton.jit
def _matrix(ptr, part, which: tl.constexpr, FIRST: tl.constexpr, SIZE: tl.constexpr):
    """Rows and columns FIRST .. FIRST + SIZE of the matrix of Wq (0), Wk (1) or Wv (2)."""
    i = FIRST + tl.arange(0, SIZE)
    return tl.load(ptr + (part * 3 + which) * WIDTH * WIDTH + i[:, None] * WIDTH + i[None, :])


@triton.jit
def _matrices(ptr, part, FIRST: tl.constexpr, SIZE: tl.constexpr, FOLDED: tl.constexpr):
    """`_matrix` of the three projections, one for the other where they are folded."""
    first = _matrix(ptr, part, 0, FIRST, SIZE)
    second, third = first, first
    if FOLDED < 2:
        second = _matrix(ptr, part, 1, FIRST, SIZE)
    if FOLDED == 0:
        third = _matrix(ptr, part, 2, FIRST, SIZE)
    return first, second, third


@triton.jit
def _gate_matrix(ptr, part, which: tl.constexpr, BG: tl.constexpr):
    """Map from c (0) or a (1) to the gates, (32, BG)."""
    i, g = tl.arange(0, WIDTH), tl.arange(0, BG)
    return tl.load(ptr + (part * 2 + which) * WIDTH * BG + i[:, None] * BG + g[None, :])


@triton.jit
def _project(
    x, low, high, m, m_high, bias_ptr, channel, E,
    SPLIT: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """One projection of both tokens of the pairs."""
    if SPLIT:
        out_low = tl.dot(low, m, input_precision=PRECISION)
        out_high = tl.dot(high, m_high, input_precision=PRECISION)
        out = _from_halves(out_low, out_high, 2 * PAIRS)
    else:
        out = _from_columns(tl.dot(x, m, input_precision=PRECISION), 2 * PAIRS)
    even, odd = _unstack(out, PAIRS)
    if HAS_BIAS:
        bias = _per_channel(bias_ptr, channel, E, EVEN, PAIRS)
        even, odd = even + bias, odd + bias
    return even, odd


@triton.jit
def _put(ptr, place, E, even, odd, has_even, has_odd):
    """Write both tokens of the pairs."""
    dtype = ptr.dtype.element_ty
    tl.store(ptr + place, even.to(dtype), mask=has_even)
    tl.store(ptr + place + E, odd.to(dtype), mask=has_odd)


@triton.jit
def _put_shares(ptr, gate, GATES: tl.constexpr, PAIRS: tl.constexpr, BG: tl.constexpr):
    """Write columns (2 * PAIRS, BG) of the gates as a chunk of PLANES by 2 * PAIRS tokens, those of a pair adjacent.

    A thread of the matrix unit has both tokens of a pair and columns 8 n + 2 m + l for all n and l. With axes in the
    order (m, pair, columns, token) no value changes its thread, and column 8 n + 2 m + l as plane 8 n + 4 l + m makes
    what a warp writes at once gapless. Tokens that do not exist are written, too, and nobody reads them.
    """
    gate = tl.permute(tl.reshape(gate, (2, PAIRS, BG // 8, 4, 2)), (3, 1, 2, 4, 0))
    gate = tl.reshape(gate, (4, PAIRS, BG // 4, 2))
    m, i = tl.arange(0, 4)[:, None, None, None], tl.arange(0, BG // 4)[None, None, :, None]
    place = ((4 * i + m) * PAIRS + tl.arange(0, PAIRS)[None, :, None, None]) * 2 + tl.arange(0, 2)[None, None, None, :]
    exists = i // 2 * 8 + i % 2 + 2 * m < GATES
    tl.store(ptr + place, gate, mask=exists)


@triton.jit
def _emit(
    pre_even, pre_odd, a_even, a_odd, token, live_even, live_odd, channel, chunk,
    matrices, matrices_high, bq_ptr, bk_ptr, bv_ptr, gate_matrices, pre_ptr, q_ptr, k_ptr, v_ptr, gate_ptr, E,
    FOLDED: tl.constexpr, GATES: tl.constexpr, SPLIT: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, PAIRS: tl.constexpr, BG: tl.constexpr, PLANES: tl.constexpr,
):  # fmt: skip
    """Everything behind the convolution for some pairs of tokens, the even ones at places `token` of B * S.

    FOLDED from 1 on: c takes the place of pre, and there is no v. FOLDED 2: nor k, and q is Wk^T (Wq c + bq).
    """
    dtype = pre_ptr.dtype.element_ty
    inside = _inside(channel, E, EVEN)
    has_even, has_odd = live_even[:, None] & inside, live_odd[:, None] & inside
    place = token[:, None] * E + channel[None, :]
    if FOLDED == 0:  # c is that of the rounded value, which is all that the other kernels know
        pre_even, pre_odd = pre_even.to(dtype), pre_odd.to(dtype)
        _put(pre_ptr, place, E, pre_even, pre_odd, has_even, has_odd)
    c_even, c_odd = _silu(pre_even.to(tl.float32)).to(dtype), _silu(pre_odd.to(tl.float32)).to(dtype)
    if FOLDED > 0:
        _put(pre_ptr, place, E, c_even, c_odd, has_even, has_odd)
    c, a = _stack(c_even, c_odd, PAIRS), _stack(a_even, a_odd, PAIRS)
    c_rows, a_rows = _as_rows(c, 2 * PAIRS), _as_rows(a, 2 * PAIRS)
    c_low, c_high = _halves(c, 2 * PAIRS)
    a_low, a_high = _halves(a, 2 * PAIRS)
    mq, mk, mv = matrices
    mq_high, mk_high, mv_high = matrices_high
    q_even, q_odd = _project(
        c_rows, c_low, c_high, mq, mq_high, bq_ptr, channel, E, SPLIT, HAS_BIAS, EVEN, PRECISION, PAIRS
    )
    _put(q_ptr, place, E, q_even, q_odd, has_even, has_odd)
    if FOLDED < 2:
        k_even, k_odd = _project(
            c_rows, c_low, c_high, mk, mk_high, bk_ptr, channel, E, SPLIT, HAS_BIAS, EVEN, PRECISION, PAIRS
        )
        _put(k_ptr, place, E, k_even, k_odd, has_even, has_odd)
    if FOLDED == 0:
        v_even, v_odd = _project(
            a_rows, a_low, a_high, mv, mv_high, bv_ptr, channel, E, SPLIT, HAS_BIAS, EVEN, PRECISION, PAIRS
        )
        _put(v_ptr, place, E, v_even, v_odd, has_even, has_odd)
    from_c, from_a = gate_matrices
    gate = tl.dot(c_rows, from_c, input_precision=PRECISION)
    gate = tl.dot(a_rows, from_a, gate, input_precision=PRECISION)
    _put_shares(gate_ptr + chunk * (PLANES * PAIRS * 2), gate, GATES, PAIRS, BG)


@triton.jit
def _three(x0, x1, x2, w0, w1, w2, total):
    """Total plus one row of a 3 x 3 convolution."""
    return total + x0 * w0 + x1 * w1 + x2 * w2


@triton.jit
def _load_line(line, a_row, has0, has1, has2, has3):
    """Tokens of a grid row at columns -1, 0, 1 and 2 relative to the pairs' first."""
    return (
        _load_live(line - a_row, has0),
        _load_live(line, has1),
        _load_live(line + a_row, has2),
        _load_live(line + 2 * a_row, has3),
    )


@triton.jit(do_not_specialize=['B', 'S', 'GH', 'GW', 'ROWS', 'row_blocks', 'parts'])
def mix2d_kernel(
    a_ptr, a_batch, a_row, conv_ptr, conv_b_ptr, matrix_ptr, gate_matrix_ptr,
    bq_ptr, bk_ptr, bv_ptr, pre_ptr, q_ptr, k_ptr, v_ptr, gate_ptr, B, S, GH, GW, E, ROWS, row_blocks, parts,
    FOLDED: tl.constexpr, GATES: tl.constexpr, SPLIT: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, PAIRS: tl.constexpr, BG: tl.constexpr, PLANES: tl.constexpr,
):  # fmt: skip
    """pre = conv(a) + b, c = SiLU(pre), q = Wq c, k = Wk c, v = Wv a, and this part's share of the gates.

    FOLDED from 1 on: c in place of pre and no v; FOLDED 2: nor k, and in place of q Wk^T (Wq c + bq).
    A strip is PAIRS pairs of columns, counted through all images, by ROWS rows. Shares are (rows of strips, parts,
    PLANES, 2 * PAIRS), see `_put_shares`. Grid: strips * parts.
    """
    part = tl.program_id(0) % parts
    strip = tl.program_id(0) // parts
    channel = part * WIDTH + tl.arange(0, WIDTH)
    pair = (strip // row_blocks) * PAIRS + tl.arange(0, PAIRS)
    image_pairs = (GW + 1) // 2
    batch, col = (pair // image_pairs).to(tl.int64), pair % image_pairs * 2
    live = batch < B
    live_odd = live & (col + 1 < GW)
    inside = _inside(channel, E, EVEN)
    has0, has1 = (live & (col > 0))[:, None] & inside, live[:, None] & inside
    has2, has3 = live_odd[:, None] & inside, (live & (col + 2 < GW))[:, None] & inside
    first_row = (strip % row_blocks) * ROWS
    line = a_ptr + (batch * a_batch + (first_row - 1).to(tl.int64) * GW * a_row + col * a_row)[:, None]
    line += channel[None, :]
    above, below = first_row > 0, first_row + 1 < GH
    # All that a program waits for is asked for at once.
    x0, x1, x2, x3 = _load_line(line, a_row, has0 & above, has1 & above, has2 & above, has3 & above)
    line += GW * a_row
    y0, a_even, a_odd, y3 = _load_line(line, a_row, has0, has1, has2, has3)
    line += GW * a_row
    n0, n1, n2, n3 = _load_line(line, a_row, has0 & below, has1 & below, has2 & below, has3 & below)
    SIZE: tl.constexpr = WIDTH // 2 if SPLIT else WIDTH
    matrices = _matrices(matrix_ptr, part, 0, SIZE, FOLDED)
    matrices_high = matrices
    if SPLIT:
        matrices_high = _matrices(matrix_ptr, part, SIZE, SIZE, FOLDED)
    gate_matrices = (_gate_matrix(gate_matrix_ptr, part, 0, BG), _gate_matrix(gate_matrix_ptr, part, 1, BG))
    w0 = _per_channel(conv_ptr, channel, E, EVEN, PAIRS)
    w1 = _per_channel(conv_ptr + E, channel, E, EVEN, PAIRS)
    w2 = _per_channel(conv_ptr + 2 * E, channel, E, EVEN, PAIRS)
    w3 = _per_channel(conv_ptr + 3 * E, channel, E, EVEN, PAIRS)
    w4 = _per_channel(conv_ptr + 4 * E, channel, E, EVEN, PAIRS)
    w5 = _per_channel(conv_ptr + 5 * E, channel, E, EVEN, PAIRS)
    w6 = _per_channel(conv_ptr + 6 * E, channel, E, EVEN, PAIRS)
    w7 = _per_channel(conv_ptr + 7 * E, channel, E, EVEN, PAIRS)
    w8 = _per_channel(conv_ptr + 8 * E, channel, E, EVEN, PAIRS)
    x0, x1, x2, x3 = x0.to(tl.float32), x1.to(tl.float32), x2.to(tl.float32), x3.to(tl.float32)
    bias = _per_channel(conv_b_ptr, channel, E, EVEN, PAIRS)
    sum_even, sum_odd = _three(x0, x1, x2, w0, w1, w2, bias), _three(x1, x2, x3, w0, w1, w2, bias)
    x0, x1, x2, x3 = y0.to(tl.float32), a_even.to(tl.float32), a_odd.to(tl.float32), y3.to(tl.float32)
    sum_even, sum_odd = _three(x0, x1, x2, w3, w4, w5, sum_even), _three(x1, x2, x3, w3, w4, w5, sum_odd)
    next_even, next_odd = _three(x0, x1, x2, w0, w1, w2, bias), _three(x1, x2, x3, w0, w1, w2, bias)
    token = batch * S + first_row * GW + col
    chunk = (strip // row_blocks * GH + first_row).to(tl.int64) * parts + part
    for step in range(tl.minimum(ROWS, GH - first_row)):
        x0, x1, x2, x3 = n0.to(tl.float32), n1.to(tl.float32), n2.to(tl.float32), n3.to(tl.float32)
        new_even, new_odd = n1, n2
        line += GW * a_row
        below = first_row + step + 2 < GH
        n0, n1, n2, n3 = _load_line(line, a_row, has0 & below, has1 & below, has2 & below, has3 & below)  # early
        pre_even, pre_odd = _three(x0, x1, x2, w6, w7, w8, sum_even), _three(x1, x2, x3, w6, w7, w8, sum_odd)
        sum_even, sum_odd = _three(x0, x1, x2, w3, w4, w5, next_even), _three(x1, x2, x3, w3, w4, w5, next_odd)
        bias = _per_channel(conv_b_ptr, channel, E, EVEN, PAIRS)  # again: registers are scarce
        next_even, next_odd = _three(x0, x1, x2, w0, w1, w2, bias), _three(x1, x2, x3, w0, w1, w2, bias)
        _emit(
            pre_even, pre_odd, a_even, a_odd, token, live, live_odd, channel, chunk,
            matrices, matrices_high, bq_ptr, bk_ptr, bv_ptr, gate_matrices, pre_ptr, q_ptr, k_ptr, v_ptr, gate_ptr, E,
            FOLDED, GATES, SPLIT, HAS_BIAS, EVEN, PRECISION, PAIRS, BG, PLANES,
        )  # fmt: skip
        a_even, a_odd = new_even, new_odd
        token += GW
        chunk += parts


@triton.jit
def _load_five(line, a_row, t, inside, S):
    """Tokens at places t .. t + 4."""
    return (
        _load_live(line, ((t >= 0) & (t < S))[:, None] & inside),
        _load_live(line + a_row, ((t + 1 >= 0) & (t + 1 < S))[:, None] & inside),
        _load_live(line + 2 * a_row, ((t + 2 >= 0) & (t + 2 < S))[:, None] & inside),
        _load_live(line + 3 * a_row, ((t + 3 >= 0) & (t + 3 < S))[:, None] & inside),
        _load_live(line + 4 * a_row, ((t + 4 >= 0) & (t + 4 < S))[:, None] & inside),
    )


@triton.jit(do_not_specialize=['B', 'S', 'ROWS', 'blocks', 'parts'])
def mix1d_kernel(
    a_ptr, a_batch, a_row, conv_ptr, conv_b_ptr, matrix_ptr, gate_matrix_ptr,
    bq_ptr, bk_ptr, bv_ptr, pre_ptr, q_ptr, k_ptr, v_ptr, gate_ptr, B, S, E, ROWS, blocks, parts,
    REVERSE: tl.constexpr, FOLDED: tl.constexpr, GATES: tl.constexpr, SPLIT: tl.constexpr, HAS_BIAS: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr, PAIRS: tl.constexpr, BG: tl.constexpr, PLANES: tl.constexpr,
):  # fmt: skip
    """`mix2d_kernel` with a causal convolution over four tokens. A strip is PAIRS * ROWS pairs, of one image."""
    part = tl.program_id(0) % parts
    strip = tl.program_id(0) // parts
    batch = (strip // blocks).to(tl.int64)
    channel = part * WIDTH + tl.arange(0, WIDTH)
    inside = _inside(channel, E, EVEN)
    SIZE: tl.constexpr = WIDTH // 2 if SPLIT else WIDTH
    matrices = _matrices(matrix_ptr, part, 0, SIZE, FOLDED)
    matrices_high = matrices
    if SPLIT:
        matrices_high = _matrices(matrix_ptr, part, SIZE, SIZE, FOLDED)
    gate_matrices = (_gate_matrix(gate_matrix_ptr, part, 0, BG), _gate_matrix(gate_matrix_ptr, part, 1, BG))
    w0 = _per_channel(conv_ptr, channel, E, EVEN, PAIRS)
    w1 = _per_channel(conv_ptr + E, channel, E, EVEN, PAIRS)
    w2 = _per_channel(conv_ptr + 2 * E, channel, E, EVEN, PAIRS)
    w3 = _per_channel(conv_ptr + 3 * E, channel, E, EVEN, PAIRS)
    FIRST: tl.constexpr = 0 if REVERSE else -3
    t = (strip % blocks) * ROWS * PAIRS * 2 + tl.arange(0, PAIRS) * 2
    line = a_ptr + (batch * a_batch + (t + FIRST).to(tl.int64) * a_row)[:, None] + channel[None, :]
    n0, n1, n2, n3, n4 = _load_five(line, a_row, t + FIRST, inside, S)
    chunk = (batch * tl.cdiv(S, 2 * PAIRS) + strip % blocks * ROWS) * parts + part
    for _ in range(tl.minimum(ROWS, tl.cdiv(S, 2 * PAIRS) - (strip % blocks) * ROWS)):
        x0, x1, x2 = n0.to(tl.float32), n1.to(tl.float32), n2.to(tl.float32)
        x3, x4 = n3.to(tl.float32), n4.to(tl.float32)
        if REVERSE:
            a_even, a_odd = n0, n1
        else:
            a_even, a_odd = n3, n4
        line += 2 * PAIRS * a_row
        bias = _per_channel(conv_b_ptr, channel, E, EVEN, PAIRS)
        n0, n1, n2, n3, n4 = _load_five(line, a_row, t + FIRST + 2 * PAIRS, inside, S)  # ahead of their use
        pre_even = _three(x0, x1, x2, w0, w1, w2, bias) + x3 * w3
        pre_odd = _three(x1, x2, x3, w0, w1, w2, bias) + x4 * w3
        _emit(
            pre_even, pre_odd, a_even, a_odd, batch * S + t, t < S, t + 1 < S, channel, chunk,
            matrices, matrices_high, bq_ptr, bk_ptr, bv_ptr, gate_matrices, pre_ptr, q_ptr, k_ptr, v_ptr, gate_ptr, E,
            FOLDED, GATES, SPLIT, HAS_BIAS, EVEN, PRECISION, PAIRS, BG, PLANES,
        )  # fmt: skip
        t += 2 * PAIRS
        chunk += parts
