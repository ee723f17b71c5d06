"""The whole ViL block in few kernels: launchers of the forward pass. Works on tensors, knows no modules.

Norm, up-projection, one kernel for convolution, projections and gates, the cell, one kernel for head norm, skip and
gate, down-projection and residual. Kept for the backward pass (`block_backward.py`): the input, the up-projection's
output, the gates, the convolution's output, keys and values, and the cell's output with its statistics.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from . import block_kernels as kernels
from . import block_norm_kernels as norm_kernels
from .triton_launch import dot_precision

__all__ = ['NORM_EPS', 'BlockShape', 'block_forward']

STRIP_COLUMNS = 16
# Channels or elements of a tile, warps.
SETTINGS = {
    'norm': (4096, 4),
    'mix': (32, 1),
    'output': (2048, 4),
}
NORM_EPS = 1e-5


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
        return self.grid if self.two_dimensional else (triton.cdiv(self.tokens, STRIP_COLUMNS), STRIP_COLUMNS)

    @property
    def first_tap(self) -> int:
        """Place of a causal convolution's first tap relative to the current token."""
        return 0 if self.reverse else -3


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Normalise the rows of x (rows, D); the stored weight is the difference from one."""
    rows, dims = x.shape
    out = torch.empty_like(x, dtype=dtype)
    width = triton.next_power_of_2(dims)
    height = max(1, SETTINGS['norm'][0] // width)
    norm_kernels.layer_norm_kernel[(triton.cdiv(rows, height),)](
        x, weight, weight if bias is None else bias, out, rows, dims, NORM_EPS, HAS_BIAS=bias is not None,
        BM=height, BD=width, num_warps=SETTINGS['norm'][1],
    )  # fmt: skip
    return out


def _strips(shape: BlockShape, columns: int = STRIP_COLUMNS) -> tuple[int, int, int]:
    """Rows of a strip, strips above each other, strips in all."""
    rows, width = shape.walk
    height = min(rows, 32)
    row_blocks = triton.cdiv(rows, height)
    return height, row_blocks, row_blocks * triton.cdiv(width, columns)


def _channels(shape: BlockShape, most: int) -> int:
    """Channels of a tile: a power of two that holds whole blocks."""
    return max(16, min(most, triton.next_power_of_2(shape.inner)))


def _gate_width(shape: BlockShape) -> int:
    """Columns of a tile of gates."""
    return max(16, triton.next_power_of_2(2 * shape.heads))


def _biases(weights: dict[str, Tensor | None]) -> list[Tensor]:
    """Biases of the projections, or something to point to where there are none."""
    return [weights['conv_b'] if weights[name] is None else weights[name] for name in ('bq', 'bk', 'bv')]


def _prepare(shape: BlockShape, weights: dict[str, Tensor | None], channels: int, dtype: torch.dtype) -> list[Tensor]:
    """Weights in tiles of `channels` channels; see `prepare_kernel`."""
    parts, gates = triton.cdiv(shape.inner, channels), _gate_width(shape)
    square = weights['wq'].new_empty(parts, 3, channels, channels, dtype=dtype)
    tall = square.new_empty(parts, 2, channels, gates)
    constant = square.new_empty(parts, gates, dtype=torch.float32)
    kernels.prepare_kernel[(parts,)](
        weights['wq'], weights['wk'], weights['wv'], *_biases(weights), weights['wg'], square, tall, constant,
        shape.inner, QB=shape.block, HEADS=shape.heads, HAS_BIAS=weights['bq'] is not None, BC=channels, BG=gates,
        num_warps=4,
    )  # fmt: skip
    return [square, tall, constant]


def _mix(
    shape: BlockShape, a: Tensor, conv: Tensor, prepared: Sequence[Tensor], weights: dict[str, Tensor | None],
    with_gates: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The convolution's output, q, k, v (B, S, E) and the gates' pre-activations without bias (2, B, NH, S)."""
    parts, _, channels, _ = prepared[0].shape
    pre, q, k, v = (a.new_empty(shape.batch, shape.tokens, shape.inner) for _ in range(4))
    partial = a.new_empty(
        (parts, 2, shape.batch, shape.heads, shape.tokens) if with_gates else (1,), dtype=torch.float32
    )
    height, row_blocks, strips = _strips(shape)
    rows, width = shape.walk
    kernels.mix_kernel[(parts, strips, shape.batch)](
        a, a.stride(0), a.stride(1), conv, weights['conv_b'], *prepared, *_biases(weights), pre, q, k, v, partial,
        shape.batch, shape.tokens, rows, width, shape.inner, height, row_blocks, shape.first_tap,
        IS_2D=shape.two_dimensional, HEADS=shape.heads, HAS_BIAS=weights['bq'] is not None, WITH_GATES=with_gates,
        PRECISION=dot_precision(a.dtype), BW=STRIP_COLUMNS, BC=channels, BG=_gate_width(shape),
        num_warps=SETTINGS['mix'][1],
    )  # fmt: skip
    return pre, q, k, v, partial.sum(0) if with_gates else None


