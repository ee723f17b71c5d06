"""The fast path of a ViL block: when it can be taken, and with which parameters.

The plain modules in `block.py` are the readable definition; this path computes the same with the same parameters.
"""

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from ..ops.block_op import fused_block
from ..ops.mlstm import why_not_triton
from ..ops.triton_launch import MAX_HEAD_DIM

__all__ = ['fused_weights', 'run_fused', 'why_not_fused']

MAX_BLOCK = 16
"""Largest edge of the projections' blocks that the kernels are made for."""

_said: set[str] = set()


def why_not_fused(block: nn.Module, x: Tensor) -> str | None:
    """Tell why a block cannot take the fast path for these tokens.

    Args:
        block: A `ViLBlock`.
        x: Tokens, (B, S, D).

    Returns:
        The reason, or None if the fast path can be taken.
    """
    layer = block.layer
    if not layer.fused:
        return 'it is switched off'
    if layer.mlstm_backend not in ('auto', 'triton'):
        return f'mlstm_backend is {layer.mlstm_backend!r}'
    dtype = compute_dtype(x)
    if dtype == torch.float64:
        return 'float64 runs in plain torch'
    conv = layer.conv
    if conv is None or (conv.weight.dim(), conv.weight.shape[-1]) not in ((4, 3), (3, 4)):
        return 'the kernels are made for 3 x 3 or causal size-4 convolutions'
    edge, heads = layer.q_proj.weight.shape[-1], layer.num_heads
    if edge > MAX_BLOCK or edge & (edge - 1):
        return f'the kernels need a qkv_block_size that is a power of two up to {MAX_BLOCK}, got {edge}'
    if heads > 16 or layer.inner_dims // heads > MAX_HEAD_DIM:
        return f'the kernels are made for up to 16 heads of up to {MAX_HEAD_DIM} channels'
    if x.numel() == 0:
        return 'the batch is empty'
    if any(module._forward_hooks or module._forward_pre_hooks for module in block.modules() if module is not block):
        return 'a module inside of the block has a forward hook'
    return why_not_triton(x.device.type, x.device.index, dtype)


def compute_dtype(x: Tensor) -> torch.dtype:
    """Type that activations are stored in: that of autocast, else the tokens' own."""
    if x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def say_once(reason: str) -> None:
    """Log one line per reason why a block on a GPU runs without the fast path."""
    if reason not in _said:
        _said.add(reason)
        print_log(f'ViL blocks run as plain modules: {reason}', logger='current')


def run_fused(block: nn.Module, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Run a block on the fused kernels.

    Args:
        block: A `ViLBlock` for which `why_not_fused` gives None.
        x: Tokens, (B, S, D).
        grid: Rows and columns of the token grid.

    Returns:
        (B, S, D) in x's dtype.
    """
    layer, dtype = block.layer, compute_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        scale = block.drop_path.factors(x)
        return fused_block(x, fused_weights(block), scale, grid, layer.num_heads, layer.reverse, dtype)


def fused_weights(block: nn.Module) -> dict[str, Tensor]:
    """Collect a block's parameters by the short names of `mmvil.ops.block_op.WEIGHTS`; absent biases are left out."""
    layer = block.layer
    named = {
        'norm_w': block.norm.weight,
        'norm_b': block.norm.bias,
        'up_w': layer.proj_up.weight,
        'up_b': layer.proj_up.bias,
        'conv_w': layer.conv.weight,
        'conv_b': layer.conv.bias,
        'wq': layer.q_proj.weight,
        'bq': layer.q_proj.bias,
        'wk': layer.k_proj.weight,
        'bk': layer.k_proj.bias,
        'wv': layer.v_proj.weight,
        'bv': layer.v_proj.bias,
        'wg': torch.cat([layer.igate.weight, layer.fgate.weight]),
        'gate_b': torch.cat([layer.igate.bias, layer.fgate.bias]),
        'head_w': layer.head_norm.weight,
        'head_b': layer.head_norm.bias,
        'skip': layer.skip,
        'down_w': layer.proj_down.weight,
        'down_b': layer.proj_down.bias,
    }
    return {name: weight for name, weight in named.items() if weight is not None}
