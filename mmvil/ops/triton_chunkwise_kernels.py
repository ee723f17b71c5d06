"""Device code of the chunkwise mLSTM: gate scans, chunk states, and gated products inside chunks.

Notation, all in reading order (position t is row t, or row S - 1 - t when the sequence is read from its end):
F = cumsum(logsigmoid(f)), g = i - F, M = cummax(g), m = F + M. The weight of position s at position t is
exp(g_s - M_t) <= 1. F, g and M are scanned over the whole sequence in float64: F falls to -40 * S for closed gates, and
float64 still leaves 1e-8 of absolute error after a million such steps.

The sequence is cut into tiles, and chunks of several tiles. E[j] is the maximum of g before tile j. A weight across a
border is a product of factors <= 1, of which `write` and `read` are stored:

    exp(g_s - M_t) = exp(g_s - E[j+1]) * exp(E[j+1] - E[i]) * exp(E[i] - M_t)        s in tile j, t in a later tile i
                        write_s                                   read_t

so that tiles off the diagonal only scale rows and columns. On the diagonal g and M are needed apart; they are stored
relative to the tile's own E[j+1], each as a float32 and its remainder.

With R[c] the E before chunk c, the state before the chunk is C[c] = sum_{s < c} exp(g_s - R[c]) k_s v_s^T, and its
gradient is sum_{t >= c} exp(R[c] - M_t) / d_t q_t dh_t^T, d_t being the denominator of h_t. Both recurrences have
factors <= 1 and need no rescaling. With delta_t = -sign(n_t) * (h_t . dh_t), or 0 where the floor exp(-m) is active,
output and gradients are four products of one form, which `product_kernel` computes:

    h_t  = sum_{s <= t} (q_t . k_s)            w_ts v_s  / d_t
    dq_t = sum_{s <= t} (dh_t . v_s + delta_t) w_ts k_s  / d_t
    dk_s = sum_{t >= s} (v_s . dh_t + delta_t) w_ts q_t  / d_t
    dv_s = sum_{t >= s} (k_s . q_t)            w_ts dh_t / d_t          w_ts = exp(g_s - M_t) / sqrt(DH)

Positions in the row's own chunk are visited tile by tile, all others through the state.
"""

import triton
import triton.language as tl

NEGLIGIBLE = tl.constexpr(-1e30)
"""Stands for minus infinity: differences with it stay finite in float64, and exp of them is 0."""
GATE_FLOOR = tl.constexpr(-1e5)
"""Lowest log gate: a gate of -inf forgets everything without leaving the numbers."""
LARGEST_EXPONENT = tl.constexpr(88.2)
"""exp of more leaves float32; h is 0 where the denominator would."""
BORDER_BLOCK = tl.constexpr(256)
"""Tiles looked at together when the gates of earlier tiles are summed."""

OUTPUT = tl.constexpr(0)
QUERY_GRADIENT = tl.constexpr(1)
KEY_GRADIENT = tl.constexpr(2)
VALUE_GRADIENT = tl.constexpr(3)


@triton.jit
def _larger(first, second):
    return tl.maximum(first, second)


@triton.jit
def _log_sigmoid(x):
    """Compute log(sigmoid(x)) in float32 with a small relative error.

    log1p(e) = 2 atanh(e / (2 + e)) as a series: log(1 + e) would round to multiples of 1e-7, a bias that grows with S.
    """
    decayed = tl.exp(-tl.abs(x))
    ratio = decayed / (2.0 + decayed)
    square = ratio * ratio
    series = 1.0 / 17.0 * square + 1.0 / 15.0
    series = series * square + 1.0 / 13.0
    series = series * square + 1.0 / 11.0
    series = series * square + 1.0 / 9.0
    series = series * square + 1.0 / 7.0
    series = series * square + 1.0 / 5.0
    series = series * square + 1.0 / 3.0
    series = series * square + 1.0
    return tl.minimum(x, 0.0) - 2.0 * ratio * series


@triton.jit
def _weight(exponent):
    """Compute exp of a float64 difference that is at most 0 but for rounding."""
    return tl.exp(tl.minimum(exponent.to(tl.float32), 0.0))


