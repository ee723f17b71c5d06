"""The fast path of a ViL block: when it can be taken, and with which parameters.

The plain modules in `block.py` are the readable definition; this path computes the same with the same parameters.
"""

from collections.abc import Sequence
from itertools import chain

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from ..ops import custom_op
from ..ops.block_chain import fused_block, fused_blocks
from ..ops.eager import operators_may_be_skipped
from ..ops.mlstm import why_not_triton
from ..ops.triton_launch import MAX_HEAD_DIM, constant_when_compiled, is_compile_failure
from . import block as plain
from .layers import BlockDiagonalLinear, CausalConv1d, DepthwiseConv2d, DropPath, MultiHeadNorm, ResidualLayerNorm

__all__ = [
    'can_join',
    'fused_weights',
    'give_up_fused',
    'may_join',
    'run_fused',
    'run_fused_blocks',
    'why_not_fused',
]

MAX_BLOCK = 16
"""Largest edge of the projections' blocks that the kernels are made for."""

CONVOLUTIONS = ((3, 3), (4,))
"""Sizes of the convolutions that the kernels are made for: over the grid, along the sequence."""

KINDS = {nn.Linear, BlockDiagonalLinear, CausalConv1d, DepthwiseConv2d, DropPath, MultiHeadNorm, ResidualLayerNorm}
FORWARDS = {kind.forward for kind in KINDS}
"""What the modules of a block compute, as far as the kernels do the same. Parametrised modules keep their forward."""

# Modules of a layer, and short names of their weights and biases.
SHORT_NAMES = (
    ('proj_up', 'up_w', 'up_b'),
    ('conv', 'conv_w', 'conv_b'),
    ('q_proj', 'wq', 'bq'),
    ('k_proj', 'wk', 'bk'),
    ('v_proj', 'wv', 'bv'),
    ('igate', 'wi', 'bi'),
    ('fgate', 'wf', 'bf'),
    ('head_norm', 'head_w', 'head_b'),
    ('proj_down', 'down_w', 'down_b'),
)
OUTER_NAMES = ((None, 'norm_w', 'norm_b'), *SHORT_NAMES)  # None: the block's norm

_said: set[str] = set()
_device_reasons: dict[tuple[str, int | None, torch.dtype], str | None] = {}


def why_not_fused(module: nn.Module, x: Tensor) -> str | None:
    """Tell why a block, or a layer on its own, cannot take the fast path for these tokens.

    Args:
        module: A `ViLBlock` or a `ViLLayer`.
        x: Tokens, (B, S, D).

    Returns:
        The reason, or None if the fast path can be taken.
    """
    return _why_not_module(module) or _why_not_tokens(x)


def _why_not_module(module: nn.Module) -> str | None:
    """What of `why_not_fused` does not depend on the tokens."""
    layer, outer = _parts(module)
    modules = layer._modules
    if not layer.fused:
        return 'it is switched off'
    if layer.mlstm_backend not in ('auto', 'triton'):
        return f'mlstm_backend is {layer.mlstm_backend!r}'
    conv = modules.get('conv')
    if conv is None or _parameter(conv, 'weight').shape[2:] not in CONVOLUTIONS:
        return 'the kernels are made for 3 x 3 or causal size-4 convolutions'
    edge, heads = _parameter(modules['q_proj'], 'weight').shape[-1], layer.num_heads
    if edge > MAX_BLOCK or edge & (edge - 1):
        return f'the kernels need a qkv_block_size that is a power of two up to {MAX_BLOCK}, got {edge}'
    if heads > 16 or layer.inner_dims // heads > MAX_HEAD_DIM:
        return f'the kernels are made for up to 16 heads of up to {MAX_HEAD_DIM} channels'
    for part in (*outer, *modules.values()):
        if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks:
            return 'a module inside of the block has a hook'
        if type(part).forward not in FORWARDS and type(part).forward is not plain.ViLLayer.forward:
            return f'a {type(part).__name__} has taken the place of one of its modules'
        if 'forward' in part.__dict__:
            return f'the forward of a {type(part).__name__} inside of the block has been replaced'
    return None


def _why_not_tokens(x: Tensor) -> str | None:
    """What of `why_not_fused` is the same for all blocks."""
    dtype, device = compute_dtype(x), x.device
    if dtype == torch.float64:
        return 'float64 runs in plain torch'
    if x.numel() == 0:
        return 'the batch is empty'
    if custom_op.counted_form is not None or torch.jit.is_tracing():
        return 'the plain modules are what is counted and traced'
    return _why_not_here(device.type, device.index, dtype)


def _parts(module: nn.Module) -> tuple[nn.Module, tuple[nn.Module, ...]]:
    """The layer of a block or the layer itself, and the block's modules that are skipped when it runs fused."""
    if isinstance(module, plain.ViLBlock):
        modules = module._modules  # nn.Module looks there last
        return modules['layer'], (modules['norm'], modules['drop_path'], modules['layer'])
    return module, ()


# A constant of the graph under torch.compile, as `why_not_triton` is.
@constant_when_compiled
def _why_not_here(device_type: str, index: int | None, dtype: torch.dtype) -> str | None:
    """`why_not_triton`, asked once in a process: its answer takes longer than a small kernel's launch."""
    key = device_type, index, dtype
    if key not in _device_reasons:
        _device_reasons[key] = why_not_triton(*key)
    return _device_reasons[key]


