"""Device code of the quadratic mLSTM cell inside of a ViL block without keys and values.

Where nothing is kept for a backward pass they need not exist: with q = Wq c + bq, k = Wk c + bk, v = Wv a + bv,

    q_i.k_j = (Wk^T q_i).c_j + q_i.bk,    sum_j A_ij v_j = Wv (sum_j A_ij a_j) + bv sum_j A_ij,

so that the cell runs on Wk^T q, c and a, and the blocks of Wv meet its output (`block_norm_kernels.output_kernel`). A
row's q_i.bk is (Wq^T bk).c_i + bq.bk.
"""

import triton
import triton.language as tl

from .triton_quadratic_kernels import BLOCK, NORMALISER, head_start, hidden_rows, load_rows, store_rows

__all__ = ['folded_forward_kernel']

WIDTH = tl.constexpr(32)


@triton.jit
def _key_bias(k, k_step, rows, S, weight, shift, DH: tl.constexpr, BM: tl.constexpr):
    """Sum of k * weight + shift over a row's channels, (BM,). Added up in tiles of one layout, reduced once."""
    total = tl.zeros((BM, WIDTH), tl.float32)
    line = k + tl.minimum(rows, S - 1)[:, None] * k_step
    for start in tl.static_range(0, DH, WIDTH):
        d = start + tl.arange(0, WIDTH)
        if start + WIDTH > DH:
            x = tl.load(line + d[None, :], mask=(d < DH)[None, :], other=0.0)
        else:
            x = tl.load(line + d[None, :])
        w, s = tl.load(weight + d, mask=d < DH, other=0.0), tl.load(shift + d, mask=d < DH, other=0.0)
        total += x.to(tl.float32) * w[None, :] + s[None, :]
    return tl.sum(total, 1)


@triton.jit
def _tile(
    q, q_step, k, k_step, v, v_step, h, h_step, key_weight, key_shift, stats, plane, S, first, log_scale, eps,
    QKV_BIAS: tl.constexpr, DH: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`folded_forward_kernel` for BM tokens of a head."""
    i = first + tl.arange(0, BM)
    q_a, q_b = load_rows(q, q_step, i, S, DH, DA, DB)
    e = 0.0
    if QKV_BIAS:
        e = _key_bias(k, k_step, i, S, key_weight, key_shift, DH, BM)
    h_a, h_b, n, inverse = hidden_rows(
        q_a, q_b, e, k, k_step, v, v_step, stats, plane, S, first, log_scale, eps, QKV_BIAS, DH, DA, DB, BM, BN,
        PRECISION,
    )  # fmt: skip
    if QKV_BIAS:
        tl.store(stats + NORMALISER * plane + i, n * inverse, mask=i < S)
    store_rows(h, h_step, i, S, h_a, h_b, DH, DA, DB)


@triton.jit(
    do_not_specialize=[
        'q_sb', 'q_sh', 'q_ss', 'k_sb', 'k_sh', 'k_ss', 'v_sb', 'v_sh', 'v_ss', 'h_sb', 'h_sh', 'h_ss',
        'S', 'NH', 'pitch', 'plane', 'reverse',
    ]
)  # fmt: skip
def folded_forward_kernel(
    q, k, v, h, folded, stats, q_sb, q_sh, q_ss, k_sb, k_sh, k_ss, v_sb, v_sh, v_ss, h_sb, h_sh, h_ss,
    S, NH, pitch, plane, reverse, log_scale, eps, QKV_BIAS: tl.constexpr, DH: tl.constexpr, DA: tl.constexpr,
    DB: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SMALL: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """sum_j A_ij a_j, and in place of n the sum of a row's A_ij, which is n over the denominator.

    q is Wk^T q, k is c, v is a; folded is that of `prepare_kernel`. All else is as in `quadratic_forward_kernel`.
    """
    tiles = tl.cdiv(S, BM)
    index = tl.program_id(0) // tiles
    first = (tiles - 1 - tl.program_id(0) % tiles) * BM
    q, q_step = head_start(q, index, NH, S, q_sb, q_sh, q_ss, reverse, ALIGN)
    k, k_step = head_start(k, index, NH, S, k_sb, k_sh, k_ss, reverse, ALIGN)
    v, v_step = head_start(v, index, NH, S, v_sb, v_sh, v_ss, reverse, ALIGN)
    h, h_step = head_start(h, index, NH, S, h_sb, h_sh, h_ss, reverse, ALIGN)
    key_weight = folded + NH * DH + index % NH * DH
    key_shift = key_weight + NH * DH
    stats += index.to(tl.int64) * pitch * BLOCK
    plane = plane.to(tl.int64) * BLOCK
    if SMALL > 0:
        if S - first <= SMALL:
            _tile(
                q, q_step, k, k_step, v, v_step, h, h_step, key_weight, key_shift, stats, plane, S, first, log_scale,
                eps, QKV_BIAS, DH, DA, DB, SMALL, BN, PRECISION,
            )  # fmt: skip
        else:
            _tile(
                q, q_step, k, k_step, v, v_step, h, h_step, key_weight, key_shift, stats, plane, S, first, log_scale,
                eps, QKV_BIAS, DH, DA, DB, BM, BN, PRECISION,
            )  # fmt: skip
    else:
        _tile(
            q, q_step, k, k_step, v, v_step, h, h_step, key_weight, key_shift, stats, plane, S, first, log_scale, eps,
            QKV_BIAS, DH, DA, DB, BM, BN, PRECISION,
        )  # fmt: skip
