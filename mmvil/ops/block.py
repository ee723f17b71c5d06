"""The whole ViL block in few kernels: launchers and the exact backward pass. Works on tensors, knows no modules.

Forward: norm, up-projection, one kernel for convolution, projections and gates, the cell, one kernel for head norm,
skip and gate, down-projection and residual. Kept for the backward pass: the input, the up-projection's output, the
gates and the cell's output with its statistics; everything else is computed again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from . import block_backward_kernels as backward_kernels
from . import block_gemm_kernels as gemm_kernels
from . import block_kernels as kernels
from . import block_mix_kernels as mix_kernels
from . import block_norm_kernels as norm_kernels
from .triton_launch import Tiles, dot_precision, launch_first_fitting

__all__ = ['BlockShape', 'block_backward', 'block_forward']

STRIP_COLUMNS = 16
# Channels and pairs of tokens of a program of the forward mixing kernel, fixed by how its threads hold them.
MIX_CHANNELS = 32
MIX_PAIRS = 8
GATE_PARTS = 8
COPY_BLOCK = 4096
# Tiles of the down-projection in 16 bits, fastest first, and the widest residual stream for which it is faster than
# cuBLAS and an addition: on one H100 26 against 36 us at D = 192, 60 against 70 at 384, 95 against 85 at 768.
DOWN_TILES = (Tiles(64, 128, 4, 4), Tiles(64, 64, 4, 4), Tiles(64, 64, 4, 2))
DOWN_MAX_DIMS = 512
# Channels, elements or tokens of a tile, warps, and where there is a third number, programs aimed at. 'mix' is for the
# backward mixing kernel; 'mix_rows' are the steps of a program of the forward one, over a grid and over a sequence.
SETTINGS = {
    'norm': (4096, 4),
    'norm_backward': (1024, 1, 2048),
    'mix': (32, 1),
    'mix_rows': (4, 4),
    'gates': (32, 1),
    'mix_backward_warps': 2,
    'conv_backward': (32, 4),
    'output': (2048, 4),
    'output_backward': (512, 1),
    'programs': 2048,
}
NORM_EPS = 1e-5


def blocks_of(count: int, size: int) -> int:
    """Blocks of a size that hold `count` things. Triton's own function costs two microseconds a call."""
    return -(-count // size)


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below a number, which is at least 1."""
    return 1 << (number - 1).bit_length()


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

    @property
    def walk(self) -> tuple[int, int]:
        """Rows and columns that strips are cut from."""
        return self.grid if self.two_dimensional else (blocks_of(self.tokens, STRIP_COLUMNS), STRIP_COLUMNS)

    @property
    def first_tap(self) -> int:
        """Place of a causal convolution's first tap relative to the current token."""
        return 0 if self.reverse else -3


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Normalise the rows of x (rows, D); the stored weight is the difference from one."""
    rows, dims = x.shape
    out = torch.empty_like(x, dtype=dtype)
    width = power_of_two(dims)
    height = max(1, SETTINGS['norm'][0] // width)
    norm_kernels.layer_norm_kernel[(blocks_of(rows, height),)](
        x, weight, weight if bias is None else bias, out, rows, dims, NORM_EPS, HAS_BIAS=bias is not None,
        BM=height, BD=width, num_warps=SETTINGS['norm'][1],
    )  # fmt: skip
    return out


def _layer_norm_backward(
    x: Tensor, weight: Tensor, dnorm: Tensor, dout: Tensor, dbranch: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradient of x, residual included, and (3, D): sums for weight, bias and the bias of the branch."""
    rows, dims = x.shape
    dx = torch.empty_like(x)
    width = triton.next_power_of_2(dims)
    height = max(1, SETTINGS['norm_backward'][0] // width)
    steps = max(1, triton.cdiv(rows, height * SETTINGS['norm_backward'][2]))
    programs = triton.cdiv(rows, height * steps)
    sums = x.new_empty(programs, 3, dims, dtype=torch.float32)
    norm_kernels.layer_norm_backward_kernel[(programs,)](
        x, weight, dnorm, dout, dbranch, dx, sums, rows, dims, NORM_EPS, steps, BM=height, BD=width,
        num_warps=SETTINGS['norm_backward'][1],
    )  # fmt: skip
    return dx, sums.sum(0)


def _strips(shape: BlockShape, columns: int = STRIP_COLUMNS) -> tuple[int, int, int]:
    """Rows of a strip, strips above each other, strips in all."""
    rows, width = shape.walk
    height = min(rows, 32)
    row_blocks = triton.cdiv(rows, height)
    return height, row_blocks, row_blocks * triton.cdiv(width, columns)


def _channels(shape: BlockShape, most: int) -> int:
    """Channels of a tile: a power of two that holds whole blocks."""
    return max(32, min(most, power_of_two(shape.inner)))


def _gate_width(shape: BlockShape) -> int:
    """Columns of a tile of gates."""
    return max(16, power_of_two(2 * shape.heads))


def _biases(weights: dict[str, Tensor | None]) -> list[Tensor]:
    """Biases of the projections, or something to point to where there are none."""
    return [weights['conv_b'] if weights[name] is None else weights[name] for name in ('bq', 'bk', 'bv')]


@dataclass(frozen=True)
class MixWeights:
    """What the forward mixing kernel reads; see `prepare_kernel`.

    Attributes:
        constant: (parts, BG) float32, what the projections' biases add to the gates.
        taps: (taps, E) float32, the convolution's weights, turned for the reading direction.
        matrices: (E / 32, 3, 32, 32), the projections.
        gate_matrices: (E / 32, 2, 32, BG), maps from c and a to the gates.
    """

    constant: Tensor
    taps: Tensor
    matrices: Tensor
    gate_matrices: Tensor


def _prepare(
    shape: BlockShape, weights: dict[str, Tensor | None], channels: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, MixWeights]:
    """Weights in tiles of `channels` channels for the backward pass, and what `_mix` reads; see `prepare_kernel`."""
    parts = blocks_of(shape.inner, channels)
    square = weights['wq'].new_empty(parts, 3, channels, channels, dtype=dtype)
    tall = square.new_empty(parts, 2, channels, _gate_width(shape))
    mix, _ = _launch_prepare(shape, weights, channels, dtype, (square, tall), ())
    return square, tall, mix


def _prepare_forward(
    shape: BlockShape, weights: dict[str, Tensor | None], dtype: torch.dtype
) -> tuple[MixWeights, dict[str, Tensor | None]]:
    """What `_mix` reads, and the outer projections' weights in dtype, all by one kernel."""
    return _launch_prepare(shape, weights, MIX_CHANNELS, dtype, None, ('up_w', 'up_b', 'down_w'))


def _launch_prepare(
    shape: BlockShape, weights: dict[str, Tensor | None], channels: int, dtype: torch.dtype,
    tiles: tuple[Tensor, Tensor] | None, wanted: tuple[str, ...],
) -> tuple[MixWeights, dict[str, Tensor | None]]:  # fmt: skip
    """Run `prepare_kernel`; `tiles` are square and tall, `wanted` the weights that are also needed in dtype."""
    parts, gates = blocks_of(shape.inner, channels), _gate_width(shape)
    groups, taps = parts * channels // MIX_CHANNELS, weights['conv_w'][0].numel()
    found = {name: weights[name] for name in wanted}
    lowered = {name: x for name, x in found.items() if x is not None and x.dtype != dtype}
    sizes = {name: lowered[name].numel() if name in lowered else 0 for name in ('up_w', 'up_b', 'down_w')}
    exact = weights['wq'].new_empty(parts * gates + taps * shape.inner, dtype=torch.float32)
    constant, turned = exact.split_with_sizes([parts * gates, taps * shape.inner])
    low = exact.new_empty(groups * MIX_CHANNELS * (3 * MIX_CHANNELS + 2 * gates) + sum(sizes.values()), dtype=dtype)
    matrices, gate_matrices, *copies = low.split_with_sizes(
        [groups * 3 * MIX_CHANNELS**2, groups * 2 * MIX_CHANNELS * gates, *sizes.values()]
    )
    square, tall = (matrices, gate_matrices) if tiles is None else tiles
    programs = parts + blocks_of(max(sizes.values()), COPY_BLOCK)
    kernels.prepare_kernel[(programs,)](
        weights['wq'], weights['wk'], weights['wv'], *_biases(weights), weights['wg'], weights['conv_w'], square, tall,
        constant, turned, matrices, gate_matrices, *(lowered.get(name, matrices) for name in sizes), *copies,
        *sizes.values(), parts, shape.inner, TAPS=taps, REVERSE=shape.reverse, QB=shape.block, HEADS=shape.heads,
        HAS_BIAS=weights['bq'] is not None, FOR_BACKWARD=tiles is not None, BC=channels, BG=gates, BLOCK=COPY_BLOCK,
        num_warps=4,
    )  # fmt: skip
    found |= {name: x.view_as(lowered[name]) for name, x in zip(sizes, copies, strict=True) if name in lowered}
    return MixWeights(constant.view(parts, gates), turned.view(taps, -1), matrices, gate_matrices), found


def _mix(
    shape: BlockShape, a: Tensor, conv: Tensor, prepared: tuple[Tensor, Tensor, MixWeights],
    weights: dict[str, Tensor | None], with_gates: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """c, q, k, v (B, S, E) and, if wanted, the gates' pre-activations (2, B, NH, S)."""
    mix = prepared[2]
    parts, gates = blocks_of(shape.inner, MIX_CHANNELS), 2 * shape.heads
    c, q, k, v = (a.new_empty(shape.batch, shape.tokens, shape.inner) for _ in range(4))
    shares = a.new_empty(parts * shape.batch * shape.tokens * gates if with_gates else 1, dtype=torch.float32)
    tensors = (
        a, a.stride(0), a.stride(1), conv, *conv.stride(), weights['conv_b'], mix.matrices, mix.gate_matrices,
        *_biases(weights), c, q, k, v, shares, shape.batch, shape.tokens,
    )  # fmt: skip
    options = {
        'GATES': gates, 'SPLIT': shape.block <= 4, 'HAS_BIAS': weights['bq'] is not None, 'WITH_GATES': with_gates,
        'EVEN': shape.inner % MIX_CHANNELS == 0, 'PRECISION': dot_precision(a.dtype), 'PAIRS': MIX_PAIRS,
        'BG': _gate_width(shape), 'num_warps': 1, 'num_stages': 1,
    }  # fmt: skip
    if shape.two_dimensional:
        rows, columns = shape.grid
        height = SETTINGS['mix_rows'][0]
        blocks = blocks_of(rows, height)
        strips = blocks_of(shape.batch * blocks_of(columns, 2), MIX_PAIRS) * blocks
        mix_kernels.mix2d_kernel[(parts * strips,)](
            *tensors, rows, columns, shape.inner, height, blocks, parts, **options
        )
    else:
        height = SETTINGS['mix_rows'][1]
        blocks = blocks_of(shape.tokens, 2 * MIX_PAIRS * height)
        mix_kernels.mix1d_kernel[(parts * blocks * shape.batch,)](
            *tensors, shape.inner, height, blocks, parts, REVERSE=shape.reverse, **options
        )
    return c, q, k, v, _gates(shape, shares, mix.constant, weights['gate_b']) if with_gates else None


def _gates(shape: BlockShape, shares: Tensor, constant: Tensor, bias: Tensor) -> Tensor:
    """Sum of the gates' shares, (2, B, NH, S)."""
    gates = shares.new_empty(2, shape.batch, shape.heads, shape.tokens)
    parts, width = constant.shape
    step, warps = SETTINGS['gates']
    mix_kernels.gates_kernel[(blocks_of(shape.batch * shape.tokens, step),)](
        shares, constant, bias, gates, shape.batch, shape.tokens, shares.numel() // gates.numel(), parts,
        HEADS=shape.heads, BG=width, BT=step, BP=GATE_PARTS, BN=power_of_two(2 * shape.heads),
        num_warps=warps,
    )  # fmt: skip
    return gates


def _heads(x: Tensor, heads: int) -> Tensor:
    """(B, S, E) seen as (B, NH, S, DH)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _taps(conv: Tensor, reverse: bool) -> Tensor:
    """Depthwise weights as (E, taps) float32, turned for the reading direction."""
    flat = conv.flatten(1).float()
    return flat.flip(1) if reverse else flat.contiguous()


def _output(shape: BlockShape, h: Tensor, c: Tensor, z: Tensor, weights: dict[str, Tensor | None]) -> Tensor:
    """y (B, S, E)."""
    dim = shape.inner // shape.heads
    y = torch.empty_like(c)
    width = power_of_two(dim)
    height = max(1, SETTINGS['output'][0] // width)
    bias = weights['head_b']
    norm_kernels.output_kernel[(blocks_of(shape.tokens, height), shape.heads, shape.batch)](
        h, h.stride(0), h.stride(1), h.stride(2), c, z, z.stride(0), z.stride(1), weights['head_w'],
        weights['head_w'] if bias is None else bias, weights['skip'], y, shape.tokens, shape.inner, NORM_EPS,
        HAS_BIAS=bias is not None, DH=dim, BM=height, BD=width, num_warps=SETTINGS['output'][1],
    )  # fmt: skip
    return y


def block_forward(
    shape: BlockShape,
    cell: ModuleType,
    x: Tensor,
    weights: dict[str, Tensor | None],
    dtype: torch.dtype,
    scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Sequence[Tensor]]:
    """Run one block.

    Args:
        shape: Sizes and direction.
        cell: Module with the mLSTM's `forward` and `backward`, such as `triton_quadratic`.
        x: Residual stream, (B, S, D), contiguous.
        weights: The block's parameters by short name; see `mmvil.ops.block_op`.
        dtype: Type that activations are stored in and multiplied as.
        scale: Drop path factor per image, (B,), or None.

    Returns:
        The new residual stream, and for the backward pass: u (B, S, 2E), gates (2, B, NH, S), h, the cell's statistics.
    """
    mix, lowered = _prepare_forward(shape, weights, dtype)
    normalised = layer_norm(x.flatten(0, 1), weights['norm_w'], weights['norm_b'], dtype)
    u = F.linear(normalised, lowered['up_w'], lowered['up_b'])
    u = u.view(shape.batch, shape.tokens, 2 * shape.inner)
    a, z = u.chunk(2, -1)
    c, q, k, v, gates = _mix(shape, a, mix.taps.t(), (None, None, mix), weights, with_gates=True)
    heads = [_heads(t, shape.heads) for t in (q, k, v)]
    h, statistics = cell.forward(*heads, gates[0], gates[1], shape.reverse, 1e-6)
    y = _output(shape, h, c, z, weights)
    return _down(shape, y, lowered['down_w'], weights['down_b'], x, scale), u, gates, h, statistics


def _down(shape: BlockShape, y: Tensor, weight: Tensor, bias: Tensor | None, x: Tensor, scale: Tensor | None) -> Tensor:
    """Down-projection of y (B, S, E), weighted by scale per image, added to the residual stream x (B, S, D)."""
    if y.dtype == torch.float32 or x.shape[-1] > DOWN_MAX_DIMS:
        branch = F.linear(y, weight, None if bias is None else bias.to(y.dtype))
        return x + branch if scale is None else torch.addcmul(x, branch, scale.view(-1, 1, 1).to(x.dtype))
    out = torch.empty_like(x)
    rows, dims = shape.batch * shape.tokens, x.shape[-1]

    def launch(tiles: Tiles) -> object:
        grid = (blocks_of(dims, tiles.columns), blocks_of(rows, tiles.rows))
        return gemm_kernels.down_kernel[grid](
            y, weight, weight if bias is None else bias, x, x if scale is None else scale, out, rows, shape.tokens,
            shape.inner, dims, HAS_BIAS=bias is not None, HAS_SCALE=scale is not None, BM=tiles.rows, BN=tiles.columns,
            BK=64, PRECISION='ieee', **tiles.options(),
        )  # fmt: skip

    launch_first_fitting(DOWN_TILES if dims > 192 else DOWN_TILES[1:], launch)
    return out


def block_backward(
    shape: BlockShape, cell: ModuleType, dout: Tensor, x: Tensor, u: Tensor, gates: Tensor, h: Tensor,
    statistics: Sequence[Tensor], weights: dict[str, Tensor | None], scale: Tensor | None,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Gradients of one block.

    Args:
        shape: Sizes and direction.
        cell: Module with the mLSTM's `forward` and `backward`, such as `triton_quadratic`.
        dout: Gradient of the new residual stream, (B, S, D).
        x: The block's input.
        u: From the forward pass.
        gates: From the forward pass.
        h: From the forward pass.
        statistics: From the forward pass.
        weights: The block's parameters by short name.
        scale: Drop path factor per image, or None.

    Returns:
        Gradient of x, and of every parameter by short name, float32 or the activations' dtype.
    """
    dtype, batch, tokens, inner = u.dtype, shape.batch, shape.tokens, shape.inner
    dout = dout.contiguous()
    dbranch = (dout if scale is None else dout * scale.view(-1, 1, 1).to(dout.dtype)).to(dtype)
    flat = dbranch.flatten(0, 1)
    a, z = u.chunk(2, -1)
    conv = _taps(weights['conv_w'], shape.reverse)
    prepared = _prepare(shape, weights, _channels(shape, SETTINGS['mix'][0]), dtype)
    c, q, k, v, _ = _mix(shape, a, conv, prepared, weights, with_gates=False)
    dy = (flat @ weights['down_w'].to(dtype)).view(batch, tokens, inner)
    du = torch.empty_like(u)
    da, dz = du.chunk(2, -1)
    grads: dict[str, Tensor] = {}
    y, dh, dc, output_sums = _output_backward(shape, h, c, z, dy, dz, weights)
    grads['head_w'], grads['head_b'], grads['skip'], dz_sum = output_sums
    grads['down_w'] = flat.t() @ y.flatten(0, 1)
    heads = [_heads(t, shape.heads) for t in (q, k, v)]
    dq, dk, dv, *dgates = cell.backward(
        _heads(dh, shape.heads), *heads, gates[0], gates[1], h, statistics, shape.reverse, 1e-6
    )
    dgates = torch.stack(dgates)
    grads['gate_b'] = dgates.sum((1, 3)).flatten()
    dpre = _mix_backward(shape, a, conv, prepared, (dq, dk, dv), dgates, dc, da, weights, grads)
    da_sum = _conv_backward(shape, a, conv, dpre, da, grads)
    grads['up_b'] = torch.cat([da_sum, dz_sum])
    normalised = layer_norm(x.flatten(0, 1), weights['norm_w'], weights['norm_b'], dtype)
    du = du.view(-1, 2 * inner)
    grads['up_w'] = du.t() @ normalised
    dnorm = du @ weights['up_w'].to(dtype)
    dx, sums = _layer_norm_backward(x.flatten(0, 1), weights['norm_w'], dnorm, dout.flatten(0, 1), flat)
    grads['norm_w'], grads['norm_b'], grads['down_b'] = sums
    return dx.view_as(x), grads


def _output_backward(
    shape: BlockShape, h: Tensor, c: Tensor, z: Tensor, dy: Tensor, dz: Tensor, weights: dict[str, Tensor | None]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, dh, dc (B, S, E); dz is written in place; sums (4, E): head norm's weight and bias, skip, bias of z."""
    dim = shape.inner // shape.heads
    y, dh, dc = torch.empty_like(c), torch.empty_like(c), torch.empty_like(c)
    width = triton.next_power_of_2(dim)
    height = max(1, SETTINGS['output_backward'][0] // width)
    steps = max(1, min(8, shape.tokens // (4 * height)))
    blocks = triton.cdiv(shape.tokens, height * steps)
    sums = c.new_empty(shape.batch * blocks, 4, shape.inner, dtype=torch.float32)
    bias = weights['head_b']
    norm_kernels.output_backward_kernel[(blocks, shape.heads, shape.batch)](
        h, h.stride(0), h.stride(1), h.stride(2), c, z, z.stride(0), z.stride(1), weights['head_w'],
        weights['head_w'] if bias is None else bias, weights['skip'], dy, y, dz, dz.stride(0), dz.stride(1), dh, dc,
        sums, shape.tokens, shape.inner, NORM_EPS, steps, blocks, HAS_BIAS=bias is not None, DH=dim, BM=height,
        BD=width, num_warps=SETTINGS['output_backward'][1],
    )  # fmt: skip
    return y, dh, dc, sums.sum(0)


def _groups(shape: BlockShape, parts: int, strips: int) -> tuple[int, int]:
    """Groups of images, and images of each, so that there are programs enough but few partial sums."""
    groups = max(1, min(shape.batch, SETTINGS['programs'] // (parts * strips)))
    batches = triton.cdiv(shape.batch, groups)
    return triton.cdiv(shape.batch, batches), batches


def _mix_backward(
    shape: BlockShape, a: Tensor, conv: Tensor, prepared: Sequence[Tensor], dqkv: Sequence[Tensor], dgates: Tensor,
    dc: Tensor, da: Tensor, weights: dict[str, Tensor | None], grads: dict[str, Tensor],
) -> Tensor:  # fmt: skip
    """Gradient of the convolution's output (B, S, E); da is written in place, the sums enter `grads`."""
    square, tall, _ = prepared
    parts, _, channels, _ = square.shape
    height, row_blocks, strips = _strips(shape)
    groups, batches = _groups(shape, parts, strips)
    rows, width = shape.walk
    inner, block, heads, gates = shape.inner, shape.block, shape.heads, _gate_width(shape)
    dpre = torch.empty_like(dc)
    if any(t.stride() != dqkv[0].stride() or t.stride(-1) != 1 for t in dqkv):
        dqkv = [t.contiguous() for t in dqkv]
    sums = a.new_empty(groups * strips, 3 * inner * (block + 1) + 2 * gates * inner + gates, dtype=torch.float32)
    backward_kernels.mix_backward_kernel[(parts, strips, groups)](
        a, a.stride(0), a.stride(1), conv, weights['conv_b'], square, tall, *dqkv, *dqkv[0].stride()[:3], dgates, dc,
        dpre, da, da.stride(0), da.stride(1), sums, shape.batch, shape.tokens, rows, width, inner, inner // heads,
        height, row_blocks, strips, batches, shape.first_tap, IS_2D=shape.two_dimensional, QB=block, HEADS=heads,
        PRECISION=dot_precision(a.dtype), BW=STRIP_COLUMNS, BC=channels, BG=gates,
        num_warps=SETTINGS['mix_backward_warps'],
    )  # fmt: skip
    matrices = a.new_empty(3, inner // block, block, block, dtype=torch.float32)
    biases = a.new_empty(3, inner, dtype=torch.float32)
    grads['wg'] = a.new_empty(2 * heads, 3 * inner, dtype=torch.float32)
    backward_kernels.finish_kernel[(parts,)](
        sums.sum(0), square, weights['wg'], *_biases(weights), matrices, biases, grads['wg'], inner, QB=block,
        HEADS=heads, HAS_BIAS=weights['bq'] is not None, BC=channels, BG=gates, num_warps=4,
    )  # fmt: skip
    grads['wq'], grads['wk'], grads['wv'] = matrices
    grads['bq'], grads['bk'], grads['bv'] = biases
    return dpre


def _conv_backward(
    shape: BlockShape, a: Tensor, conv: Tensor, dpre: Tensor, da: Tensor, grads: dict[str, Tensor]
) -> Tensor:
    """Add the convolution's gradient to da in place; the sum of da over all tokens (E)."""
    channels = _channels(shape, SETTINGS['conv_backward'][0])
    parts = triton.cdiv(shape.inner, channels)
    height, row_blocks, strips = _strips(shape)
    groups, batches = _groups(shape, parts, strips)
    rows, width = shape.walk
    taps = conv.shape[1]
    sums = a.new_empty(groups * strips, taps + 2, shape.inner, dtype=torch.float32)
    kernel = (
        backward_kernels.conv2d_backward_kernel if shape.two_dimensional else backward_kernels.conv1d_backward_kernel
    )
    extra = () if shape.two_dimensional else (shape.first_tap,)
    kernel[(parts, strips, groups)](
        a, a.stride(0), a.stride(1), dpre, conv, da, da.stride(0), da.stride(1), sums, shape.batch, shape.tokens, rows,
        width, shape.inner, height, row_blocks, strips, batches, *extra, BW=STRIP_COLUMNS, BC=channels,
        num_warps=SETTINGS['conv_backward'][1],
    )  # fmt: skip
    total = sums.sum(0)
    dconv = total[:taps].flip(0) if shape.reverse else total[:taps]
    grads['conv_w'] = dconv.t().contiguous()
    grads['conv_b'] = total[taps]
    return total[taps + 1]
