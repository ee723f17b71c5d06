"""Device code that adds up the gates' shares of `block_mix_kernels.py`, alone or with the cell's scans behind it."""

import triton
import triton.language as tl

from .triton_quadratic_kernels import BLOCK, CLOSED, LOG2_E, scan_span, store_scans

__all__ = ['gates_kernel', 'gates_scan_kernel']


@triton.jit
def _load_share(share_ptr, constant_ptr, place, part, parts, pitch, mask, FIRST: tl.constexpr, BG: tl.constexpr, g):
    """What one part adds to the gates from column FIRST on, (BT, BN), zero behind the last part."""
    share = tl.load(share_ptr + part * pitch + place + FIRST, mask=mask & (part < parts), other=0.0)
    return share, tl.load(constant_ptr + part * BG + FIRST + g, mask=(part < parts) & (g >= 0), other=0.0)


@triton.jit
def _sum_shares(
    share_ptr, constant_ptr, bi_ptr, bf_ptr, token, live, tokens, parts,
    SCORES: tl.constexpr, HEADS: tl.constexpr, BG: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Input and forget gates of some tokens and q.bk, if there are SCORES, (BT, BN) each.

    A thread holds whole rows and adds up in registers.
    """
    g = tl.arange(0, BN)
    has = g < HEADS
    mask = live[:, None] if BN == HEADS else live[:, None] & has[None, :]  # the same for adjacent gates: wide loads
    zeros = tl.zeros((token.shape[0], BN), tl.float32)
    igate = zeros + tl.load(bi_ptr + g, mask=has, other=0.0).to(tl.float32)[None, :]
    fgate = zeros + tl.load(bf_ptr + g, mask=has, other=0.0).to(tl.float32)[None, :]
    score = zeros
    WIDTH: tl.constexpr = (3 if SCORES else 2) * HEADS
    pitch = tokens * WIDTH
    place = token[:, None] * WIDTH + g[None, :]
    for part in range(0, parts, 4):  # four at a time, so that enough bytes are on their way
        i0, ci0 = _load_share(share_ptr, constant_ptr, place, part, parts, pitch, mask, 0, BG, g)
        f0, cf0 = _load_share(share_ptr, constant_ptr, place, part, parts, pitch, mask, HEADS, BG, g)
        i1, ci1 = _load_share(share_ptr, constant_ptr, place, part + 1, parts, pitch, mask, 0, BG, g)
        f1, cf1 = _load_share(share_ptr, constant_ptr, place, part + 1, parts, pitch, mask, HEADS, BG, g)
        i2, ci2 = _load_share(share_ptr, constant_ptr, place, part + 2, parts, pitch, mask, 0, BG, g)
        f2, cf2 = _load_share(share_ptr, constant_ptr, place, part + 2, parts, pitch, mask, HEADS, BG, g)
        i3, ci3 = _load_share(share_ptr, constant_ptr, place, part + 3, parts, pitch, mask, 0, BG, g)
        f3, cf3 = _load_share(share_ptr, constant_ptr, place, part + 3, parts, pitch, mask, HEADS, BG, g)
        igate += (i0 + i1) + (i2 + i3) + ((ci0 + ci1) + (ci2 + ci3))[None, :]
        fgate += (f0 + f1) + (f2 + f3) + ((cf0 + cf1) + (cf2 + cf3))[None, :]
        if SCORES:
            s0, cs0 = _load_share(share_ptr, constant_ptr, place, part, parts, pitch, mask, 2 * HEADS, BG, g)
            s1, cs1 = _load_share(share_ptr, constant_ptr, place, part + 1, parts, pitch, mask, 2 * HEADS, BG, g)
            s2, cs2 = _load_share(share_ptr, constant_ptr, place, part + 2, parts, pitch, mask, 2 * HEADS, BG, g)
            s3, cs3 = _load_share(share_ptr, constant_ptr, place, part + 3, parts, pitch, mask, 2 * HEADS, BG, g)
            score += (s0 + s1) + (s2 + s3) + ((cs0 + cs1) + (cs2 + cs3))[None, :]
    return igate, fgate, score


@triton.jit(do_not_specialize=['B', 'S', 'parts'])
def gates_kernel(
    share_ptr, constant_ptr, bi_ptr, bf_ptr, gates_ptr, B, S, parts,
    SCORES: tl.constexpr, HEADS: tl.constexpr, BG: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Gates (2, B, NH, S): shares (parts, B * S, 2 NH), constants (parts, BG) and biases added up.

    SCORES: (3, B, NH, S) of 3 NH columns, the last q.bk.
    """
    token = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    tokens = B.to(tl.int64) * S
    live = token < tokens
    g = tl.arange(0, BN)
    igate, fgate, score = _sum_shares(
        share_ptr, constant_ptr, bi_ptr, bf_ptr, token, live, tokens, parts, SCORES, HEADS, BG, BN
    )
    image = token // S
    target = gates_ptr + (image[:, None] * HEADS + g[None, :]) * S + (token - image * S)[:, None]
    mask = live[:, None] & (g < HEADS)[None, :]
    tl.store(target, igate, mask=mask)
    tl.store(target + tokens * HEADS, fgate, mask=mask)
    if SCORES:
        tl.store(target + 2 * tokens * HEADS, score, mask=mask)


@triton.jit(do_not_specialize=['B', 'S', 'parts', 'pitch', 'plane', 'reverse'])
def gates_scan_kernel(
    share_ptr, constant_ptr, bi_ptr, bf_ptr, gates_ptr, stats, B, S, parts, pitch, plane, reverse,
    SCORES: tl.constexpr, HEADS: tl.constexpr, BG: tl.constexpr, BN: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """`gates_kernel` and `gate_scan_kernel` of the quadratic form in one, for sequences of up to SPAN. Grid: B."""
    image = tl.program_id(0).to(tl.int64)
    tokens = B.to(tl.int64) * S
    position = tl.arange(0, SPAN)
    token = tl.where(reverse != 0, S - 1 - position, position)
    live = position < S
    g = tl.arange(0, BN)
    igate, fgate, score = _sum_shares(
        share_ptr, constant_ptr, bi_ptr, bf_ptr, image * S + token, live, tokens, parts, SCORES, HEADS, BG, BN
    )
    row = image * HEADS + g[None, :]
    target, has = gates_ptr + row * S + token[:, None], (g < HEADS)[None, :]
    valid = live[:, None] & has
    tl.store(target, igate, mask=valid)
    tl.store(target + tokens * HEADS, fgate, mask=valid)
    if SCORES:
        tl.store(target + 2 * tokens * HEADS, score, mask=valid)
    _, forget, g, top = scan_span(igate, fgate, valid, tl.zeros((), tl.float64), tl.full((), CLOSED, tl.float64))
    block_start = tl.min(tl.reshape(top, (SPAN // BLOCK, BLOCK, BN)), 1)
    relative = (tl.reshape(g, (SPAN // BLOCK, BLOCK, BN)) - block_start[:, None, :]) * LOG2_E
    relative = tl.reshape(relative.to(tl.float32), (SPAN, BN))
    padded = (position < pitch * BLOCK)[:, None] & has
    out = stats + row * pitch * BLOCK + position[:, None]
    store_scans(out, plane.to(tl.int64) * BLOCK, padded, valid, forget, g, top, relative)