def compute_dtype(x: Tensor) -> torch.dtype:
    """Type that activations are stored in: that of autocast, else the tokens' own."""
    dtype, kind = x.dtype, x.device.type
    if dtype != torch.float64 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return dtype


def say_once(reason: str) -> None:
    """Log one line per reason why a block on a GPU runs without the fast path."""
    if reason not in _said:
        _said.add(reason)
        print_log(f'ViL blocks run as plain modules: {reason}', logger='current')


def run_fused(module: nn.Module, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Run a block, or a layer on its own, on the fused kernels.

    Args:
        module: A `ViLBlock` or a `ViLLayer` for which `why_not_fused` gives None.
        x: Tokens, (B, S, D).
        grid: Rows and columns of the token grid.

    Returns:
        (B, S, D), of a block in x's dtype, of a layer in the one that it computes in.
    """
    layer, outer = _parts(module)
    dtype, kind = compute_dtype(x), x.device.type
    with torch.autocast(kind, enabled=False) if torch.compiler.is_compiling() else _WithoutAutocast(kind):
        scale = module._modules['drop_path'].factors(x) if outer else None
        return fused_block(x, fused_weights(module), scale, grid, layer.num_heads, layer.reverse, dtype)


def may_join(x: Tensor) -> bool:
    """Whether blocks may run fused as one call for these tokens, with nothing that watches."""
    return x.is_cuda and operators_may_be_skipped(x) and _why_not_tokens(x) is None


def can_join(block: nn.Module, dims: int) -> bool:
    """Whether a block may be a part of such a call.

    Modules of other kinds run alone: they may compute their parameters, which would exist for all blocks at a time.

    Args:
        block: A `ViLBlock`.
        dims: Channels of the tokens.
    """
    layer = block._modules['layer']
    as_built = layer.embed_dims == dims and KINDS.issuperset(map(type, layer._modules.values()))
    return as_built and _why_not_module(block) is None


def run_fused_blocks(blocks: Sequence[nn.Module], x: Tensor, grid: tuple[int, int]) -> Tensor | None:
    """Run `ViLBlock`s behind each other as one call on the fused kernels.

    Args:
        blocks: Blocks for which `can_join` holds.
        x: Tokens, (B, S, D), for which `may_join` holds.
        grid: Rows and columns of the token grid.

    Returns:
        (B, S, D), as by `run_fused` block by block; None if parameters are of a kind that asks for that.
    """
    dtype = compute_dtype(x)
    with _WithoutAutocast(x.device.type):
        weights = [fused_weights(block) for block in blocks]
        if not operators_may_be_skipped(*chain.from_iterable(named.values() for named in weights)):
            return None
        scales = [block._modules['drop_path'].factors(x) for block in blocks]
        layers = [block._modules['layer'] for block in blocks]
        kinds = [(layer.num_heads, layer.reverse) for layer in layers]
        return fused_blocks(x, weights, scales, kinds, grid, dtype)


class _WithoutAutocast:
    """`torch.autocast(kind, enabled=False)` without its checks, which take the host longer than a kernel's launch."""

    def __init__(self, kind: str) -> None:
        self.kind, self.before = kind, torch.is_autocast_enabled(kind)

    def __enter__(self) -> None:
        torch.set_autocast_enabled(self.kind, False)

    def __exit__(self, *_: object) -> None:
        torch.set_autocast_enabled(self.kind, self.before)


def give_up_fused(x: Tensor, error: Exception) -> str:
    """Note that the kernels cannot be built for tokens like these, so that the plain modules run from now on.

    Args:
        x: Tokens that the kernels were to be built for.
        error: What `run_fused` raised.

    Returns:
        The reason, as `why_not_fused` gives it from now on.

    Raises:
        Exception: `error`, if it is of another kind.
    """
    if not is_compile_failure(error):
        raise error
    dtype = compute_dtype(x)
    reason = f'the fused kernels cannot be built for {dtype} on this device: {type(error).__name__}: {error}'
    _device_reasons[x.device.type, x.device.index, dtype] = reason
    return reason


def fused_weights(module: nn.Module) -> dict[str, Tensor]:
    """Collect the parameters of a block, or of a layer on its own, by the short names of `mmvil.ops.block_op.WEIGHTS`.

    Absent biases are left out. Nothing is kept from call to call, neither lists nor casts: parameters may be replaced,
    moved or changed in place at any time, through `.data` even without a trace.
    """
    layer, outer = _parts(module)
    modules = layer._modules
    named = {'skip': _parameter(layer, 'skip')}
    for name, weight, bias in OUTER_NAMES if outer else SHORT_NAMES:
        part = outer[0] if name is None else modules[name]
        named[weight] = _parameter(part, 'weight')
        value = _parameter(part, 'bias')
        if value is not None:
            named[bias] = value
    return named


def _parameter(module: nn.Module, name: str) -> Tensor | None:
    """A module's attribute, without nn.Module's slow search where it is a parameter and not computed from others."""
    own = module._parameters
    return own[name] if name in own else getattr(module, name)
