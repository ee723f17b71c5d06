"""Device code of a ViL block's backward pass through its convolution; names as in `block_backward_kernels.py`.

Tokens are walked in strips: a strip is BW columns of the grid by ROWS rows. A causal 1-D convolution walks the sequence
as rows of BW tokens. Each program writes one row of partial sums: taps (E, TAPS), bias (E) and da (E).
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
def _weigh3(x0, x1, x2, w0, w1, w2):
    """One row of a 3 x 3 convolution, float32."""
    return x0.to(tl.float32) * w0 + x1.to(tl.float32) * w1 + x2.to(tl.float32) * w2


@triton.jit
def _tap(w_ptr, channel, E, last, TAPS: tl.constexpr, i: tl.constexpr):
    """Tap i of the depthwise weights (E, TAPS), (1, BC) float32; `last` is TAPS - 1 to count from the end, else 0."""
    place = channel * TAPS + tl.where(last > 0, last - i, i)
    return tl.load(w_ptr + place, mask=channel < E, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _three_taps(w_ptr, channel, E, last, first: tl.constexpr):
    """Three taps of one kernel row."""
    return (
        _tap(w_ptr, channel, E, last, 9, first),
        _tap(w_ptr, channel, E, last, 9, first + 1),
        _tap(w_ptr, channel, E, last, 9, first + 2),
    )


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
def _load_row_at(left, middle, right, offset, live, left_mask, mask, right_mask):
    """Tiles of a grid row, `offset` behind the pointers, at the columns before, at and behind; zero if not `live`."""
    return (
        tl.load(left + offset, mask=left_mask & live, other=0.0),
        tl.load(middle + offset, mask=mask & live, other=0.0),
        tl.load(right + offset, mask=right_mask & live, other=0.0),
    )


@triton.jit(do_not_specialize=['B', 'GH', 'GW', 'ROWS', 'row_blocks', 'strips', 'batches', 'last', 'pitch'])
def conv2d_backward_kernel(
    a_ptr, a_row, dpre_ptr, conv_ptr, da_ptr, da_row, sums_ptr,
    B, GH, GW, E, ROWS, row_blocks, strips, batches, last, pitch, BW: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """da += transposed 3 x 3 convolution of dpre; writes a convolution row. Loads run one grid row ahead of their use.

    Images are taken from the last to the first: the last ones written by the kernels before may still be in the cache.
    """
    part = tl.program_id(0)
    strip = tl.program_id(1)
    group = tl.num_programs(2) - 1 - tl.program_id(2)
    channel = part * BC + tl.arange(0, BC)
    inside = channel < E
    col = (strip // row_blocks) * BW + tl.arange(0, BW)
    first_row = (strip % row_blocks) * ROWS
    dtype = da_ptr.dtype.element_ty
    # A row of the grid is one scalar offset from these: addresses and column masks are worked out once.
    mask = (col < GW)[:, None] & inside[None, :]
    left_mask = ((col >= 1) & (col <= GW))[:, None] & inside[None, :]
    right_mask = (col + 1 < GW)[:, None] & inside[None, :]
    middle = dpre_ptr + col[:, None] * E + channel[None, :]
    a_ptrs = a_ptr + col[:, None] * a_row + channel[None, :]
    da_ptrs = da_ptr + col[:, None] * da_row + channel[None, :]
    w0, w1, w2 = _three_taps(conv_ptr, channel, E, last, 0)
    w3, w4, w5 = _three_taps(conv_ptr, channel, E, last, 3)
    w6, w7, w8 = _three_taps(conv_ptr, channel, E, last, 6)
    s0 = tl.zeros((BW, BC), tl.float32)
    s1 = tl.zeros((BW, BC), tl.float32)
    s2 = tl.zeros((BW, BC), tl.float32)
    s3 = tl.zeros((BW, BC), tl.float32)
    s4 = tl.zeros((BW, BC), tl.float32)
    s5 = tl.zeros((BW, BC), tl.float32)
    s6 = tl.zeros((BW, BC), tl.float32)
    s7 = tl.zeros((BW, BC), tl.float32)
    s8 = tl.zeros((BW, BC), tl.float32)
    dbias = tl.zeros((BW, BC), tl.float32)
    dasum = tl.zeros((BW, BC), tl.float32)
    for item in range(batches):
        batch = tl.minimum(group * batches + item, B - 1).to(tl.int64)
        live = group * batches + item < B
        token = (batch * GH + first_row) * GW  # first token of the row
        u0, u1, u2 = _load_row_at(
            middle - E, middle, middle + E, (token - GW) * E, (first_row >= 1) & live, left_mask, mask, right_mask
        )
        m0, m1, m2 = _load_row_at(middle - E, middle, middle + E, token * E, live, left_mask, mask, right_mask)
        d0, d1, d2 = _load_row_at(
            middle - E, middle, middle + E, (token + GW) * E, (first_row + 1 < GH) & live, left_mask, mask, right_mask
        )
        a = tl.load(a_ptrs + token * a_row, mask=mask & live, other=0.0)
        da = tl.load(da_ptrs + token * da_row, mask=mask & live, other=0.0)
        for step in range(ROWS):
            row = first_row + step
            below = (row + 1 < GH) & (step + 1 < ROWS) & live
            n0, n1, n2 = _load_row_at(
                middle - E, middle, middle + E, (token + 2 * GW) * E, (row + 2 < GH) & live, left_mask, mask, right_mask
            )
            a_next = tl.load(a_ptrs + (token + GW) * a_row, mask=mask & below, other=0.0)
            da_next = tl.load(da_ptrs + (token + GW) * da_row, mask=mask & below, other=0.0)
            # Token t was read by its neighbours: by the one below through the upper tap, and so on.
            da = da.to(tl.float32)
            da += _weigh3(u0, u1, u2, w8, w7, w6) + _weigh3(m0, m1, m2, w5, w4, w3) + _weigh3(d0, d1, d2, w2, w1, w0)
            own = mask & live & (row < GH)
            tl.store(da_ptrs + token * da_row, da.to(dtype), mask=own)
            dasum += tl.where(own, da, 0.0)
            a = a.to(tl.float32)
            s8 += u0.to(tl.float32) * a
            s7 += u1.to(tl.float32) * a
            s6 += u2.to(tl.float32) * a
            s5 += m0.to(tl.float32) * a
            s4 += m1.to(tl.float32) * a
            s3 += m2.to(tl.float32) * a
            s2 += d0.to(tl.float32) * a
            s1 += d1.to(tl.float32) * a
            s0 += d2.to(tl.float32) * a
            dbias += m1.to(tl.float32)
            u0, u1, u2 = m0, m1, m2
            m0, m1, m2 = d0, d1, d2
            d0, d1, d2 = n0, n1, n2
            a, da = a_next, da_next
            token += GW
    sums_ptr += (group * strips + strip).to(tl.int64) * pitch
    _store_tap(sums_ptr, s0, channel, E, last, 9, 0)
    _store_tap(sums_ptr, s1, channel, E, last, 9, 1)
    _store_tap(sums_ptr, s2, channel, E, last, 9, 2)
    _store_tap(sums_ptr, s3, channel, E, last, 9, 3)
    _store_tap(sums_ptr, s4, channel, E, last, 9, 4)
    _store_tap(sums_ptr, s5, channel, E, last, 9, 5)
    _store_tap(sums_ptr, s6, channel, E, last, 9, 6)
    _store_tap(sums_ptr, s7, channel, E, last, 9, 7)
    _store_tap(sums_ptr, s8, channel, E, last, 9, 8)
    tl.store(sums_ptr + 9 * E + channel, tl.sum(dbias, 0), mask=inside)
    tl.store(sums_ptr + 10 * E + channel, tl.sum(dasum, 0), mask=inside)


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
