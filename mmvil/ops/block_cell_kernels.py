"""Device code of the cell inside of a ViL block: the quadratic mLSTM, then head norm, skip and gate while h is at hand."""

import triton
import triton.language as tl

from .triton_quadratic_kernels import BLOCK, head_start, hidden_rows, load_piece, store_rows

__all__ = ['gated_forward_kernel']


@triton.jit
def _vector(ptr, columns, DH: tl.constexpr):
    """Some channels' numbers as a row, float32."""
    return tl.load(ptr + columns, mask=columns < DH, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _gated(
    normalised, i, S, pre, pre_step, z, z_step, w, b, skip,
    HAS_BIAS: tl.constexpr, FIRST: tl.constexpr, COLUMNS: tl.constexpr, DH: tl.constexpr,
):  # fmt: skip
    """((1 + w) * normalised + b + skip * SiLU(pre)) * SiLU(z) for some channels."""
    columns = FIRST + tl.arange(0, COLUMNS)
    y = normalised * (1.0 + _vector(w, columns, DH))
    if HAS_BIAS:
        y += _vector(b, columns, DH)
    c = load_piece(pre, pre_step, i, S, FIRST, COLUMNS, DH).to(tl.float32)
    y += _vector(skip, columns, DH) * c * tl.sigmoid(c)
    gate = load_piece(z, z_step, i, S, FIRST, COLUMNS, DH).to(tl.float32)
    return y * gate * tl.sigmoid(gate)


@triton.jit
def _tile(
    q, q_step, k, k_step, v, v_step, h, h_step, pre, pre_step, z, z_step, y, y_step, w, b, skip, stats, plane,
    S, first, log_scale, eps, norm_eps, KEEP: tl.constexpr, HAS_BIAS: tl.constexpr,
    DH: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`gated_forward_kernel` for BM tokens of a head."""
    i = first + tl.arange(0, BM)
    h_a, h_b = hidden_rows(
        q, q_step, k, k_step, v, v_step, stats, plane, S, first, log_scale, eps, DH, DA, DB, BM, BN, PRECISION
    )
    if KEEP:
        store_rows(h, h_step, i, S, h_a, h_b, DH, DA, DB)
    # The backward pass knows the rounded h alone.
    dtype = y.dtype.element_ty
    h_a = h_a.to(dtype).to(tl.float32)
    total = tl.sum(h_a, 1)  # columns beyond DH are zero
    if DB > 0:
        h_b = h_b.to(dtype).to(tl.float32)
        total += tl.sum(h_b, 1)
    mean = (total / DH)[:, None]
    h_a = tl.where(tl.arange(0, DA)[None, :] < DH, h_a - mean, 0.0)
    squares = tl.sum(h_a * h_a, 1)
    if DB > 0:
        h_b = tl.where(DA + tl.arange(0, DB)[None, :] < DH, h_b - mean, 0.0)
        squares += tl.sum(h_b * h_b, 1)
    rstd = tl.rsqrt(squares / DH + norm_eps)[:, None]
    y_a = _gated(h_a * rstd, i, S, pre, pre_step, z, z_step, w, b, skip, HAS_BIAS, 0, DA, DH)
    y_b = y_a
    if DB > 0:
        y_b = _gated(h_b * rstd, i, S, pre, pre_step, z, z_step, w, b, skip, HAS_BIAS, DA, DB, DH)
    store_rows(y, y_step, i, S, y_a, y_b, DH, DA, DB)


@triton.jit(
    do_not_specialize=[
        'q_sb', 'q_sh', 'q_ss', 'k_sb', 'k_sh', 'k_ss', 'v_sb', 'v_sh', 'v_ss', 'h_sb', 'h_sh', 'h_ss',
        'pre_sb', 'pre_sh', 'pre_ss', 'z_sb', 'z_sh', 'z_ss', 'y_sb', 'y_sh', 'y_ss',
        'S', 'NH', 'pitch', 'plane', 'reverse',
    ]
)  # fmt: skip
def gated_forward_kernel(
    q, k, v, h, pre, z, y, w, b, skip, stats,
    q_sb, q_sh, q_ss, k_sb, k_sh, k_ss, v_sb, v_sh, v_ss, h_sb, h_sh, h_ss,
    pre_sb, pre_sh, pre_ss, z_sb, z_sh, z_ss, y_sb, y_sh, y_ss,
    S, NH, pitch, plane, reverse, log_scale, eps, norm_eps, KEEP: tl.constexpr, HAS_BIAS: tl.constexpr,
    DH: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SMALL: tl.constexpr,
    ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y = ((1 + w) * norm(h) + b + skip * SiLU(pre)) * SiLU(z), h being the mLSTM of q, k, v; h is written if KEEP.

    Everything else is as in `quadratic_forward_kernel`; w, b and skip hold NH * DH channels.
    """
    tiles = tl.cdiv(S, BM)
    index = tl.program_id(0) // tiles
    first = (tiles - 1 - tl.program_id(0) % tiles) * BM
    q, q_step = head_start(q, index, NH, S, q_sb, q_sh, q_ss, reverse, ALIGN)
    k, k_step = head_start(k, index, NH, S, k_sb, k_sh, k_ss, reverse, ALIGN)
    v, v_step = head_start(v, index, NH, S, v_sb, v_sh, v_ss, reverse, ALIGN)
    h, h_step = head_start(h, index, NH, S, h_sb, h_sh, h_ss, reverse, ALIGN)
    pre, pre_step = head_start(pre, index, NH, S, pre_sb, pre_sh, pre_ss, reverse, ALIGN)
    z, z_step = head_start(z, index, NH, S, z_sb, z_sh, z_ss, reverse, ALIGN)
    y, y_step = head_start(y, index, NH, S, y_sb, y_sh, y_ss, reverse, ALIGN)
    channel = index % NH * DH
    w, b, skip = w + channel, b + channel, skip + channel
    stats += index.to(tl.int64) * pitch * BLOCK
    plane = plane.to(tl.int64) * BLOCK
    if SMALL > 0:
        if S - first <= SMALL:
            _tile(
                q, q_step, k, k_step, v, v_step, h, h_step, pre, pre_step, z, z_step, y, y_step, w, b, skip, stats,
                plane, S, first, log_scale, eps, norm_eps, KEEP, HAS_BIAS, DH, DA, DB, SMALL, BN, PRECISION,
            )  # fmt: skip
        else:
            _tile(
                q, q_step, k, k_step, v, v_step, h, h_step, pre, pre_step, z, z_step, y, y_step, w, b, skip, stats,
                plane, S, first, log_scale, eps, norm_eps, KEEP, HAS_BIAS, DH, DA, DB, BM, BN, PRECISION,
            )  # fmt: skip
    else:
        _tile(
            q, q_step, k, k_step, v, v_step, h, h_step, pre, pre_step, z, z_step, y, y_step, w, b, skip, stats,
            plane, S, first, log_scale, eps, norm_eps, KEEP, HAS_BIAS, DH, DA, DB, BM, BN, PRECISION,
        )  # fmt: skip
