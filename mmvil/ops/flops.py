"""FLOPs of the mLSTM: formulas for `torch.utils.flop_counter`, a handle for mmengine's FlopAnalyzer, and `get_flops`.

Counted are the matrix products that the kernels execute: 2 FLOPs per multiply-add, keys up to the query alone (the
causal half). Left out: gates, scans, exponentials and the division by the normaliser, O(S * DH) or less. FlopAnalyzer
counts multiply-adds and calls them flops; `get_flops` returns both.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from . import block_op, custom_op  # noqa: F401 - the first registers the operators named below
from .triton_chunkwise_tiles import CHUNK  # assumed where the caller names none
from .triton_launch import choose_form

__all__ = ['CHUNK', 'block_flops', 'count_as', 'get_flops', 'mlstm_flops', 'mlstm_op_handle']

# Products of S x S type per form: scores and values forward; one pair each for dq, dk and dv backward.
FORWARD_PRODUCTS, BACKWARD_PRODUCTS = 2, 6
# Products with a DH x DH state per token: write and read forward; dq, dk, dv, their states' two writes backward.
FORWARD_STATE_PRODUCTS, BACKWARD_STATE_PRODUCTS = 2, 5


def mlstm_flops(shape: Sequence[int], form: str = 'quadratic', chunk: int = CHUNK, backward: bool = False) -> int:
    """Count the FLOPs of one mLSTM call.

    Args:
        shape: (B, NH, S, DH) of q.
        form: 'quadratic' (causal S x S products) or 'chunkwise' (causal L x L products and DH x DH states).
        chunk: L of the chunkwise form, in tokens.
        backward: Count the backward pass instead of the forward pass.
        trains: Whether a backward pass follows, on which the form of the cell depends.

    Returns:
        FLOPs, 2 per multiply-add.

    Raises:
        ValueError: If the form is unknown.
    """
    batch, heads, length, dim = shape
    if form not in custom_op.FORMS:
        raise ValueError(f'form must be one of {sorted(custom_op.FORMS)}, got {form!r}')
    size = length if form == 'quadratic' else min(chunk, length)
    whole, rest = divmod(length, size) if length else (0, 0)
    pairs = whole * (size * (size + 1) // 2) + rest * (rest + 1) // 2
    products = (BACKWARD_PRODUCTS if backward else FORWARD_PRODUCTS) * pairs * dim
    if form == 'chunkwise':
        products += (BACKWARD_STATE_PRODUCTS if backward else FORWARD_STATE_PRODUCTS) * length * dim * dim
    return 2 * batch * heads * products


@register_flop_formula(torch.ops.mmvil.mlstm_fwd)
def _forward_formula(q: Sequence[int], *args: Any, **kwargs: Any) -> int:
    """Shapes in place of tensors; the last argument is the form."""
    return mlstm_flops(q, args[-1])


@register_flop_formula(torch.ops.mmvil.mlstm_bwd)
def _backward_formula(dh: Sequence[int], *args: Any, **kwargs: Any) -> int:
    """Shapes in place of tensors; the last argument is the form."""
    return mlstm_flops(dh, args[-1], backward=True)


@torch.library.custom_op('mmvil::mlstm_counted', mutates_args=())
def mlstm_counted(q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, form: str) -> Tensor:
    """Stand for an mLSTM call while FLOPs are counted: the right shape and zeros."""
    return torch.zeros_like(q)


@mlstm_counted.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, form: str) -> Tensor:
    return torch.empty_like(q)


mlstm_counted.register_autograd(lambda ctx, gradient: (gradient, gradient, gradient, None, None, None))


@register_flop_formula(torch.ops.mmvil.mlstm_counted)
def _counted_formula(q: Sequence[int], *args: Any, **kwargs: Any) -> int:
    """Shapes in place of tensors; the last argument is the form."""
    return mlstm_flops(q, args[-1])


def block_flops(
    x: Sequence[int], weights: dict[str, Sequence[int]], tokens: int, heads: int, backward: bool = False,
    trains: bool = True,
) -> int:  # fmt: skip
    """Count the FLOPs of one fused ViL block, as its plain modules execute them.

    Args:
        x: Shape (B, S, D) of the residual stream.
        weights: Shapes of the block's parameters by the short names of `mmvil.ops.block_op`.
        tokens: S.
        heads: Heads of the cell.
        backward: Count the backward pass instead of the forward pass.
        trains: Whether a backward pass follows, on which the form of the cell depends; it is the form of a card where
            the chunkwise one does not carry its state.

    Returns:
        FLOPs, 2 per multiply-add.
    """
    inner, block = weights['skip'][0], weights['wq'][-1]
    taps = math.prod(weights['conv_w'][1:])
    per_token = math.prod(weights['up_w']) + math.prod(weights['down_w'])
    per_token += inner * (taps + 3 * block) + 2 * heads * 3 * inner
    form = choose_form(tokens, inner // heads, trains)
    cell = mlstm_flops((x[0], heads, tokens, inner // heads), form, backward=backward)
    return (4 if backward else 2) * x[0] * tokens * per_token + cell


@register_flop_formula(torch.ops.mmvil.vil_block_fwd)
def _block_forward_formula(
    x: Sequence[int], weights: Sequence[Sequence[int]], names: str, scale: object, rows: int, columns: int,
    heads: int, *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    """Shapes in place of tensors."""
    return block_flops(x, dict(zip(names.split(), weights, strict=True)), rows * columns, heads)


@register_flop_formula(torch.ops.mmvil.vil_block_inference)
def _block_inference_formula(
    x: Sequence[int], weights: Sequence[Sequence[int]], names: str, scale: object, rows: int, columns: int,
    heads: int, *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    """Shapes in place of tensors."""
    return block_flops(x, dict(zip(names.split(), weights, strict=True)), rows * columns, heads, trains=False)


@register_flop_formula(torch.ops.mmvil.vil_block_bwd)
def _block_backward_formula(
    dout: Sequence[int], x: Sequence[int], weights: Sequence[Sequence[int]], names: str, scale: object,
    saved: Sequence[Sequence[int]], rows: int, columns: int, heads: int, *args: Any, **kwargs: Any,
) -> int:  # fmt: skip
    """Shapes in place of tensors."""
    return block_flops(x, dict(zip(names.split(), weights, strict=True)), rows * columns, heads, backward=True)


@contextlib.contextmanager
def count_as(form: str) -> Iterator[None]:
    """Make every `mlstm` call one counted operator instead of computing it, on any device.

    Args:
        form: 'quadratic' or 'chunkwise'.
    """
    if form not in custom_op.FORMS:
        raise ValueError(f'form must be one of {sorted(custom_op.FORMS)}, got {form!r}')
    before, custom_op.counted_form = custom_op.counted_form, form
    try:
        yield
    finally:
        custom_op.counted_form = before


def mlstm_op_handle(inputs: list[Any], outputs: list[Any]) -> int:
    """Handle for FlopAnalyzer: multiply-adds of one traced mLSTM operator.

    Args:
        inputs: Traced values of the operator's arguments; the first is q, the last the form.
        outputs: Traced values of its results; not used.

    Returns:
        Multiply-adds.
    """
    return mlstm_flops(inputs[0].type().sizes(), inputs[-1].toIValue()) // 2


def get_flops(model: nn.Module, inputs: Tensor | tuple[Tensor, ...], form: str = 'quadratic') -> dict[str, int]:
    """Count a model's forward pass with mmengine's FlopAnalyzer, the mLSTM calls included.

    Args:
        model: Any module, on any device.
        inputs: Its input, such as an image (1, 3, H, W), or several.
        form: Form that the mLSTM calls are counted as, 'quadratic' or 'chunkwise'.

    Returns:
        'macs' (multiply-adds, what FlopAnalyzer calls flops), 'flops' (twice that) and 'mlstm_macs' (the share of the
        mLSTM calls).

    Raises:
        ValueError: If the form is unknown.
    """
    from mmengine.analysis import FlopAnalyzer

    analyzer = FlopAnalyzer(model, inputs)
    analyzer.set_op_handle('mmvil::mlstm_counted', mlstm_op_handle)
    analyzer.unsupported_ops_warnings(False)
    with count_as(form), torch.no_grad():
        total = int(analyzer.total())
        cells = int(analyzer.by_operator().get('mlstm_counted', 0))
    return {'macs': total, 'flops': 2 * total, 'mlstm_macs': cells}
