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
def _sum_shares(
    share_ptr, constant_ptr, bi_ptr, bf_ptr, head, token, tokens,
    SCORES: tl.constexpr, HEADS: tl.constexpr, PARTS: tl.constexpr, BG: tl.constexpr, BC: tl.constexpr,
    BP: tl.constexpr,
):  # fmt: skip
    """Input and forget gates of some tokens of a head and q.bk, if there are SCORES, (BT) each. Masks nothing.

    A thread holds a token, asks for BP parts of all columns at once, and adds up in registers. Parts are known when
    compiling: loads of those behind the last vanish, and addresses take few instructions.
    """
    igate = tl.zeros(token.shape, tl.float32)
    fgate, score = igate, igate
    kind = tokens * HEADS  # from a head's input gate to its forget gate
    pitch = kind * (3 if SCORES else 2)
    ptr = share_ptr + (head * tokens + token)[:, None]  # tokens first: neighbouring threads get neighbouring ones
    part = tl.arange(0, BP)[None, :]
    offset = part * pitch
    for first in tl.static_range(0, PARTS, BP):
        has = first + part < PARTS
        i = tl.load(ptr + offset, mask=has, other=0.0)
        f = tl.load(ptr + kind + offset, mask=has, other=0.0)
        if SCORES:
            s = tl.load(ptr + 2 * kind + offset, mask=has, other=0.0)
            score += tl.sum(s, 1)
        igate += tl.sum(i, 1)
        fgate += tl.sum(f, 1)
        ptr += BP * pitch
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


@triton.jit(do_not_specialize=['B', 'S'])
def gates_kernel(
    share_ptr, constant_ptr, bi_ptr, bf_ptr, gates_ptr, B, S,
    SCORES: tl.constexpr, HEADS: tl.constexpr, PARTS: tl.constexpr, BG: tl.constexpr, BC: tl.constexpr,
    BP: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Gates (2, B, NH, S): shares (parts, 2 NH, B * S), constants (parts, BG) and biases added up.

    SCORES: (3, B, NH, S) of 3 NH planes, the last q.bk. Grid: blocks of BT tokens by heads.
    """
    token = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    head = tl.program_id(1)
    tokens = B.to(tl.int64) * S
    live = token < tokens
    igate, fgate, score = _sum_shares(
        share_ptr, constant_ptr, bi_ptr, bf_ptr, head, tl.minimum(token, tokens - 1), tokens,
        SCORES, HEADS, PARTS, BG, BC, BP,
    )  # fmt: skip
    image = token // S
    target = gates_ptr + (image * HEADS + head) * S + (token - image * S)
    _store_gates(target, tokens * HEADS, live, igate, fgate, score, SCORES)


@triton.jit(do_not_specialize=['B', 'S', 'pitch', 'plane', 'reverse'])
def gates_scan_kernel(
    share_ptr, constant_ptr, bi_ptr, bf_ptr, gates_ptr, stats, B, S, pitch, plane, reverse,
    SCORES: tl.constexpr, HEADS: tl.constexpr, PARTS: tl.constexpr, BG: tl.constexpr, BC: tl.constexpr,
    BP: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """`gates_kernel` and `gate_scan_kernel` of the quadratic form in one, for sequences of up to SPAN. Grid: B * NH."""
    row = tl.program_id(0).to(tl.int64)
    head, image = tl.program_id(0) % HEADS, row // HEADS
    tokens = B.to(tl.int64) * S
    position = tl.arange(0, SPAN)
    live = position < S
    token = tl.where(live, tl.where(reverse != 0, S - 1 - position, position), 0)
    igate, fgate, score = _sum_shares(
        share_ptr, constant_ptr, bi_ptr, bf_ptr, head, image * S + token, tokens, SCORES, HEADS, PARTS, BG, BC, BP
    )
    _store_gates(gates_ptr + row * S + token, tokens * HEADS, live, igate, fgate, score, SCORES)
    _, forget, g, top = scan_span(igate, fgate, live, tl.zeros((), tl.float64), tl.full((), CLOSED, tl.float64))
    block_start = tl.min(tl.reshape(top, (SPAN // BLOCK, BLOCK)), 1)
    relative = (tl.reshape(g, (SPAN // BLOCK, BLOCK)) - block_start[:, None]) * LOG2_E
    relative = tl.reshape(relative.to(tl.float32), (SPAN,))
    out = stats + row * pitch * BLOCK + position
    store_scans(out, plane.to(tl.int64) * BLOCK, position < pitch * BLOCK, live, forget, g, top, relative)
