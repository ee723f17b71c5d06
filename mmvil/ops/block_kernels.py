"""What the kernels around the mLSTM cell of a ViL block share, and the kernel that lays out weights, adds, normalises.

Names, all in the kernels' own units (a token is one row of S, a channel one column of E):

    a, z     (B, S, E)       halves of the up-projection, rows 2E apart
    conv     (E, taps)       depthwise weights, already turned for the reading direction
    pre, c   (B, S, E)       conv(a) + bias, and SiLU of that; pre is what is stored
    q, k, v  (B, S, E)       block-diagonal projections of c, c and a; blocks of QB x QB
    gate     (parts, B, S, 2 NH)  partial sums of the input and forget gates, one part per block of 32 channels

Sums over tokens are written per program and added up outside, so results do not depend on the order in which programs
run. Source: Vision-LSTM (arXiv 2406.04303) section 3, with the gates as linear maps of c and a, since q, k and v are
linear in these.
"""

import triton
import triton.language as tl

from .block_norm_kernels import normalise

__all__ = ['prepare_kernel']


@triton.jit
def _block_matrix(w_ptr, first, E, QB: tl.constexpr, BC: tl.constexpr):
    """Block-diagonal (BC, BC) matrix of one projection, [in, out]."""
    i = tl.arange(0, BC)[:, None]
    o = tl.arange(0, BC)[None, :]
    return tl.load(w_ptr + (first + o) * QB + i % QB, mask=(i // QB == o // QB) & (first + o < E), other=0.0)


@triton.jit
def _gate_matrix(wi_ptr, wf_ptr, part, channel, E, HEADS: tl.constexpr, BG: tl.constexpr):
    """(BC, BG) slice of the gates' weights (HEADS, 3E), the input gates first, for q (part 0), k (1) or v (2)."""
    g = tl.arange(0, BG)[None, :]
    inside = (channel < E)[:, None]
    place = g * (3 * E) + part * E + channel[:, None]
    wi = tl.load(wi_ptr + place, mask=inside & (g < HEADS), other=0.0).to(tl.float32)
    is_forget = inside & (g >= HEADS) & (g < 2 * HEADS)
    return wi + tl.load(wf_ptr + place - HEADS * 3 * E, mask=is_forget, other=0.0).to(tl.float32)


@triton.jit
def _fold_gates(
    w_ptr, wi_ptr, wf_ptr, which: tl.constexpr, channel, E,
    QB: tl.constexpr, HEADS: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """Map from one projection's inputs to the gates, (BC, BG): its blocks times the gates' weights, without a product.

    So a program needs neither shared memory nor to wait for more than these loads.
    """
    total = tl.zeros((channel.shape[0], BG), tl.float32)
    for j in tl.static_range(QB):
        out = channel // QB * QB + j
        w = tl.load(w_ptr + out * QB + channel % QB, mask=out < E, other=0.0).to(tl.float32)
        total += w[:, None] * _gate_matrix(wi_ptr, wf_ptr, which, out, E, HEADS, BG)
    return total


@triton.jit
def _load_block(ptr, first, size, BLOCK: tl.constexpr):
    """Up to BLOCK elements of a flat array."""
    place = first + tl.arange(0, BLOCK)
    return tl.load(ptr + place, mask=place < size, other=0.0)


@triton.jit
def _store_block(ptr, first, size, value, BLOCK: tl.constexpr):
    """Write what `_load_block` gives, in the target's dtype."""
    place = first + tl.arange(0, BLOCK)
    tl.store(ptr + place, value.to(ptr.dtype.element_ty), mask=place < size)


@triton.jit
def _folded_matrix(wq_ptr, wk_ptr, first, E, QB: tl.constexpr, BC: tl.constexpr):
    """Block-diagonal (BC, BC) matrix Wk^T Wq, [in, out]."""
    i = tl.arange(0, BC)[:, None]
    o = tl.arange(0, BC)[None, :]
    total = tl.zeros((BC, BC), tl.float32)
    for j in tl.static_range(QB):
        from_i, from_o = first + i // QB * QB + j, first + o // QB * QB + j
        wq = tl.load(wq_ptr + from_i * QB + i % QB, mask=from_i < E, other=0.0).to(tl.float32)
        wk = tl.load(wk_ptr + from_o * QB + o % QB, mask=from_o < E, other=0.0).to(tl.float32)
        total += tl.where(i // QB == o // QB, wq * wk, 0.0)
    return total


@triton.jit
def _store_matrix(matrix_ptr, part, which: tl.constexpr, matrix, BC: tl.constexpr):
    """Write a matrix of a part in the order of `block_mix_kernels`."""
    i = tl.arange(0, BC)
    row = i // 4 % 2 * 16 + i // 8 % 4 * 4 + i % 4
    column = i // 4 % 2 * 16 + i // 2 % 2 * 8 + i // 8 % 4 * 2 + i % 2
    place = ((part * 3 + which) * BC * BC + row * BC)[:, None] + column[None, :]
    tl.store(matrix_ptr + place, matrix.to(matrix_ptr.dtype.element_ty))


@triton.jit
def _store_gate_matrix(gate_matrix_ptr, part, which: tl.constexpr, gate, BC: tl.constexpr, BG: tl.constexpr):
    """Write a part's map to the gates in the order of `block_mix_kernels`."""
    i = tl.arange(0, BC)
    row = i // 4 % 2 * 16 + i // 8 % 4 * 4 + i % 4
    place = ((part * 2 + which) * BC + row)[:, None] * BG + tl.arange(0, BG)[None, :]
    tl.store(gate_matrix_ptr + place, gate.to(gate_matrix_ptr.dtype.element_ty))


@triton.jit
def _bias_share(b_ptr, wi_ptr, wf_ptr, which: tl.constexpr, channel, E, HEADS: tl.constexpr, BG: tl.constexpr):
    """What one projection's bias adds to the gates, per channel, (BC, BG)."""
    bias = tl.load(b_ptr + channel, mask=channel < E, other=0.0).to(tl.float32)
    return bias[:, None] * _gate_matrix(wi_ptr, wf_ptr, which, channel, E, HEADS, BG)


@triton.jit
def _turned_bias(w_ptr, b_ptr, channel, E, QB: tl.constexpr):
    """Transposed blocks of one projection times another one's bias, per channel."""
    total = tl.zeros(channel.shape, tl.float32)
    for j in tl.static_range(QB):
        out = channel // QB * QB + j
        w = tl.load(w_ptr + out * QB + channel % QB, mask=out < E, other=0.0).to(tl.float32)
        total += w * tl.load(b_ptr + out, mask=out < E, other=0.0).to(tl.float32)
    return total


@triton.jit
def _at_scores(value, channel, E, HEADS: tl.constexpr, BG: tl.constexpr):
    """One number per channel in its head's column of scores, (BC, BG)."""
    g = tl.arange(0, BG)[None, :]
    return tl.where(g == (2 * HEADS + channel // (E // HEADS))[:, None], value[:, None], 0.0)


@triton.jit
def _store_values(part, wv_ptr, values_ptr, E, QB: tl.constexpr, BC: tl.constexpr):
    """Write a part of the blocks of Wv, (QB, QB, E / QB)."""
    channel = part * BC + tl.arange(0, BC)
    exists = channel < E
    place = values_ptr + channel % QB * E + channel // QB
    for j in tl.static_range(QB):
        w = tl.load(wv_ptr + channel * QB + j, mask=exists, other=0.0).to(tl.float32)
        tl.store(place + j * (E // QB), w, mask=exists)


@triton.jit
def _store_exact(
    part, bq_ptr, bk_ptr, bv_ptr, wi_ptr, wf_ptr, conv_ptr, constant_ptr, taps_ptr, E, TAPS: tl.constexpr,
    REVERSE: tl.constexpr, SCORES: tl.constexpr, HEADS: tl.constexpr, HAS_BIAS: tl.constexpr, BC: tl.constexpr,
    BG: tl.constexpr,
):  # fmt: skip
    """Write a part's constant and taps."""
    channel = part * BC + tl.arange(0, BC)
    tap = tl.arange(0, 16)
    turned = TAPS - 1 - tap if REVERSE else tap
    is_tap = (channel < E)[None, :] & (tap < TAPS)[:, None]
    value = tl.load(conv_ptr + channel[None, :] * TAPS + turned[:, None], mask=is_tap, other=0.0)
    constant = tl.zeros((BC, BG), tl.float32)
    if HAS_BIAS:
        constant += _bias_share(bq_ptr, wi_ptr, wf_ptr, 0, channel, E, HEADS, BG)
        constant += _bias_share(bk_ptr, wi_ptr, wf_ptr, 1, channel, E, HEADS, BG)
        constant += _bias_share(bv_ptr, wi_ptr, wf_ptr, 2, channel, E, HEADS, BG)
    if SCORES:
        bq = tl.load(bq_ptr + channel, mask=channel < E, other=0.0).to(tl.float32)
        bk = tl.load(bk_ptr + channel, mask=channel < E, other=0.0).to(tl.float32)
        constant += _at_scores(bq * bk, channel, E, HEADS, BG)
    tl.store(taps_ptr + tap[:, None] * E + channel[None, :], value.to(tl.float32), mask=is_tap)
    tl.store(constant_ptr + part * BG + tl.arange(0, BG), tl.sum(constant, 0))


@triton.jit(do_not_specialize=['rows', 'S', 'parts', 'others'])
def prepare_kernel(
    wq_ptr, wk_ptr, wv_ptr, bq_ptr, bk_ptr, bv_ptr, wi_ptr, wf_ptr, conv_ptr, constant_ptr, taps_ptr, turned_ptr,
    values_ptr, matrix_ptr, gate_matrix_ptr, up_w_ptr, up_b_ptr, down_w_ptr, up_w_copy_ptr, up_b_copy_ptr,
    down_w_copy_ptr, x_ptr, branch_ptr, branch_b_ptr, scale_ptr, sum_ptr, norm_w_ptr, norm_b_ptr, out_ptr, up_w_size,
    up_b_size, down_w_size, parts, others, E, rows, S, D, eps, TAPS: tl.constexpr, REVERSE: tl.constexpr,
    FOLDED: tl.constexpr, SCORES: tl.constexpr, QB: tl.constexpr, HEADS: tl.constexpr, HAS_BIAS: tl.constexpr,
    ADDS: tl.constexpr, BRANCH_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, NORM_BIAS: tl.constexpr, BC: tl.constexpr,
    BG: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Weights as the other kernels read them, and the norm, which does not depend on that and hides how long it takes.

    matrix (parts, 3, BC, BC): Wq, Wk, Wv as block-diagonal matrices [in, out]. The gates are linear in q, k and v, and
    these in c and a: gate_matrix (parts, 2, BC, BG) maps c and a straight to the gates, constant (parts, BG) is what
    the projections' biases add. Rows and columns are in the order that `block_mix_kernels` reads, BC is 32. taps
    (TAPS, E): the convolution's weights, turned for the reading direction. The copies of the outer projections' weights
    are in the activations' dtype. FOLDED from 1 on: Wv is not among the matrices, but its blocks are written to values,
    (QB, QB, E / QB). FOLDED 2: in place of Wq and Wk there is Wk^T Wq; with SCORES turned (E) is Wk^T bq, and the maps
    from c and the constants have HEADS columns more, for q.bk of each head. Three programs for each part of BC
    channels, `others` in all with those that copy; the rest normalise BM rows of D each, with ADDS of a sum that the
    block before has left, x + scale * (branch + branch_b), which goes to sum.
    """
    program = tl.program_id(0)
    if program >= others:
        normalise(
            x_ptr, branch_ptr, branch_b_ptr, scale_ptr, sum_ptr, norm_w_ptr, norm_b_ptr, out_ptr, program - others,
            rows, S, D, eps, ADDS, BRANCH_BIAS, HAS_SCALE, NORM_BIAS, BM, BD,
        )  # fmt: skip
    elif program >= 3 * parts:
        first = (program - 3 * parts) * BLOCK
        up_w = _load_block(up_w_ptr, first, up_w_size, BLOCK)
        up_b = _load_block(up_b_ptr, first, up_b_size, BLOCK)
        down_w = _load_block(down_w_ptr, first, down_w_size, BLOCK)
        _store_block(up_w_copy_ptr, first, up_w_size, up_w, BLOCK)
        _store_block(up_b_copy_ptr, first, up_b_size, up_b, BLOCK)
        _store_block(down_w_copy_ptr, first, down_w_size, down_w, BLOCK)
    elif program >= 2 * parts:
        part = program - 2 * parts
        _store_exact(
            part, bq_ptr, bk_ptr, bv_ptr, wi_ptr, wf_ptr, conv_ptr, constant_ptr, taps_ptr, E, TAPS, REVERSE, SCORES,
            HEADS, HAS_BIAS, BC, BG,
        )  # fmt: skip
        if FOLDED > 0:
            _store_values(part, wv_ptr, values_ptr, E, QB, BC)
        if SCORES:
            channel = part * BC + tl.arange(0, BC)
            tl.store(turned_ptr + channel, _turned_bias(wk_ptr, bq_ptr, channel, E, QB), mask=channel < E)
    elif program >= parts:
        part = program - parts
        channel = part * BC + tl.arange(0, BC)
        gate = _fold_gates(wv_ptr, wi_ptr, wf_ptr, 2, channel, E, QB, HEADS, BG)
        if FOLDED == 0:
            _store_matrix(matrix_ptr, part, 2, _block_matrix(wv_ptr, part * BC, E, QB, BC), BC)
        _store_gate_matrix(gate_matrix_ptr, part, 1, gate, BC, BG)
    else:
        channel = program * BC + tl.arange(0, BC)
        gate = _fold_gates(wq_ptr, wi_ptr, wf_ptr, 0, channel, E, QB, HEADS, BG)
        gate += _fold_gates(wk_ptr, wi_ptr, wf_ptr, 1, channel, E, QB, HEADS, BG)
        first = program * BC
        if SCORES:
            gate += _at_scores(_turned_bias(wq_ptr, bk_ptr, channel, E, QB), channel, E, HEADS, BG)
        if FOLDED == 2:
            _store_matrix(matrix_ptr, program, 0, _folded_matrix(wq_ptr, wk_ptr, first, E, QB, BC), BC)
        else:
            _store_matrix(matrix_ptr, program, 0, _block_matrix(wq_ptr, first, E, QB, BC), BC)
            _store_matrix(matrix_ptr, program, 1, _block_matrix(wk_ptr, first, E, QB, BC), BC)
        _store_gate_matrix(gate_matrix_ptr, program, 0, gate, BC, BG)
