"""Device code of the quadratic mLSTM's backward pass that makes its S x S products anew: dq, dk and dv, the gates.

Names and buffers as in `triton_quadratic_kernels`.
"""

import triton
import triton.language as tl

from .triton_quadratic_kernels import (
    BLOCK,
    G_HI,
    G_LO,
    M_HI,
    M_LO,
    NORMALISER,
    STABILISER,
    add_dot,
    gather_rows,
    head_start,
    load_rows,
    outer_dot,
    row_dot,
    store_rows,
)

__all__ = ['gate_gradient_kernel', 'key_gradient_kernel', 'query_gradient_kernel']

# Planes of the backward buffer, float32 (5, B * NH, pitch): (gradient of n) * denominator, 1 / denominator,
# (M at the start of i's block) - M_i - log2(denominator), q.dq, k.dk.
E_ROW, W_ROW, QUERY_BLOCK, Q_DQ, K_DK = (tl.constexpr(plane) for plane in range(5))


@triton.jit
def query_gradient_tile(
    q, q_step, k, k_step, v, v_step, h, h_step, dh, dh_step, dq, dq_step, products, stats, rows, plane, S, first,
    reverse, log_scale, eps, WITH_H: tl.constexpr, DH: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq_i = (1 / den_i) sum_j (dh_i.v_j + e_i) w_ij k_j, with e_i = -(dh_i.h_i) sign(n_i) where |n_i| > exp(-m_i).

    q_i.dq_i would need no q: it is dh_i.h_i, times eps / den_i where |n_i| > exp(-m_i), as q's length cancels in h
    there. But the sums of q.dq and k.dk over tokens cancel, and their rounding errors do so only if both are made of
    the same rounded products, 1 / den_i included.
    """
    i = first + tl.arange(0, BM)
    dh_a, dh_b = load_rows(dh, dh_step, i, S, DH, DA, DB)
    if WITH_H:
        h_a, h_b = load_rows(h, h_step, i, S, DH, DA, DB)
        product = row_dot(dh_a, dh_b, h_a, h_b, DB)
    else:
        product = tl.load(products + tl.where(reverse != 0, S - 1 - i, i), mask=i < S, other=0.0)
    n = tl.load(stats + NORMALISER * plane + i, mask=i < S, other=0.0)
    m = tl.load(stats + STABILISER * plane + i, mask=i < S, other=0.0)
    floor = tl.exp(-m)
    sign = tl.where(n > floor, 1.0, tl.where(-n > floor, -1.0, 0.0))
    e = -product * sign
    inverse = 1.0 / (tl.maximum(tl.abs(n), floor) + eps)
    log_inverse = tl.log2(inverse)
    tl.store(rows + E_ROW * plane + i, e, mask=i < S)
    tl.store(rows + W_ROW * plane + i, inverse, mask=i < S)
    top_hi = tl.load(stats + M_HI * plane + i, mask=i < S, other=0.0)
    top_lo = tl.load(stats + M_LO * plane + i, mask=i < S, other=0.0)
    block_hi = tl.load(stats + M_HI * plane + (i // BLOCK) * BLOCK, mask=i < S, other=0.0)
    block_lo = tl.load(stats + M_LO * plane + (i // BLOCK) * BLOCK, mask=i < S, other=0.0)
    decay = (block_hi - top_hi) + (block_lo - top_lo)
    tl.store(rows + QUERY_BLOCK * plane + i, decay + log_inverse, mask=i < S)
    acc_a, acc_b, _ = gather_rows(
        dh_a, dh_b, e, log_inverse, v, v_step, k, k_step, stats, plane, S, first, log_scale, True, False, DH, DA, DB,
        BM, BN, PRECISION,
    )  # fmt: skip
    store_rows(dq, dq_step, i, S, acc_a, acc_b, DH, DA, DB)
    q_a, q_b = load_rows(q, q_step, i, S, DH, DA, DB)
    tl.store(rows + Q_DQ * plane + i, row_dot(q_a, q_b, acc_a, acc_b, DB), mask=i < S)


@triton.jit(
    do_not_specialize=[
        'q_sb', 'q_sh', 'q_ss', 'k_sb', 'k_sh', 'k_ss', 'v_sb', 'v_sh', 'v_ss', 'h_sb', 'h_sh', 'h_ss',
        'dh_sb', 'dh_sh', 'dh_ss', 'dq_sb', 'dq_sh', 'dq_ss', 'S', 'NH', 'pitch', 'plane', 'reverse'
    ]
)  # fmt: skip
def query_gradient_kernel(
    q, k, v, h, dh, dq, products, stats, rows,
    q_sb, q_sh, q_ss, k_sb, k_sh, k_ss, v_sb, v_sh, v_ss, h_sb, h_sh, h_ss, dh_sb, dh_sh, dh_ss, dq_sb, dq_sh, dq_ss,
    S, NH, pitch, plane, reverse, log_scale, eps, WITH_H: tl.constexpr,
    DH: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SMALL: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One dq tile of BM queries; per row e, 1 / den and q.dq for the kernels after it. Grid as in the forward.

    dh_i.h_i is made of h, or without it read from products (B * NH, S), float32, in token order.
    """
    tiles = tl.cdiv(S, BM)
    index = tl.program_id(0) // tiles
    first = (tiles - 1 - tl.program_id(0) % tiles) * BM
    q, q_step = head_start(q, index, NH, S, q_sb, q_sh, q_ss, reverse, ALIGN)
    k, k_step = head_start(k, index, NH, S, k_sb, k_sh, k_ss, reverse, ALIGN)
    v, v_step = head_start(v, index, NH, S, v_sb, v_sh, v_ss, reverse, ALIGN)
    h, h_step = head_start(h, index, NH, S, h_sb, h_sh, h_ss, reverse, ALIGN)
    dh, dh_step = head_start(dh, index, NH, S, dh_sb, dh_sh, dh_ss, reverse, ALIGN)
    dq, dq_step = head_start(dq, index, NH, S, dq_sb, dq_sh, dq_ss, reverse, ALIGN)
    products += index.to(tl.int64) * S
    stats += index.to(tl.int64) * pitch * BLOCK
    plane = plane.to(tl.int64) * BLOCK
    rows += index.to(tl.int64) * pitch * BLOCK
    if SMALL > 0:
        if S - first <= SMALL:
            query_gradient_tile(
                q, q_step, k, k_step, v, v_step, h, h_step, dh, dh_step, dq, dq_step, products, stats, rows, plane, S,
                first, reverse, log_scale, eps, WITH_H, DH, DA, DB, SMALL, BN, PRECISION,
            )  # fmt: skip
        else:
            query_gradient_tile(
                q, q_step, k, k_step, v, v_step, h, h_step, dh, dh_step, dq, dq_step, products, stats, rows, plane, S,
                first, reverse, log_scale, eps, WITH_H, DH, DA, DB, BM, BN, PRECISION,
            )  # fmt: skip
    else:
        query_gradient_tile(
            q, q_step, k, k_step, v, v_step, h, h_step, dh, dh_step, dq, dq_step, products, stats, rows, plane, S,
            first, reverse, log_scale, eps, WITH_H, DH, DA, DB, BM, BN, PRECISION,
        )  # fmt: skip


@triton.jit
def add_query_block(
    k_a, k_b, v_a, v_b, dk_a, dk_b, dv_a, dv_b, q, q_step, dh, dh_step, rows, plane, S, i, weight,
    WITH_K: tl.constexpr, WITH_V: tl.constexpr, DH: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dk_j += sum_i (v_j.dh_i + e_i) w_ij q_i and dv_j += sum_i (k_j.q_i) w_ij dh_i for one block of queries i."""
    q_a, q_b = load_rows(q, q_step, i, S, DH, DA, DB)
    dh_a, dh_b = load_rows(dh, dh_step, i, S, DH, DA, DB)
    if WITH_V:
        p = outer_dot(k_a, k_b, q_a, q_b, DB, PRECISION) * weight
        dv_a, dv_b = add_dot(p, dh_a, dh_b, dv_a, dv_b, DB, PRECISION)
    if WITH_K:
        e = tl.load(rows + E_ROW * plane + tl.minimum(i, S - 1))
        ds = (outer_dot(v_a, v_b, dh_a, dh_b, DB, PRECISION) + e[None, :]) * weight
        dk_a, dk_b = add_dot(ds, q_a, q_b, dk_a, dk_b, DB, PRECISION)
    return dk_a, dk_b, dv_a, dv_b


@triton.jit(
    do_not_specialize=[
        'q_sb', 'q_sh', 'q_ss', 'k_sb', 'k_sh', 'k_ss', 'v_sb', 'v_sh', 'v_ss', 'dh_sb', 'dh_sh', 'dh_ss',
        'dk_sb', 'dk_sh', 'dk_ss', 'dv_sb', 'dv_sh', 'dv_ss', 'S', 'NH', 'pitch', 'plane', 'reverse'
    ]
)  # fmt: skip
def key_gradient_kernel(
    q, k, v, dh, dk, dv, stats, rows,
    q_sb, q_sh, q_ss, k_sb, k_sh, k_ss, v_sb, v_sh, v_ss, dh_sb, dh_sh, dh_ss, dk_sb, dk_sh, dk_ss, dv_sb, dv_sh, dv_ss,
    S, NH, pitch, plane, reverse, log_scale,
    WITH_K: tl.constexpr, WITH_V: tl.constexpr, DH: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of BM rows of dk and dv (or one of them) and k.dk. Grid: B * NH * ceil(S / BM)."""
    tiles = tl.cdiv(S, BM)
    index = tl.program_id(0) // tiles
    first = (tl.program_id(0) % tiles) * BM
    q, q_step = head_start(q, index, NH, S, q_sb, q_sh, q_ss, reverse, ALIGN)
    k, k_step = head_start(k, index, NH, S, k_sb, k_sh, k_ss, reverse, ALIGN)
    v, v_step = head_start(v, index, NH, S, v_sb, v_sh, v_ss, reverse, ALIGN)
    dh, dh_step = head_start(dh, index, NH, S, dh_sb, dh_sh, dh_ss, reverse, ALIGN)
    stats += index.to(tl.int64) * pitch * BLOCK
    plane = plane.to(tl.int64) * BLOCK
    rows += index.to(tl.int64) * pitch * BLOCK

    j = first + tl.arange(0, BM)
    k_a, k_b = load_rows(k, k_step, j, S, DH, DA, DB)
    v_a, v_b = load_rows(v, v_step, j, S, DH, DA, DB)
    if not WITH_V:
        k_a, k_b = v_a, v_b
    if not WITH_K:
        v_a, v_b = k_a, k_b
    g_hi = tl.load(stats + G_HI * plane + j, mask=j < S, other=float('-inf'))
    g_lo = tl.load(stats + G_LO * plane + j, mask=j < S, other=0.0)
    first_hi, first_lo = tl.load(stats + M_HI * plane + first), tl.load(stats + M_LO * plane + first)
    g = (g_hi - first_hi) + (g_lo - first_lo) + log_scale

    dk_a = tl.zeros((BM, DA), tl.float32)
    dk_b = dk_a
    if DB > 0:
        dk_b = tl.zeros((BM, DB), tl.float32)
    dv_a, dv_b = dk_a, dk_b
    for start in range(first, S, BN):
        i = start + tl.arange(0, BN)
        if q.dtype.element_ty == tl.float32:
            top_hi = tl.load(stats + M_HI * plane + i, mask=i < S, other=float('inf'))
            top_lo = tl.load(stats + M_LO * plane + i, mask=i < S, other=0.0)
            inverse = tl.load(rows + W_ROW * plane + i, mask=i < S, other=0.0)
            weight = (g_hi[:, None] - top_hi[None, :]) + (g_lo[:, None] - top_lo[None, :]) + log_scale
            weight = tl.exp2(weight) * inverse[None, :]
        else:
            block = stats + (start // BLOCK) * BLOCK
            block_hi, block_lo = tl.load(block + M_HI * plane), tl.load(block + M_LO * plane)
            top = tl.load(rows + QUERY_BLOCK * plane + i, mask=i < S, other=float('-inf'))
            top += (first_hi - block_hi) + (first_lo - block_lo)
            weight = tl.exp2(g[:, None] + top[None, :])
        weight = tl.where(tl.arange(0, BN)[None, :] >= (j - start)[:, None], weight, 0.0)
        dk_a, dk_b, dv_a, dv_b = add_query_block(
            k_a, k_b, v_a, v_b, dk_a, dk_b, dv_a, dv_b, q, q_step, dh, dh_step, rows, plane, S, i, weight,
            WITH_K, WITH_V, DH, DA, DB, PRECISION,
        )  # fmt: skip
    if WITH_V:
        dv, dv_step = head_start(dv, index, NH, S, dv_sb, dv_sh, dv_ss, reverse, ALIGN)
        store_rows(dv, dv_step, j, S, dv_a, dv_b, DH, DA, DB)
    if WITH_K:
        dk, dk_step = head_start(dk, index, NH, S, dk_sb, dk_sh, dk_ss, reverse, ALIGN)
        store_rows(dk, dk_step, j, S, dk_a, dk_b, DH, DA, DB)
        k_a, k_b = load_rows(k, k_step, j, S, DH, DA, DB)
        tl.store(rows + K_DK * plane + j, row_dot(k_a, k_b, dk_a, dk_b, DB), mask=j < S)


@triton.jit
def sum_gate_gradients(fgate, sums, digate, dfgate, S, pitch, plane, parts, reverse, SPAN: tl.constexpr):
    """`gate_gradient_kernel` for one head, SPAN positions at a time."""
    row = tl.program_id(0).to(tl.int64) * S
    sums += tl.program_id(0).to(tl.int64) * pitch * BLOCK
    plane = plane.to(tl.int64) * BLOCK
    total = tl.zeros((), tl.float64)
    for start in range(0, S, SPAN):
        position = S - 1 - start - tl.arange(0, SPAN)
        valid = position >= 0
        token = tl.where(reverse != 0, S - 1 - position, position)
        from_query = tl.zeros((SPAN,), tl.float32)
        from_key = tl.zeros((SPAN,), tl.float32)
        for first in range(0, parts, 4):  # four at a time, so that enough bytes are on their way
            for step in tl.static_range(4):
                part = first + step
                below = valid & (part < parts) & ((parts == 1) | (position >= part * BLOCK))
                above = valid & (part < parts) & ((parts == 1) | (position < (part + 1) * BLOCK))
                from_query += tl.load(sums + part * plane + position, mask=below, other=0.0)
                from_key += tl.load(sums + (parts + part) * plane + position, mask=above, other=0.0)
        difference = from_query.to(tl.float64) - from_key.to(tl.float64)
        gradient = (total + tl.cumsum(difference, 0)).to(tl.float32)
        f = tl.load(fgate + row + token, mask=valid, other=0.0)
        tl.store(digate + row + token, from_key, mask=valid)
        tl.store(dfgate + row + token, gradient * tl.sigmoid(-f), mask=valid)
        total += tl.sum(difference, 0)


@triton.jit(do_not_specialize=['S', 'pitch', 'plane', 'parts', 'reverse'])
def gate_gradient_kernel(
    fgate, sums, digate, dfgate, S, pitch, plane, parts, reverse, SHORT_SPAN: tl.constexpr, LONG_SPAN: tl.constexpr
):  # fmt: skip
    """di_j = k_j.dk_j;  df_u = sigmoid(-f_u) * sum over t >= u of (q_t.dq_t - k_t.dk_t), summed in float64.

    sums: planes of q.dq and after them as many of k.dk to add up, the n-th of several from blocks of positions from n
    on and up to n. fgate, digate, dfgate (B, NH, S) float32 in token order. Spans and grid as in the scan.
    """
    if S <= SHORT_SPAN:
        sum_gate_gradients(fgate, sums, digate, dfgate, S, pitch, plane, parts, reverse, SHORT_SPAN)
    else:
        sum_gate_gradients(fgate, sums, digate, dfgate, S, pitch, plane, parts, reverse, LONG_SPAN)
