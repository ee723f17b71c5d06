"""Device code of the quadratic mLSTM: gate scans, forward, and the three parts of its backward pass.

Every kernel works in *reading order*: position r is token r, or token S - 1 - r when the sequence is read from its end.
Only addresses know the difference (a signed row step), so both directions share one compiled kernel.

Names: S length, DH head size = DA + DB columns (two powers of two; DB may be 0), i query and j key position, BM / BN
rows of the output / streamed tile. Scan values in units of log 2, as float32 pairs hi + lo: g_j = i_j - F_j and its
running maximum M_i, F the running sum of log sigmoid(f). Key j has weight exp2(g_j - M_i) <= 1 for query i >= j: M is
known before any product, so no accumulator is ever rescaled. docs/mlstm.md derives the equations.
"""

import triton
import triton.language as tl

from .triton_gates import larger, log_sigmoid

LOG2_E = tl.constexpr(1.4426950408889634)
# Stands for minus infinity where subtracting two infinities would give NaN.
CLOSED = tl.constexpr(-1e30)
# Rows of the buffers below are padded to blocks of this many positions, which also aligns them. Products of 16-bit
# inputs use one float32 relative to M at the block's start instead of a pair: exact enough for them, fewer registers.
BLOCK = tl.constexpr(64)
# Planes of the statistics buffer, float32 (7, B * NH, pitch), reading order: g, M, stabiliser m = F + M (natural log),
# normaliser n, and g_j - (M at the start of j's block).
G_HI, G_LO, M_HI, M_LO, STABILISER, NORMALISER, G_BLOCK = (tl.constexpr(plane) for plane in range(7))
# Planes of the backward buffer, float32 (5, B * NH, pitch): (gradient of n) * denominator, 1 / denominator,
# (M at the start of i's block) - M_i - log2(denominator), q.dq, k.dk.
E_ROW, W_ROW, QUERY_BLOCK, Q_DQ, K_DK = (tl.constexpr(plane) for plane in range(5))


@triton.jit
def scan_span(igate, fgate, valid, total, maximum):
    """Scans of gates (SPAN, ...) along the first dimension, behind positions of that sum of log forget gates and top.

    Returns log forget gates, their running sum F, g and its running maximum, float64.
    """
    log_forget = tl.where(valid, log_sigmoid(fgate), 0.0).to(tl.float64)
    forget = total + tl.cumsum(log_forget, 0)
    g = tl.where(valid, tl.maximum(igate.to(tl.float64), CLOSED) - forget, CLOSED)
    return log_forget, forget, g, tl.maximum(tl.associative_scan(g, 0, larger), maximum)


@triton.jit
def store_scans(out, plane, padded, valid, forget, g, top, relative):
    """Write the scans' planes; the normaliser becomes zero where the sequence has ended."""
    g_hi, top_hi = (g * LOG2_E).to(tl.float32), (top * LOG2_E).to(tl.float32)
    tl.store(out + G_HI * plane, g_hi, mask=padded)
    tl.store(out + G_LO * plane, (g * LOG2_E - g_hi.to(tl.float64)).to(tl.float32), mask=padded)
    tl.store(out + M_HI * plane, top_hi, mask=padded)
    tl.store(out + M_LO * plane, (top * LOG2_E - top_hi.to(tl.float64)).to(tl.float32), mask=padded)
    tl.store(out + STABILISER * plane, (forget + top).to(tl.float32), mask=padded)
    tl.store(out + NORMALISER * plane, tl.zeros(g.shape, tl.float32), mask=padded & (valid == 0))
    tl.store(out + G_BLOCK * plane, relative, mask=padded)


