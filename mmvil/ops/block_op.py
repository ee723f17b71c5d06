"""The fused ViL block as a torch operator: fake kernels and autograd, so that it works under torch.compile and AMP.

The launchers in `block.py` know tensors alone; this file gives them to torch. Triton is imported at the first call.
"""

import importlib
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from .triton_launch import choose_form, empty_rows_like

__all__ = ['WEIGHTS', 'fused_block']

WEIGHTS = (
    'norm_w', 'norm_b', 'up_w', 'up_b', 'conv_w', 'conv_b', 'wq', 'bq', 'wk', 'bk', 'wv', 'bv', 'wg', 'gate_b',
    'head_w', 'head_b', 'skip', 'down_w', 'down_b',
)  # fmt: skip
"""Short names of a block's parameters.

wg (2 NH, 3E) and gate_b (2 NH) are those of the input gates above those of the forget gates; biases may be missing.
"""


def _launchers() -> ModuleType:
    return importlib.import_module('.block', __package__)


def _cell(shape: object) -> ModuleType:
    """The form of the mLSTM that is fastest at this size."""
    form = choose_form(shape.tokens, shape.inner // shape.heads)
    return importlib.import_module(f'.triton_{form}', __package__)


def _by_name(weights: Sequence[Tensor], names: str) -> dict[str, Tensor | None]:
    """All of `WEIGHTS`, None for those that the block does not have."""
    return {**dict.fromkeys(WEIGHTS), **dict(zip(names.split(), weights, strict=True))}


def _shape(x: Tensor, named: dict[str, Tensor | None], rows: int, columns: int, heads: int, reverse: bool) -> object:
    return _launchers().BlockShape(
        batch=x.shape[0],
        grid=(rows, columns),
        heads=heads,
        inner=named['skip'].shape[0],
        block=named['wq'].shape[-1],
        two_dimensional=named['conv_w'].dim() == 4,
        reverse=reverse,
    )


@torch.library.custom_op('mmvil::vil_block_fwd', mutates_args=())
def vil_block_fwd(
    x: Tensor,
    weights: Sequence[Tensor],
    names: str,
    scale: Tensor | None,
    rows: int,
    columns: int,
    heads: int,
    reverse: bool,
    dtype: torch.dtype,
) -> list[Tensor]:
    """Run one block.

    Args:
        x: Residual stream, (B, S, D), contiguous.
        weights: Parameters of the block.
        names: Their short names, out of `WEIGHTS`, separated by blanks.
        scale: Drop path factor per image, (B,), or None.
        rows: Rows of the token grid.
        columns: Columns of the token grid.
        heads: Heads of the cell.
        reverse: Read the tokens from the last to the first.
        dtype: Type that activations are stored in and multiplied as.

    Returns:
        The new residual stream, and after it what the backward pass needs: u, gates, h, the
        convolution's output, k, v and the cell's statistics.
    """
    named = _by_name(weights, names)
    shape = _shape(x, named, rows, columns, heads, reverse)
    out, *saved, statistics = _launchers().block_forward(shape, _cell(shape), x, named, dtype, scale)
    return [out, *saved, *statistics]


@vil_block_fwd.register_fake
def _(
    x: Tensor,
    weights: Sequence[Tensor],
    names: str,
    scale: Tensor | None,
    rows: int,
    columns: int,
    heads: int,
    reverse: bool,
    dtype: torch.dtype,
) -> list[Tensor]:
    batch, tokens, _ = x.shape
    named = _by_name(weights, names)
    inner = named['skip'].shape[0]
    u = x.new_empty(batch, tokens, 2 * inner, dtype=dtype)
    gates = x.new_empty(2, batch, heads, tokens, dtype=torch.float32)
    q = x.new_empty(batch, tokens, heads, inner // heads, dtype=dtype).transpose(1, 2)  # as the launchers lay it out
    shape = _shape(x, named, rows, columns, heads, reverse)
    kept = [x.new_empty(batch, tokens, inner, dtype=dtype) for _ in range(3)]
    return [torch.empty_like(x), u, gates, empty_rows_like(q), *kept, *_cell(shape).empty_saved(q)]


@torch.library.custom_op('mmvil::vil_block_bwd', mutates_args=())
def vil_block_bwd(
    dout: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    names: str,
    scale: Tensor | None,
    saved: Sequence[Tensor],
    rows: int,
    columns: int,
    heads: int,
    reverse: bool,
) -> list[Tensor]:
    """Gradients of `vil_block_fwd`.

    Args:
        dout: Gradient of the new residual stream, (B, S, D).
        x: As given to `vil_block_fwd`, like the following but one.
        weights: See x.
        names: See x.
        scale: See x.
        saved: Results of `vil_block_fwd` after the first.
        rows: See x.
        columns: See x.
        heads: See x.
        reverse: See x.

    Returns:
        Gradient of x, then of each weight, in their dtypes.
    """
    named = _by_name(weights, names)
    shape = _shape(x, named, rows, columns, heads, reverse)
    u, gates, h, pre, k, v, *statistics = saved
    dx, gradients = importlib.import_module('.block_backward', __package__).block_backward(
        shape, _cell(shape), dout, x, u, gates, h, pre, k, v, tuple(statistics), named, scale
    )
    return [
        dx,
        *(gradients[name].reshape(named[name].shape).to(named[name].dtype, copy=True) for name in names.split()),
    ]


@vil_block_bwd.register_fake
def _(
    dout: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    names: str,
    scale: Tensor | None,
    saved: Sequence[Tensor],
    rows: int,
    columns: int,
    heads: int,
    reverse: bool,
) -> list[Tensor]:
    return [torch.empty_like(x), *(torch.empty_like(weight) for weight in weights)]


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: list[Tensor]) -> None:
    x, weights, ctx.names, scale, *ctx.sizes, _ = inputs
    ctx.count, ctx.scaled = len(weights), scale is not None
    ctx.save_for_backward(x, *weights, *([scale] if ctx.scaled else []), *output[1:])


def _backward(ctx: torch.autograd.function.FunctionCtx, gradients: list[Tensor]) -> tuple:
    x, *rest = ctx.saved_tensors
    weights, rest = rest[: ctx.count], rest[ctx.count :]
    scale = rest.pop(0) if ctx.scaled else None
    dx, *found = vil_block_bwd(gradients[0].contiguous(), x, weights, ctx.names, scale, rest, *ctx.sizes)
    return dx, found, None, None, None, None, None, None, None


vil_block_fwd.register_autograd(_backward, setup_context=_setup_context)


def fused_block(
    x: Tensor,
    weights: dict[str, Tensor],
    scale: Tensor | None,
    grid: tuple[int, int],
    heads: int,
    reverse: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Run one ViL block on fused kernels, with exact gradients.

    Args:
        x: Residual stream, (B, S, D); its dtype is kept.
        weights: Parameters by the short names of `WEIGHTS`; biases may be missing.
        scale: Drop path factor per image, (B,), or None.
        grid: Rows and columns of the token grid.
        heads: Heads of the cell.
        reverse: Read the tokens from the last to the first.
        dtype: Type that activations are stored in and multiplied as: float32, bfloat16 or float16.

    Returns:
        (B, S, D).
    """
    rows, columns = grid
    names, tensors = ' '.join(weights), list(weights.values())
    return torch.ops.mmvil.vil_block_fwd(x.contiguous(), tensors, names, scale, rows, columns, heads, reverse, dtype)[0]
