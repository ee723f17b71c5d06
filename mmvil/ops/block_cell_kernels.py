"""Device code of the cell inside of a ViL block: the quadratic mLSTM, then head norm, skip and gate of the same rows.

The cell's tile of h is laid out for the matrix unit and takes most registers. It goes through memory, that is the L2
cache, and comes back some rows at a time.
"""

import triton
import triton.language as tl

from .triton_quadratic_kernels import BLOCK, head_start, hidden_rows, store_rows

__all__ = ['gated_forward_kernel']


@triton.jit
def _gate_rows(
    h, h_step, pre, pre_step, z, z_step, y, y_step, w, b, skip, S, first, norm_eps,
    HAS_BIAS: tl.constexpr, DH: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BG: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """y = ((1 + w) * norm(h) + b + skip * SiLU(pre)) * SiLU(z) for BM rows, BG at a time; h and y may be one."""
    d = tl.arange(0, BD)
    inside = d < DH
    weight = tl.load(w + d, mask=inside, other=0.0).to(tl.float32)[None, :] + 1.0
    jump = tl.load(skip + d, mask=inside, other=0.0).to(tl.float32)[None, :]
    bias = tl.load(b + d, mask=inside, other=0.0).to(tl.float32)[None, :] if HAS_BIAS else jump
    for start in tl.range(first, tl.minimum(first + BM, S), BG, num_stages=STAGES):
        i = start + tl.arange(0, BG)
        mask = (i < S)[:, None] & inside[None, :]
        x = tl.load(h + i[:, None] * h_step + d[None, :], mask=mask, other=0.0).to(tl.float32)
        c = tl.load(pre + i[:, None] * pre_step + d[None, :], mask=mask, other=0.0).to(tl.float32)
        gate = tl.load(z + i[:, None] * z_step + d[None, :], mask=mask, other=0.0).to(tl.float32)
        centred = tl.where(mask, x - (tl.sum(x, 1) / DH)[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, 1) / DH + norm_eps)
        inner = centred * rstd[:, None] * weight + jump * c * tl.sigmoid(c)
        if HAS_BIAS:
            inner += bias
        out = inner * gate * tl.sigmoid(gate)
        tl.store(y + i[:, None] * y_step + d[None, :], out.to(y.dtype.element_ty), mask=mask)


@triton.jit
def _tile(
    q, q_step, k, k_step, v, v_step, h, h_step, pre, pre_step, z, z_step, y, y_step, w, b, skip, stats, plane,
    S, first, log_scale, eps, norm_eps, HAS_BIAS: tl.constexpr, DH: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr,
    BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BG: tl.constexpr, STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`gated_forward_kernel` for BM tokens of a head."""
    h_a, h_b = hidden_rows(
        q, q_step, k, k_step, v, v_step, stats, plane, S, first, log_scale, eps, DH, DA, DB, BM, BN, PRECISION
    )
    store_rows(h, h_step, first + tl.arange(0, BM), S, h_a, h_b, DH, DA, DB)
    tl.debug_barrier()  # what other threads have written is read from here on
    _gate_rows(
        h, h_step, pre, pre_step, z, z_step, y, y_step, w, b, skip, S, first, norm_eps, HAS_BIAS, DH, BD, BM, BG, STAGES
    )


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
    S, NH, pitch, plane, reverse, log_scale, eps, norm_eps, HAS_BIAS: tl.constexpr,
    DH: tl.constexpr, DA: tl.constexpr, DB: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BG: tl.constexpr, STAGES: tl.constexpr, SMALL: tl.constexpr, ALIGN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y = ((1 + w) * norm(h) + b + skip * SiLU(pre)) * SiLU(z), h being the mLSTM of q, k, v.

    h may be y, where nobody wants it. Everything else is as in `quadratic_forward_kernel`; w, b and skip hold NH * DH
    channels.
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
                plane, S, first, log_scale, eps, norm_eps, HAS_BIAS, DH, DA, DB, BD, SMALL, BN, BG, STAGES,
                PRECISION,
            )  # fmt: skip
        else:
            _tile(
                q, q_step, k, k_step, v, v_step, h, h_step, pre, pre_step, z, z_step, y, y_step, w, b, skip, stats,
                plane, S, first, log_scale, eps, norm_eps, HAS_BIAS, DH, DA, DB, BD, BM, BN, BG, STAGES,
                PRECISION,
            )  # fmt: skip
    else:
        _tile(
            q, q_step, k, k_step, v, v_step, h, h_step, pre, pre_step, z, z_step, y, y_step, w, b, skip, stats,
            plane, S, first, log_scale, eps, norm_eps, HAS_BIAS, DH, DA, DB, BD, BM, BN, BG, STAGES,
                PRECISION,
        )  # fmt: skip
