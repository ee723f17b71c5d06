"""What the kernels around the mLSTM cell of a ViL block share, and the kernel that lays out weights for them.

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
def _copy(source_ptr, target_ptr, first, size, BLOCK: tl.constexpr):
    """Copy up to BLOCK elements in the target's dtype."""
    place = first + tl.arange(0, BLOCK)
    value = tl.load(source_ptr + place, mask=place < size, other=0.0)
    tl.store(target_ptr + place, value.to(target_ptr.dtype.element_ty), mask=place < size)


@triton.jit
def _store_ordered(matrix_ptr, gate_matrix_ptr, part, mq, mk, mv, gc, ga, BC: tl.constexpr, BG: tl.constexpr):
    """Write the matrices of a part in the order of `block_mix_kernels`."""
    i = tl.arange(0, BC)
    row = i // 4 % 2 * 16 + i // 8 % 4 * 4 + i % 4
    column = i // 4 % 2 * 16 + i // 2 % 2 * 8 + i // 8 % 4 * 2 + i % 2
    matrix = matrix_ptr + (part * 3 * BC * BC + row * BC)[:, None] + column[None, :]
    tl.store(matrix, mq)
    tl.store(matrix + BC * BC, mk)
    tl.store(matrix + 2 * BC * BC, mv)
    gate_matrix = gate_matrix_ptr + (part * 2 * BC + row)[:, None] * BG + tl.arange(0, BG)[None, :]
    tl.store(gate_matrix, gc)
    tl.store(gate_matrix + BC * BG, ga)


@triton.jit
def _fold(
    part, wq_ptr, wk_ptr, wv_ptr, bq_ptr, bk_ptr, bv_ptr, wi_ptr, wf_ptr, conv_ptr, constant_ptr,
    taps_ptr, matrix_ptr, gate_matrix_ptr, E, TAPS: tl.constexpr, REVERSE: tl.constexpr, QB: tl.constexpr,
    HEADS: tl.constexpr, HAS_BIAS: tl.constexpr, BC: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """`prepare_kernel` for one part."""
    channel = part * BC + tl.arange(0, BC)
    inside = channel < E
    g = tl.arange(0, BG)
    dtype = matrix_ptr.dtype.element_ty
    mq = _block_matrix(wq_ptr, part * BC, E, QB, BC).to(tl.float32)
    mk = _block_matrix(wk_ptr, part * BC, E, QB, BC).to(tl.float32)
    mv = _block_matrix(wv_ptr, part * BC, E, QB, BC).to(tl.float32)
    gq = _gate_matrix(wi_ptr, wf_ptr, 0, channel, E, HEADS, BG)
    gk = _gate_matrix(wi_ptr, wf_ptr, 1, channel, E, HEADS, BG)
    gv = _gate_matrix(wi_ptr, wf_ptr, 2, channel, E, HEADS, BG)
    gc = tl.dot(mq, gq, input_precision='tf32x3') + tl.dot(mk, gk, input_precision='tf32x3')
    ga = tl.dot(mv, gv, input_precision='tf32x3')
    constant = tl.zeros((BG,), tl.float32)
    if HAS_BIAS:
        constant += tl.sum(tl.load(bq_ptr + channel, mask=inside, other=0.0).to(tl.float32)[:, None] * gq, 0)
        constant += tl.sum(tl.load(bk_ptr + channel, mask=inside, other=0.0).to(tl.float32)[:, None] * gk, 0)
        constant += tl.sum(tl.load(bv_ptr + channel, mask=inside, other=0.0).to(tl.float32)[:, None] * gv, 0)
    tl.store(constant_ptr + part * BG + g, constant)
    tap = tl.arange(0, 16)
    turned = TAPS - 1 - tap if REVERSE else tap
    is_tap = inside[None, :] & (tap < TAPS)[:, None]
    value = tl.load(conv_ptr + channel[None, :] * TAPS + turned[:, None], mask=is_tap, other=0.0)
    tl.store(taps_ptr + tap[:, None] * E + channel[None, :], value.to(tl.float32), mask=is_tap)
    mq, mk, mv, gc, ga = mq.to(dtype), mk.to(dtype), mv.to(dtype), gc.to(dtype), ga.to(dtype)
    _store_ordered(matrix_ptr, gate_matrix_ptr, part, mq, mk, mv, gc, ga, BC, BG)


@triton.jit
def prepare_kernel(
    wq_ptr, wk_ptr, wv_ptr, bq_ptr, bk_ptr, bv_ptr, wi_ptr, wf_ptr, conv_ptr, constant_ptr, taps_ptr,
    matrix_ptr, gate_matrix_ptr, up_w_ptr, up_b_ptr, down_w_ptr, up_w_copy_ptr, up_b_copy_ptr, down_w_copy_ptr,
    up_w_size, up_b_size, down_w_size, parts, E, TAPS: tl.constexpr, REVERSE: tl.constexpr, QB: tl.constexpr,
    HEADS: tl.constexpr, HAS_BIAS: tl.constexpr, BC: tl.constexpr, BG: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Weights as the other kernels read them. Program i < parts does block i of BC channels, the others copy.

    matrix (parts, 3, BC, BC): Wq, Wk, Wv as block-diagonal matrices [in, out]. The gates are linear in q, k and v, and
    these in c and a: gate_matrix (parts, 2, BC, BG) maps c and a straight to the gates, constant (parts, BG) is what
    the projections' biases add. Rows and columns are in the order that `block_mix_kernels` reads, BC is 32. taps
    (TAPS, E): the convolution's weights, turned for the reading direction. The copies of the outer projections' weights
    are in the activations' dtype.
    """
    program = tl.program_id(0)
    if program < parts:
        _fold(
            program, wq_ptr, wk_ptr, wv_ptr, bq_ptr, bk_ptr, bv_ptr, wi_ptr, wf_ptr, conv_ptr,
            constant_ptr, taps_ptr, matrix_ptr, gate_matrix_ptr, E, TAPS, REVERSE, QB, HEADS, HAS_BIAS, BC, BG,
        )  # fmt: skip
    else:
        first = (program - parts) * BLOCK
        _copy(up_w_ptr, up_w_copy_ptr, first, up_w_size, BLOCK)
        _copy(up_b_ptr, up_b_copy_ptr, first, up_b_size, BLOCK)
        _copy(down_w_ptr, down_w_copy_ptr, first, down_w_size, BLOCK)
