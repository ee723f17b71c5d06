"""The ViL layer and its pre-norm residual block."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import takewhile

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from ..ops import mlstm
from ..ops.mlstm import AUTOCAST_DEVICES, BACKENDS
from .fused import can_join, give_up_fused, may_join, run_fused, run_fused_blocks, say_once, why_not_fused
from .layers import BlockDiagonalLinear, CausalConv1d, DepthwiseConv2d, DropPath, MultiHeadNorm, ResidualLayerNorm
from .streamed import can_stream, run_streamed

__all__ = ['ViLBlock', 'ViLLayer', 'run_joined']

CONVOLUTIONS = ('conv2d', 'causal_conv1d', None)


class ViLLayer(BaseModule):
    """The gated mLSTM mixer of one sub-block, without norm and residual.

    Args:
        embed_dims: Channels D of a token.
        reverse: Read the tokens from the last to the first.
        expand_ratio: Inner width E divided by D; E must be a multiple of num_heads and qkv_block_size.
        num_heads: Heads of the mLSTM.
        qkv_block_size: Edge of the blocks of the query, key and value projections.
        conv: 'conv2d' (depthwise over the grid, the second generation), 'causal_conv1d' (along the sequence, the first
            generation) or None (the activation alone).
        conv_kernel_size: Kernel size of the convolution; odd for 'conv2d'.
        proj_bias: Whether the up, down, query, key and value projections have biases.
        norm_bias: Whether the head norm has a bias.
        mlstm_backend: Backend of `mmvil.ops.mlstm`.
        fused: Run on fused kernels where a GPU can: a `ViLBlock` as a whole, a layer on its own too.
        init_num_blocks: Sub-blocks that the initial scale of the down-projection is divided by. The published models
            were started with 1.
        init_cfg: mmengine initialisation config.

    Raises:
        TypeError: The expand_ratio is no number.
        ValueError: An option is unknown or sizes do not divide.

    Source: Vision-LSTM (arXiv 2406.04303) section 3 and figure 2.
    """

    def __init__(
        self,
        embed_dims: int,
        reverse: bool = False,
        expand_ratio: float = 2,
        num_heads: int = 4,
        qkv_block_size: int = 4,
        conv: str | None = 'conv2d',
        conv_kernel_size: int = 3,
        proj_bias: bool = True,
        norm_bias: bool = True,
        mlstm_backend: str = 'auto',
        fused: bool = True,
        init_num_blocks: int = 1,
        init_cfg: dict | list | None = None,
    ) -> None:
        super().__init__(init_cfg)
        sizes = {'num_heads': num_heads, 'qkv_block_size': qkv_block_size}
        _check_sizes(embed_dims=embed_dims, conv_kernel_size=conv_kernel_size, init_num_blocks=init_num_blocks, **sizes)
        _check_choice('conv', conv, CONVOLUTIONS)
        _check_choice('mlstm_backend', mlstm_backend, ('auto', *BACKENDS))
        inner_dims = _inner_width(embed_dims, expand_ratio, **sizes)
        self.embed_dims, self.inner_dims, self.num_heads = embed_dims, inner_dims, num_heads
        self.reverse, self.mlstm_backend, self.fused = reverse, mlstm_backend, fused
        self.init_num_blocks = init_num_blocks

        self.proj_up = nn.Linear(embed_dims, 2 * inner_dims, bias=proj_bias)
        if conv == 'conv2d':
            self.conv = DepthwiseConv2d(inner_dims, conv_kernel_size, reverse)
        else:
            self.conv = CausalConv1d(inner_dims, conv_kernel_size, reverse) if conv == 'causal_conv1d' else None
        self.q_proj = BlockDiagonalLinear(inner_dims, qkv_block_size, bias=proj_bias)
        self.k_proj = BlockDiagonalLinear(inner_dims, qkv_block_size, bias=proj_bias)
        self.v_proj = BlockDiagonalLinear(inner_dims, qkv_block_size, bias=proj_bias)
        self.igate = nn.Linear(3 * inner_dims, num_heads)
        self.fgate = nn.Linear(3 * inner_dims, num_heads)
        self.head_norm = MultiHeadNorm(inner_dims, num_heads, bias=norm_bias)
        self.skip = nn.Parameter(torch.ones(inner_dims))
        self.proj_down = nn.Linear(inner_dims, embed_dims, bias=proj_bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw initial parameters as the reference does; the convolution keeps PyTorch's default."""
        small = math.sqrt(2 / (5 * self.embed_dims))
        for projection in (self.proj_up, self.q_proj, self.k_proj, self.v_proj):
            nn.init.normal_(projection.weight, std=small)
        nn.init.normal_(self.proj_down.weight, std=2 / (self.init_num_blocks * math.sqrt(self.embed_dims)))
        for projection in (self.proj_up, self.q_proj, self.k_proj, self.v_proj, self.proj_down):
            if projection.bias is not None:
                nn.init.zeros_(projection.bias)
        nn.init.zeros_(self.igate.weight)
        nn.init.normal_(self.igate.bias, std=0.1)
        nn.init.zeros_(self.fgate.weight)
        with torch.no_grad():  # long memory at the start, differing by head
            self.fgate.bias.copy_(torch.linspace(3.0, 6.0, self.num_heads))

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Mix the tokens of an image.

        Args:
            x: Tokens in row-major order, (B, S, D).
            grid: Rows and columns of the token grid, rows * columns = S.

        Returns:
            (B, S, D).

        Raises:
            ValueError: If the shape does not fit the layer or the grid.
        """
        _check_tokens(x, grid, self.embed_dims)
        fast = _try_fused(self, x, grid) if x.is_cuda and self.fused else None
        return self._forward_plain(x, grid) if fast is None else fast

    def _forward_plain(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """The layer's definition."""
        values, gate = self.proj_up(x).chunk(2, dim=-1)
        keys = F.silu(values if self.conv is None else self.conv(values, grid))
        q, k, v = self.q_proj(keys), self.k_proj(keys), self.v_proj(values)
        input_gate, forget_gate = self.gates(q, k, v)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        h = mlstm(q, k, v, input_gate, forget_gate, reverse=self.reverse, backend=self.mlstm_backend)
        return self.proj_down((self.head_norm(h) + self.skip * keys) * F.silu(gate))

    def gates(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the gates' pre-activations, in at least float32 also under autocast.

        Args:
            q: Queries of all heads, (B, S, E).
            k: Keys, like q.
            v: Values, like q.

        Returns:
            Input and forget gates, (B, NH, S) each.
        """
        device_type = q.device.type
        has_autocast = device_type in AUTOCAST_DEVICES
        without_autocast = torch.autocast(device_type, enabled=False) if has_autocast else nullcontext()
        with without_autocast:
            joined = torch.cat([q, k, v], dim=-1).to(self.igate.weight.dtype)
            return self.igate(joined).transpose(1, 2), self.fgate(joined).transpose(1, 2)


class ViLBlock(BaseModule):
    """One sub-block: norm, ViL layer, drop path, residual.

    Args:
        embed_dims: Channels D of a token.
        reverse: Read the tokens from the last to the first.
        drop_path_rate: Probability of dropping the branch for a sample in training, in [0, 1).
        norm_bias: Whether the norms have biases.
        init_cfg: mmengine initialisation config.
        **layer_options: Further options of `ViLLayer`.

    Example:
        >>> import torch
        >>> ViLBlock(32, reverse=True)(torch.randn(2, 12, 32), (3, 4)).shape
        torch.Size([2, 12, 32])
    """

    def __init__(
        self,
        embed_dims: int,
        reverse: bool = False,
        drop_path_rate: float = 0.0,
        norm_bias: bool = True,
        init_cfg: dict | list | None = None,
        **layer_options: int | float | bool | str | None,
    ) -> None:
        super().__init__(init_cfg)
        self.norm = ResidualLayerNorm(embed_dims, bias=norm_bias)
        self.layer = ViLLayer(embed_dims, reverse, norm_bias=norm_bias, **layer_options)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Mix the tokens of an image and add them to the residual stream.

        Args:
            x: Tokens in row-major order, (B, S, D).
            grid: Rows and columns of the token grid.

        Returns:
            (B, S, D).
        """
        if x.is_cuda and (layer := self.layer).fused:
            _check_tokens(x, grid, layer.embed_dims)
            fast = _try_fused(self, x, grid)
            if fast is not None:
                return fast
        if can_stream(self, x):
            _check_tokens(x, grid, self.layer.embed_dims)
            return run_streamed(self, x, grid)
        return x + self.drop_path(self.layer(self.norm(x), grid))


def _try_fused(module: nn.Module, x: Tensor, grid: tuple[int, int]) -> Tensor | None:
    """Run a block, or a layer on its own, on the fused kernels; None and one log line where that is not possible."""
    reason = why_not_fused(module, x)
    if reason is None:
        try:
            return run_fused(module, x, grid)
        except Exception as error:
            reason = give_up_fused(x, error)
    say_once(reason)
    return None


CALLED = ViLBlock.__call__, ViLBlock.forward
"""What a call of a block runs unless somebody has put something else in its place."""


TRAINED_TOGETHER = 6
"""Blocks of a call in training."""


def run_joined(blocks: Sequence[nn.Module], x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, int]:
    """Run as many of the first blocks as should go as one call on the fused kernels.

    In training these are a few at a time, or the frozen ones that need no gradients: gradients come when all of a call
    are there, and others, as in data-parallel training, work on some while the next are made.

    Args:
        blocks: Modules, of which none but the last one's result is wanted.
        x: Tokens in row-major order, (B, S, D).
        grid: Rows and columns of the token grid.

    Returns:
        The tokens after these blocks, and how many there were: x and 0 if less than two blocks can.
    """
    if not may_join(x) or _has_any_global_hook() or (ViLBlock.__call__, ViLBlock.forward) != CALLED:
        return x, 0
    dims = x.shape[-1]
    together = _together(blocks, x)
    joined = list(takewhile(lambda block: _is_only_called(block) and can_join(block, dims), together))
    if len(joined) < 2:
        return x, 0
    try:
        out = run_fused_blocks(joined, x, grid)
    except Exception as error:
        give_up_fused(x, error)
        out = None
    return (x, 0) if out is None else (out, len(joined))


def _together(blocks: Sequence[nn.Module], x: Tensor) -> Sequence[nn.Module]:
    """Those of the blocks that should be one call if they can."""
    if not torch.is_grad_enabled():
        return blocks
    frozen = not x.requires_grad and list(takewhile(_is_frozen, blocks))
    return frozen or blocks[:TRAINED_TOGETHER]


def _is_frozen(block: nn.Module) -> bool:
    """Whether none of its parameters gets a gradient."""
    return not any(parameter.requires_grad for parameter in block.parameters())


def _is_only_called(block: nn.Module) -> bool:
    """Whether calling a module is nothing but running the forward function of a `ViLBlock`."""
    return type(block) is ViLBlock and not (
        block._forward_hooks
        or block._forward_pre_hooks
        or block._backward_hooks
        or block._backward_pre_hooks
        or block._compiled_call_impl
        or 'forward' in block.__dict__
    )


def _check_sizes(**sizes: int) -> None:
    """Refuse sizes that are not positive ints."""
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f'{name} must be a positive int, got {size!r}')


def _check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    """Refuse a value that is not among the choices."""
    if value not in choices:
        raise ValueError(f'{name} must be one of {list(choices)}, got {value!r}')


def _inner_width(embed_dims: int, expand_ratio: float, **divisors: int) -> int:
    """Compute the inner width, which the divisors must divide."""
    if not isinstance(expand_ratio, (int, float)):
        raise TypeError(f'expand_ratio must be a number, got {expand_ratio!r}')
    width = round(expand_ratio * embed_dims)
    for name, divisor in divisors.items():
        if width < 1 or width % divisor:
            raise ValueError(
                f'the inner width expand_ratio * embed_dims = {width} must be a multiple of {name} = {divisor}'
            )
    return width


def _check_tokens(x: Tensor, grid: tuple[int, int], embed_dims: int) -> None:
    """Refuse tokens that do not fit the layer or the grid."""
    if x.dim() != 3 or x.shape[-1] != embed_dims:
        raise ValueError(f'expected tokens of shape (B, S, {embed_dims}), got {tuple(x.shape)}')
    if not isinstance(grid, Sequence) or len(grid) != 2 or grid[0] * grid[1] != x.shape[1]:
        raise ValueError(f'grid must be (rows, columns) with {x.shape[1]} tokens, got {grid}')
