"""Device code that adds up the gates' shares of `block_mix_kernels.py`, alone or with the cell's scans behind it."""

import triton
import triton.language as tl

from .triton_quadratic_kernels import BLOCK, CLOSED, LOG2_E, scan_span, store_scans

__all__ = ['gates_kernel', 'gates_scan_kernel']


@triton.jit
def _constant(ptr, column, PARTS: tl.constexpr, BG: tl.constexpr, BC: tl.constexpr):
    """What the constants of all parts add to one column of the gates."""
    part = tl.arange(0, BC)
    return tl.sum(tl.load(ptr + part * BG + column, mask=part < PARTS, other=0.0), 0)


@triton.jit
def _plane(column):
    """Where `block_mix_kernels` writes a column of the gates."""
    return column // 8 * 8 + column % 2 * 4 + column % 8 // 2


@triton.jit
def _place(image, t, GH, GW, image_pairs, PARTS: tl.constexpr, PLANES: tl.constexpr, CHUNK: tl.constexpr):
    """Where the first part's first plane has token t of an image, in chunks of CHUNK tokens."""
    row = t // GW
    col = t - row * GW
    pair = image * image_pairs + col // 2
    chunk = pair // (CHUNK // 2) * GH + row
    return chunk * (PARTS * PLANES * CHUNK) + pair % (CHUNK // 2) * 2 + col % 2


@triton.jit
def _sum_shares(
    ptr, constant_ptr, bi_ptr, bf_ptr, head,
    SCORES: tl.constexpr, HEADS: tl.constexpr, PARTS: tl.constexpr, PLANES: tl.constexpr, CHUNK: tl.constexpr,
    BG: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Input and forget gates of tokens of a head at places ptr and q.bk, if there are SCORES, (BT) each.

    A thread holds a token, asks for BP parts of all columns at once, and adds up in registers.
    """
    igate = tl.zeros(ptr.shape, tl.float32)
    fgate, score = igate, igate
    part = tl.arange(0, BP)[None, :]
    offset = part * (PLANES * CHUNK)
    i_ptr, f_ptr = ptr + _plane(head) * CHUNK, ptr + _plane(HEADS + head) * CHUNK
    s_ptr = ptr + _plane(2 * HEADS + head) * CHUNK
    for first in tl.static_range(0, PARTS, BP):
        has = first + part < PARTS
        start = offset + first * (PLANES * CHUNK)
        i = tl.load(i_ptr[:, None] + start, mask=has, other=0.0)  # tokens first: neighbouring threads get neighbours
        f = tl.load(f_ptr[:, None] + start, mask=has, other=0.0)
        if SCORES:
            s = tl.load(s_ptr[:, None] + start, mask=has, other=0.0)
            score += tl.sum(s, 1)
        igate += tl.sum(i, 1)
        fgate += tl.sum(f, 1)
    igate += _constant(constant_ptr, head, PARTS, BG, BC) + tl.load(bi_ptr + head).to(tl.float32)
    fgate += _constant(constant_ptr, HEADS + head, PARTS, BG, BC) + tl.load(bf_ptr + head).to(tl.float32)
    if SCORES:
        score += _constant(constant_ptr, 2 * HEADS + head, PARTS, BG, BC)
    return igate, fgate, score


@triton.jit
def _store_gates(ptr, plane, mask, igate, fgate, score, SCORES: tl.constexpr):
    """Write what `_sum_shares` made to places `ptr` of planes."""
    tl.store(ptr, igate, mask=mask)
    tl.store(ptr + plane, fgate, mask=mask)
    if SCORES:
        tl.store(ptr + 2 * plane, score, mask=mask)


@triton.jit(do_not_specialize=['B', 'S', 'GH', 'GW', 'image_pairs'])
def gates_kernel(
    share_ptr, constant_ptr, bi_ptr, bf_ptr, gates_ptr, B, S, GH, GW, image_pairs,
    SCORES: tl.constexpr, HEADS: tl.constexpr, PARTS: tl.constexpr, PLANES: tl.constexpr, CHUNK: tl.constexpr,
    BG: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Gates (2, B, NH, S): shares (chunks, PARTS, PLANES, CHUNK), constants (PARTS, BG) and biases added up.

    SCORES: (3, B, NH, S), the last q.bk. Grid: blocks of BT tokens by heads.
    """
    token = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    head = tl.program_id(1)
    tokens = B.to(tl.int64) * S
    live = token < tokens
    token = tl.minimum(token, tokens - 1)
    image = token // S
    t = (token - image * S).to(tl.int32)
    igate, fgate, score = _sum_shares(
        share_ptr + _place(image, t, GH, GW, image_pairs, PARTS, PLANES, CHUNK), constant_ptr, bi_ptr, bf_ptr, head,
        SCORES, HEADS, PARTS, PLANES, CHUNK, BG, BC, BP,
    )  # fmt: skip
    target = gates_ptr + (image * HEADS + head) * S + t
    _store_gates(target, tokens * HEADS, live, igate, fgate, score, SCORES)


@triton.jit(do_not_specialize=['B', 'S', 'GH', 'GW', 'image_pairs', 'pitch', 'plane', 'reverse'])
def gates_scan_kernel(
    share_ptr, constant_ptr, bi_ptr, bf_ptr, gates_ptr, stats, B, S, GH, GW, image_pairs, pitch, plane, reverse,
    SCORES: tl.constexpr, HEADS: tl.constexpr, PARTS: tl.constexpr, PLANES: tl.constexpr, CHUNK: tl.constexpr,
    BG: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """`gates_kernel` and `gate_scan_kernel` of the quadratic form in one, for sequences of up to SPAN. Grid: B * NH."""
    row = tl.program_id(0).to(tl.int64)
    head, image = tl.program_id(0) % HEADS, row // HEADS
    tokens = B.to(tl.int64) * S
    position = tl.arange(0, SPAN)
    live = position < S
    token = tl.where(live, tl.where(reverse != 0, S - 1 - position, position), 0)
    igate, fgate, score = _sum_shares(
        share_ptr + _place(image, token, GH, GW, image_pairs, PARTS, PLANES, CHUNK), constant_ptr, bi_ptr, bf_ptr,
        head, SCORES, HEADS, PARTS, PLANES, CHUNK, BG, BC, BP,
    )  # fmt: skip
    _store_gates(gates_ptr + row * S + token, tokens * HEADS, live, igate, fgate, score, SCORES)
    _, forget, g, top = scan_span(igate, fgate, live, tl.zeros((), tl.float64), tl.full((), CLOSED, tl.float64))
    block_start = tl.min(tl.reshape(top, (SPAN // BLOCK, BLOCK)), 1)
    relative = (tl.reshape(g, (SPAN // BLOCK, BLOCK)) - block_start[:, None]) * LOG2_E
    relative = tl.reshape(relative.to(tl.float32), (SPAN,))
    out = stats + row * pitch * BLOCK + position
    store_scans(out, plane.to(tl.int64) * BLOCK, position < pitch * BLOCK, live, forget, g, top, relative)
