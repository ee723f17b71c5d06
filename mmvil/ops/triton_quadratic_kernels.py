"""Device code of the quadratic mLSTM: gate scans, forward pass, and what the backward pass shares with it.

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
    q, q_step, k, k_step, v, v_step, h, h_step, scores, stats, plane, S, first, reverse, log_scale, eps,
    WITH_E: tl.constexpr, SUMS: tl.constexpr, DH: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`hidden_rows`, written to h, and n, or with SUMS n over the denominator."""
    i = first + tl.arange(0, BM)
    q_a, q_b = load_rows(q, q_step, i, S, DH, DA, DB)
    e = 0.0
    if WITH_E:
        e = tl.load(scores + tl.where(reverse != 0, S - 1 - i, i), mask=i < S, other=0.0)
    h_a, h_b, n, inverse = hidden_rows(
        q_a, q_b, e, k, k_step, v, v_step, stats, plane, S, first, log_scale, eps, WITH_E, DH, DA, DB, BM, BN,
        PRECISION,
    )  # fmt: skip
    tl.store(stats + NORMALISER * plane + i, n * inverse if SUMS else n, mask=i < S)
    store_rows(h, h_step, i, S, h_a, h_b, DH, DA, DB)


@triton.jit(
    do_not_specialize=[
        'q_sb', 'q_sh', 'q_ss', 'k_sb', 'k_sh', 'k_ss', 'v_sb', 'v_sh', 'v_ss', 'h_sb', 'h_sh', 'h_ss',
        'S', 'NH', 'pitch', 'plane', 'reverse',
    ]
)  # fmt: skip
def quadratic_forward_kernel(
    q, k, v, h, scores, stats,
    q_sb, q_sh, q_ss, k_sb, k_sh, k_ss, v_sb, v_sh, v_ss, h_sb, h_sh, h_ss,
    S, NH, pitch, plane, reverse, log_scale, eps, WITH_E: tl.constexpr, SUMS: tl.constexpr,
    DH: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SMALL: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """H and the normaliser n for one tile of BM queries. Grid: B * NH * ceil(S / BM), long rows first.

    A last tile of at most SMALL rows (0: never) is computed as SMALL rows: 196 = 3 * 64 + 4. scores (B * NH, S)
    float32, in token order: if WITH_E added to all products q_i.k_j of query i. SUMS: n over the denominator for n.
    """
    tiles = tl.cdiv(S, BM)
    index = tl.program_id(0) // tiles
    first = (tiles - 1 - tl.program_id(0) % tiles) * BM
    q, q_step = head_start(q, index, NH, S, q_sb, q_sh, q_ss, reverse, ALIGN)
    k, k_step = head_start(k, index, NH, S, k_sb, k_sh, k_ss, reverse, ALIGN)
    v, v_step = head_start(v, index, NH, S, v_sb, v_sh, v_ss, reverse, ALIGN)
    h, h_step = head_start(h, index, NH, S, h_sb, h_sh, h_ss, reverse, ALIGN)
    scores += index.to(tl.int64) * S
    stats += index.to(tl.int64) * pitch * BLOCK
    plane = plane.to(tl.int64) * BLOCK
    if SMALL > 0:
        if S - first <= SMALL:
            forward_tile(
                q, q_step, k, k_step, v, v_step, h, h_step, scores, stats, plane, S, first, reverse, log_scale, eps,
                WITH_E, SUMS, DH, DA, DB, SMALL, BN, PRECISION,
            )  # fmt: skip
        else:
            forward_tile(
                q, q_step, k, k_step, v, v_step, h, h_step, scores, stats, plane, S, first, reverse, log_scale, eps,
                WITH_E, SUMS, DH, DA, DB, BM, BN, PRECISION,
            )  # fmt: skip
    else:
        forward_tile(
            q, q_step, k, k_step, v, v_step, h, h_step, scores, stats, plane, S, first, reverse, log_scale, eps,
            WITH_E, SUMS, DH, DA, DB, BM, BN, PRECISION,
        )  # fmt: skip
