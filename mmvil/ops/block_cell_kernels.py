"""Device code of the cell inside of a ViL block: the quadratic mLSTM, then head norm, skip and gate of the same rows.

The cell's tile of h is laid out for the matrix unit and takes most registers. It goes through memory, that is the L2
cache, and comes back some rows at a time.

Where nothing is kept for a backward pass, keys and values need not exist (FOLDED): with q = Wq c + bq, k = Wk c + bk,
v = Wv a + bv,

    q_i.k_j = (Wk^T q_i).c_j + q_i.bk,    sum_j A_ij v_j = Wv (sum_j A_ij a_j) + bv sum_j A_ij,

so that the cell runs on Wk^T q, c and a, and the blocks of Wv meet its output. A row's q_i.bk is Wq^T bk . c_i + bq.bk.
"""

import triton
import triton.language as tl

from .triton_quadratic_kernels import BLOCK, NORMALISER, head_start, hidden_rows, load_rows, store_rows

__all__ = ['FOLDED_BLOCK', 'gated_forward_kernel']

FOLDED_BLOCK = tl.constexpr(4)
"""Edge of the projections' blocks where they are folded: a thread holds that many neighbouring channels."""


@triton.jit
def _every_fourth(x, BG: tl.constexpr, BD: tl.constexpr):
    """Channels 4 g, 4 g + 1, 4 g + 2, 4 g + 3 of (BG, BD), (BG, BD / 4) each."""
    even, odd = tl.split(tl.reshape(x, (BG, BD // 4, 2, 2)))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def _load_block_row(w, row: tl.constexpr, DH: tl.constexpr, BD: tl.constexpr):
    """One row of each 4 x 4 block of a head, four of (1, BD / 4)."""
    g = tl.arange(0, BD // 4)
    place, exists = w + g * 16 + row * 4, g * 4 < DH
    return (
        tl.load(place, mask=exists, other=0.0).to(tl.float32)[None, :],
        tl.load(place + 1, mask=exists, other=0.0).to(tl.float32)[None, :],
        tl.load(place + 2, mask=exists, other=0.0).to(tl.float32)[None, :],
        tl.load(place + 3, mask=exists, other=0.0).to(tl.float32)[None, :],
    )


@triton.jit
def _four(x0, x1, x2, x3, w):
    """Sum of four products."""
    w0, w1, w2, w3 = w
    return x0 * w0 + x1 * w1 + x2 * w2 + x3 * w3


@triton.jit
def _through_blocks(x, row0, row1, row2, row3, BG: tl.constexpr, BD: tl.constexpr):
    """Block-diagonal matrix times each row of x, (BG, BD). No value changes its thread."""
    x0, x1, x2, x3 = _every_fourth(x, BG, BD)
    y0, y1 = _four(x0, x1, x2, x3, row0), _four(x0, x1, x2, x3, row1)
    y2, y3 = _four(x0, x1, x2, x3, row2), _four(x0, x1, x2, x3, row3)
    return tl.reshape(tl.join(tl.join(y0, y2), tl.join(y1, y3)), (BG, BD))


@triton.jit
def _gate_rows(
    h, h_step, pre, pre_step, z, z_step, y, y_step, w, b, skip, wv, bv, share, S, first, norm_eps,
    FOLDED: tl.constexpr, QKV_BIAS: tl.constexpr, HAS_BIAS: tl.constexpr, DH: tl.constexpr, BD: tl.constexpr,
    BM: tl.constexpr, BG: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y = ((1 + w) * norm(h) + b + skip * c) * SiLU(z) for BM rows, BG at a time; h and y may be one.

    pre holds what c is the SiLU of. FOLDED: it holds c, and h is what Wv and, times the row's share, bv make of it.
    """
    d = tl.arange(0, BD)
    inside = d < DH
    weight = tl.load(w + d, mask=inside, other=0.0).to(tl.float32)[None, :] + 1.0
    jump = tl.load(skip + d, mask=inside, other=0.0).to(tl.float32)[None, :]
    bias = tl.load(b + d, mask=inside, other=0.0).to(tl.float32)[None, :] if HAS_BIAS else jump
    if FOLDED:
        row0, row1 = _load_block_row(wv, 0, DH, BD), _load_block_row(wv, 1, DH, BD)
        row2, row3 = _load_block_row(wv, 2, DH, BD), _load_block_row(wv, 3, DH, BD)
        if QKV_BIAS:
            value_bias = tl.load(bv + d, mask=inside, other=0.0).to(tl.float32)[None, :]
    for start in tl.range(first, tl.minimum(first + BM, S), BG, num_stages=STAGES):
        i = start + tl.arange(0, BG)
        mask = (i < S)[:, None] & inside[None, :]
        x = tl.load(h + i[:, None] * h_step + d[None, :], mask=mask, other=0.0).to(tl.float32)
        c = tl.load(pre + i[:, None] * pre_step + d[None, :], mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(z + i[:, None] * z_step + d[None, :], mask=mask, other=0.0).to(tl.float32)
        if FOLDED:
            x = _through_blocks(x, row0, row1, row2, row3, BG, BD)
            if QKV_BIAS:
                x += value_bias * tl.load(share + i, mask=i < S, other=0.0)[:, None]
        else:
            c *= tl.sigmoid(c)
        centred = tl.where(mask, x - (tl.sum(x, 1) / DH)[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, 1) / DH + norm_eps)
        inner = centred * rstd[:, None] * weight + jump * c
        if HAS_BIAS:
            inner += bias
        out = inner * gate * tl.sigmoid(gate)
        tl.store(y + i[:, None] * y_step + d[None, :], out.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _piece_dot(x, weight, shift, FIRST: tl.constexpr, COLUMNS: tl.constexpr, DH: tl.constexpr):
    """Sum over columns of x * weight + shift."""
    d = FIRST + tl.arange(0, COLUMNS)
    w, s = tl.load(weight + d, mask=d < DH, other=0.0), tl.load(shift + d, mask=d < DH, other=0.0)
    return tl.sum(x.to(tl.float32) * w[None, :] + s[None, :], 1)


@triton.jit
def _tile(
    q, q_step, k, k_step, v, v_step, h, h_step, pre, pre_step, z, z_step, y, y_step, w, b, skip, key_weight, key_shift,
    wv, bv, stats, plane, S, first, log_scale, eps, norm_eps, FOLDED: tl.constexpr, QKV_BIAS: tl.constexpr,
    HAS_BIAS: tl.constexpr, DH: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BG: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`gated_forward_kernel` for BM tokens of a head."""
    i = first + tl.arange(0, BM)
    WITH_E: tl.constexpr = FOLDED and QKV_BIAS
    e = 0.0
    if WITH_E:
        k_a, k_b = load_rows(k, k_step, i, S, DH, DA, DB)
        e = _piece_dot(k_a, key_weight, key_shift, 0, DA, DH)
        if DB > 0:
            e += _piece_dot(k_b, key_weight, key_shift, DA, DB, DH)
    h_a, h_b, n, inverse = hidden_rows(
        q, q_step, e, k, k_step, v, v_step, stats, plane, S, first, log_scale, eps, WITH_E, DH, DA, DB, BM, BN,
        PRECISION,
    )  # fmt: skip
    if FOLDED:
        n *= inverse  # nobody else wants it
    tl.store(stats + NORMALISER * plane + i, n, mask=i < S)
    store_rows(h, h_step, i, S, h_a, h_b, DH, DA, DB)
    tl.debug_barrier()  # what other threads have written is read from here on
    _gate_rows(
        h, h_step, pre, pre_step, z, z_step, y, y_step, w, b, skip, wv, bv, stats + NORMALISER * plane, S, first,
        norm_eps, FOLDED, QKV_BIAS, HAS_BIAS, DH, BD, BM, BG, STAGES,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        'q_sb', 'q_sh', 'q_ss', 'k_sb', 'k_sh', 'k_ss', 'v_sb', 'v_sh', 'v_ss', 'h_sb', 'h_sh', 'h_ss',
        'pre_sb', 'pre_sh', 'pre_ss', 'z_sb', 'z_sh', 'z_ss', 'y_sb', 'y_sh', 'y_ss',
        'S', 'NH', 'pitch', 'plane', 'reverse',
    ]
)  # fmt: skip
def gated_forward_kernel(
    q, k, v, h, pre, z, y, w, b, skip, folded, wv, bv, stats,
    q_sb, q_sh, q_ss, k_sb, k_sh, k_ss, v_sb, v_sh, v_ss, h_sb, h_sh, h_ss,
    pre_sb, pre_sh, pre_ss, z_sb, z_sh, z_ss, y_sb, y_sh, y_ss,
    S, NH, pitch, plane, reverse, log_scale, eps, norm_eps, FOLDED: tl.constexpr, QKV_BIAS: tl.constexpr,
    HAS_BIAS: tl.constexpr, DH: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BG: tl.constexpr, STAGES: tl.constexpr, SMALL: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """y = ((1 + w) * norm(h) + b + skip * SiLU(pre)) * SiLU(z), h being the mLSTM of q, k, v.

    h may be y, where nobody wants it. Everything else is as in `quadratic_forward_kernel`; w, b and skip hold NH * DH
    channels. FOLDED: q is Wk^T q, k and pre are c, v is a, wv (NH * DH, 4) and bv are the values' projection, folded is
    that of `prepare_kernel`, and n ends up divided by the denominator.
    """
    tiles = tl.cdiv(S, BM)
    index = tl.program_id(0) // tiles
    first = (tiles - 1 - tl.program_id(0) % tiles) * BM
    q, q_step = head_start(q, index, NH, S, q_sb, q_sh, q_ss, reverse, ALIGN)
    k, k_step = head_start(k, index, NH, S, k_sb, k_sh, k_ss, reverse, ALIGN)
    v, v_step = head_start(v, index, NH, S, v_sb, v_sh, v_ss, reverse, ALIGN)
    h, h_step = head_start(h, index, NH, S, h_sb, h_sh, h_ss, reverse, ALIGN)
    pre, pre_step = head_start(pre, index, NH, S, pre_sb, pre_sh, pre_ss, reverse, ALIGN)
    z, z_step = head_start(z, index, NH, S, z_sb, z_sh, z_ss, reverse, ALIGN)
    y, y_step = head_start(y, index, NH, S, y_sb, y_sh, y_ss, reverse, ALIGN)
    channel = index % NH * DH
    w, b, skip = w + channel, b + channel, skip + channel
    key_weight, key_shift = folded + NH * DH + channel, folded + 2 * NH * DH + channel
    wv, bv = wv + channel * FOLDED_BLOCK, bv + channel
    stats += index.to(tl.int64) * pitch * BLOCK
    plane = plane.to(tl.int64) * BLOCK
    if SMALL > 0:
        if S - first <= SMALL:
            _tile(
                q, q_step, k, k_step, v, v_step, h, h_step, pre, pre_step, z, z_step, y, y_step, w, b, skip,
                key_weight, key_shift, wv, bv, stats, plane, S, first, log_scale, eps, norm_eps, FOLDED, QKV_BIAS,
                HAS_BIAS, DH, DA, DB, BD, SMALL, BN, BG, STAGES, PRECISION,
            )  # fmt: skip
        else:
            _tile(
                q, q_step, k, k_step, v, v_step, h, h_step, pre, pre_step, z, z_step, y, y_step, w, b, skip,
                key_weight, key_shift, wv, bv, stats, plane, S, first, log_scale, eps, norm_eps, FOLDED, QKV_BIAS,
                HAS_BIAS, DH, DA, DB, BD, BM, BN, BG, STAGES, PRECISION,
            )  # fmt: skip
    else:
        _tile(
            q, q_step, k, k_step, v, v_step, h, h_step, pre, pre_step, z, z_step, y, y_step, w, b, skip, key_weight,
            key_shift, wv, bv, stats, plane, S, first, log_scale, eps, norm_eps, FOLDED, QKV_BIAS, HAS_BIAS, DH, DA,
            DB, BD, BM, BN, BG, STAGES, PRECISION,
        )  # fmt: skip
