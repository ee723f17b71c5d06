"""Device code of the chunkwise mLSTM: the output and the gradients of q, k and v, tile by tile.

Notation and weights are those of `triton_chunkwise_states`. With delta_t = -sign(n_t) * (h_t . dh_t), or 0 where the
floor exp(-m) is active, output and gradients are four products of one form, which `product_kernel` computes:

    h_t  = sum_{s <= t} (q_t . k_s)            w_ts v_s  / d_t
    dq_t = sum_{s <= t} (dh_t . v_s + delta_t) w_ts k_s  / d_t
    dk_s = sum_{t >= s} (v_s . dh_t + delta_t) w_ts q_t  / d_t
    dv_s = sum_{t >= s} (k_s . q_t)            w_ts dh_t / d_t          w_ts = exp(g_s - M_t) / sqrt(DH)

Positions of other chunks come in through their state, those of the row's own chunk are streamed. All of them but the
row's own tile share one factor per row, which is left to the end; only the own tile has a mask and an exponential per
weight.
"""

import triton
import triton.language as tl

from .triton_chunkwise_states import (
    clamped_exp,
    head_start,
    load_columns,
    load_rows,
    row_start,
    store_rows,
)
from .triton_gates import inverse_denominator

LOG2_E = tl.constexpr(1.4426950408889634)
OUTPUT = tl.constexpr(0)
QUERY_GRADIENT = tl.constexpr(1)
KEY_GRADIENT = tl.constexpr(2)
VALUE_GRADIENT = tl.constexpr(3)


@triton.jit
def state_product(accumulator, left, right, PRECISION: tl.constexpr):
    """Add left @ right to the accumulator, for products with states.

    States of float16 sequences exceed float16. They are kept in float32 and multiplied as TF32, which holds float16's
    digits exactly.
    """
    if left.dtype == tl.float16:
        return tl.dot(left.to(tl.float32), right.to(tl.float32), accumulator, input_precision='tf32')
    return tl.dot(left, right.to(left.dtype), accumulator, input_precision=PRECISION)


@triton.jit
def diagonal_weight(g_high, g_low, highest_high, highest_low, s, t, PAIRS: tl.constexpr):
    """Compute exp(g_s - M_t) where s <= t, else 0; the arguments are already shaped as rows and columns.

    With PAIRS the remainders keep all digits where gates are so steep that g and M are far below the tile's border, yet
    close to each other. Products of 16-bit numbers are not that exact.
    """
    if PAIRS:
        weight = tl.exp((g_high - highest_high) + (g_low - highest_low))
    else:
        weight = tl.exp2(g_high * LOG2_E - highest_high * LOG2_E)
    return tl.where(s <= t, weight, 0.0)


@triton.jit
def add_parts(base, part_stride, offset, mask, PARTS: tl.constexpr):
    """Load a sum whose PARTS lie part_stride apart."""
    total = tl.load(base + offset, mask=mask, other=0.0)
    for part in tl.static_range(1, PARTS):
        total += tl.load(base + part_stride * part + offset, mask=mask, other=0.0)
    return total


