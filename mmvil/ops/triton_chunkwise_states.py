"""Device code of the chunkwise mLSTM: gate scans, states between chunks, gradients of the gates.

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
factors <= 1 and need no rescaling.
"""

import triton
import triton.language as tl

from .triton_gates import inverse_denominator, larger, log_sigmoid

NEGLIGIBLE = tl.constexpr(-1e30)
"""Stands for minus infinity: differences with it stay finite in float64, and exp of them is 0."""
GATE_FLOOR = tl.constexpr(-1e5)
"""Lowest log gate: a gate of -inf forgets everything without leaving the numbers."""
BORDER_BLOCK = tl.constexpr(256)
"""Tiles looked at together when the gates of earlier tiles are summed."""


@triton.jit
def clamped_exp(exponent):
    """Compute exp of a float64 difference that is at most 0 but for rounding."""
    return tl.exp(tl.minimum(exponent.to(tl.float32), 0.0))


@triton.jit
def load_gates(igate, fgate, head, start, length, TILE: tl.constexpr, REVERSE: tl.constexpr):
    """Load log input gates and log forget gates of a tile as float64; outside of the sequence nothing is written."""
    position = start + tl.arange(0, TILE)
    inside = position < length
    row = length - 1 - position if REVERSE else position
    offset = head.to(tl.int64) * length + row
    write = tl.maximum(tl.load(igate + offset, mask=inside, other=0.0), GATE_FLOOR)
    forget = tl.maximum(log_sigmoid(tl.load(fgate + offset, mask=inside, other=0.0)), GATE_FLOOR)
    write = tl.where(inside, write.to(tl.float64), NEGLIGIBLE)
    return write, tl.where(inside, forget, 0.0).to(tl.float64), inside


