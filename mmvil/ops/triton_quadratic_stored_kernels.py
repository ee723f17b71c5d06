"""Device code of the quadratic mLSTM's backward pass through matrices in memory, in 16 bits.

Names and buffers as in `triton_quadratic_kernels`. With w_ij = scale exp2(g_j - M_i) / den_i for j <= i, else 0,

    P_ij = q_i.k_j w_ij,    D_ij = (dh_i.v_j + e_i) w_ij,
    dq_i = sum_j D_ij k_j,    dk_j = sum_i D_ij q_i,    dv_j = sum_i P_ij dh_i,
    q_i.dq_i = sum_j D_ij q_i.k_j,    k_j.dk_j = sum_i D_ij q_i.k_j.

Kernels that make P and D anew for each gradient need six or seven products and hold whole rows of DH channels; with P
and D in memory, in the inputs' dtype, there are five, and every tile is small. Of a head there are the blocks on and
below the diagonal, row by row, B * NH * pitch * (pitch + 1) / 2 of BLOCK x BLOCK in all.
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
    head_start,
)

__all__ = ['matrix_gradient_kernel', 'matrix_kernel', 'row_product_kernel']


@triton.jit
def _tile(base, step, rows, S, first, WIDTH: tl.constexpr, DH: tl.constexpr, EVEN: tl.constexpr):
    """Columns first .. first + WIDTH of some rows, (rows, WIDTH); row S - 1 beyond S, 0 beyond DH unless EVEN."""
    columns = first + tl.arange(0, WIDTH)
    pointers = base + tl.minimum(rows, S - 1)[:, None] * step + columns[None, :]
    if EVEN:
        return tl.load(pointers)
    return tl.load(pointers, mask=(columns < DH)[None, :], other=0.0)


@triton.jit(do_not_specialize=['h_sb', 'h_sh', 'h_ss', 'dh_sb', 'dh_sh', 'dh_ss', 'S', 'NH'])
def row_product_kernel(
    h, dh, products, h_sb, h_sh, h_ss, dh_sb, dh_sh, dh_ss, S, NH,
    DH: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """dh_i.h_i for BM tokens of a head. Grid: B * NH * ceil(S / BM)."""
    tiles = tl.cdiv(S, BM)
    index = tl.program_id(0) // tiles
    h, h_step = head_start(h, index, NH, S, h_sb, h_sh, h_ss, 0, ALIGN)
    dh, dh_step = head_start(dh, index, NH, S, dh_sb, dh_sh, dh_ss, 0, ALIGN)
    token = tl.program_id(0) % tiles * BM + tl.arange(0, BM)
    x = _tile(h, h_step, token, S, 0, BD, DH, BD == DH).to(tl.float32)
    y = _tile(dh, dh_step, token, S, 0, BD, DH, BD == DH).to(tl.float32)
    tl.store(products + index.to(tl.int64) * S + token, tl.sum(x * y, 1), mask=token < S)


@triton.jit
def _matrix_tile(
    q, q_step, k, k_step, v, v_step, dh, dh_step, p, d, products, stats, sums, S, pitch, plane, reverse, log_scale, eps,
    row_block, key_block, DH: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """`matrix_kernel` for the first BM rows of a block. Pointers at the head's start, p and d at the block's."""
    i = row_block * BLOCK + tl.arange(0, BM)
    j = key_block * BLOCK + tl.arange(0, BLOCK)
    exists = i < S
    n = tl.load(stats + NORMALISER * plane + i, mask=exists, other=0.0)
    floor = tl.exp(-tl.load(stats + STABILISER * plane + i, mask=exists, other=0.0))
    sign = tl.where(n > floor, 1.0, tl.where(-n > floor, -1.0, 0.0))
    e = -sign * tl.load(products + tl.where(reverse != 0, S - 1 - i, i), mask=exists, other=0.0)
    # Relative to M where the block of keys starts, as pairs: small numbers.
    start = stats + key_block * BLOCK
    start_hi, start_lo = tl.load(start + M_HI * plane), tl.load(start + M_LO * plane)
    row = start_hi - tl.load(stats + M_HI * plane + i, mask=exists, other=float('inf'))
    row += start_lo - tl.load(stats + M_LO * plane + i, mask=exists, other=0.0)
    row += log_scale - tl.log2(tl.maximum(tl.abs(n), floor) + eps)
    g = tl.load(stats + G_HI * plane + j, mask=j < S, other=float('-inf')) - start_hi
    g += tl.load(stats + G_LO * plane + j, mask=j < S, other=0.0) - start_lo
    score = tl.zeros((BM, BLOCK), tl.float32)
    gradient = tl.zeros((BM, BLOCK), tl.float32)
    for first in range(0, DH, BK):
        q_tile = _tile(q, q_step, i, S, first, BK, DH, DH % BK == 0)
        k_tile = _tile(k, k_step, j, S, first, BK, DH, DH % BK == 0)
        score = tl.dot(q_tile, tl.trans(k_tile), score, input_precision='ieee')
        dh_tile = _tile(dh, dh_step, i, S, first, BK, DH, DH % BK == 0)
        v_tile = _tile(v, v_step, j, S, first, BK, DH, DH % BK == 0)
        gradient = tl.dot(dh_tile, tl.trans(v_tile), gradient, input_precision='ieee')
    weight = tl.where(i[:, None] >= j[None, :], tl.exp2(g[None, :] + row[:, None]), 0.0)
    gradient = (gradient + e[:, None]) * weight
    product = gradient * score
    tl.store(sums + key_block * plane + i, tl.sum(product, 1), mask=exists)
    tl.store(sums + (pitch + row_block) * plane + j, tl.sum(product, 0), mask=j < S)
    place = tl.arange(0, BM)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(p + place, (score * weight).to(p.dtype.element_ty), mask=exists[:, None])
    tl.store(d + place, gradient.to(d.dtype.element_ty), mask=exists[:, None])


@triton.jit(
    do_not_specialize=[
        'q_sb', 'q_sh', 'q_ss', 'k_sb', 'k_sh', 'k_ss', 'v_sb', 'v_sh', 'v_ss', 'dh_sb', 'dh_sh', 'dh_ss',
        'S', 'NH', 'pitch', 'plane', 'reverse',
    ]
)  # fmt: skip
def matrix_kernel(
    q, k, v, dh, p, d, products, stats, sums, q_sb, q_sh, q_ss, k_sb, k_sh, k_ss, v_sb, v_sh, v_ss,
    dh_sb, dh_sh, dh_ss, S, NH, pitch, plane, reverse, log_scale, eps,
    DH: tl.constexpr, BK: tl.constexpr, SMALL: tl.constexpr, ALIGN: tl.constexpr,
):  # fmt: skip
    """One block of P and D, and its sums over rows and columns.

    products: dh_i.h_i, (B * NH, S) float32, in token order. sums (2 * pitch, B * NH, pitch * BLOCK) float32: over the
    j-th block of keys, one plane for each, then over the i-th block of queries. A last block of at most SMALL rows is
    computed as SMALL rows. Grid: B * NH * pitch * (pitch + 1) / 2.
    """
    tiles = pitch * (pitch + 1) // 2
    index = tl.program_id(0) // tiles
    number = tl.program_id(0) % tiles
    # Row of the triangle: the largest t with t (t + 1) / 2 <= number; the addend makes up for an inexact root.
    row_block = ((tl.sqrt(8.0 * number + 1.0) - 1.0) * 0.5 + 0.001).to(tl.int32)
    key_block = number - row_block * (row_block + 1) // 2
    q, q_step = head_start(q, index, NH, S, q_sb, q_sh, q_ss, reverse, ALIGN)
    k, k_step = head_start(k, index, NH, S, k_sb, k_sh, k_ss, reverse, ALIGN)
    v, v_step = head_start(v, index, NH, S, v_sb, v_sh, v_ss, reverse, ALIGN)
    dh, dh_step = head_start(dh, index, NH, S, dh_sb, dh_sh, dh_ss, reverse, ALIGN)
    width = pitch * BLOCK
    products += index.to(tl.int64) * S
    stats += index.to(tl.int64) * width
    sums += index.to(tl.int64) * width
    p += tl.program_id(0).to(tl.int64) * BLOCK * BLOCK
    d += tl.program_id(0).to(tl.int64) * BLOCK * BLOCK
    plane = plane.to(tl.int64) * BLOCK
    if S - row_block * BLOCK <= SMALL:
        _matrix_tile(
            q, q_step, k, k_step, v, v_step, dh, dh_step, p, d, products, stats, sums, S, pitch, plane, reverse,
            log_scale, eps, row_block, key_block, DH, SMALL, BK,
        )  # fmt: skip
    else:
        _matrix_tile(
            q, q_step, k, k_step, v, v_step, dh, dh_step, p, d, products, stats, sums, S, pitch, plane, reverse,
            log_scale, eps, row_block, key_block, DH, BLOCK, BK,
        )  # fmt: skip


@triton.jit
def _store(base, step, rows, S, first, x, DH: tl.constexpr):
    """Write columns from `first` on of some rows."""
    columns = first + tl.arange(0, x.shape[1])
    mask = (rows < S)[:, None] & (columns < DH)[None, :]
    tl.store(base + rows[:, None] * step + columns[None, :], x.to(base.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=[
        'x_sb', 'x_sh', 'x_ss', 'y_sb', 'y_sh', 'y_ss', 'dx_sb', 'dx_sh', 'dx_ss', 'dy_sb', 'dy_sh', 'dy_ss',
        'S', 'NH', 'pitch', 'reverse',
    ]
)  # fmt: skip
def matrix_gradient_kernel(
    first_matrix, second_matrix, x, y, dx, dy, x_sb, x_sh, x_ss, y_sb, y_sh, y_ss, dx_sb, dx_sh, dx_ss,
    dy_sb, dy_sh, dy_ss, S, NH, pitch, reverse,
    TURNED: tl.constexpr, DH: tl.constexpr, CA: tl.constexpr, CB: tl.constexpr, SPLIT: tl.constexpr, BN: tl.constexpr,
    ALIGN: tl.constexpr,
):  # fmt: skip
    """dx = first matrix * x, dy = second matrix * y, or TURNED with the matrices transposed.

    A program makes BLOCK rows and CA + CB columns of one of the two, unless TURNED of dx. Grid: B * NH * pitch * SPLIT,
    TURNED twice that; long rows first.
    """
    programs = pitch * SPLIT * (2 if TURNED else 1)
    index = tl.program_id(0) // programs
    part = tl.program_id(0) % programs // pitch
    number = tl.program_id(0) % pitch
    first = (part % SPLIT) * (CA + CB)
    EVEN: tl.constexpr = DH == SPLIT * (CA + CB)
    if part < SPLIT:
        matrix = first_matrix
        line, step = head_start(x, index, NH, S, x_sb, x_sh, x_ss, reverse, ALIGN)
        out, out_step = head_start(dx, index, NH, S, dx_sb, dx_sh, dx_ss, reverse, ALIGN)
    else:
        matrix = second_matrix
        line, step = head_start(y, index, NH, S, y_sb, y_sh, y_ss, reverse, ALIGN)
        out, out_step = head_start(dy, index, NH, S, dy_sb, dy_sh, dy_ss, reverse, ALIGN)
    matrix += index.to(tl.int64) * (pitch * (pitch + 1) // 2) * BLOCK * BLOCK
    acc_a = tl.zeros((BLOCK, CA), tl.float32)
    acc_b = acc_a
    if CB > 0:
        acc_b = tl.zeros((BLOCK, CB), tl.float32)
    row = tl.arange(0, BLOCK)
    if TURNED:
        block = number
        start, end = block * BLOCK, S
    else:
        block = pitch - 1 - number
        start, end = 0, tl.minimum((block + 1) * BLOCK, S)
        matrix += block * (block + 1) // 2 * BLOCK * BLOCK
    for other_first in range(start, end, BN):
        other = other_first + tl.arange(0, BN)
        other_block = other_first // BLOCK
        inside = other - other_block * BLOCK
        if TURNED:
            tile = matrix + (other_block * (other_block + 1) // 2 + block) * BLOCK * BLOCK
            m = tl.load(tile + inside[:, None] * BLOCK + row[None, :], mask=(other < S)[:, None], other=0.0)
            m = tl.trans(m)
        else:
            # Rows beyond S hold anything and end in rows that are not stored; columns beyond S hold zeros.
            m = tl.load(matrix + other_block * BLOCK * BLOCK + row[:, None] * BLOCK + inside[None, :])
        z = _tile(line, step, other, S, first, CA, DH, EVEN)
        acc_a = tl.dot(m, z, acc_a, input_precision='ieee')
        if CB > 0:
            z_b = _tile(line, step, other, S, first + CA, CB, DH, EVEN)
            acc_b = tl.dot(m, z_b, acc_b, input_precision='ieee')
    _store(out, out_step, block * BLOCK + row, S, first, acc_a, DH)
    if CB > 0:
        _store(out, out_step, block * BLOCK + row, S, first + CA, acc_b, DH)
