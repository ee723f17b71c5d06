"""A ViL block on a CPU without gradients: some tokens at a time through everything that follows the convolution.

The plain modules in `block.py` are the readable definition; this computes the same with the same parameters. Queries,
keys, values, gates and the cell's output exist for some tokens only, so a block needs less than half of the memory, and
what is computed lies in the cache when it is used next.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from ..ops import custom_op
from ..ops.mlstm import autocast_is_on
from ..ops.streaming import MLSTMStream, chunk_slices
from .layers import BlockDiagonalLinear, CausalConv1d, DepthwiseConv2d

__all__ = ['can_stream', 'run_streamed']


def can_stream(block: nn.Module, x: Tensor) -> bool:
    """Tell whether a block can run some tokens at a time.

    Args:
        block: A `ViLBlock`.
        x: Tokens, (B, S, D).

    Returns:
        False where gradients are wanted, off the CPU, in half precision, where the user chose another backend of the
        cell, and where someone looks inside: tracers, compilers, FLOP counts, forward hooks, replaced projections.
    """
    layer = block.layer
    return (
        x.device.type == 'cpu'
        and not torch.is_grad_enabled()
        and layer.mlstm_backend in ('auto', 'chunkwise')
        and x.dtype in (torch.float32, torch.float64)
        and x.numel() > 0
        and not (block.training and block.drop_path.rate)
        and not (torch.compiler.is_compiling() or torch.jit.is_tracing() or custom_op.counted_form)
        and _get_current_dispatch_mode() is None
        and not autocast_is_on('cpu')
        and type(layer.proj_up) is nn.Linear  # weights of these are taken apart
        and all(type(each) is BlockDiagonalLinear for each in (layer.q_proj, layer.k_proj, layer.v_proj))
        and type(layer.conv) in (DepthwiseConv2d, CausalConv1d, type(None))  # their output may be overwritten
        and not any(module._forward_hooks or module._forward_pre_hooks for module in _inner_modules(block))
    )


def _inner_modules(block: nn.Module) -> list[nn.Module]:
    """All modules of a block without the block itself, whose hooks see what they always do."""
    return [module for module in block.modules() if module is not block]


def run_streamed(block: nn.Module, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Run a block some tokens at a time.

    Args:
        block: A `ViLBlock` for which `can_stream` is true.
        x: Tokens, (B, S, D).
        grid: Rows and columns of the token grid.

    Returns:
        (B, S, D).
    """
    layer = block.layer
    normalised = block.norm(x)
    value_weight, gate_weight = layer.proj_up.weight.chunk(2)
    value_bias, gate_bias = (None, None) if layer.proj_up.bias is None else layer.proj_up.bias.chunk(2)
    values = F.linear(normalised, value_weight, value_bias)
    keys = F.silu(values) if layer.conv is None else F.silu(layer.conv(values, grid), inplace=True)
    slices = chunk_slices(x.shape[1], layer.inner_dims // layer.num_heads, layer.reverse)
    project_q, project_k, project_v = (_Projection(each) for each in (layer.q_proj, layer.k_proj, layer.v_proj))
    cell, pieces = MLSTMStream(layer.reverse), []
    for tokens in slices:
        q, k, v = project_q(keys[:, tokens]), project_k(keys[:, tokens]), project_v(values[:, tokens])
        gates = layer.gates(q, k, v)
        q, k, v = (t.unflatten(-1, (layer.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        h = layer.head_norm(cell(q, k, v, *gates, last=tokens is slices[-1]))
        h.addcmul_(layer.skip, keys[:, tokens])
        h.mul_(F.silu(F.linear(normalised[:, tokens], gate_weight, gate_bias), inplace=True))
        pieces.append(layer.proj_down(h).add_(x[:, tokens]))
    return torch.cat(pieces[::-1] if layer.reverse else pieces, 1)


class _Projection:
    """A block-diagonal projection with blocks wide enough for a CPU's matrix product.

    Blocks of 4 x 4 are joined to blocks of up to 16 x 16, zero off the diagonal: three times as fast.
    """

    WIDTH = 16

    def __init__(self, layer: BlockDiagonalLinear) -> None:
        count, edge, _ = layer.weight.shape
        joined = next(n for n in range(max(1, self.WIDTH // edge), 0, -1) if count % n == 0)
        width = joined * edge
        blocks = layer.weight.mT.unflatten(0, (-1, joined))  # [joined block, block, in, out]
        self.weight = layer.weight.new_zeros(count // joined, joined, edge, joined, edge)
        self.weight.diagonal(dim1=1, dim2=3).copy_(blocks.permute(0, 2, 3, 1))
        self.weight = self.weight.reshape(-1, width, width)
        bias = layer.weight.new_zeros(count * edge) if layer.bias is None else layer.bias
        self.bias = bias.view(-1, 1, width)

    def __call__(self, x: Tensor) -> Tensor:
        """Project x (B, L, E); same shape out."""
        blocks = x.flatten(0, 1).unflatten(-1, self.weight.shape[:2]).transpose(0, 1)
        return torch.baddbmm(self.bias, blocks, self.weight).transpose(0, 1).reshape(x.shape)