@triton.jit(do_not_specialize=['length', 'tiles'])
def gate_sum_kernel(igate, fgate, totals, peaks, length, tiles, TILE: tl.constexpr, REVERSE: tl.constexpr):
    """Per tile: sum of the log forget gates, and maximum of g counted from the tile's start."""
    program = tl.program_id(0)
    write, forget, _ = load_gates(igate, fgate, program // tiles, program % tiles * TILE, length, TILE, REVERSE)
    tl.store(totals + program, tl.sum(forget, 0))
    tl.store(peaks + program, tl.max(write - tl.cumsum(forget, 0), 0))


@triton.jit
def store_split(base, stride, offset, value, inside):
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

    inputs, forget, inside = load_gates(igate, fgate, head, tile * TILE, length, TILE, REVERSE)
    decay = decay_before + tl.cumsum(forget, 0)
    g = inputs - decay
    highest = tl.maximum(tl.associative_scan(g, 0, larger), peak_before)
    after = tl.maximum(tl.max(g, 0), peak_before)
    stride = total_heads.to(tl.int64) * length
    offset = head.to(tl.int64) * length + tile * TILE + tl.arange(0, TILE)
    store_split(gate, stride, offset, g - after, inside)
    store_split(maximum, stride, offset, highest - after, inside)
    tl.store(write + offset, clamped_exp(g - after), mask=inside)
    tl.store(read + offset, clamped_exp(peak_before - highest), mask=inside)
    tl.store(stabiliser + offset, (decay + highest).to(tl.float32), mask=inside)
    borders = border + head * (tiles + 1) + tile
    tl.store(borders, peak_before, mask=tile == 0)
    tl.store(borders + 1, after)


@triton.jit
def row_start(base, position, length, stride, REVERSE: tl.constexpr):
    """Address of the row of a position; 64 bits, since long sequences pass 2^31 elements."""
    row = length - 1 - position if REVERSE else position
    return base + row.to(tl.int64) * stride


@triton.jit
def load_rows(base, rows, columns, step, rows_left, DH: tl.constexpr, WHOLE: tl.constexpr, EXACT: tl.constexpr):
    """Load [rows, columns] of a tile whose first row is at base; 0 beyond the last row and column.

    WHOLE: no row is beyond the end, EXACT: no column is. Both need no mask.
    """
    pointers = base + rows[:, None] * step + columns[None, :]
    if WHOLE and EXACT:
        return tl.load(pointers)
    elif EXACT:
        return tl.load(pointers, mask=(rows < rows_left)[:, None], other=0.0)
    elif WHOLE:
        return tl.load(pointers, mask=(columns < DH)[None, :], other=0.0)
    else:
        return tl.load(pointers, mask=(rows < rows_left)[:, None] & (columns < DH)[None, :], other=0.0)


@triton.jit
def load_columns(base, rows, columns, step, rows_left, DH: tl.constexpr, WHOLE: tl.constexpr, EXACT: tl.constexpr):
    """Load a tile like `load_rows`, but transposed: [columns, rows]."""
    pointers = base + rows[None, :] * step + columns[:, None]
    if WHOLE and EXACT:
        return tl.load(pointers)
    elif EXACT:
        return tl.load(pointers, mask=(rows < rows_left)[None, :], other=0.0)
    elif WHOLE:
        return tl.load(pointers, mask=(columns < DH)[:, None], other=0.0)
    else:
        return tl.load(pointers, mask=(rows < rows_left)[None, :] & (columns < DH)[:, None], other=0.0)


@triton.jit
def store_rows(base, rows, columns, step, rows_left, values, DH: tl.constexpr):
    """Write [rows, columns] of a tile whose first row is at base, in base's dtype."""
    mask = (rows[:, None] < rows_left) & (columns[None, :] < DH)
    tl.store(base + rows[:, None] * step + columns[None, :], values.to(base.dtype.element_ty), mask=mask)


@triton.jit
def head_start(base, program, heads, batch_stride, head_stride, UNIT: tl.constexpr):
    """Address of one head of one image. Strides come in units of UNIT elements, so that alignment is known."""
    batch, head = (program // heads).to(tl.int64), (program % heads).to(tl.int64)
    return base + (batch * batch_stride + head * head_stride) * UNIT


@triton.jit
def round_to_tf32(x):
    """Round float32 to the nearest TF32; tensor cores cut the digits that they do not read off."""
    rounded = ((x.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)
    return tl.where(x == x, rounded, x)  # the carry of a NaN may run over


@triton.jit
def outer_product(accumulator, left, scaled, PRECISION: tl.constexpr):
    """Add left^T @ scaled to the accumulator; rows are tokens, scaled is float32.

    States of float16 sequences exceed float16: both sides are multiplied as TF32, which holds float16's digits exactly.
    """
    if left.dtype == tl.float16:
        return tl.dot(tl.trans(left.to(tl.float32)), round_to_tf32(scaled), accumulator, input_precision='tf32')
    return tl.dot(tl.trans(left), scaled.to(left.dtype), accumulator, input_precision=PRECISION)


@triton.jit
def weighted_sum(accumulator, left, weight, PRECISION: tl.constexpr):
    """Add left^T @ weight as the sum of the accumulator's 16 columns, which tensor cores need.

    The first holds the weight rounded to bfloat16, whose range is that of float32, the second what is left over.
    """
    column = tl.arange(0, 16)[None, :]
    high = weight.to(tl.bfloat16).to(tl.float32)
    split = tl.where(column == 0, high[:, None], tl.where(column == 1, (weight - high)[:, None], 0.0))
    return outer_product(accumulator, left, split, PRECISION)


@triton.jit
def store_state(base, rows, columns, state, DH: tl.constexpr):
    """Write a block of a state, in base's dtype."""
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
    DH: tl.constexpr, RA: tl.constexpr, RB: tl.constexpr, ROW_SPLIT: tl.constexpr, CA: tl.constexpr, CB: tl.constexpr,
    SPLIT: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, STREAM: tl.constexpr, BACKWARD: tl.constexpr,
    REVERSE: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What one chunk adds to the state after it (k v^T), or to the gradient of the state before it (q dh^T).

    ROW_SPLIT * SPLIT programs hold RA + RB rows and CA + CB columns of it each, and read STREAM tokens at a time.
    Backward, delta and 1 / d are made on the way: each program of the first rows sums delta over its own columns, whose
    readers add the parts. x is used as an operand alone and y in registers alone, for the reason in `from_state`.
    """
    EXACT_ROWS: tl.constexpr = (RA + RB) * ROW_SPLIT == DH
    EXACT: tl.constexpr = (CA + CB) * SPLIT == DH
    block = tl.program_id(0) % SPLIT
    row_block = tl.program_id(0) // SPLIT % ROW_SPLIT
    program = tl.program_id(0) // (SPLIT * ROW_SPLIT)
    head, chunk = program // chunks, program % chunks
    x_base = head_start(x, head, heads, x_batch, x_head, UNIT)
    y_base = head_start(y, head, heads, y_batch, y_head, UNIT)
    h_base = head_start(h, head, heads, h_batch, h_head, UNIT)
    x_step = -x_row * UNIT if REVERSE else x_row * UNIT
    y_step = -y_row * UNIT if REVERSE else y_row * UNIT
    h_step = -h_row * UNIT if REVERSE else h_row * UNIT
    row_offset = head.to(tl.int64) * length
    rows, in_a = tl.arange(0, STREAM), row_block * (RA + RB) + tl.arange(0, RA)
    column_a = block * (CA + CB) + tl.arange(0, CA)
    state_aa = tl.zeros([RA, CA], tl.float32)
    normaliser_a = tl.zeros([RA, 16], tl.float32)
    if CB > 0:
        column_b = block * (CA + CB) + CA + tl.arange(0, CB)
        state_ab = tl.zeros([RA, CB], tl.float32)
    if RB > 0:
        in_b = row_block * (RA + RB) + RA + tl.arange(0, RB)
        state_ba = tl.zeros([RB, CA], tl.float32)
        normaliser_b = tl.zeros([RB, 16], tl.float32)
        if CB > 0:
            state_bb = tl.zeros([RB, CB], tl.float32)

    tiles = tl.cdiv(length, TILE)
    borders = border + head * (tiles + 1)
    near = chunk * (CHUNK // TILE) if BACKWARD else tl.minimum(chunk * (CHUNK // TILE) + CHUNK // TILE, tiles)
    reference = tl.load(borders + near)
    for start in range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, length), STREAM):
        left = length - start
        inside = rows < left
        y_start = row_start(y_base, start, length, y_row * UNIT, REVERSE)
        y_a = load_rows(y_start, rows, column_a, y_step, left, DH, False, EXACT)
        if CB > 0:
            y_b = load_rows(y_start, rows, column_b, y_step, left, DH, False, EXACT)
        position = row_offset + start + rows
        if BACKWARD:
            n = tl.load(normaliser + position, mask=inside, other=0.0)
            m = tl.load(stabiliser + position, mask=inside, other=0.0)
            over, active = inverse_denominator(n, m, eps)
            read_over = tl.load(read + position, mask=inside, other=0.0) * over
            weight = clamped_exp(reference - tl.load(borders + start // TILE)) * read_over
            h_start = row_start(h_base, start, length, h_row * UNIT, REVERSE)
            h_a = load_rows(h_start, rows, column_a, h_step, left, DH, False, EXACT)
            product = tl.sum(y_a.to(tl.float32) * h_a.to(tl.float32), 1)
            if CB > 0:
                h_b = load_rows(h_start, rows, column_b, h_step, left, DH, False, EXACT)
                product += tl.sum(y_b.to(tl.float32) * h_b.to(tl.float32), 1)
            slope = tl.where(active, tl.where(n > 0, -product, product), 0.0)
            tl.store(
                delta + block.to(tl.int64) * total_heads * length + position, slope, mask=inside & (row_block == 0)
            )
            is_first = inside & (block == 0) & (row_block == 0)
            tl.store(inverse + position, over, mask=is_first)
            tl.store(read_inverse + position, read_over, mask=is_first)
        else:
            fade = clamped_exp(tl.load(borders + start // TILE + 1) - reference)
            weight = tl.load(write + position, mask=inside, other=0.0) * fade
            slope = tl.full([STREAM], 1.0, tl.float32)

        x_start = row_start(x_base, start, length, x_row * UNIT, REVERSE)
        x_a = load_rows(x_start, rows, in_a, x_step, left, DH, False, EXACT_ROWS)
        y_a = y_a.to(tl.float32) * weight[:, None]
        normaliser_a = weighted_sum(normaliser_a, x_a, weight * slope, PRECISION)
        state_aa = outer_product(state_aa, x_a, y_a, PRECISION)
        if CB > 0:
            y_b = y_b.to(tl.float32) * weight[:, None]
            state_ab = outer_product(state_ab, x_a, y_b, PRECISION)
        if RB > 0:
            x_b = load_rows(x_start, rows, in_b, x_step, left, DH, False, EXACT_ROWS)
            normaliser_b = weighted_sum(normaliser_b, x_b, weight * slope, PRECISION)
            state_ba = outer_product(state_ba, x_b, y_a, PRECISION)
            if CB > 0:
                state_bb = outer_product(state_bb, x_b, y_b, PRECISION)

    base = states + program.to(tl.int64) * DH * DH
    part = block if BACKWARD else 0
    normaliser_base = state_normalisers + (part.to(tl.int64) * total_heads * chunks + program) * DH
    stored = block == 0 or BACKWARD
    store_state(base, in_a, column_a, state_aa, DH)
    tl.store(normaliser_base + in_a, tl.sum(normaliser_a, 1), mask=(in_a < DH) & stored)
    if CB > 0:
        store_state(base, in_a, column_b, state_ab, DH)
    if RB > 0:
        store_state(base, in_b, column_a, state_ba, DH)
        tl.store(normaliser_base + in_b, tl.sum(normaliser_b, 1), mask=(in_b < DH) & stored)
        if CB > 0:
            store_state(base, in_b, column_b, state_bb, DH)


@triton.jit
def border_decay(borders, chunk, tiles, PER_CHUNK: tl.constexpr):
    """Compute exp(R[c] - R[c+1])."""
    after = tl.minimum(chunk * PER_CHUNK + PER_CHUNK, tiles)
    return clamped_exp(tl.load(borders + chunk * PER_CHUNK) - tl.load(borders + after))


@triton.jit(do_not_specialize=['total_heads', 'chunks', 'tiles'])
def state_scan_kernel(
    states, state_normalisers, other_states, other_normalisers, border, crossing, total_heads, chunks, tiles,
    PER_CHUNK: tl.constexpr, STATE: tl.constexpr, DH: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
    WIDTH: tl.constexpr, PARTS: tl.constexpr, BACKWARD: tl.constexpr, TF32: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Replace each chunk's contribution by the state before it, or by the gradient of the state after it, in place.

    The last of the BLOCKS + 1 programs of a head carries the normaliser, whose PARTS it adds. Backward, `crossing`
    receives at c this block's share of the products <C[c], gradient of C[c]>: what the gates at the border are due.
    TF32: states are multiplied as such, and stored rounded to it.
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
            keep = border_decay(borders, chunk, tiles, PER_CHUNK)
            kept = round_to_tf32(carried) if TF32 else carried
            tl.store(states + address, kept.to(states.dtype.element_ty), mask=inside)
            carried = keep * carried + added
            if BACKWARD:
                other = tl.load(other_states + address, mask=inside, other=0.0).to(tl.float32)
                share = tl.sum(tl.where(inside, carried * other, 0.0), 0)
                tl.store(crossing + (head * chunks + chunk) * (BLOCKS + 1) + block, share)
    else:
        column = tl.arange(0, WIDTH)
        known = column < DH
        sums = tl.zeros([WIDTH], tl.float32)
        # All programs pay for this one's shared memory.
        LOADS: tl.constexpr = STAGES if PARTS * WIDTH <= 1024 else 2 if PARTS * WIDTH <= 8192 else 1
        for step in tl.range(0, chunks, num_stages=LOADS):
            chunk = chunks - 1 - step if BACKWARD else step
            address = (head.to(tl.int64) * chunks + chunk) * DH + column
            added = tl.load(state_normalisers + address, mask=known, other=0.0)
            for part in tl.static_range(1, PARTS):
                shifted = address + total_heads.to(tl.int64) * chunks * DH * part
                added += tl.load(state_normalisers + shifted, mask=known, other=0.0)
            keep = border_decay(borders, chunk, tiles, PER_CHUNK)
            tl.store(state_normalisers + address, sums, mask=known)
            sums = keep * sums + added
            if BACKWARD:
                other = tl.load(other_normalisers + address, mask=known, other=0.0)
                share = tl.sum(sums * other, 0)
                tl.store(crossing + (head * chunks + chunk) * (BLOCKS + 1) + block, share)


@triton.jit(do_not_specialize=['left', 'steps', 'tiles'])
def segment_scan_kernel(
    segment_states, border, left, steps, tiles, SPLIT: tl.constexpr, STATE: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Replace what each of `left` segments of `steps` tiles adds to the state by the state after it, in place.

    States of a head and segment are SPLIT parts of STATE elements; a program carries BLOCK of them.
    """
    BLOCKS: tl.constexpr = SPLIT * STATE // BLOCK
    head = tl.program_id(0) // BLOCKS
    element = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    places = segment_states + head.to(tl.int64) * left * (SPLIT * STATE) + element
    borders = border + head * (tiles + 1)
    carried = tl.zeros([BLOCK], tl.float32)
    for segment in tl.range(0, left, num_stages=STAGES):
        keep = clamped_exp(tl.load(borders + segment * steps) - tl.load(borders + segment * steps + steps))
        carried = keep * carried + tl.load(places).to(tl.float32)
        tl.store(places, carried.to(segment_states.dtype.element_ty))
        places += SPLIT * STATE


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
