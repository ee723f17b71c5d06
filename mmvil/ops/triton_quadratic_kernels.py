"""Device code of the quadratic mLSTM: gate scans, forward, and the three parts of its backward pass.

Every kernel works in *reading order*: position r is token r, or token S - 1 - r when the sequence is read from its end.
Only addresses know the difference (a signed row step), so both directions share one compiled kernel.

Names: S length, DH head size = DA + DB columns (two powers of two; DB may be 0), i query and j key position, BM / BN rows of
the output / streamed tile. Scan values, in units of log 2 and as float32 pairs hi + lo, (B, NH, S): g_j = i_j - F_j and
its running maximum M_i, with F the running sum of log sigmoid(f). The weight of key j for query i is exp2(g_j - M_i) <= 1.
docs/mlstm.md derives the equations.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# Stands for minus infinity where subtracting two infinities would give NaN.
CLOSED = tl.constexpr(-1e30)
# Planes of the statistics buffer, float32 (6, B, NH, S), reading order: g, M, stabiliser m (natural log), normaliser n.
G_HI, G_LO, M_HI, M_LO, STABILISER, NORMALISER = (tl.constexpr(plane) for plane in range(6))
# Planes of the backward buffer, float32 (4, B, NH, S): (n's gradient) * denominator, 1 / denominator, q.dq, k.dk.
E_ROW, W_ROW, Q_DQ, K_DK = (tl.constexpr(plane) for plane in range(4))


@triton.jit
def larger(first, second):
    """Combine two values of a running maximum."""
    return tl.maximum(first, second)


@triton.jit(do_not_specialize=['S', 'plane', 'reverse'])
def gate_scan_kernel(igate, fgate, stats, S, plane, reverse, BLOCK: tl.constexpr):
    """F = cumsum(log sigmoid(f)), g = i - F, M = cummax(g), m = F + M for one head, in float64 (scalars only).

    igate, fgate (B, NH, S) float32, token order; stats planes g, M and m in reading order. Grid: B * NH.
    """
    row = tl.program_id(0).to(tl.int64) * S
    total = tl.zeros((), tl.float64)
    maximum = tl.full((), CLOSED, tl.float64)
    for start in range(0, S, BLOCK):
        position = start + tl.arange(0, BLOCK)
        valid = position < S
        token = tl.where(reverse != 0, S - 1 - position, position)
        f = tl.load(fgate + row + token, mask=valid, other=0.0).to(tl.float64)
        i = tl.load(igate + row + token, mask=valid, other=CLOSED).to(tl.float64)
        log_forget = tl.where(valid, tl.minimum(f, 0.0) - tl.log(1.0 + tl.exp(-tl.abs(f))), 0.0)
        forget = total + tl.cumsum(log_forget, 0)
        g = tl.maximum(i, CLOSED) - forget
        top = tl.maximum(tl.associative_scan(g, 0, larger), maximum)
        out = stats + row + position
        g_hi, top_hi = (g * LOG2_E).to(tl.float32), (top * LOG2_E).to(tl.float32)
        tl.store(out + G_HI * plane, g_hi, mask=valid)
        tl.store(out + G_LO * plane, (g * LOG2_E - g_hi.to(tl.float64)).to(tl.float32), mask=valid)
        tl.store(out + M_HI * plane, top_hi, mask=valid)
        tl.store(out + M_LO * plane, (top * LOG2_E - top_hi.to(tl.float64)).to(tl.float32), mask=valid)
        tl.store(out + STABILISER * plane, (forget + top).to(tl.float32), mask=valid)
        total += tl.sum(log_forget, 0)
        maximum = tl.maximum(maximum, tl.max(tl.where(valid, g, CLOSED), 0))


@triton.jit(do_not_specialize=['S', 'plane', 'reverse'])
def gate_gradient_kernel(fgate, rows, digate, dfgate, S, plane, reverse, BLOCK: tl.constexpr):
    """di_j = k_j.dk_j;  df_u = sigmoid(-f_u) * sum over t >= u of (q_t.dq_t - k_t.dk_t), summed in float64.

    rows: the backward buffer; fgate, digate, dfgate (B, NH, S) float32 in token order. Grid: B * NH.
    """
    row = tl.program_id(0).to(tl.int64) * S
    total = tl.zeros((), tl.float64)
    for start in range(0, S, BLOCK):
        position = S - 1 - start - tl.arange(0, BLOCK)
        valid = position >= 0
        token = tl.where(reverse != 0, S - 1 - position, position)
        from_query = tl.load(rows + Q_DQ * plane + row + position, mask=valid, other=0.0)
        from_key = tl.load(rows + K_DK * plane + row + position, mask=valid, other=0.0)
        difference = from_query.to(tl.float64) - from_key.to(tl.float64)
        gradient = (total + tl.cumsum(difference, 0)).to(tl.float32)
        f = tl.load(fgate + row + token, mask=valid, other=0.0)
        tl.store(digate + row + token, from_key, mask=valid)
        tl.store(dfgate + row + token, gradient * tl.sigmoid(-f), mask=valid)
        total += tl.sum(difference, 0)


@triton.jit
def head_start(base, index, NH, S, stride_b, stride_h, stride_s, reverse, ALIGN: tl.constexpr):
    """Address of reading position 0 of one head and the signed step to the next position. Strides in units of ALIGN."""
    offset = (index // NH).to(tl.int64) * stride_b + (index % NH).to(tl.int64) * stride_h
    offset += reverse * (S - 1).to(tl.int64) * stride_s
    return base + offset * ALIGN, stride_s * (1 - 2 * reverse) * ALIGN


@triton.jit
def load_rows(base, step, rows, S, MASKED: tl.constexpr, DH: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr):
    """Rows of one head as two pieces (rows, DA) and (rows, DB); the second repeats the first when DB is 0."""
    columns = tl.arange(0, DA)
    pointers = base + rows[:, None] * step + columns[None, :]
    if MASKED:
        a = tl.load(pointers, mask=(rows < S)[:, None] & (columns < DH)[None, :], other=0.0)
    elif DA > DH:
        a = tl.load(pointers, mask=(columns < DH)[None, :], other=0.0)
    else:
        a = tl.load(pointers)
    b = a
    if DB > 0:
        columns_b = DA + tl.arange(0, DB)
        pointers_b = base + rows[:, None] * step + columns_b[None, :]
        if MASKED:
            b = tl.load(pointers_b, mask=(rows < S)[:, None] & (columns_b < DH)[None, :], other=0.0)
        elif DA + DB > DH:
            b = tl.load(pointers_b, mask=(columns_b < DH)[None, :], other=0.0)
        else:
            b = tl.load(pointers_b)
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
    x_a, x_b, e, y, y_step, z, z_step, stats, plane, S, first, log_scale,
    WITH_E: tl.constexpr, DH: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sum_{j <= i} (x_i.y_j + e_i) scale exp2(g_j - M_i) z_j for i in [first, first + BM), and the sum of the weights.

    Left of the diagonal the weight is rank one: exp2(g_j - R) * exp2(R - M_i) with R = M_{first-1}, both factors <= 1.
    stats points at the head's row. Returns pieces (BM, DA), (BM, DB) and, without e, the row sums (BM,).
    """
    i = first + tl.arange(0, BM)
    top_hi = tl.load(stats + M_HI * plane + i, mask=i < S, other=0.0)
    top_lo = tl.load(stats + M_LO * plane + i, mask=i < S, other=0.0)
    border_hi = tl.load(stats + M_HI * plane + first - 1, mask=first > 0, other=0.0)
    border_lo = tl.load(stats + M_LO * plane + first - 1, mask=first > 0, other=0.0)
    acc_a = tl.zeros((BM, DA), tl.float32)
    acc_b = acc_a
    if DB > 0:
        acc_b = tl.zeros((BM, DB), tl.float32)
    row_sum = tl.zeros((BM,), tl.float32)
    for start in range(0, first, BN):
        j = start + tl.arange(0, BN)
        y_a, y_b = load_rows(y, y_step, j, S, False, DH, DA, DB)
        z_a, z_b = load_rows(z, z_step, j, S, False, DH, DA, DB)
        g_hi = tl.load(stats + G_HI * plane + j)
        g_lo = tl.load(stats + G_LO * plane + j)
        p = outer_dot(x_a, x_b, y_a, y_b, DB, PRECISION)
        if WITH_E:
            p += e[:, None]
        p *= tl.exp2((g_hi - border_hi) + (g_lo - border_lo) + log_scale)[None, :]
        if not WITH_E:
            row_sum += tl.sum(p, 1)
        acc_a, acc_b = add_dot(p, z_a, z_b, acc_a, acc_b, DB, PRECISION)
    if first > 0:
        carry = tl.exp2((border_hi - top_hi) + (border_lo - top_lo))
        acc_a *= carry[:, None]
        if DB > 0:
            acc_b *= carry[:, None]
        row_sum *= carry
    BD: tl.constexpr = BN if BN < BM else BM
    for start in range(first, tl.minimum(first + BM, S), BD):
        j = start + tl.arange(0, BD)
        y_a, y_b = load_rows(y, y_step, j, S, True, DH, DA, DB)
        z_a, z_b = load_rows(z, z_step, j, S, True, DH, DA, DB)
        g_hi = tl.load(stats + G_HI * plane + j, mask=j < S, other=0.0)
        g_lo = tl.load(stats + G_LO * plane + j, mask=j < S, other=0.0)
        p = outer_dot(x_a, x_b, y_a, y_b, DB, PRECISION)
        if WITH_E:
            p += e[:, None]
        weight = (g_hi[None, :] - top_hi[:, None]) + (g_lo[None, :] - top_lo[:, None]) + log_scale
        p = tl.where(i[:, None] >= j[None, :], p * tl.exp2(weight), 0.0)
        if not WITH_E:
            row_sum += tl.sum(p, 1)
        acc_a, acc_b = add_dot(p, z_a, z_b, acc_a, acc_b, DB, PRECISION)
    return acc_a, acc_b, row_sum


