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
from .layers import CausalConv1d, DepthwiseConv2d

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
        and type(layer.proj_up) is nn.Linear  # its weight is taken apart
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
    cell, pieces = MLSTMStream(layer.reverse), []
    for tokens in slices:
        q, k, v = layer.q_proj(keys[:, tokens]), layer.k_proj(keys[:, tokens]), layer.v_proj(values[:, tokens])
        gates = layer.gates(q, k, v)
        q, k, v = (t.unflatten(-1, (layer.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        h = layer.head_norm(cell(q, k, v, *gates, last=tokens is slices[-1]))
        h.addcmul_(layer.skip, keys[:, tokens])
        h.mul_(F.silu(F.linear(normalised[:, tokens], gate_weight, gate_bias), inplace=True))
        pieces.append(layer.proj_down(h).add_(x[:, tokens]))
    return torch.cat(pieces[::-1] if layer.reverse else pieces, 1)