@triton.jit
def from_state(
    x_start, x_step, rows, left, state, column_a, column_b, depth, DH: tl.constexpr, CA: tl.constexpr,
    CB: tl.constexpr, TILE: tl.constexpr, BK: tl.constexpr, TRANSPOSED: tl.constexpr, EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What positions of other chunks contribute, through their state: x @ state or x @ state^T, unscaled.

    `depth` is DH, or 0 where there is no other chunk. x must not be used for anything but the product here: Triton 3.6
    then gives a pipelined operand one buffer too few, and loads overwrite it while the tensor cores still read.
    """
    EVEN: tl.constexpr = DH % BK == 0
    out_a = tl.zeros([TILE, CA], tl.float32)
    out_b = tl.zeros([TILE, CB], tl.float32) if CB > 0 else out_a
    for begin in range(0, depth, BK):
        inner = begin + tl.arange(0, BK)
        x = load_rows(x_start, rows, inner, x_step, left, DH, False, EVEN)
        if TRANSPOSED:
            state_a = load_columns(state, column_a, inner, DH, DH, DH, EXACT, EVEN)
        else:
            state_a = load_rows(state, inner, column_a, DH, DH, DH, EVEN, EXACT)
        out_a = state_product(out_a, x, state_a, PRECISION)
        if CB > 0:
            if TRANSPOSED:
                state_b = load_columns(state, column_b, inner, DH, DH, DH, EXACT, EVEN)
            else:
                state_b = load_rows(state, inner, column_b, DH, DH, DH, EVEN, EXACT)
            out_b = state_product(out_b, x, state_b, PRECISION)
    return out_a, out_b


@triton.jit
def add_normaliser(out, sums, columns, factor, present, DH: tl.constexpr):
    """Add factor * the state's normaliser to each row."""
    return out + factor[:, None] * tl.load(sums + columns, mask=(columns < DH) & present, other=0.0)[None, :]


@triton.jit
def row_product(x, sums, columns, present, DH: tl.constexpr):
    """Multiply rows x with the state's normaliser."""
    return tl.sum(x.to(tl.float32) * tl.load(sums + columns, mask=(columns < DH) & present, other=0.0)[None, :], 1)


@triton.jit
def scores(
    x_a, x_b, y_start, streamed, y_step, left, in_a, in_b, row_delta, delta, part_stride, place,
    DH: tl.constexpr, KB: tl.constexpr, DELTAS: tl.constexpr, PRODUCT: tl.constexpr, WHOLE: tl.constexpr,
    EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """x @ y^T, and delta where the product has it, for streamed rows of y."""
    y_a = load_columns(y_start, streamed, in_a, y_step, left, DH, WHOLE, EXACT)
    product = tl.dot(x_a, y_a, input_precision=PRECISION)
    if KB > 0:
        y_b = load_columns(y_start, streamed, in_b, y_step, left, DH, WHOLE, EXACT)
        product = tl.dot(x_b, y_b, product, input_precision=PRECISION)
    if PRODUCT == QUERY_GRADIENT:
        product += row_delta[:, None]
    if PRODUCT == KEY_GRADIENT:
        product += add_parts(delta, part_stride, place, streamed < left, DELTAS)[None, :]
    return product


@triton.jit
def add_product(
    out_a, out_b, sums, product, z_start, streamed, z_step, left, column_a, column_b, DH: tl.constexpr,
    CB: tl.constexpr, PRODUCT: tl.constexpr, WHOLE: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add product @ z for streamed rows of z, and the sums of product's rows."""
    if PRODUCT == OUTPUT:
        sums += tl.sum(product, 1)
    z_a = load_rows(z_start, streamed, column_a, z_step, left, DH, WHOLE, EXACT)
    product = product.to(z_a.dtype)
    out_a = tl.dot(product, z_a, out_a, input_precision=PRECISION)
    if CB > 0:
        z_b = load_rows(z_start, streamed, column_b, z_step, left, DH, WHOLE, EXACT)
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
    DELTAS: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, STREAM: tl.constexpr, BK: tl.constexpr,
    PRODUCT: tl.constexpr, SUMS: tl.constexpr, REVERSE: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One of the four products: a tile of rows of `out`, of which SPLIT programs hold CA + CB columns each.

    `x @ y^T` is summed in pieces KA + KB >= DH (in steps of BK where y is a state) for STREAM rows of y at a time.
    `partner` is what the rows of `out` are multiplied with for the gradients of the gates. For gradients of k and v,
    `read` is the stored read / d. The output's normaliser is divided by d if SUMS.
    """
    MIRRORED: tl.constexpr = PRODUCT >= KEY_GRADIENT
    WITH_DELTA: tl.constexpr = (PRODUCT == QUERY_GRADIENT) | (PRODUCT == KEY_GRADIENT)
    PAIRS: tl.constexpr = x.dtype.element_ty == tl.float32
    EXACT: tl.constexpr = KA + KB == DH
    EXACT_OUT: tl.constexpr = (CA + CB) * SPLIT == DH
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
    x_start = row_start(head_start(x, head, heads, x_batch, x_head, UNIT), first, length, x_row * UNIT, REVERSE)
    y_base = head_start(y, head, heads, y_batch, y_head, UNIT)
    z_base = head_start(z, head, heads, z_batch, z_head, UNIT)
    in_a = tl.arange(0, KA)
    in_b = KA + tl.arange(0, KB) if KB > 0 else in_a
    x_a = load_rows(x_start, rows, in_a, x_step, left, DH, False, EXACT)
    x_b = load_rows(x_start, rows, in_b, x_step, left, DH, False, EXACT) if KB > 0 else x_a

    borders = border + head * (tiles + 1)
    part_stride = total_heads.to(tl.int64) * length
    if MIRRORED:
        row_weight = tl.load(write + position, mask=known, other=0.0)
        reference = tl.load(borders + tile + 1)
        after = tl.minimum((chunk + 1) * (CHUNK // TILE), tiles)
        carry = clamped_exp(reference - tl.load(borders + after)) * scale
        depth = tl.where(chunk == chunks - 1, 0, DH)
        stream_from, stream_to = first + TILE, tl.minimum(chunk * CHUNK + CHUNK, length)
    else:
        row_weight = tl.load(read + position, mask=known, other=0.0)
        reference = tl.load(borders + tile)
        carry = clamped_exp(tl.load(borders + chunk * (CHUNK // TILE)) - reference) * scale
        depth = tl.where(chunk == 0, 0, DH)
        stream_from, stream_to = chunk * CHUNK, first
    row_delta = add_parts(delta, part_stride, position, known, DELTAS) if PRODUCT == QUERY_GRADIENT else rows

    column_a = block * (CA + CB) + tl.arange(0, CA)
    column_b = block * (CA + CB) + CA + tl.arange(0, CB) if CB > 0 else column_a
    state_index = head * chunks + chunk
    state_sums, present = state_normalisers + state_index * DH, depth > 0
    sums = tl.zeros([TILE], tl.float32)
    if PRODUCT == OUTPUT:
        sums = row_product(x_a, state_sums, in_a, present, DH)
        if KB > 0:
            sums += row_product(x_b, state_sums, in_b, present, DH)
    out_a, out_b = from_state(
        x_start, x_step, rows, left, states + state_index.to(tl.int64) * DH * DH, column_a, column_b, depth,
        DH, CA, CB, TILE, BK, WITH_DELTA, EXACT_OUT, PRECISION,
    )  # fmt: skip
    if WITH_DELTA:
        row_factor = row_delta if PRODUCT == QUERY_GRADIENT else tl.full([TILE], 1.0, tl.float32)
        out_a = add_normaliser(out_a, state_sums, column_a, row_factor, present, DH)
        if CB > 0:
            out_b = add_normaliser(out_b, state_sums, column_b, row_factor, present, DH)
    out_a *= carry
    sums *= carry
    if CB > 0:
        out_b *= carry

    streamed = tl.arange(0, STREAM)
    for start in range(stream_from, stream_to, STREAM):
        there = tl.load(borders + start // TILE + (0 if MIRRORED else 1))
        fade = clamped_exp(reference - there if MIRRORED else there - reference) * scale
        # Before the own tile every row exists; after it, rows beyond the end have factor 0.
        streamed_weight = read if MIRRORED else write
        factor = tl.load(streamed_weight + offset + start + streamed, mask=streamed < length - start, other=0.0)
        product = scores(
            x_a, x_b, row_start(y_base, start, length, y_row * UNIT, REVERSE), streamed, y_step, length - start,
            in_a, in_b, row_delta, delta, part_stride, offset + start + streamed, DH, KB, DELTAS, PRODUCT,
            not MIRRORED, EXACT, PRECISION,
        )  # fmt: skip
        product *= (factor * fade)[None, :]
        out_a, out_b, sums = add_product(
            out_a, out_b, sums, product, row_start(z_base, start, length, z_row * UNIT, REVERSE), streamed, z_step,
            length - start, column_a, column_b, DH, CB, PRODUCT, not MIRRORED, EXACT_OUT, PRECISION,
        )  # fmt: skip
    out_a *= row_weight[:, None]
    sums *= row_weight
    if CB > 0:
        out_b *= row_weight[:, None]

    own, other = (gate, maximum) if MIRRORED else (maximum, gate)
    row_high = tl.load(own + position, mask=known, other=0.0)
    row_low = tl.load(own + part_stride + position, mask=known, other=0.0)
    for start in range(first, tl.minimum(first + TILE, length), STREAM):
        inside = streamed < length - start
        place = offset + start + streamed
        high = tl.load(other + place, mask=inside, other=0.0)
        low = tl.load(other + part_stride + place, mask=inside, other=0.0)
        product = scores(
            x_a, x_b, row_start(y_base, start, length, y_row * UNIT, REVERSE), streamed, y_step, length - start,
            in_a, in_b, row_delta, delta, part_stride, place, DH, KB, DELTAS, PRODUCT, False, EXACT, PRECISION,
        )  # fmt: skip
        if MIRRORED:
            over = tl.load(inverse + place, mask=inside, other=0.0) * scale
            product *= over[None, :] * diagonal_weight(
                row_high[:, None], row_low[:, None], high[None, :], low[None, :],
                (first + rows - start)[:, None], streamed[None, :], PAIRS,
            )  # fmt: skip
        else:
            product *= scale * diagonal_weight(
                high[None, :], low[None, :], row_high[:, None], row_low[:, None],
                streamed[None, :], (first + rows - start)[:, None], PAIRS,
            )  # fmt: skip
        out_a, out_b, sums = add_product(
            out_a, out_b, sums, product, row_start(z_base, start, length, z_row * UNIT, REVERSE), streamed, z_step,
            length - start, column_a, column_b, DH, CB, PRODUCT, False, EXACT_OUT, PRECISION,
        )  # fmt: skip

    if PRODUCT == OUTPUT:
        over, _ = inverse_denominator(sums, tl.load(stabiliser + position, mask=known, other=0.0), eps)
        tl.store(normaliser + position, sums * over if SUMS else sums, mask=known & (block == 0))
    elif PRODUCT == QUERY_GRADIENT:
        over = tl.load(inverse + position, mask=known, other=0.0)
    else:
        over = tl.full([TILE], 1.0, tl.float32)
    o_start = row_start(head_start(out, head, heads, o_batch, o_head, UNIT), first, length, o_row * UNIT, REVERSE)
    o_step = -o_row * UNIT if REVERSE else o_row * UNIT
    p_start = row_start(head_start(partner, head, heads, p_batch, p_head, UNIT), first, length, p_row * UNIT, REVERSE)
    p_step = -p_row * UNIT if REVERSE else p_row * UNIT
    out_a *= over[:, None]
    store_rows(o_start, rows, column_a, o_step, left, out_a, DH)
    if WITH_DELTA:
        dots = tl.sum(out_a * load_rows(p_start, rows, column_a, p_step, left, DH, False, EXACT_OUT).to(tl.float32), 1)
    if CB > 0:
        out_b *= over[:, None]
        store_rows(o_start, rows, column_b, o_step, left, out_b, DH)
        if WITH_DELTA:
            dots += tl.sum(
                out_b * load_rows(p_start, rows, column_b, p_step, left, DH, False, EXACT_OUT).to(tl.float32), 1
            )
    if WITH_DELTA:
        tl.store(row_dot + part_stride * block + position, dots, mask=known)
