"""The whole ViL block in few kernels: launchers of the forward pass. Works on tensors, knows no modules.

One kernel for residual, norm and weights, up-projection, one kernel for convolution, projections and gates, the cell,
one kernel for head norm, skip and gate, down-projection. The residual is left to the block that follows, or made by a
kernel of its own. Kept for the backward pass (`block_backward.py`): the input, the up-projection's output, the gates,
the convolution's output, values, and the cell's output with its statistics.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import (
    block_gate_kernels,
    block_kernels,
    block_mix_kernels,
    block_norm_kernels,
    triton_quadratic,
)
from .fast_launch import FastKernels
from .triton_launch import ceil_div, device_limits, dot_precision, next_power_of_two

__all__ = [
    'CELL_EPS',
    'NORM_EPS',
    'BlockShape',
    'Stream',
    'as_heads',
    'as_rows',
    'block_forward',
    'gate_width',
    'qkv_biases',
]

kernels = FastKernels(block_kernels)
gate_kernels = FastKernels(block_gate_kernels)
mix_kernels = FastKernels(block_mix_kernels)
norm_kernels = FastKernels(block_norm_kernels)

# Channels and pairs of tokens of a program of the forward mixing kernel, fixed by how its threads hold them.
MIX_CHANNELS = 32
MIX_PAIRS = 8
MIX_TOKENS = 2 * MIX_PAIRS
# Sequences up to which the gates are summed and scanned by one kernel, a head a program.
SCAN_TOKENS = triton_quadratic.SCAN_SPANS['SHORT_SPAN']
COPY_BLOCK = 2048
# Edge of the projections' blocks where they are folded: a thread holds that many neighbouring channels.
FOLDED_BLOCK = 4
NOTHING, VALUES, VALUES_AND_KEYS = range(3)
"""What of the projections is folded into its neighbours and does not exist."""
LOWERED = ('up_w', 'up_b', 'down_w')
# Elements or tokens of a tile, warps, and of gates the parts asked for at once; 'mix_rows' are the fewest and most
# steps of a mixing program over a grid, and its steps over a sequence.
SETTINGS = {
    'norm': (4096, 4),
    'residual': (4096, 4),
    'mix_rows': (4, 6, 4),
    'gates': (128, 4, 8),
    'scan': (SCAN_TOKENS, 8, 8),
}
# Elements of a tile, warps, stages of the loop; programs that a multiprocessor holds at a time, and where each holds
# many weights of folded projections.
OUTPUT_TILE = (512, 1, 3, 16, 8)
FOLDED_WIDTH = 256
# Mixing programs that a multiprocessor should have before each takes more rows: half of those that it holds.
MIX_PROGRAMS = 4
NORM_EPS = 1e-5
CELL_EPS = 1e-6


@dataclass(frozen=True)
class BlockShape:
    """What a block's kernels are specialised or launched for.

    Attributes:
        batch: Images.
        grid: Rows and columns of tokens.
        heads: Heads of the cell.
        inner: Channels E of the inner part.
        block: Edge of the projections' blocks.
        two_dimensional: 3 x 3 convolution over the grid, else a causal one over four tokens.
        reverse: Reading direction.
    """

    batch: int
    grid: tuple[int, int]
    heads: int
    inner: int
    block: int
    two_dimensional: bool
    reverse: bool

    @property
    def tokens(self) -> int:
        """Tokens of an image."""
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True)
class Stream:
    """The residual stream behind a block that has left its last sum, x + scale * (branch + bias), to the next one.

    Attributes:
        x: Residual stream before the block, (B, S, D).
        branch: The block's down-projection, (B, S, D), in the activations' dtype; None if x is all.
        bias: (D), or None.
        scale: Drop path factor per image, (B,), or None.
    """

    x: Tensor
    branch: Tensor | None = None
    bias: Tensor | None = None
    scale: Tensor | None = None

    def pointers(self) -> tuple[Tensor, ...]:
        """All four, with x where something is missing."""
        return self.x, *(self.x if t is None else t for t in (self.branch, self.bias, self.scale))

    def summed(self) -> Tensor:
        """The residual stream, by a kernel of its own if there is something to add."""
        if self.branch is None:
            return self.x
        out, (batch, tokens, dims) = torch.empty_like(self.x), self.x.shape
        rows, width = batch * tokens, next_power_of_two(dims)
        elements, warps = SETTINGS['residual']
        height = max(1, elements // width)
        norm_kernels.residual_kernel[(ceil_div(rows, height),)](
            *self.pointers(), out, rows, tokens, dims, HAS_BIAS=self.bias is not None,
            HAS_SCALE=self.scale is not None, BM=height, BD=width, num_warps=warps,
        )  # fmt: skip
        return out


def gate_width(shape: BlockShape, kinds: int = 2) -> int:
    """Columns of a tile with `kinds` columns a head: the two gates, or these and the scores."""
    return max(16, next_power_of_two(kinds * shape.heads))


def qkv_biases(weights: dict[str, Tensor | None]) -> list[Tensor]:
    """Biases of the projections, or something to point to where there are none."""
    return [weights['conv_b'] if weights[name] is None else weights[name] for name in ('bq', 'bk', 'bv')]


@dataclass(frozen=True)
class MixWeights:
    """What the forward mixing kernel reads; see `prepare_kernel`.

    Attributes:
        constant: (parts * BG) float32, what the projections' biases add to the gates.
        taps: (taps * E) float32, the convolution's weights, turned for the reading direction.
        turned: (E) float32, Wk^T bq where there are no keys.
        values: (QB, QB, E / QB) float32, the blocks of Wv where there are no values.
        matrices: (E / 32, 3, 32, 32), the projections.
        gate_matrices: (E / 32, 2, 32, BG), maps from c and a to the gates.
        kinds: Kinds of columns a head: input gate, forget gate, and q.bk where there are no keys, but biases.
    """

    constant: Tensor
    taps: Tensor
    turned: Tensor
    values: Tensor
    matrices: Tensor
    gate_matrices: Tensor
    kinds: int


def _prepare(
    shape: BlockShape, stream: Stream, weights: dict[str, Tensor | None], dtype: torch.dtype, folded: int
) -> tuple[MixWeights, dict[str, Tensor | None], Tensor, Tensor]:
    """What `_mix` reads, the outer projections' weights in dtype, the stream's sum and its norm, all by one kernel."""
    x, adds = stream.x, stream.branch is not None
    has_bias = weights['bq'] is not None
    with_scores = folded == VALUES_AND_KEYS and has_bias
    kinds = 3 if with_scores else 2
    parts, gates = ceil_div(shape.inner, MIX_CHANNELS), gate_width(shape, kinds)
    taps = weights['conv_w'][0].numel()
    found = {name: weights[name] for name in LOWERED}
    lowered = {name: x for name, x in found.items() if x is not None and x.dtype != dtype}
    sizes = {name: lowered[name].numel() if name in lowered else 0 for name in LOWERED}
    exact_sizes = [
        parts * gates, taps * shape.inner, shape.inner if with_scores else 0, shape.block * shape.inner if folded else 0
    ]  # fmt: skip
    exact = weights['wq'].new_empty(sum(exact_sizes), dtype=torch.float32)
    constant, conv_w, turned, values = exact.split_with_sizes(exact_sizes)
    low = exact.new_empty(parts * MIX_CHANNELS * (3 * MIX_CHANNELS + 2 * gates) + sum(sizes.values()), dtype=dtype)
    matrices, gate_matrices, *copies = low.split_with_sizes(
        [parts * 3 * MIX_CHANNELS**2, parts * 2 * MIX_CHANNELS * gates, *sizes.values()]
    )
    count, dims = shape.batch * shape.tokens, x.shape[2]
    norm, bias = weights['norm_w'], weights['norm_b']
    normalised = x.to(dtype) if norm is None else torch.empty_like(x, dtype=dtype)
    total = torch.empty_like(x) if adds else x
    width = next_power_of_two(dims)
    height = max(1, SETTINGS['norm'][0] // width)
    others = 3 * parts + ceil_div(max(sizes.values()), COPY_BLOCK)
    kernels.prepare_kernel[(others + (0 if norm is None else ceil_div(count, height)),)](
        weights['wq'], weights['wk'], weights['wv'], *qkv_biases(weights), weights['wi'], weights['wf'],
        weights['conv_w'], constant, conv_w, turned, values, matrices, gate_matrices,
        *(lowered.get(name, matrices) for name in sizes), *copies, *stream.pointers(), total,
        x if norm is None else norm, x if bias is None else bias, normalised, *sizes.values(), parts, others,
        shape.inner, count, shape.tokens, dims, NORM_EPS, TAPS=taps, REVERSE=shape.reverse, FOLDED=folded,
        SCORES=with_scores, QB=shape.block, HEADS=shape.heads, HAS_BIAS=has_bias, ADDS=adds,
        BRANCH_BIAS=stream.bias is not None, HAS_SCALE=stream.scale is not None, NORM_BIAS=bias is not None,
        BC=MIX_CHANNELS, BG=gates, BLOCK=COPY_BLOCK, BM=height, BD=width, num_warps=SETTINGS['norm'][1],
    )  # fmt: skip
    found |= {name: x.view_as(lowered[name]) for name, x in zip(sizes, copies, strict=True) if name in lowered}
    return MixWeights(constant, conv_w, turned, values, matrices, gate_matrices, kinds), found, total, normalised


def _strip_height(rows: int, beside: int, processors: int) -> int:
    """Rows of a grid that a mixing program walks down, with `beside` programs for each strip of rows.

    Those that leave the last strip fullest, the most of such; fewer where few programs would leave the device idle.
    """
    fewest, most, _ = SETTINGS['mix_rows']
    height = min(range(most, fewest - 1, -1), key=lambda height: -rows % height)
    while height > 1 and beside * ceil_div(rows, height) < MIX_PROGRAMS * processors:
        height = ceil_div(height, 2)
    return height


class _Chunks(NamedTuple):
    """How the gates' shares lie in memory: in chunks of MIX_TOKENS, as the forward mixing kernels walk.

    Attributes:
        rows: Rows of an image, each in chunks of its own.
        columns: Tokens of a row.
        pairs: Pairs of tokens from an image's row to that of the next, which may begin in the same chunk.
        count: Chunks.
    """

    rows: int
    columns: int
    pairs: int
    count: int


def _chunks(shape: BlockShape) -> _Chunks:
    if shape.two_dimensional:
        rows, columns = shape.grid
        pairs = ceil_div(columns, 2)
    else:
        rows, columns = 1, shape.tokens
        pairs = ceil_div(columns, MIX_TOKENS) * MIX_PAIRS
    return _Chunks(rows, columns, pairs, ceil_div(shape.batch * pairs, MIX_PAIRS) * rows)


def share_planes(gates: int) -> int:
    """Planes of a chunk with so many columns of gates, in the order of `_put_shares`: the last eight may have gaps."""
    left = gates % 8
    return gates - left + (left if left < 2 else 4 + left // 2)


def _mix(
    shape: BlockShape, a: Tensor, mix: MixWeights, weights: dict[str, Tensor | None], folded: int
) -> tuple[Tensor, ...]:
    """The convolution's output, q, k, v (B, S, E) and shares (chunks, parts, planes, MIX_TOKENS) of the gates.

    With values folded, c and a stand for the convolution's output and v; with keys, Wk^T q and c for q and k.
    """
    parts, gates = ceil_div(shape.inner, MIX_CHANNELS), mix.kinds * shape.heads
    pre, q = (a.new_empty(shape.batch, shape.tokens, shape.inner) for _ in range(2))
    k = pre if folded == VALUES_AND_KEYS else torch.empty_like(pre)
    v = a if folded else torch.empty_like(pre)
    shares = a.new_empty(_chunks(shape).count * parts * share_planes(gates) * MIX_TOKENS, dtype=torch.float32)
    biases = [mix.turned] * 3 if folded == VALUES_AND_KEYS else qkv_biases(weights)
    tensors = (
        a, a.stride(0), a.stride(1), mix.taps, weights['conv_b'], mix.matrices, mix.gate_matrices, *biases,
        pre, q, k, v, shares, shape.batch, shape.tokens,
    )  # fmt: skip
    options = {
        'FOLDED': folded, 'GATES': gates, 'SPLIT': shape.block <= 4, 'HAS_BIAS': weights['bq'] is not None,
        'EVEN': shape.inner % MIX_CHANNELS == 0, 'PRECISION': dot_precision(a.dtype), 'PAIRS': MIX_PAIRS,
        'BG': gate_width(shape, mix.kinds), 'PLANES': share_planes(gates), 'num_warps': 1, 'num_stages': 1,
    }  # fmt: skip
    if shape.two_dimensional:
        rows, columns = shape.grid
        beside = parts * ceil_div(shape.batch * ceil_div(columns, 2), MIX_PAIRS)
        height = _strip_height(rows, beside, device_limits(a.device).multiprocessors)
        blocks = ceil_div(rows, height)
        mix_kernels.mix2d_kernel[(beside * blocks,)](
            *tensors, rows, columns, shape.inner, height, blocks, parts, **options
        )
    else:
        height = SETTINGS['mix_rows'][2]
        blocks = ceil_div(shape.tokens, MIX_TOKENS * height)
        mix_kernels.mix1d_kernel[(parts * blocks * shape.batch,)](
            *tensors, shape.inner, height, blocks, parts, REVERSE=shape.reverse, **options
        )
    return pre, q, k, v, shares


def _gates(
    shape: BlockShape, cell: ModuleType, q: Tensor, shares: Tensor, mix: MixWeights, weights: dict[str, Tensor | None]
) -> tuple[Tensor, Tensor | None]:
    """Sum of the gates' shares, (kinds, B, NH, S), and the quadratic cell's scans of them, where they are made here."""
    gates = shares.new_empty(mix.kinds, shape.batch, shape.heads, shape.tokens)
    width = gate_width(shape, mix.kinds)
    parts = mix.constant.numel() // width
    chunks = _chunks(shape)
    tensors = shares, mix.constant, weights['bi'], weights['bf'], gates
    sizes = shape.batch, shape.tokens, chunks.rows, chunks.columns, chunks.pairs
    options = {
        'SCORES': mix.kinds > 2, 'HEADS': shape.heads, 'PARTS': parts, 'PLANES': share_planes(mix.kinds * shape.heads),
        'CHUNK': MIX_TOKENS, 'BG': width, 'BC': next_power_of_two(parts),
    }  # fmt: skip
    if cell is triton_quadratic and shape.tokens <= SCAN_TOKENS:
        (stats,) = cell.empty_saved(q)
        pitch = stats.shape[-1] // cell.BLOCK
        rows, (span, warps, at_once) = shape.batch * shape.heads, SETTINGS['scan']
        gate_kernels.gates_scan_kernel[(rows,)](
            *tensors, stats, *sizes, pitch, rows * pitch, int(shape.reverse), **options, BP=at_once, SPAN=span,
            num_warps=warps,
        )  # fmt: skip
        return gates, stats
    step, warps, at_once = SETTINGS['gates']
    gate_kernels.gates_kernel[(ceil_div(shape.batch * shape.tokens, step), shape.heads)](
        *tensors, *sizes, **options, BP=at_once, BT=step, num_warps=warps
    )
    return gates, None


def as_heads(x: Tensor, heads: int) -> Tensor:
    """(B, S, E) seen as (B, NH, S, DH)."""
    return x.view(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


def as_rows(x: Tensor) -> Tensor:
    """(B, NH, S, DH) as (B * S, E), without a copy if it is token-major."""
    batch, heads, tokens, dim = x.shape
    return x.transpose(1, 2).reshape(batch * tokens, heads * dim)


def _output(
    shape: BlockShape, h: Tensor, pre: Tensor, z: Tensor, mix: MixWeights, sums: Tensor,
    weights: dict[str, Tensor | None], folded: int,
) -> Tensor:  # fmt: skip
    """y (B, S, E). With values folded h is what the cell makes of a."""
    dim, count = shape.inner // shape.heads, shape.batch * shape.tokens
    y = torch.empty_like(pre)
    elements, warps, stages, held, held_folded = OUTPUT_TILE
    width = next_power_of_two(dim)
    held = held_folded if folded and width > FOLDED_WIDTH else held
    height = max(1, elements // width)
    steps = ceil_div(count * shape.heads, height * held * device_limits(y.device).multiprocessors)
    bias = weights['head_b']
    norm_kernels.output_kernel[(ceil_div(count, height * steps), shape.heads)](
        as_rows(h), pre, z, z.stride(1), weights['head_w'], weights['head_w'] if bias is None else bias,
        weights['skip'], mix.values, qkv_biases(weights)[2], sums, y, count, shape.tokens, shape.inner,
        sums.shape[-1], int(shape.reverse), NORM_EPS, steps, FOLDED=folded > NOTHING,
        QKV_BIAS=weights['bq'] is not None, HAS_BIAS=bias is not None, DH=dim, BM=height, BD=width, STAGES=stages,
        num_warps=warps,
    )  # fmt: skip
    return y


def _folds(shape: BlockShape, cell: ModuleType) -> int:
    """Which of keys and values need not exist where there is no backward pass."""
    if shape.block != FOLDED_BLOCK or shape.inner // shape.heads % shape.block != 0:
        return NOTHING
    return VALUES_AND_KEYS if cell is triton_quadratic else VALUES


def block_forward(
    shape: BlockShape,
    cell: ModuleType,
    stream: Stream,
    weights: dict[str, Tensor | None],
    dtype: torch.dtype,
    scale: Tensor | None,
    keep: bool = True,
) -> tuple[Stream, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Sequence[Tensor]]:
    """Run one block, or without a norm's weight its inner part alone.

    Args:
        shape: Sizes and direction.
        cell: Module with the mLSTM's `forward` and `backward`, such as `triton_quadratic`.
        stream: Residual stream, contiguous.
        weights: The block's parameters by short name; see `mmvil.ops.block_op`.
        dtype: Type that activations are stored in and multiplied as.
        scale: Drop path factor per image, (B,), or None.
        keep: Whether there will be a backward pass. Else only the first result means something.

    Returns:
        The new residual stream (of the inner part: x is its output in dtype), and for the backward pass: the block's
        input x (B, S, D), u (B, S, 2E), gates (2, B, NH, S), h, the convolution's output, v (B, S, E), the cell's
        statistics.
    """
    folded = NOTHING if keep else _folds(shape, cell)
    mix, lowered, x, normalised = _prepare(shape, stream, weights, dtype, folded)
    u = F.linear(normalised, lowered['up_w'], lowered['up_b'])
    a, z = u.chunk(2, -1)
    pre, q, k, v, shares = _mix(shape, a, mix, weights, folded)
    heads = [as_heads(t, shape.heads) for t in (q, k, v)]
    gates, stats = _gates(shape, cell, heads[0], shares, mix, weights)
    known = {'stats': stats, 'scores': gates[2] if mix.kinds > 2 else None} if cell is triton_quadratic else {}
    h, statistics = cell.forward(*heads, gates[0], gates[1], shape.reverse, CELL_EPS, sums=folded > NOTHING, **known)
    del normalised, q, k, heads  # their memory is free for what comes
    y = _output(shape, h, pre, z, mix, cell.row_sums(statistics), weights, folded)
    bias = weights['down_b']
    if weights['norm_w'] is None:
        out = Stream(F.linear(y, lowered['down_w'], None if bias is None else bias.to(dtype)))
    else:
        out = Stream(x, F.linear(y, lowered['down_w']), bias, scale)
    return out, x, u, gates, h, pre, v, statistics
