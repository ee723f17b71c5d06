"""Device code of a ViL block's backward pass through its convolution; names as in `block_backward_kernels.py`.

Tokens are walked in strips: of a grid some quads of neighbouring columns by ROWS rows; of a sequence, which has a
causal 1-D convolution, ROWS rows of BW tokens. Each program writes one row of partial sums: taps (E, TAPS), bias (E)
and da (E).
"""

import triton
import triton.language as tl

__all__ = ['conv1d_backward_kernel', 'conv2d_backward_kernel']


@triton.jit
def _load_shifted(ptr, stride, t, channel, S, E):
    """Tile (BW, BC) of a token-major tensor at places t, zero outside of the sequence."""
    valid = (t >= 0) & (t < S)
    return tl.load(
        ptr + t.to(tl.int64)[:, None] * stride + channel[None, :],
        mask=valid[:, None] & (channel < E)[None, :],
        other=0.0,
    )


@triton.jit
def _load_four(ptr, stride, t, first, channel, S, E):
    """Tiles at the four successive places that a causal convolution sees, float32."""
    t0 = _load_shifted(ptr, stride, t + first, channel, S, E).to(tl.float32)
    t1 = _load_shifted(ptr, stride, t + first + 1, channel, S, E).to(tl.float32)
    t2 = _load_shifted(ptr, stride, t + first + 2, channel, S, E).to(tl.float32)
    t3 = _load_shifted(ptr, stride, t + first + 3, channel, S, E).to(tl.float32)
    return t0, t1, t2, t3