@triton.jit
def _load_gates(igate, fgate, head, start, length, TILE: tl.constexpr, REVERSE: tl.constexpr):
    """Load log input gates and log forget gates of a tile as float64; outside of the sequence nothing is written."""
    position = start + tl.arange(0, TILE)
    inside = position < length
    row = length - 1 - position if REVERSE else position
    offset = head.to(tl.int64) * length + row
    write = tl.maximum(tl.load(igate + offset, mask=inside, other=0.0), GATE_FLOOR)
    forget = tl.maximum(_log_sigmoid(tl.load(fgate + offset, mask=inside, other=0.0)), GATE_FLOOR)
    write = tl.where(inside, write.to(tl.float64), NEGLIGIBLE)
    return write, tl.where(inside, forget, 0.0).to(tl.float64), inside


@triton.jit(do_not_specialize=['length', 'tiles'])
def gate_sum_kernel(igate, fgate, totals, peaks, length, tiles, TILE: tl.constexpr, REVERSE: tl.constexpr):
    """Per tile: sum of the log forget gates, and maximum of g counted from the tile's start."""
    program = tl.program_id(0)
    write, forget, _ = _load_gates(igate, fgate, program // tiles, program % tiles * TILE, length, TILE, REVERSE)
    tl.store(totals + program, tl.sum(forget, 0))
    tl.store(peaks + program, tl.max(write - tl.cumsum(forget, 0), 0))


@triton.jit
def _store_split(base, stride, offset, value, inside):
    """Store a float64 as a float32 and, `stride` further, its remainder."""
    high = value.to(tl.float32)
    tl.store(base + offset, high, mask=inside)
    tl.store(base + stride + offset, (value - high.to(tl.float64)).to(tl.float32), mask=inside)


@triton.jit(do_not_specialize=['total_heads', 'length', 'tiles'])
def gate_scan_kernel(
    igate, fgate, totals, peaks, gate, maximum, write, read, stabiliser, border, total_heads, length, tiles,
    TILE: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Per tile: everything about the gates that other kernels read, and E after the tile."""
    program = tl.program_id(0)
    head, tile = program // tiles, program % tiles
    decay_before = tl.full((), 0.0, tl.float64)
    peak_before = tl.full((), NEGLIGIBLE, tl.float64)
    for first in range(0, tile, BORDER_BLOCK):
        index = first + tl.arange(0, BORDER_BLOCK)
        total = tl.load(totals + head * tiles + index, mask=index < tile, other=0.0)
        peak = tl.load(peaks + head * tiles + index, mask=index < tile, other=NEGLIGIBLE)
        decay_to = decay_before + tl.cumsum(total, 0) - total
        peak_before = tl.maximum(peak_before, tl.max(peak - decay_to, 0))
        decay_before += tl.sum(total, 0)

    inputs, forget, inside = _load_gates(igate, fgate, head, tile * TILE, length, TILE, REVERSE)
    decay = decay_before + tl.cumsum(forget, 0)
    g = inputs - decay
    highest = tl.maximum(tl.associative_scan(g, 0, _larger), peak_before)
    after = tl.maximum(tl.max(g, 0), peak_before)
    stride = total_heads.to(tl.int64) * length
    offset = head.to(tl.int64) * length + tile * TILE + tl.arange(0, TILE)
    _store_split(gate, stride, offset, g - after, inside)
    _store_split(maximum, stride, offset, highest - after, inside)
    tl.store(write + offset, _weight(g - after), mask=inside)
    tl.store(read + offset, _weight(peak_before - highest), mask=inside)
    tl.store(stabiliser + offset, (decay + highest).to(tl.float32), mask=inside)
    borders = border + head * (tiles + 1) + tile
    tl.store(borders, peak_before, mask=tile == 0)
    tl.store(borders + 1, after)


@triton.jit
def _row_start(base, position, length, stride, REVERSE: tl.constexpr):
    """Address of the row of a position; 64 bits, since long sequences pass 2^31 elements."""
    row = length - 1 - position if REVERSE else position
    return base + row.to(tl.int64) * stride


@triton.jit
def _load_rows(base, rows, columns, step, rows_left, DH: tl.constexpr):
    """Load [rows, columns] of a tile whose first row is at base."""
    mask = (rows[:, None] < rows_left) & (columns[None, :] < DH)
    return tl.load(base + rows[:, None] * step + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _load_columns(base, rows, columns, step, rows_left, DH: tl.constexpr):
    """Load a tile transposed, [columns, rows]."""
    mask = (rows[None, :] < rows_left) & (columns[:, None] < DH)
    return tl.load(base + rows[None, :] * step + columns[:, None], mask=mask, other=0.0)


@triton.jit
def _store_rows(base, rows, columns, step, rows_left, values, DH: tl.constexpr):
    mask = (rows[:, None] < rows_left) & (columns[None, :] < DH)
    tl.store(base + rows[:, None] * step + columns[None, :], values.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _state_product(accumulator, left, right, PRECISION: tl.constexpr):
    """Add left @ right to the accumulator, for products with states.

    States of float16 sequences exceed float16. They are kept in float32 and multiplied as TF32, which holds float16's
    digits exactly.
    """
    if left.dtype == tl.float16:
        return tl.dot(left.to(tl.float32), right.to(tl.float32), accumulator, input_precision='tf32')
    return tl.dot(left, right.to(left.dtype), accumulator, input_precision=PRECISION)


@triton.jit
def _inverse_denominator(normaliser, stabiliser, eps):
    """Compute 1 / (max(|n|, exp(-m)) + eps), 0 where exp(-m) overflows; and whether |n| is the larger."""
    floor = tl.exp(tl.minimum(-stabiliser, LARGEST_EXPONENT))
    inverse = 1.0 / (tl.maximum(tl.abs(normaliser), floor) + eps)
    return tl.where(-stabiliser > LARGEST_EXPONENT, 0.0, inverse), tl.abs(normaliser) > floor


@triton.jit
def _head_start(base, program, heads, batch_stride, head_stride, UNIT: tl.constexpr):
    """Address of one head of one image. Strides come in units of UNIT elements, so that alignment is known."""
    batch, head = (program // heads).to(tl.int64), (program % heads).to(tl.int64)
    return base + (batch * batch_stride + head * head_stride) * UNIT


@triton.jit
def _outer_product(accumulator, scaled, right, PRECISION: tl.constexpr):
    """Add scaled^T @ right to the accumulator, scaled in float32, by the rules of `_state_product`."""
    if right.dtype == tl.float16:
        return tl.dot(tl.trans(scaled), right.to(tl.float32), accumulator, input_precision='tf32')
    return tl.dot(tl.trans(scaled.to(right.dtype)), right, accumulator, input_precision=PRECISION)


@triton.jit
def _store_state(base, rows, columns, state, DH: tl.constexpr):
    mask = (rows[:, None] < DH) & (columns[None, :] < DH)
    tl.store(base + rows[:, None] * DH + columns[None, :], state.to(base.dtype.element_ty), mask=mask)


@triton.jit(
    do_not_specialize=[
        'x_batch', 'x_head', 'x_row', 'y_batch', 'y_head', 'y_row', 'h_batch', 'h_head', 'h_row',
        'total_heads', 'heads', 'length', 'chunks', 'eps',
    ]
)  # fmt: skip
def chunk_state_kernel(
    x, y, h, states, state_normalisers, write, read, border, stabiliser, normaliser, inverse, read_inverse, delta,
    x_batch, x_head, x_row, y_batch, y_head, y_row, h_batch, h_head, h_row,
    total_heads, heads, length, chunks, eps,
    DH: tl.constexpr, RA: tl.constexpr, RB: tl.constexpr, CA: tl.constexpr, CB: tl.constexpr, SPLIT: tl.constexpr,
    CHUNK: tl.constexpr, TILE: tl.constexpr, BACKWARD: tl.constexpr, REVERSE: tl.constexpr, UNIT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What one chunk adds to the state after it (k v^T), or to the gradient of the state before it (q dh^T).

    The rows of a state are held in pieces RA + RB >= DH, its columns in SPLIT programs of CA + CB. Backward, delta and
    1 / d are made on the way: each program sums delta over its own columns, whose readers add the parts.
    """
    block = tl.program_id(0) % SPLIT
    program = tl.program_id(0) // SPLIT
    head, chunk = program // chunks, program % chunks
    x_base = _head_start(x, head, heads, x_batch, x_head, UNIT)
    y_base = _head_start(y, head, heads, y_batch, y_head, UNIT)
    h_base = _head_start(h, head, heads, h_batch, h_head, UNIT)
    x_step = -x_row * UNIT if REVERSE else x_row * UNIT
    y_step = -y_row * UNIT if REVERSE else y_row * UNIT
    h_step = -h_row * UNIT if REVERSE else h_row * UNIT
    row_offset = head.to(tl.int64) * length
    rows, in_a = tl.arange(0, TILE), tl.arange(0, RA)
    column_a = block * (CA + CB) + tl.arange(0, CA)
    state_aa = tl.zeros([RA, CA], tl.float32)
    normaliser_a = tl.zeros([RA], tl.float32)
    if CB > 0:
        column_b = block * (CA + CB) + CA + tl.arange(0, CB)
        state_ab = tl.zeros([RA, CB], tl.float32)
    if RB > 0:
        in_b = RA + tl.arange(0, RB)
        state_ba = tl.zeros([RB, CA], tl.float32)
        normaliser_b = tl.zeros([RB], tl.float32)
        if CB > 0:
            state_bb = tl.zeros([RB, CB], tl.float32)

    tiles = tl.cdiv(length, TILE)
    borders = border + head * (tiles + 1)
    near = chunk * (CHUNK // TILE) if BACKWARD else tl.minimum(chunk * (CHUNK // TILE) + CHUNK // TILE, tiles)
    reference = tl.load(borders + near)
    for start in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, length), TILE):
        left = length - start
        inside = rows < left
        y_start = _row_start(y_base, start, length, y_row * UNIT, REVERSE)
        y_a = _load_rows(y_start, rows, column_a, y_step, left, DH)
        if CB > 0:
            y_b = _load_rows(y_start, rows, column_b, y_step, left, DH)
        position = row_offset + start + rows
        if BACKWARD:
            n = tl.load(normaliser + position, mask=inside, other=0.0)
            m = tl.load(stabiliser + position, mask=inside, other=0.0)
            over, active = _inverse_denominator(n, m, eps)
            read_over = tl.load(read + position, mask=inside, other=0.0) * over
            weight = _weight(reference - tl.load(borders + start // TILE)) * read_over
            h_start = _row_start(h_base, start, length, h_row * UNIT, REVERSE)
            h_a = _load_rows(h_start, rows, column_a, h_step, left, DH)
            product = tl.sum(y_a.to(tl.float32) * h_a.to(tl.float32), 1)
            if CB > 0:
                h_b = _load_rows(h_start, rows, column_b, h_step, left, DH)
                product += tl.sum(y_b.to(tl.float32) * h_b.to(tl.float32), 1)
            slope = tl.where(active, tl.where(n > 0, -product, product), 0.0)
            tl.store(delta + block.to(tl.int64) * total_heads * length + position, slope, mask=inside)
            tl.store(inverse + position, over, mask=inside & (block == 0))
            tl.store(read_inverse + position, read_over, mask=inside & (block == 0))
        else:
            fade = _weight(tl.load(borders + start // TILE + 1) - reference)
            weight = tl.load(write + position, mask=inside, other=0.0) * fade
            slope = tl.full([TILE], 1.0, tl.float32)

        x_start = _row_start(x_base, start, length, x_row * UNIT, REVERSE)
        x_a = _load_rows(x_start, rows, in_a, x_step, left, DH).to(tl.float32) * weight[:, None]
        normaliser_a += tl.sum(x_a * slope[:, None], 0)
        state_aa = _outer_product(state_aa, x_a, y_a, PRECISION)
        if CB > 0:
            state_ab = _outer_product(state_ab, x_a, y_b, PRECISION)
        if RB > 0:
            x_b = _load_rows(x_start, rows, in_b, x_step, left, DH).to(tl.float32) * weight[:, None]
            normaliser_b += tl.sum(x_b * slope[:, None], 0)
            state_ba = _outer_product(state_ba, x_b, y_a, PRECISION)
            if CB > 0:
                state_bb = _outer_product(state_bb, x_b, y_b, PRECISION)

    base = states + program.to(tl.int64) * DH * DH
    part = block if BACKWARD else 0
    normaliser_base = state_normalisers + (part.to(tl.int64) * total_heads * chunks + program) * DH
    stored = block == 0 or BACKWARD
    _store_state(base, in_a, column_a, state_aa, DH)
    tl.store(normaliser_base + in_a, normaliser_a, mask=(in_a < DH) & stored)
    if CB > 0:
        _store_state(base, in_a, column_b, state_ab, DH)
    if RB > 0:
        _store_state(base, in_b, column_a, state_ba, DH)
        tl.store(normaliser_base + in_b, normaliser_b, mask=(in_b < DH) & stored)
        if CB > 0:
            _store_state(base, in_b, column_b, state_bb, DH)


@triton.jit
def _border_decay(borders, chunk, tiles, PER_CHUNK: tl.constexpr):
    """Compute exp(R[c] - R[c+1])."""
    after = tl.minimum(chunk * PER_CHUNK + PER_CHUNK, tiles)
    return _weight(tl.load(borders + chunk * PER_CHUNK) - tl.load(borders + after))


@triton.jit(do_not_specialize=['total_heads', 'chunks', 'tiles'])
def state_scan_kernel(
    states, state_normalisers, other_states, other_normalisers, border, crossing, total_heads, chunks, tiles,
    PER_CHUNK: tl.constexpr, STATE: tl.constexpr, DH: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
    WIDTH: tl.constexpr, PARTS: tl.constexpr, BACKWARD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Replace each chunk's contribution by the state before it, or by the gradient of the state after it, in place.

    The last of the BLOCKS + 1 programs of a head carries the normaliser, whose PARTS it adds. Backward, `crossing`
    receives at c this block's share of the products <C[c], gradient of C[c]>: what the gates at the border are due.
    """
    block = tl.program_id(0) % (BLOCKS + 1)
    head = tl.program_id(0) // (BLOCKS + 1)
    borders = border + head * (tiles + 1)
    if block < BLOCKS:
        element = block * BLOCK + tl.arange(0, BLOCK)
        inside = element < STATE
        carried = tl.zeros([BLOCK], tl.float32)
        for step in tl.range(0, chunks, num_stages=STAGES):
            chunk = chunks - 1 - step if BACKWARD else step
            address = (head.to(tl.int64) * chunks + chunk) * STATE + element
            added = tl.load(states + address, mask=inside, other=0.0).to(tl.float32)
            keep = _border_decay(borders, chunk, tiles, PER_CHUNK)
            tl.store(states + address, carried.to(states.dtype.element_ty), mask=inside)
            carried = keep * carried + added
            if BACKWARD:
                other = tl.load(other_states + address, mask=inside, other=0.0).to(tl.float32)
                share = tl.sum(tl.where(inside, carried * other, 0.0), 0)
                tl.store(crossing + (head * chunks + chunk) * (BLOCKS + 1) + block, share)
    else:
        column = tl.arange(0, WIDTH)
        known = column < DH
        sums = tl.zeros([WIDTH], tl.float32)
        for step in tl.range(0, chunks, num_stages=STAGES):
            chunk = chunks - 1 - step if BACKWARD else step
            address = (head.to(tl.int64) * chunks + chunk) * DH + column
            added = tl.load(state_normalisers + address, mask=known, other=0.0)
            for part in tl.static_range(1, PARTS):
                shifted = address + total_heads.to(tl.int64) * chunks * DH * part
                added += tl.load(state_normalisers + shifted, mask=known, other=0.0)
            keep = _border_decay(borders, chunk, tiles, PER_CHUNK)
            tl.store(state_normalisers + address, sums, mask=known)
            sums = keep * sums + added
            if BACKWARD:
                other = tl.load(other_normalisers + address, mask=known, other=0.0)
                share = tl.sum(sums * other, 0)
                tl.store(crossing + (head * chunks + chunk) * (BLOCKS + 1) + block, share)


@triton.jit(do_not_specialize=['total_heads', 'length', 'chunks', 'scale'])
def gate_gradient_kernel(
    query_dot, key_dot, crossing, fgate, igate_gradient, fgate_gradient, total_heads, length, chunks, scale,
    SPLIT: tl.constexpr, BLOCKS: tl.constexpr, WIDTH: tl.constexpr, CHUNK: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Compute di = k . dk and df = sigmoid(-f) * sum_{t >= u} (q . dq - k . dk).

    The sum runs inside the chunk only; all later chunks together are the product of the state at the border with its
    gradient. A sum over the whole sequence would add up the rounding errors of all positions.
    """
    program = tl.program_id(0)
    head, chunk = program // chunks, program % chunks
    share = tl.arange(0, WIDTH)
    is_last = chunk == chunks - 1
    later = tl.load(
        crossing + (program + 1) * (BLOCKS + 1) + share, mask=(share < BLOCKS + 1) & (chunk < chunks - 1), other=0.0
    )
    from_later = tl.where(is_last, 0.0, tl.sum(later, 0) * scale).to(tl.float64)

    position = chunk * CHUNK + tl.arange(0, CHUNK)
    inside = position < length
    offset = head.to(tl.int64) * length + position
    queried = tl.load(query_dot + offset, mask=inside, other=0.0)
    keyed = tl.load(key_dot + offset, mask=inside, other=0.0)
    for part in tl.static_range(1, SPLIT):
        shifted = offset + total_heads.to(tl.int64) * length * part
        queried += tl.load(query_dot + shifted, mask=inside, other=0.0)
        keyed += tl.load(key_dot + shifted, mask=inside, other=0.0)
    change = queried.to(tl.float64) - keyed.to(tl.float64)
    forget_gradient = tl.sum(change, 0) - tl.cumsum(change, 0) + change + from_later
    row = head.to(tl.int64) * length + (length - 1 - position if REVERSE else position)
    closed = 1.0 / (1.0 + tl.exp(tl.load(fgate + row, mask=inside, other=0.0)))
    tl.store(igate_gradient + row, keyed, mask=inside)
    tl.store(fgate_gradient + row, forget_gradient.to(tl.float32) * closed, mask=inside)


@triton.jit
def _diagonal_weight(g_high, g_low, highest_high, highest_low, s, t):
    """Compute exp(g_s - M_t) where s <= t, else 0; the arguments are already shaped as rows and columns.

    The remainders keep all digits where gates are so steep that g and M are far below the tile's border, yet close to
    each other.
    """
    exponent = (g_high - highest_high) + (g_low - highest_low)
    return tl.where(s <= t, tl.exp(tl.minimum(exponent, 0.0)), 0.0)


@triton.jit
def _add_parts(base, part_stride, offset, mask, PARTS: tl.constexpr):
    total = tl.load(base + offset, mask=mask, other=0.0)
    for part in tl.static_range(1, PARTS):
        total += tl.load(base + part_stride * part + offset, mask=mask, other=0.0)
    return total


@triton.jit
def _from_state(
    x_start, x_step, rows, left, state, state_normaliser, row_delta, column_a, column_b, depth,
    DH: tl.constexpr, CA: tl.constexpr, CB: tl.constexpr, TILE: tl.constexpr, BK: tl.constexpr,
    PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What positions of other chunks contribute, through their state: x @ state or x @ state^T, unscaled.

    `depth` is DH, or 0 where there is no other chunk.
    """
    TRANSPOSED: tl.constexpr = (PRODUCT == QUERY_GRADIENT) | (PRODUCT == KEY_GRADIENT)
    out_a, sums = tl.zeros([TILE, CA], tl.float32), tl.zeros([TILE], tl.float32)
    out_b = tl.zeros([TILE, CB], tl.float32) if CB > 0 else sums
    for begin in range(0, depth, BK):
        inner = begin + tl.arange(0, BK)
        x = _load_rows(x_start, rows, inner, x_step, left, DH)
        if PRODUCT == OUTPUT:
            state_sums = tl.load(state_normaliser + inner, mask=inner < DH, other=0.0)
            sums += tl.sum(x.to(tl.float32) * state_sums[None, :], 1)
        if TRANSPOSED:
            state_a = _load_columns(state, column_a, inner, DH, DH, DH)
        else:
            state_a = _load_rows(state, inner, column_a, DH, DH, DH)
        out_a = _state_product(out_a, x, state_a, PRECISION)
        if CB > 0:
            if TRANSPOSED:
                state_b = _load_columns(state, column_b, inner, DH, DH, DH)
            else:
                state_b = _load_rows(state, inner, column_b, DH, DH, DH)
            out_b = _state_product(out_b, x, state_b, PRECISION)
    if TRANSPOSED:
        factor = row_delta if PRODUCT == QUERY_GRADIENT else tl.full([TILE], 1.0, tl.float32)
        present = depth > 0
        sums_a = tl.load(state_normaliser + column_a, mask=(column_a < DH) & present, other=0.0)
        out_a += factor[:, None] * sums_a[None, :]
        if CB > 0:
            sums_b = tl.load(state_normaliser + column_b, mask=(column_b < DH) & present, other=0.0)
            out_b += factor[:, None] * sums_b[None, :]
    return out_a, out_b, sums


@triton.jit
def _add_tile(
    out_a, out_b, sums, x_a, x_b, y_start, z_start, y_step, z_step, columns_left, gate, maximum, factor, inverse,
    delta, part_stride, place, fade, scale, row_high, row_low, row_weight, row_delta, on_diagonal,
    in_a, in_b, column_a, column_b, DH: tl.constexpr, KB: tl.constexpr, CB: tl.constexpr, DELTAS: tl.constexpr,
    TILE: tl.constexpr, PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add ((x @ y^T [+ delta]) * weight) @ z for one tile of streamed positions.

    Off the diagonal the weight is `row_weight` times the column's `factor` times what fades between both, `fade`.
    """
    streamed = tl.arange(0, TILE)
    present = streamed < columns_left
    place += streamed
    y_a = _load_columns(y_start, streamed, in_a, y_step, columns_left, DH)
    product = tl.dot(x_a, y_a, input_precision=PRECISION)
    if KB > 0:
        y_b = _load_columns(y_start, streamed, in_b, y_step, columns_left, DH)
        product = tl.dot(x_b, y_b, product, input_precision=PRECISION)
    if PRODUCT == QUERY_GRADIENT:
        product += row_delta[:, None]
    if PRODUCT == KEY_GRADIENT:
        product += _add_parts(delta, part_stride, place, present, DELTAS)[None, :]
    column_weight = tl.load(factor + place, mask=present, other=0.0) * fade
    if on_diagonal:
        if PRODUCT >= KEY_GRADIENT:
            high = tl.load(maximum + place, mask=present, other=0.0)
            low = tl.load(maximum + part_stride + place, mask=present, other=0.0)
            over = tl.load(inverse + place, mask=present, other=0.0) * scale
            weight = over[None, :] * _diagonal_weight(
                row_high[:, None], row_low[:, None], high[None, :], low[None, :], streamed[:, None], streamed[None, :]
            )
        else:
            high = tl.load(gate + place, mask=present, other=0.0)
            low = tl.load(gate + part_stride + place, mask=present, other=0.0)
            weight = scale * _diagonal_weight(
                high[None, :], low[None, :], row_high[:, None], row_low[:, None], streamed[None, :], streamed[:, None]
            )
    else:
        weight = row_weight[:, None] * column_weight[None, :]
    product *= weight
    if PRODUCT == OUTPUT:
        sums += tl.sum(product, 1)
    z_a = _load_rows(z_start, streamed, column_a, z_step, columns_left, DH)
    product = product.to(z_a.dtype)
    out_a = tl.dot(product, z_a, out_a, input_precision=PRECISION)
    if CB > 0:
        z_b = _load_rows(z_start, streamed, column_b, z_step, columns_left, DH)
        out_b = tl.dot(product, z_b, out_b, input_precision=PRECISION)
    return out_a, out_b, sums


@triton.jit(
    do_not_specialize=[
        'x_batch', 'x_head', 'x_row', 'y_batch', 'y_head', 'y_row', 'z_batch', 'z_head', 'z_row',
        'o_batch', 'o_head', 'o_row', 'p_batch', 'p_head', 'p_row', 'total_heads', 'heads', 'length', 'chunks',
        'scale', 'eps',
    ]
)  # fmt: skip
def product_kernel(
    x, y, z, out, partner, states, state_normalisers, gate, maximum, write, read, border, stabiliser, normaliser,
    inverse, delta, row_dot, x_batch, x_head, x_row, y_batch, y_head, y_row, z_batch, z_head, z_row,
    o_batch, o_head, o_row, p_batch, p_head, p_row, total_heads, heads, length, chunks, scale, eps,
    DH: tl.constexpr, KA: tl.constexpr, KB: tl.constexpr, CA: tl.constexpr, CB: tl.constexpr, SPLIT: tl.constexpr,
    DELTAS: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, BK: tl.constexpr, PRODUCT: tl.constexpr,
    REVERSE: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One of the four products: a tile of rows of `out`, of which SPLIT programs hold CA + CB columns each.

    `x @ y^T` is summed in pieces KA + KB >= DH (in steps of BK where y is a state). `partner` is what the rows of `out`
    are multiplied with for the gradients of the gates. For gradients of k and v, `read` is the stored read / d.
    """
    MIRRORED: tl.constexpr = PRODUCT >= KEY_GRADIENT
    WITH_DELTA: tl.constexpr = (PRODUCT == QUERY_GRADIENT) | (PRODUCT == KEY_GRADIENT)
    block = tl.program_id(0) % SPLIT
    tiles = tl.cdiv(length, TILE)
    head = tl.program_id(0) // (SPLIT * tiles)
    tile = tl.program_id(0) // SPLIT % tiles
    first = tile * TILE
    chunk = first // CHUNK
    left = length - first
    offset = head.to(tl.int64) * length
    rows = tl.arange(0, TILE)
    known = rows < left
    position = offset + first + rows
    x_step = -x_row * UNIT if REVERSE else x_row * UNIT
    y_step = -y_row * UNIT if REVERSE else y_row * UNIT
    z_step = -z_row * UNIT if REVERSE else z_row * UNIT
    x_start = _row_start(_head_start(x, head, heads, x_batch, x_head, UNIT), first, length, x_row * UNIT, REVERSE)
    y_base = _head_start(y, head, heads, y_batch, y_head, UNIT)
    z_base = _head_start(z, head, heads, z_batch, z_head, UNIT)
    in_a = tl.arange(0, KA)
    in_b = KA + tl.arange(0, KB) if KB > 0 else in_a
    x_a = _load_rows(x_start, rows, in_a, x_step, left, DH)
    x_b = _load_rows(x_start, rows, in_b, x_step, left, DH) if KB > 0 else x_a

    borders = border + head * (tiles + 1)
    part_stride = total_heads.to(tl.int64) * length
    own, factor = (gate, read) if MIRRORED else (maximum, write)
    row_high = tl.load(own + position, mask=known, other=0.0)
    row_low = tl.load(own + part_stride + position, mask=known, other=0.0)
    if MIRRORED:
        row_weight = tl.load(write + position, mask=known, other=0.0)
        reference = tl.load(borders + tile + 1)
        after = tl.minimum((chunk + 1) * (CHUNK // TILE), tiles)
        carry = _weight(reference - tl.load(borders + after)) * scale * row_weight
        depth = tl.where(chunk == chunks - 1, 0, DH)
        stream_from, stream_to = first, tl.minimum(chunk * CHUNK + CHUNK, length)
    else:
        row_weight = tl.load(read + position, mask=known, other=0.0)
        reference = tl.load(borders + tile)
        carry = _weight(tl.load(borders + chunk * (CHUNK // TILE)) - reference) * scale * row_weight
        depth = tl.where(chunk == 0, 0, DH)
        stream_from, stream_to = chunk * CHUNK, tl.minimum(first + TILE, length)
    row_delta = _add_parts(delta, part_stride, position, known, DELTAS) if PRODUCT == QUERY_GRADIENT else rows

    column_a = block * (CA + CB) + tl.arange(0, CA)
    column_b = block * (CA + CB) + CA + tl.arange(0, CB) if CB > 0 else column_a
    state_index = head * chunks + chunk
    out_a, out_b, sums = _from_state(
        x_start, x_step, rows, left, states + state_index.to(tl.int64) * DH * DH, state_normalisers + state_index * DH,
        row_delta, column_a, column_b, depth, DH, CA, CB, TILE, BK, PRODUCT, PRECISION,
    )  # fmt: skip
    out_a *= carry[:, None]
    sums *= carry
    if CB > 0:
        out_b *= carry[:, None]
    for start in range(stream_from, stream_to, TILE):
        there = tl.load(borders + start // TILE + (0 if MIRRORED else 1))
        fade = _weight(reference - there if MIRRORED else there - reference) * scale
        out_a, out_b, sums = _add_tile(
            out_a, out_b, sums, x_a, x_b, _row_start(y_base, start, length, y_row * UNIT, REVERSE),
            _row_start(z_base, start, length, z_row * UNIT, REVERSE), y_step, z_step, length - start,
            gate, maximum, factor, inverse, delta, part_stride, offset + start, fade, scale, row_high, row_low,
            row_weight, row_delta, start == first, in_a, in_b, column_a, column_b, DH, KB, CB, DELTAS, TILE, PRODUCT,
            PRECISION,
        )  # fmt: skip

    if PRODUCT == OUTPUT:
        over, _ = _inverse_denominator(sums, tl.load(stabiliser + position, mask=known, other=0.0), eps)
        tl.store(normaliser + position, sums, mask=known & (block == 0))
    elif PRODUCT == QUERY_GRADIENT:
        over = tl.load(inverse + position, mask=known, other=0.0)
    else:
        over = tl.full([TILE], 1.0, tl.float32)
    o_start = _row_start(_head_start(out, head, heads, o_batch, o_head, UNIT), first, length, o_row * UNIT, REVERSE)
    o_step = -o_row * UNIT if REVERSE else o_row * UNIT
    p_start = _row_start(_head_start(partner, head, heads, p_batch, p_head, UNIT), first, length, p_row * UNIT, REVERSE)
    p_step = -p_row * UNIT if REVERSE else p_row * UNIT
    out_a *= over[:, None]
    _store_rows(o_start, rows, column_a, o_step, left, out_a, DH)
    if WITH_DELTA:
        dots = tl.sum(out_a * _load_rows(p_start, rows, column_a, p_step, left, DH).to(tl.float32), 1)
    if CB > 0:
        out_b *= over[:, None]
        _store_rows(o_start, rows, column_b, o_step, left, out_b, DH)
        if WITH_DELTA:
            dots += tl.sum(out_b * _load_rows(p_start, rows, column_b, p_step, left, DH).to(tl.float32), 1)
    if WITH_DELTA:
        tl.store(row_dot + part_stride * block + position, dots, mask=known)
