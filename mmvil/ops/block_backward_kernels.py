"""Device code of a ViL block's backward pass between the mLSTM cell and the up-projection; names as in `block_kernels`.

A token is a row n of N = B * S; `pre` (N, E) is the convolution's output with its bias, so that c = SiLU(pre). Sums
over tokens are written per program, one row of partial sums each, and added up by `sum_kernel`:

    mix row           dWq, dWk (E, QB)   their biases (E)   dgate' c (2 NH, E)   dgate (2 NH)
    value row         dWv (E, QB)        its bias (E)       dgate' a (2 NH, E)
    convolution row   taps (E, TAPS)     its bias (E)       da (E)
"""

import triton
import triton.language as tl

from .block_kernels import _block_matrix, _gate_matrix, _load_block, _store_block
from .triton_gates import fast_sigmoid

__all__ = [
    'finish_kernel',
    'mix_backward_kernel',
    'query_key_kernel',
    'sum_kernel',
    'value_backward_kernel',
]


@triton.jit
def _turned_matrix(w_ptr, first, E, QB: tl.constexpr, BC: tl.constexpr):
    """Block-diagonal (BC, BC) matrix of one projection, [out, in]."""
    o = tl.arange(0, BC)[:, None]
    i = tl.arange(0, BC)[None, :]
    return tl.load(w_ptr + (first + o) * QB + i % QB, mask=(i // QB == o // QB) & (first + o < E), other=0.0)


@triton.jit
def _diagonal_blocks(full, QB: tl.constexpr, BC: tl.constexpr):
    """Blocks of a (BC, BC) matrix [out, in] as (BC, QB)."""
    i = tl.arange(0, BC)[:, None]
    o = tl.arange(0, BC)[None, :]
    masked = tl.where(i // QB == o // QB, full, 0.0)
    return tl.sum(tl.reshape(masked, (BC, BC // QB, QB)), 1)


@triton.jit
def _adder(BM: tl.constexpr, dtype: tl.constexpr):
    """(16, BM) matrix that adds up BM rows in a product: the result's first row is the sum, the others are zero."""
    row = tl.arange(0, 16)[:, None] + tl.zeros((1, BM), tl.int32)
    return tl.where(row == 0, 1.0, 0.0).to(dtype)


@triton.jit
def _store_blocks(ptr, full, channel, E, QB: tl.constexpr):
    """Write the diagonal blocks of a (BC, BC) matrix [in, out] as (BC, QB), [out, in]."""
    wide = channel[:, None] * QB + tl.arange(0, QB)[None, :]
    tl.store(ptr + wide, _diagonal_blocks(tl.trans(full), QB, full.shape[0]), mask=(channel < E)[:, None])


@triton.jit
def _load_rows(ptr, n, channel, N, E):
    """Tile of a dense (N, E) tensor, zero outside."""
    mask = (n < N)[:, None] & (channel < E)[None, :]
    return tl.load(ptr + n.to(tl.int64)[:, None] * E + channel[None, :], mask=mask, other=0.0)


@triton.jit
def _gate_gradients(di_ptr, df_ptr, n, N, S, HEADS: tl.constexpr, BG: tl.constexpr):
    """Gradients of the input gates and, after them, the forget gates at tokens n: (BM, BG) float32."""
    image = n // S
    g = tl.arange(0, BG)[None, :]
    place = (image.to(tl.int64)[:, None] * HEADS + g % HEADS) * S + (n - image * S)[:, None]
    valid = (n < N)[:, None]
    dgate = tl.load(di_ptr + place, mask=valid & (g < HEADS), other=0.0)
    return dgate + tl.load(df_ptr + place, mask=valid & (g >= HEADS) & (g < 2 * HEADS), other=0.0)


@triton.jit(do_not_specialize=['N', 'steps'])
def query_key_kernel(
    pre_ptr, wq_ptr, wk_ptr, bq_ptr, bk_ptr, q_ptr, k_ptr, N, E, steps,
    QB: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """q = Wq c + bq and k = Wk c + bk with c = SiLU(pre)."""
    part = tl.program_id(0)
    program = tl.program_id(1)
    channel = part * BC + tl.arange(0, BC)
    inside = channel < E
    dtype = pre_ptr.dtype.element_ty
    mq = _block_matrix(wq_ptr, part * BC, E, QB, BC).to(dtype)
    mk = _block_matrix(wk_ptr, part * BC, E, QB, BC).to(dtype)
    bq, bk = tl.zeros((BC,), tl.float32), tl.zeros((BC,), tl.float32)
    if HAS_BIAS:
        bq += tl.load(bq_ptr + channel, mask=inside, other=0.0).to(tl.float32)
        bk += tl.load(bk_ptr + channel, mask=inside, other=0.0).to(tl.float32)
    for step in tl.range(0, steps, num_stages=STAGES):
        n = (program * steps + step) * BM + tl.arange(0, BM)
        mask = (n < N)[:, None] & inside[None, :]
        place = n.to(tl.int64)[:, None] * E + channel[None, :]
        pre = tl.load(pre_ptr + place, mask=mask, other=0.0).to(tl.float32)
        c = (pre * fast_sigmoid(pre)).to(dtype)
        q = tl.dot(c, mq, input_precision=PRECISION) + bq[None, :]
        k = tl.dot(c, mk, input_precision=PRECISION) + bk[None, :]
        tl.store(q_ptr + place, q.to(dtype), mask=mask)
        tl.store(k_ptr + place, k.to(dtype), mask=mask)


@triton.jit(do_not_specialize=['N', 'S', 'steps', 'pitch'])
def mix_backward_kernel(
    pre_ptr, dq_ptr, dk_ptr, dc_ptr, di_ptr, df_ptr, wq_ptr, wk_ptr, map_ptr, dpre_ptr, sums_ptr,
    N, S, E, steps, pitch,
    QB: tl.constexpr, HEADS: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BG: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dpre = (dc + Wq' dq + Wk' dk + Gc' dgate) * SiLU'(pre), Gc the gates' linear map of c; writes a mix row."""
    part = tl.program_id(0)
    program = tl.program_id(1)
    channel = part * BC + tl.arange(0, BC)
    inside = channel < E
    g = tl.arange(0, BG)
    dtype = pre_ptr.dtype.element_ty
    mq = _turned_matrix(wq_ptr, part * BC, E, QB, BC).to(dtype)
    mk = _turned_matrix(wk_ptr, part * BC, E, QB, BC).to(dtype)
    gc = tl.load(map_ptr + channel[None, :] * BG + g[:, None], mask=inside[None, :], other=0.0)
    # Sums are formed so that dq and dk are operands of products alone, and not turned: then the compiler loads them
    # ahead, into shared memory without bank conflicts. Hence dWq and dWk as [in, out] and biases as products.
    dwq = tl.zeros((BC, BC), tl.float32)
    dwk = tl.zeros((BC, BC), tl.float32)
    dbq = tl.zeros((16, BC), tl.float32)
    dbk = tl.zeros((16, BC), tl.float32)
    gate_c = tl.zeros((BC, BG), tl.float32)
    add_up = _adder(BM, dtype)
    pre_next = _load_rows(pre_ptr, program * steps * BM + tl.arange(0, BM), channel, N, E)
    for step in tl.range(0, steps, num_stages=STAGES):
        n = (program * steps + step) * BM + tl.arange(0, BM)
        mask = (n < N)[:, None] & inside[None, :]
        place = n.to(tl.int64)[:, None] * E + channel[None, :]
        pre = pre_next.to(tl.float32)
        pre_next = _load_rows(pre_ptr, n + BM, channel, N, E)  # the compiler loads the others ahead, but not this
        dq = tl.load(dq_ptr + place, mask=mask, other=0.0)
        dk = tl.load(dk_ptr + place, mask=mask, other=0.0)
        dc = tl.load(dc_ptr + place, mask=mask, other=0.0).to(tl.float32)
        dgate = _gate_gradients(di_ptr, df_ptr, n, N, S, HEADS, BG).to(dtype)
        sigma = fast_sigmoid(pre)
        c = pre * sigma
        turned = tl.trans(c.to(dtype))
        dbq = tl.dot(add_up, dq, dbq, input_precision=PRECISION)
        dbk = tl.dot(add_up, dk, dbk, input_precision=PRECISION)
        gate_c = tl.dot(turned, dgate, gate_c, input_precision=PRECISION)
        dwq = tl.dot(turned, dq, dwq, input_precision=PRECISION)
        dwk = tl.dot(turned, dk, dwk, input_precision=PRECISION)
        dc = tl.dot(dq, mq, dc, input_precision=PRECISION)
        dc = tl.dot(dk, mk, dc, input_precision=PRECISION)
        dc = tl.dot(dgate, gc, dc, input_precision=PRECISION)
        tl.store(dpre_ptr + place, (dc * (sigma + c * (1.0 - sigma))).to(dtype), mask=mask)
    sums_ptr += program.to(tl.int64) * pitch
    _store_blocks(sums_ptr, dwq, channel, E, QB)
    _store_blocks(sums_ptr + E * QB, dwk, channel, E, QB)
    sums_ptr += 2 * E * QB
    tl.store(sums_ptr + channel, tl.sum(dbq, 0), mask=inside)
    tl.store(sums_ptr + E + channel, tl.sum(dbk, 0), mask=inside)
    sums_ptr += 2 * E
    gates = inside[:, None] & (g < 2 * HEADS)[None, :]
    tl.store(sums_ptr + g[None, :] * E + channel[:, None], gate_c, mask=gates)
    if part == 0:
        gate_sum = tl.zeros((64, BG), tl.float32)
        for first in range(0, steps * BM, 64):
            i = first + tl.arange(0, 64)
            n = tl.where(i < steps * BM, program * steps * BM + i, N)
            gate_sum += _gate_gradients(di_ptr, df_ptr, n, N, S, HEADS, BG)
        tl.store(sums_ptr + 2 * HEADS * E + g, tl.sum(gate_sum, 0), mask=g < 2 * HEADS)


@triton.jit(do_not_specialize=['N', 'S', 'steps', 'pitch'])
def value_backward_kernel(
    a_ptr, a_row, dv_ptr, di_ptr, df_ptr, wv_ptr, map_ptr, da_ptr, da_row, sums_ptr, N, S, E, steps, pitch,
    QB: tl.constexpr, HEADS: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BG: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """da = Wv' dv + Ga' dgate, with the gates as linear map Ga of a; writes a value row."""
    part = tl.program_id(0)
    program = tl.program_id(1)
    channel = part * BC + tl.arange(0, BC)
    inside = channel < E
    g = tl.arange(0, BG)
    dtype = a_ptr.dtype.element_ty
    mv = _turned_matrix(wv_ptr, part * BC, E, QB, BC).to(dtype)
    ga = tl.load(map_ptr + (E + channel[None, :]) * BG + g[:, None], mask=inside[None, :], other=0.0)
    dwv = tl.zeros((BC, BC), tl.float32)  # [in, out]
    dbv = tl.zeros((16, BC), tl.float32)
    gate_a = tl.zeros((BC, BG), tl.float32)
    add_up = _adder(BM, dtype)
    for step in tl.range(0, steps, num_stages=STAGES):
        n = (program * steps + step) * BM + tl.arange(0, BM)
        mask = (n < N)[:, None] & inside[None, :]
        row = n.to(tl.int64)[:, None]
        a = tl.load(a_ptr + row * a_row + channel[None, :], mask=mask, other=0.0)
        dv = tl.load(dv_ptr + row * E + channel[None, :], mask=mask, other=0.0)
        dgate = _gate_gradients(di_ptr, df_ptr, n, N, S, HEADS, BG).to(dtype)
        turned = tl.trans(a)
        dbv = tl.dot(add_up, dv, dbv, input_precision=PRECISION)
        gate_a = tl.dot(turned, dgate, gate_a, input_precision=PRECISION)
        dwv = tl.dot(turned, dv, dwv, input_precision=PRECISION)
        da = tl.dot(dv, mv, input_precision=PRECISION)
        da = tl.dot(dgate, ga, da, input_precision=PRECISION)
        tl.store(da_ptr + row * da_row + channel[None, :], da.to(dtype), mask=mask)
    sums_ptr += program.to(tl.int64) * pitch
    _store_blocks(sums_ptr, dwv, channel, E, QB)
    sums_ptr += E * QB
    tl.store(sums_ptr + channel, tl.sum(dbv, 0), mask=inside)
    gates = inside[:, None] & (g < 2 * HEADS)[None, :]
    tl.store(sums_ptr + (1 + g)[None, :] * E + channel[:, None], gate_a, mask=gates)


@triton.jit(do_not_specialize=['rows0', 'rows1', 'rows2', 'rows3', 'rows4', 'rows5'])
def sum_kernel(
    part_ptr, total_ptr, rows0, rows1, rows2, rows3, rows4, rows5, width0, width1, width2, width3, width4, width5,
    BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Column sums of six float32 matrices (rows, width) that lie behind each other, likewise laid out."""
    block = tl.program_id(0)
    rows, width = rows0, width0
    base = tl.zeros((), tl.int64)
    target = tl.zeros((), tl.int32)
    for i in tl.static_range(1, 6):
        rows_next = rows1 if i == 1 else (rows2 if i == 2 else (rows3 if i == 3 else (rows4 if i == 4 else rows5)))
        width_next = (
            width1 if i == 1 else (width2 if i == 2 else (width3 if i == 3 else (width4 if i == 4 else width5)))
        )
        # Matrices before the one that holds this block are stepped over; `block` then counts within the next one.
        blocks = tl.cdiv(width, BC)
        over = block >= blocks
        base = tl.where(over, base + rows.to(tl.int64) * width, base)
        target = tl.where(over, target + width, target)
        block = tl.where(over, block - blocks, block)
        rows = tl.where(over, rows_next, rows)
        width = tl.where(over, width_next, width)
    col = block * BC + tl.arange(0, BC)
    part_ptr += base
    total = tl.zeros((BM, BC), tl.float32)
    for first in range(0, rows, 4 * BM):  # four tiles at a time, or the longest matrix would wait for each of its tiles
        x0 = _load_rows(part_ptr, first + tl.arange(0, BM), col, rows, width)
        x1 = _load_rows(part_ptr, first + BM + tl.arange(0, BM), col, rows, width)
        x2 = _load_rows(part_ptr, first + 2 * BM + tl.arange(0, BM), col, rows, width)
        x3 = _load_rows(part_ptr, first + 3 * BM + tl.arange(0, BM), col, rows, width)
        total += (x0 + x1) + (x2 + x3)
    tl.store(total_ptr + target + col, tl.sum(total, 0), mask=col < width)


@triton.jit
def _finish(
    part, mix_ptr, value_ptr, wq_ptr, wk_ptr, wv_ptr, wi_ptr, wf_ptr, bq_ptr, bk_ptr, bv_ptr, dw_ptr, db_ptr,
    dwg_ptr, E, QB: tl.constexpr, HEADS: tl.constexpr, HAS_BIAS: tl.constexpr, BC: tl.constexpr, BG: tl.constexpr,
):  # fmt: skip
    """`finish_kernel` for one part of BC channels."""
    channel = part * BC + tl.arange(0, BC)
    inside = channel < E
    g = tl.arange(0, BG)
    i = tl.arange(0, QB)
    gates = (g < 2 * HEADS)[:, None] & inside[None, :]
    map_place = g[:, None] * E + channel[None, :]
    gate_c = tl.load(mix_ptr + 2 * E * (QB + 1) + map_place, mask=gates, other=0.0)
    gate_a = tl.load(value_ptr + E * (QB + 1) + map_place, mask=gates, other=0.0)
    gate_sum = tl.load(mix_ptr + 2 * E * (QB + 1 + HEADS) + g, mask=g < 2 * HEADS, other=0.0)
    wide = channel[:, None] * QB + i[None, :]
    for which in tl.static_range(3):
        if tl.program_id(1) == which:
            weights = _gate_matrix(wi_ptr, wf_ptr, which, channel, E, HEADS, BG)  # (BC, BG)
            seen = gate_c if which < 2 else gate_a
            dw_sum = mix_ptr + which * E * QB if which < 2 else value_ptr
            db_sum = mix_ptr + 2 * E * QB + which * E if which < 2 else value_ptr + E * QB
            w_ptr = wq_ptr if which == 0 else (wk_ptr if which == 1 else wv_ptr)
            dw = _diagonal_blocks(tl.dot(weights, seen, input_precision='tf32x3'), QB, BC)
            dw += tl.load(dw_sum + wide, mask=inside[:, None], other=0.0)
            tl.store(dw_ptr + which * E * QB + wide, dw, mask=inside[:, None])
            db = tl.sum(weights * gate_sum[None, :], 1)
            db += tl.load(db_sum + channel, mask=inside, other=0.0)
            tl.store(db_ptr + which * E + channel, db, mask=inside)
            square = _block_matrix(w_ptr, part * BC, E, QB, BC).to(tl.float32)
            dwg = tl.dot(seen, square, input_precision='tf32x3')
            if HAS_BIAS:
                b_ptr = bq_ptr if which == 0 else (bk_ptr if which == 1 else bv_ptr)
                dwg += gate_sum[:, None] * tl.load(b_ptr + channel, mask=inside, other=0.0).to(tl.float32)[None, :]
            place = g[:, None] * (3 * E) + which * E + channel[None, :]
            tl.store(dwg_ptr + place, dwg, mask=gates)


@triton.jit(do_not_specialize=['parts'])
def finish_kernel(
    mix_ptr, value_ptr, wq_ptr, wk_ptr, wv_ptr, wi_ptr, wf_ptr, bq_ptr, bk_ptr, bv_ptr, dw_ptr, db_ptr, dwg_ptr,
    up_ptr, down_ptr, up_copy_ptr, down_copy_ptr, up_size, down_size, parts, E, QB: tl.constexpr, HEADS: tl.constexpr,
    HAS_BIAS: tl.constexpr, BC: tl.constexpr, BG: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of one of Wq, Wk, Wv (second program index) and its gates from the total mix and value rows.

    What Wq sees as dq is dq + Gq' dgate, and what Gq sees as q is Wq c + bq; likewise for k and v. Programs behind the
    parts copy the gradients of the outer projections' weights in these weights' dtype.
    """
    program = tl.program_id(0)
    if program < parts:
        _finish(
            program, mix_ptr, value_ptr, wq_ptr, wk_ptr, wv_ptr, wi_ptr, wf_ptr, bq_ptr, bk_ptr, bv_ptr, dw_ptr,
            db_ptr, dwg_ptr, E, QB, HEADS, HAS_BIAS, BC, BG,
        )  # fmt: skip
    else:
        first = (program - parts) * BLOCK
        if tl.program_id(1) == 0:
            _store_block(up_copy_ptr, first, up_size, _load_block(up_ptr, first, up_size, BLOCK), BLOCK)
        elif tl.program_id(1) == 1:
            _store_block(down_copy_ptr, first, down_size, _load_block(down_ptr, first, down_size, BLOCK), BLOCK)