@triton.jit
def _tap(w_ptr, channel, E, last, TAPS: tl.constexpr, i: tl.constexpr):
    """Tap i of the depthwise weights (E, TAPS), (1, BC) float32; `last` is TAPS - 1 to count from the end, else 0."""
    place = channel * TAPS + tl.where(last > 0, last - i, i)
    return tl.load(w_ptr + place, mask=channel < E, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _store_tap(sums_ptr, tile, channel, E, last, TAPS: tl.constexpr, i: tl.constexpr):
    """Sum of a tile over its tokens, written where `_tap` reads."""
    tl.store(sums_ptr + channel * TAPS + tl.where(last > 0, last - i, i), tl.sum(tile, 0), mask=channel < E)


@triton.jit
def _load_da(a_ptr, a_row, da_ptr, da_row, batch, t, mask, channel, S):
    """Tiles of a and of what is in da, in their own type."""
    n = (batch * S + t)[:, None]
    a = tl.load(a_ptr + n * a_row + channel[None, :], mask=mask, other=0.0)
    return a, tl.load(da_ptr + n * da_row + channel[None, :], mask=mask, other=0.0)


@triton.jit
def _inside(channel, E: tl.constexpr, BC: tl.constexpr):
    """Channels that exist, (1, BC). A constant if all do, written as one that also the oldest interpreters know."""
    inside = channel < E
    if E % BC == 0:
        inside = inside | (channel >= E)
    return inside[None, :]


@triton.jit
def _tap_tile(w_ptr, channel, E, last, QUADS: tl.constexpr, BC: tl.constexpr, i: tl.constexpr):
    """`_tap` of nine as a tile (QUADS, BC), so that it comes in the activations' layout."""
    channel = tl.broadcast_to(channel[None, :], (QUADS, BC))
    return tl.load(w_ptr + channel * 9 + tl.where(last > 0, last - i, i), mask=channel < E, other=0.0).to(tl.float32)


@triton.jit
def _three_taps(w_ptr, channel, E, last, QUADS: tl.constexpr, BC: tl.constexpr, first: tl.constexpr):
    """Three taps of one kernel row."""
    return (
        _tap_tile(w_ptr, channel, E, last, QUADS, BC, first),
        _tap_tile(w_ptr, channel, E, last, QUADS, BC, first + 1),
        _tap_tile(w_ptr, channel, E, last, QUADS, BC, first + 2),
    )


@triton.jit
def _load_four_columns(line, stride: tl.constexpr, width, inside):
    """Tokens of a grid row at the quads' columns."""
    return (
        tl.load(line, mask=(width > 0) & inside, other=0.0),
        tl.load(line + stride, mask=(width > 1) & inside, other=0.0),
        tl.load(line + 2 * stride, mask=(width > 2) & inside, other=0.0),
        tl.load(line + 3 * stride, mask=(width > 3) & inside, other=0.0),
    )


@triton.jit
def _floats(x0, x1, x2, x3):
    return x0.to(tl.float32), x1.to(tl.float32), x2.to(tl.float32), x3.to(tl.float32)


@triton.jit
def _spread(left, x0, x1, x2, x3, right, w, d0, d1, d2, d3):
    """Sums for the quads' columns plus what comes from a row of dpre through a row of the kernel."""
    w0, w1, w2 = w
    return (
        d0 + left * w2 + x0 * w1 + x1 * w0,
        d1 + x0 * w2 + x1 * w1 + x2 * w0,
        d2 + x1 * w2 + x2 * w1 + x3 * w0,
        d3 + x2 * w2 + x3 * w1 + right * w0,
    )


@triton.jit
def _correlate(left, x0, x1, x2, x3, right, a0, a1, a2, a3, s0, s1, s2):
    """Sums for a row of the kernel plus what comes from a row of dpre and the row of a that it read through these."""
    return (
        s0 + x1 * a0 + x2 * a1 + x3 * a2 + right * a3,
        s1 + x0 * a0 + x1 * a1 + x2 * a2 + x3 * a3,
        s2 + left * a0 + x0 * a1 + x1 * a2 + x2 * a3,
    )


@triton.jit(do_not_specialize=['B', 'GH', 'GW', 'ROWS', 'row_blocks', 'images', 'last', 'pitch'])
def conv2d_backward_kernel(
    a_ptr, dpre_ptr, conv_ptr, da_ptr, sums_ptr, B, GH, GW, ROWS, row_blocks, images, last, pitch,
    E: tl.constexpr, A_ROW: tl.constexpr, DA_ROW: tl.constexpr, QUADS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """da += transposed 3 x 3 convolution of dpre; writes a convolution row.

    A strip is QUADS times four neighbouring columns, counted through `images` images, by ROWS rows. A program walks
    down its strip in these images, in the next `images` and so on, without a break: between two strips it only passes
    rows that hold zeros. A row x of dpre is added to the sums for the three rows of da that it comes to and multiplied
    with the same rows of a: it is converted once and not kept. All loads run a row ahead of their use.

    Strides are constants, as addresses are then too: this kernel has few registers to spare. The last images come first
    as those written by the kernels before may still be in the cache.
    """
    dtype = da_ptr.dtype.element_ty
    parts = (E + BC - 1) // BC
    channel = tl.program_id(0) % parts * BC + tl.arange(0, BC)
    strip = tl.program_id(0) // parts
    inside = _inside(channel, E, BC)
    first_row = strip % row_blocks * ROWS
    rows = tl.minimum(ROWS, GH - first_row)
    # Places 1 .. rows of a period are the strip's rows, 0 is the row above; that below is one more, or the next 0.
    period = rows + tl.where(row_blocks > 1, 2, 1)
    quads = (GW + 3) // 4
    quad = strip // row_blocks * QUADS + tl.arange(0, QUADS)
    col, batch = quad % quads * 4, B - 1 - quad // quads
    rounds = tl.cdiv(B, images)
    own_rounds = tl.where(quad < quads * images, tl.cdiv(batch + 1, images), 0)[:, None]
    before, width = col[:, None], (GW - col)[:, None]
    token = ((batch.to(tl.int64) * GH + first_row - 1) * GW + col)[:, None]
    line = dpre_ptr + token * E + channel[None, :]
    a_line = a_ptr + (token + GW) * A_ROW + channel[None, :]
    da_line = da_ptr + (token + GW) * DA_ROW + channel[None, :]
    jump = -(images.to(tl.int64) * GH + period - 1) * GW
    target = da_ptr + (token - jump) * DA_ROW + channel[None, :]
    live = (first_row > 0) & (own_rounds > 0)
    columns = tl.where(live, width, 0)
    left = tl.load(line - E, mask=(tl.where(live, before, 0) > 0) & inside, other=0.0)
    x0, x1, x2, x3 = _load_four_columns(line, E, columns, inside)
    right = tl.load(line + 4 * E, mask=(columns > 4) & inside, other=0.0)
    columns = tl.where(own_rounds > 0, width, 0)
    c0, c1, c2, c3 = _load_four_columns(a_line, A_ROW, columns, inside)
    f0, f1, f2, f3 = _load_four_columns(da_line, DA_ROW, columns, inside)
    upper = _three_taps(conv_ptr, channel, E, last, QUADS, BC, 0)
    middle = _three_taps(conv_ptr, channel, E, last, QUADS, BC, 3)
    lower = _three_taps(conv_ptr, channel, E, last, QUADS, BC, 6)
    left, right = left.to(tl.float32), right.to(tl.float32)
    x0, x1, x2, x3 = _floats(x0, x1, x2, x3)
    c0, c1, c2, c3 = _floats(c0, c1, c2, c3)
    f0, f1, f2, f3 = _floats(f0, f1, f2, f3)
    # Triton does not carry a variable around a loop that holds the very tensor after the body that it held before: if a
    # and b were one tensor at first, a would never change.
    zero, none = tl.zeros((QUADS, BC), tl.float32), tl.zeros((QUADS, BC), tl.float32)
    a0, a1, a2, a3, b0, b1, b2, b3 = zero, zero, zero, zero, none, none, none, none
    d0, d1, d2, d3, e0, e1, e2, e3 = zero, zero, zero, zero, zero, zero, zero, zero
    s0, s1, s2, s3, s4, s5, s6, s7, s8 = zero, zero, zero, zero, zero, zero, zero, zero, zero
    dbias, dasum = zero, zero
    place, turn = 0 * rows, 0 * rows  # not Python's numbers: old interpreters cannot mix their comparisons with others
    for _ in range(rounds * period + 1):
        # x is the row of dpre at `place`; a and d are the rows before it, b and e the same, c and f the next ones.
        wraps = place + 1 == period
        place1, turn1 = tl.where(wraps, 0, place + 1), tl.where(wraps, turn + 1, turn)
        line += tl.where(wraps, jump, GW) * E
        row = first_row + place1 - 1
        live = tl.where((row >= 0) & (row < GH), turn1, rounds) < own_rounds
        columns = tl.where(live, width, 0)
        next_left = tl.load(line - E, mask=(tl.where(live, before, 0) > 0) & inside, other=0.0)
        n0, n1, n2, n3 = _load_four_columns(line, E, columns, inside)
        next_right = tl.load(line + 4 * E, mask=(columns > 4) & inside, other=0.0)
        wraps = place1 + 1 == period
        place2, turn2 = tl.where(wraps, 0, place1 + 1), tl.where(wraps, turn1 + 1, turn1)
        step = tl.where(wraps, jump, GW)
        a_line += step * A_ROW
        da_line += step * DA_ROW
        live = tl.where((place2 >= 1) & (place2 <= rows), turn2, rounds) < own_rounds
        columns = tl.where(live, width, 0)
        g0, g1, g2, g3 = _load_four_columns(a_line, A_ROW, columns, inside)
        h0, h1, h2, h3 = _load_four_columns(da_line, DA_ROW, columns, inside)
        d0, d1, d2, d3 = _spread(left, x0, x1, x2, x3, right, upper, d0, d1, d2, d3)
        ended = tl.where(place == 0, tl.where((row_blocks == 1) & (turn > 0), turn - 1, rounds), turn)
        live = tl.where(place == 1, rounds, ended) < own_rounds
        columns = tl.where(live, width, 0)
        has0, has1, has2, has3 = columns > 0, columns > 1, columns > 2, columns > 3
        tl.store(target, d0.to(dtype), mask=has0 & inside)
        tl.store(target + DA_ROW, d1.to(dtype), mask=has1 & inside)
        tl.store(target + 2 * DA_ROW, d2.to(dtype), mask=has2 & inside)
        tl.store(target + 3 * DA_ROW, d3.to(dtype), mask=has3 & inside)
        target += tl.where(place == 0, jump, GW) * DA_ROW
        dasum += tl.where(has0, d0, 0.0) + tl.where(has1, d1, 0.0)
        dasum += tl.where(has2, d2, 0.0) + tl.where(has3, d3, 0.0)
        dbias += tl.where((place >= 1) & (place <= rows), x0 + x1 + x2 + x3, 0.0)
        d0, d1, d2, d3 = _spread(left, x0, x1, x2, x3, right, middle, e0, e1, e2, e3)
        e0, e1, e2, e3 = _spread(left, x0, x1, x2, x3, right, lower, f0, f1, f2, f3)
        s0, s1, s2 = _correlate(left, x0, x1, x2, x3, right, a0, a1, a2, a3, s0, s1, s2)
        s3, s4, s5 = _correlate(left, x0, x1, x2, x3, right, b0, b1, b2, b3, s3, s4, s5)
        s6, s7, s8 = _correlate(left, x0, x1, x2, x3, right, c0, c1, c2, c3, s6, s7, s8)
        a0, a1, a2, a3, b0, b1, b2, b3 = b0, b1, b2, b3, c0, c1, c2, c3
        # Converted here: values of 16 bits that cross the loop's end cost moves.
        left, right = next_left.to(tl.float32), next_right.to(tl.float32)
        x0, x1, x2, x3 = _floats(n0, n1, n2, n3)
        c0, c1, c2, c3 = _floats(g0, g1, g2, g3)
        f0, f1, f2, f3 = _floats(h0, h1, h2, h3)
        place, turn = place1, turn1
    sums_ptr += strip.to(tl.int64) * pitch
    _store_tap(sums_ptr, s0, channel, E, last, 9, 0)
    _store_tap(sums_ptr, s1, channel, E, last, 9, 1)
    _store_tap(sums_ptr, s2, channel, E, last, 9, 2)
    _store_tap(sums_ptr, s3, channel, E, last, 9, 3)
    _store_tap(sums_ptr, s4, channel, E, last, 9, 4)
    _store_tap(sums_ptr, s5, channel, E, last, 9, 5)
    _store_tap(sums_ptr, s6, channel, E, last, 9, 6)
    _store_tap(sums_ptr, s7, channel, E, last, 9, 7)
    _store_tap(sums_ptr, s8, channel, E, last, 9, 8)
    tl.store(sums_ptr + 9 * E + channel, tl.sum(dbias, 0), mask=channel < E)
    tl.store(sums_ptr + 10 * E + channel, tl.sum(dasum, 0), mask=channel < E)


@triton.jit(do_not_specialize=['B', 'S', 'ROWS', 'strips', 'batches', 'first', 'last', 'pitch'])
def conv1d_backward_kernel(
    a_ptr, a_row, dpre_ptr, conv_ptr, da_ptr, da_row, sums_ptr,
    B, S, E, ROWS, strips, batches, first, last, pitch, BW: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """da += transposed causal convolution of dpre; writes a convolution row. A strip is ROWS x BW tokens."""
    part = tl.program_id(0)
    strip = tl.program_id(1)
    group = tl.program_id(2)
    channel = part * BC + tl.arange(0, BC)
    inside = channel < E
    w0, w1 = _tap(conv_ptr, channel, E, last, 4, 0), _tap(conv_ptr, channel, E, last, 4, 1)
    w2, w3 = _tap(conv_ptr, channel, E, last, 4, 2), _tap(conv_ptr, channel, E, last, 4, 3)
    s0 = tl.zeros((BW, BC), tl.float32)
    s1 = tl.zeros((BW, BC), tl.float32)
    s2 = tl.zeros((BW, BC), tl.float32)
    s3 = tl.zeros((BW, BC), tl.float32)
    dbias = tl.zeros((BW, BC), tl.float32)
    dasum = tl.zeros((BW, BC), tl.float32)
    for item in range(batches):
        batch = tl.minimum(group * batches + item, B - 1).to(tl.int64)
        live = group * batches + item < B
        base = dpre_ptr + batch * S * E
        for step in range(ROWS):
            t = (strip * ROWS + step) * BW + tl.arange(0, BW)
            mask = ((t < S) & live)[:, None] & inside[None, :]
            a, da = _load_da(a_ptr, a_row, da_ptr, da_row, batch, t, mask, channel, S)
            # Token t was read through tap i by the token at t - first - i.
            d3, d2, d1, d0 = _load_four(base, E, t, -first - 3, channel, S, E)
            own = _load_shifted(base, E, t, channel, S, E).to(tl.float32)
            da = tl.where(mask, da.to(tl.float32) + d0 * w0 + d1 * w1 + d2 * w2 + d3 * w3, 0.0)
            place = (batch * S + t)[:, None] * da_row + channel[None, :]
            tl.store(da_ptr + place, da.to(da_ptr.dtype.element_ty), mask=mask)
            dasum += da
            a = a.to(tl.float32)
            s0 += d0 * a
            s1 += d1 * a
            s2 += d2 * a
            s3 += d3 * a
            dbias += tl.where(mask, own, 0.0)
    sums_ptr += (group * strips + strip).to(tl.int64) * pitch
    _store_tap(sums_ptr, s0, channel, E, last, 4, 0)
    _store_tap(sums_ptr, s1, channel, E, last, 4, 1)
    _store_tap(sums_ptr, s2, channel, E, last, 4, 2)
    _store_tap(sums_ptr, s3, channel, E, last, 4, 3)
    tl.store(sums_ptr + 4 * E + channel, tl.sum(dbias, 0), mask=inside)
    tl.store(sums_ptr + 5 * E + channel, tl.sum(dasum, 0), mask=inside)