@triton.jit
def forward_tile(
    q, q_step, k, k_step, v, v_step, h, h_step, stats, plane, S, first, log_scale, eps,
    DH: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """h_i = num_i / (max(|n_i|, exp(-m_i)) + eps) for BM rows; exp(-m) = inf gives 0."""
    i = first + tl.arange(0, BM)
    q_a, q_b = load_rows(q, q_step, i, S, True, DH, DA, DB)
    acc_a, acc_b, n = gather_rows(
        q_a, q_b, 0.0, k, k_step, v, v_step, stats, plane, S, first, log_scale, False, DH, DA, DB, BM, BN, PRECISION
    )
    m = tl.load(stats + STABILISER * plane + i, mask=i < S, other=0.0)
    inverse = 1.0 / (tl.maximum(tl.abs(n), tl.exp(-m)) + eps)
    tl.store(stats + NORMALISER * plane + i, n, mask=i < S)
    acc_a *= inverse[:, None]
    if DB > 0:
        acc_b *= inverse[:, None]
    store_rows(h, h_step, i, S, acc_a, acc_b, DH, DA, DB)


@triton.jit(
    do_not_specialize=[
        'q_sb', 'q_sh', 'q_ss', 'k_sb', 'k_sh', 'k_ss', 'v_sb', 'v_sh', 'v_ss', 'h_sb', 'h_sh', 'h_ss',
        'S', 'NH', 'plane', 'reverse',
    ]
)  # fmt: skip
def quadratic_forward_kernel(
    q, k, v, h, stats,
    q_sb, q_sh, q_ss, k_sb, k_sh, k_ss, v_sb, v_sh, v_ss, h_sb, h_sh, h_ss, S, NH, plane, reverse, log_scale, eps,
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
    stats += index.to(tl.int64) * S
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
    q, q_step, k, k_step, v, v_step, h, h_step, dh, dh_step, dq, dq_step, stats, rows, plane, S, first, log_scale, eps,
    DH: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq_i = (1 / den_i) sum_j (dh_i.v_j + e_i) w_ij k_j, with e_i = -(dh_i.h_i) sign(n_i) where |n_i| > exp(-m_i)."""
    i = first + tl.arange(0, BM)
    dh_a, dh_b = load_rows(dh, dh_step, i, S, True, DH, DA, DB)
    h_a, h_b = load_rows(h, h_step, i, S, True, DH, DA, DB)
    n = tl.load(stats + NORMALISER * plane + i, mask=i < S, other=0.0)
    m = tl.load(stats + STABILISER * plane + i, mask=i < S, other=0.0)
    floor = tl.exp(-m)
    sign = tl.where(n > floor, 1.0, tl.where(-n > floor, -1.0, 0.0))
    e = -row_dot(dh_a, dh_b, h_a, h_b, DB) * sign
    inverse = 1.0 / (tl.maximum(tl.abs(n), floor) + eps)
    tl.store(rows + E_ROW * plane + i, e, mask=i < S)
    tl.store(rows + W_ROW * plane + i, inverse, mask=i < S)
    acc_a, acc_b, _ = gather_rows(
        dh_a, dh_b, e, v, v_step, k, k_step, stats, plane, S, first, log_scale, True, DH, DA, DB, BM, BN, PRECISION
    )
    acc_a *= inverse[:, None]
    if DB > 0:
        acc_b *= inverse[:, None]
    q_a, q_b = load_rows(q, q_step, i, S, True, DH, DA, DB)
    tl.store(rows + Q_DQ * plane + i, row_dot(q_a, q_b, acc_a, acc_b, DB), mask=i < S)
    store_rows(dq, dq_step, i, S, acc_a, acc_b, DH, DA, DB)


@triton.jit(
    do_not_specialize=[
        'q_sb', 'q_sh', 'q_ss', 'k_sb', 'k_sh', 'k_ss', 'v_sb', 'v_sh', 'v_ss', 'h_sb', 'h_sh', 'h_ss',
        'dh_sb', 'dh_sh', 'dh_ss', 'dq_sb', 'dq_sh', 'dq_ss', 'S', 'NH', 'plane', 'reverse'
    ]
)  # fmt: skip
def query_gradient_kernel(
    q, k, v, h, dh, dq, stats, rows,
    q_sb, q_sh, q_ss, k_sb, k_sh, k_ss, v_sb, v_sh, v_ss, h_sb, h_sh, h_ss, dh_sb, dh_sh, dh_ss, dq_sb, dq_sh, dq_ss,
    S, NH, plane, reverse, log_scale, eps,
    DH: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SMALL: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One dq tile of BM queries; per row e, 1 / den and q.dq for the kernels after it. Grid as in the forward."""
    tiles = tl.cdiv(S, BM)
    index = tl.program_id(0) // tiles
    first = (tiles - 1 - tl.program_id(0) % tiles) * BM
    q, q_step = head_start(q, index, NH, S, q_sb, q_sh, q_ss, reverse, ALIGN)
    k, k_step = head_start(k, index, NH, S, k_sb, k_sh, k_ss, reverse, ALIGN)
    v, v_step = head_start(v, index, NH, S, v_sb, v_sh, v_ss, reverse, ALIGN)
    h, h_step = head_start(h, index, NH, S, h_sb, h_sh, h_ss, reverse, ALIGN)
    dh, dh_step = head_start(dh, index, NH, S, dh_sb, dh_sh, dh_ss, reverse, ALIGN)
    dq, dq_step = head_start(dq, index, NH, S, dq_sb, dq_sh, dq_ss, reverse, ALIGN)
    stats += index.to(tl.int64) * S
    rows += index.to(tl.int64) * S
    if SMALL > 0:
        if S - first <= SMALL:
            query_gradient_tile(
                q, q_step, k, k_step, v, v_step, h, h_step, dh, dh_step, dq, dq_step, stats, rows, plane, S, first,
                log_scale, eps, DH, DA, DB, SMALL, BN, PRECISION,
            )  # fmt: skip
        else:
            query_gradient_tile(
                q, q_step, k, k_step, v, v_step, h, h_step, dh, dh_step, dq, dq_step, stats, rows, plane, S, first,
                log_scale, eps, DH, DA, DB, BM, BN, PRECISION,
            )  # fmt: skip
    else:
        query_gradient_tile(
            q, q_step, k, k_step, v, v_step, h, h_step, dh, dh_step, dq, dq_step, stats, rows, plane, S, first,
            log_scale, eps, DH, DA, DB, BM, BN, PRECISION,
        )  # fmt: skip


@triton.jit
def add_query_block(
    k_a, k_b, v_a, v_b, dk_a, dk_b, dv_a, dv_b, q, q_step, dh, dh_step, rows, plane, S, i, weight,
    WITH_K: tl.constexpr, WITH_V: tl.constexpr, DH: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dk_j += sum_i (v_j.dh_i + e_i) w_ij q_i and dv_j += sum_i (k_j.q_i) w_ij dh_i for one block of queries i."""
    q_a, q_b = load_rows(q, q_step, i, S, True, DH, DA, DB)
    dh_a, dh_b = load_rows(dh, dh_step, i, S, True, DH, DA, DB)
    if WITH_V:
        p = outer_dot(k_a, k_b, q_a, q_b, DB, PRECISION) * weight
        dv_a, dv_b = add_dot(p, dh_a, dh_b, dv_a, dv_b, DB, PRECISION)
    if WITH_K:
        e = tl.load(rows + E_ROW * plane + i, mask=i < S, other=0.0)
        ds = (outer_dot(v_a, v_b, dh_a, dh_b, DB, PRECISION) + e[None, :]) * weight
        dk_a, dk_b = add_dot(ds, q_a, q_b, dk_a, dk_b, DB, PRECISION)
    return dk_a, dk_b, dv_a, dv_b


@triton.jit(
    do_not_specialize=[
        'q_sb', 'q_sh', 'q_ss', 'k_sb', 'k_sh', 'k_ss', 'v_sb', 'v_sh', 'v_ss', 'dh_sb', 'dh_sh', 'dh_ss',
        'dk_sb', 'dk_sh', 'dk_ss', 'dv_sb', 'dv_sh', 'dv_ss', 'S', 'NH', 'plane', 'reverse'
    ]
)  # fmt: skip
def key_gradient_kernel(
    q, k, v, dh, dk, dv, stats, rows,
    q_sb, q_sh, q_ss, k_sb, k_sh, k_ss, v_sb, v_sh, v_ss, dh_sb, dh_sh, dh_ss, dk_sb, dk_sh, dk_ss, dv_sb, dv_sh, dv_ss,
    S, NH, plane, reverse, log_scale,
    WITH_K: tl.constexpr, WITH_V: tl.constexpr, DH: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk, dv (or one of them) and k.dk for one tile of BM keys, over blocks of BN queries. Grid: B * NH * ceil(S / BM).

    Below the diagonal w_ij = exp2(g_j - R) * exp2(R - M_i) / den_i with R = M at the tile's last key.
    """
    tiles = tl.cdiv(S, BM)
    index = tl.program_id(0) // tiles
    first = (tl.program_id(0) % tiles) * BM
    q, q_step = head_start(q, index, NH, S, q_sb, q_sh, q_ss, reverse, ALIGN)
    k, k_step = head_start(k, index, NH, S, k_sb, k_sh, k_ss, reverse, ALIGN)
    v, v_step = head_start(v, index, NH, S, v_sb, v_sh, v_ss, reverse, ALIGN)
    dh, dh_step = head_start(dh, index, NH, S, dh_sb, dh_sh, dh_ss, reverse, ALIGN)
    stats += index.to(tl.int64) * S
    rows += index.to(tl.int64) * S

    j = first + tl.arange(0, BM)
    k_a, k_b = load_rows(k, k_step, j, S, True, DH, DA, DB)
    v_a, v_b = load_rows(v, v_step, j, S, True, DH, DA, DB)
    if not WITH_V:
        k_a, k_b = v_a, v_b
    if not WITH_K:
        v_a, v_b = k_a, k_b
    g_hi = tl.load(stats + G_HI * plane + j, mask=j < S, other=float('-inf'))
    g_lo = tl.load(stats + G_LO * plane + j, mask=j < S, other=0.0)
    last = tl.minimum(first + BM, S) - 1
    border_hi = tl.load(stats + M_HI * plane + last)
    border_lo = tl.load(stats + M_LO * plane + last)

    dk_a = tl.zeros((BM, DA), tl.float32)
    dk_b = dk_a
    if DB > 0:
        dk_b = tl.zeros((BM, DB), tl.float32)
    dv_a, dv_b = dk_a, dk_b
    for start in range(first + BM, S, BN):
        i = start + tl.arange(0, BN)
        top_hi = tl.load(stats + M_HI * plane + i, mask=i < S, other=float('inf'))
        top_lo = tl.load(stats + M_LO * plane + i, mask=i < S, other=0.0)
        inverse = tl.load(rows + W_ROW * plane + i, mask=i < S, other=0.0)
        weight = tl.exp2((border_hi - top_hi) + (border_lo - top_lo) + log_scale) * inverse
        dk_a, dk_b, dv_a, dv_b = add_query_block(
            k_a, k_b, v_a, v_b, dk_a, dk_b, dv_a, dv_b, q, q_step, dh, dh_step, rows, plane, S, i, weight[None, :],
            WITH_K, WITH_V, DH, DA, DB, PRECISION,
        )  # fmt: skip
    carry = tl.exp2((g_hi - border_hi) + (g_lo - border_lo))[:, None]
    dk_a *= carry
    dv_a *= carry
    if DB > 0:
        dk_b *= carry
        dv_b *= carry
    BD: tl.constexpr = BN if BN < BM else BM
    for start in range(first, last + 1, BD):
        i = start + tl.arange(0, BD)
        top_hi = tl.load(stats + M_HI * plane + i, mask=i < S, other=float('inf'))
        top_lo = tl.load(stats + M_LO * plane + i, mask=i < S, other=0.0)
        inverse = tl.load(rows + W_ROW * plane + i, mask=i < S, other=0.0)
        weight = (g_hi[:, None] - top_hi[None, :]) + (g_lo[:, None] - top_lo[None, :]) + log_scale
        weight = tl.where(i[None, :] >= j[:, None], tl.exp2(weight) * inverse[None, :], 0.0)
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
        k_a, k_b = load_rows(k, k_step, j, S, True, DH, DA, DB)
        tl.store(rows + K_DK * plane + j, row_dot(k_a, k_b, dk_a, dk_b, DB), mask=j < S)