def _heads(x: Tensor, heads: int) -> Tensor:
    """(B, S, E) seen as (B, NH, S, DH)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _taps(conv: Tensor, reverse: bool) -> Tensor:
    """Depthwise weights as (E, taps) float32, turned for the reading direction."""
    flat = conv.flatten(1).float()
    return flat.flip(1) if reverse else flat.contiguous()


def _output(shape: BlockShape, h: Tensor, pre: Tensor, z: Tensor, weights: dict[str, Tensor | None]) -> Tensor:
    """y (B, S, E)."""
    dim = shape.inner // shape.heads
    y = torch.empty_like(pre)
    width = triton.next_power_of_2(dim)
    height = max(1, SETTINGS['output'][0] // width)
    bias = weights['head_b']
    norm_kernels.output_kernel[(triton.cdiv(shape.tokens, height), shape.heads, shape.batch)](
        h, h.stride(0), h.stride(1), h.stride(2), pre, z, z.stride(0), z.stride(1), weights['head_w'],
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Sequence[Tensor]]:
    """Run one block.

    Args:
        shape: Sizes and direction.
        cell: Module with the mLSTM's `forward` and `backward`, such as `triton_quadratic`.
        x: Residual stream, (B, S, D), contiguous.
        weights: The block's parameters by short name; see `mmvil.ops.block_op`.
        dtype: Type that activations are stored in and multiplied as.
        scale: Drop path factor per image, (B,), or None.

    Returns:
        The new residual stream, and for the backward pass: u (B, S, 2E), gates (2, B, NH, S), h, the convolution's
        output, k, v (B, S, E), the cell's statistics.
    """
    normalised = layer_norm(x.flatten(0, 1), weights['norm_w'], weights['norm_b'], dtype)
    u = F.linear(normalised, weights['up_w'].to(dtype), _cast(weights['up_b'], dtype))
    u = u.view(shape.batch, shape.tokens, 2 * shape.inner)
    a, z = u.chunk(2, -1)
    conv = _taps(weights['conv_w'], shape.reverse)
    prepared = _prepare(shape, weights, _channels(shape, SETTINGS['mix'][0]), dtype)
    pre, q, k, v, gates = _mix(shape, a, conv, prepared, weights, with_gates=True)
    gates = gates + weights['gate_b'].float().view(2, 1, shape.heads, 1)
    heads = [_heads(t, shape.heads) for t in (q, k, v)]
    h, statistics = cell.forward(*heads, gates[0], gates[1], shape.reverse, 1e-6)
    y = _output(shape, h, pre, z, weights)
    branch = F.linear(y, weights['down_w'].to(dtype), _cast(weights['down_b'], dtype))
    out = x + branch if scale is None else torch.addcmul(x, branch, scale.view(-1, 1, 1).to(x.dtype))
    return out, u, gates, h, pre, k, v, statistics


def _cast(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype)