@triton.jit
def scan_gates(igate, fgate, stats, S, pitch, plane, reverse, SPAN: tl.constexpr):
    """`gate_scan_kernel` for one head, SPAN positions at a time."""
    row = tl.program_id(0).to(tl.int64) * S
    stats += tl.program_id(0).to(tl.int64) * pitch * BLOCK
    plane = plane.to(tl.int64) * BLOCK
    total = tl.zeros((), tl.float64)
    maximum = tl.full((), CLOSED, tl.float64)
    for start in range(0, S, SPAN):
        position = start + tl.arange(0, SPAN)
        valid = position < S
        token = tl.where(reverse != 0, S - 1 - position, position)
        f = tl.load(fgate + row + token, mask=valid, other=0.0)
        i = tl.load(igate + row + token, mask=valid, other=0.0)
        log_forget, forget, g, top = scan_span(i, f, valid, total, maximum)
        block_start = tl.min(tl.reshape(top, (SPAN // BLOCK, BLOCK)), 1)
        relative = (tl.reshape(g, (SPAN // BLOCK, BLOCK)) - block_start[:, None]) * LOG2_E
        relative = tl.reshape(relative.to(tl.float32), (SPAN,))
        store_scans(stats + position, plane, position < pitch * BLOCK, valid, forget, g, top, relative)
        total += tl.sum(log_forget, 0)
        maximum = tl.maximum(maximum, tl.max(g, 0))


@triton.jit(do_not_specialize=['S', 'pitch', 'plane', 'reverse'])
def gate_scan_kernel(
    igate, fgate, stats, S, pitch, plane, reverse, SHORT_SPAN: tl.constexpr, LONG_SPAN: tl.constexpr
):  # fmt: skip
    """F = cumsum(log sigmoid(f)), g = i - F, M = cummax(g), m = F + M for one head, in float64 (scalars only).

    igate, fgate (B, NH, S) float32, token order; stats planes g, M, m and block-relative g in reading order, pitch
    and plane in blocks. Spans are multiples of BLOCK; the short one is for sequences that it covers. Grid: B * NH.
    """
    if S <= SHORT_SPAN:
        scan_gates(igate, fgate, stats, S, pitch, plane, reverse, SHORT_SPAN)
    else:
        scan_gates(igate, fgate, stats, S, pitch, plane, reverse, LONG_SPAN)


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
        for part in range(parts):
            below = valid & ((parts == 1) | (position >= part * BLOCK))
            above = valid & ((parts == 1) | (position < (part + 1) * BLOCK))
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


@triton.jit
def head_start(base, index, NH, S, stride_b, stride_h, stride_s, reverse, ALIGN: tl.constexpr):
    """Address of reading position 0 of one head and the signed step to the next position. Strides in units of ALIGN."""
    offset = (index // NH).to(tl.int64) * stride_b + (index % NH).to(tl.int64) * stride_h
    offset += reverse * (S - 1).to(tl.int64) * stride_s
    return base + offset * ALIGN, stride_s * (1 - 2 * reverse) * ALIGN


@triton.jit
def load_piece(base, step, rows, S, FIRST: tl.constexpr, COLUMNS: tl.constexpr, DH: tl.constexpr):
    """Columns FIRST .. FIRST + COLUMNS of some rows, (rows, COLUMNS); row S - 1 beyond S, 0 beyond DH."""
    columns = FIRST + tl.arange(0, COLUMNS)
    pointers = base + tl.minimum(rows, S - 1)[:, None] * step + columns[None, :]
    if FIRST + COLUMNS > DH:
        return tl.load(pointers, mask=(columns < DH)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def load_rows(base, step, rows, S, DH: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr):
    """Rows of one head as two pieces (rows, DA) and (rows, DB); the second repeats the first when DB is 0."""
    a = load_piece(base, step, rows, S, 0, DA, DH)
    b = a
    if DB > 0:
        b = load_piece(base, step, rows, S, DA, DB, DH)
    return a, b


@triton.jit
def store_rows(base, step, rows, S, a, b, DH: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr):
    """Write two pieces (rows, DA) and (rows, DB) in the dtype of base."""
    columns = tl.arange(0, DA)
    mask = (rows < S)[:, None] & (columns < DH)[None, :]
    tl.store(base + rows[:, None] * step + columns[None, :], a.to(base.dtype.element_ty), mask=mask)
    if DB > 0:
        columns_b = DA + tl.arange(0, DB)
        mask_b = (rows < S)[:, None] & (columns_b < DH)[None, :]
        tl.store(base + rows[:, None] * step + columns_b[None, :], b.to(base.dtype.element_ty), mask=mask_b)


@triton.jit
def outer_dot(x_a, x_b, y_a, y_b, DB: tl.constexpr, PRECISION: tl.constexpr):
    """X y^T over both pieces, float32."""
    s = tl.dot(x_a, tl.trans(y_a), input_precision=PRECISION)
    if DB > 0:
        s = tl.dot(x_b, tl.trans(y_b), s, input_precision=PRECISION)
    return s


@triton.jit
def add_dot(p, z_a, z_b, acc_a, acc_b, DB: tl.constexpr, PRECISION: tl.constexpr):
    """Acc + p z for both pieces; p enters the product in z's dtype."""
    p = p.to(z_a.dtype)
    acc_a = tl.dot(p, z_a, acc_a, input_precision=PRECISION)
    if DB > 0:
        acc_b = tl.dot(p, z_b, acc_b, input_precision=PRECISION)
    return acc_a, acc_b


@triton.jit
def row_dot(x_a, x_b, y_a, y_b, DB: tl.constexpr):
    """Sum over columns of x * y in float32."""
    total = tl.sum(x_a.to(tl.float32) * y_a.to(tl.float32), 1)
    if DB > 0:
        total += tl.sum(x_b.to(tl.float32) * y_b.to(tl.float32), 1)
    return total


@triton.jit
def gather_rows(
    x_a, x_b, e, log_factor, y, y_step, z, z_step, stats, plane, S, first, log_scale,
    WITH_E: tl.constexpr, WITH_SUM: tl.constexpr, DH: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sum_{j <= i} (x_i.y_j + e_i) scale exp2(g_j - M_i + log_factor_i) z_j for i in [first, first + BM).

    And the sum of what z_j is multiplied with. stats points at the head's row. Returns pieces (BM, DA), (BM, DB) and,
    if wanted, the row sums (BM,).
    """
    i = first + tl.arange(0, BM)
    top_hi = tl.load(stats + M_HI * plane + i, mask=i < S, other=0.0)
    top_lo = tl.load(stats + M_LO * plane + i, mask=i < S, other=0.0)
    first_hi, first_lo = tl.load(stats + M_HI * plane + first), tl.load(stats + M_LO * plane + first)
    top = (top_hi - first_hi) + (top_lo - first_lo) - log_factor
    acc_a = tl.zeros((BM, DA), tl.float32)
    acc_b = acc_a
    if DB > 0:
        acc_b = tl.zeros((BM, DB), tl.float32)
    row_sum = tl.zeros((BM,), tl.float32)
    for start in range(0, tl.minimum(first + BM, S), BN):
        j = start + tl.arange(0, BN)
        y_a, y_b = load_rows(y, y_step, j, S, DH, DA, DB)
        z_a, z_b = load_rows(z, z_step, j, S, DH, DA, DB)
        if y.dtype.element_ty == tl.float32:
            g_hi = tl.load(stats + G_HI * plane + j, mask=j < S, other=0.0)
            g_lo = tl.load(stats + G_LO * plane + j, mask=j < S, other=0.0)
            weight = (g_hi[None, :] - top_hi[:, None]) + (g_lo[None, :] - top_lo[:, None]) + log_scale
            weight += (tl.zeros((BM,), tl.float32) + log_factor)[:, None]
        else:
            block = stats + (start // BLOCK) * BLOCK
            block_hi, block_lo = tl.load(block + M_HI * plane), tl.load(block + M_LO * plane)
            g = tl.load(stats + G_BLOCK * plane + j) + ((block_hi - first_hi) + (block_lo - first_lo) + log_scale)
            weight = g[None, :] - top[:, None]
        p = outer_dot(x_a, x_b, y_a, y_b, DB, PRECISION)
        if WITH_E:
            p += e[:, None]
        p = tl.where((i - start)[:, None] >= tl.arange(0, BN)[None, :], p * tl.exp2(weight), 0.0)
        if WITH_SUM:
            row_sum += tl.sum(p, 1)
        acc_a, acc_b = add_dot(p, z_a, z_b, acc_a, acc_b, DB, PRECISION)
    return acc_a, acc_b, row_sum


@triton.jit
def hidden_rows(
    q_a, q_b, e, k, k_step, v, v_step, stats, plane, S, first, log_scale, eps, WITH_E: tl.constexpr,
    DH: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """h_i = num_i / (max(|n_i|, exp(-m_i)) + eps) for BM rows, in two pieces; exp(-m) = inf gives 0.

    e_i is added to each of the row's products q_i.k_j. Returns also n_i and one over the denominator.
    """
    i = first + tl.arange(0, BM)
    m = tl.load(stats + STABILISER * plane + i, mask=i < S, other=0.0)
    acc_a, acc_b, n = gather_rows(
        q_a, q_b, e, 0.0, k, k_step, v, v_step, stats, plane, S, first, log_scale, WITH_E, True, DH, DA, DB, BM, BN,
        PRECISION,
    )  # fmt: skip
    inverse = 1.0 / (tl.maximum(tl.abs(n), tl.exp(-m)) + eps)
    acc_a *= inverse[:, None]
    if DB > 0:
        acc_b *= inverse[:, None]
    return acc_a, acc_b, n, inverse


@triton.jit
def forward_tile(
    q, q_step, k, k_step, v, v_step, h, h_step, stats, plane, S, first, log_scale, eps,
    DH: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`hidden_rows`, written to h, and n."""
    i = first + tl.arange(0, BM)
    q_a, q_b = load_rows(q, q_step, i, S, DH, DA, DB)
    h_a, h_b, n, _ = hidden_rows(
        q_a, q_b, 0.0, k, k_step, v, v_step, stats, plane, S, first, log_scale, eps, False, DH, DA, DB, BM, BN,
        PRECISION,
    )  # fmt: skip
    tl.store(stats + NORMALISER * plane + i, n, mask=i < S)
    store_rows(h, h_step, i, S, h_a, h_b, DH, DA, DB)


@triton.jit(
    do_not_specialize=[
        'q_sb', 'q_sh', 'q_ss', 'k_sb', 'k_sh', 'k_ss', 'v_sb', 'v_sh', 'v_ss', 'h_sb', 'h_sh', 'h_ss',
        'S', 'NH', 'pitch', 'plane', 'reverse',
    ]
)  # fmt: skip
def quadratic_forward_kernel(
    q, k, v, h, stats,
    q_sb, q_sh, q_ss, k_sb, k_sh, k_ss, v_sb, v_sh, v_ss, h_sb, h_sh, h_ss,
    S, NH, pitch, plane, reverse, log_scale, eps,
    DH: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SMALL: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """H and the normaliser n for one tile of BM queries. Grid: B * NH * ceil(S / BM), long rows first.

    A last tile of at most SMALL rows (0: never) is computed as SMALL rows: 196 = 3 * 64 + 4.
    """
    tiles = tl.cdiv(S, BM)
    index = tl.program_id(0) // tiles
    first = (tiles - 1 - tl.program_id(0) % tiles) * BM
    q, q_step = head_start(q, index, NH, S, q_sb, q_sh, q_ss, reverse, ALIGN)
    k, k_step = head_start(k, index, NH, S, k_sb, k_sh, k_ss, reverse, ALIGN)
    v, v_step = head_start(v, index, NH, S, v_sb, v_sh, v_ss, reverse, ALIGN)
    h, h_step = head_start(h, index, NH, S, h_sb, h_sh, h_ss, reverse, ALIGN)
    stats += index.to(tl.int64) * pitch * BLOCK
    plane = plane.to(tl.int64) * BLOCK
    if SMALL > 0:
        if S - first <= SMALL:
            forward_tile(
                q, q_step, k, k_step, v, v_step, h, h_step, stats, plane, S, first, log_scale, eps,
                DH, DA, DB, SMALL, BN, PRECISION,
            )  # fmt: skip
        else:
            forward_tile(
                q, q_step, k, k_step, v, v_step, h, h_step, stats, plane, S, first, log_scale, eps,
                DH, DA, DB, BM, BN, PRECISION,
            )  # fmt: skip
    else:
        forward_tile(
            q, q_step, k, k_step, v, v_step, h, h_step, stats, plane, S, first, log_scale, eps,
            DH, DA, DB, BM, BN, PRECISION,
        )  # fmt: skip


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
