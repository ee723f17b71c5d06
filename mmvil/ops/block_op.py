"""The fused ViL block as a torch operator: fake kernels and autograd, so that it works under torch.compile and AMP.

The launchers in `block.py` know tensors alone; this file gives them to torch. Where nobody traces or watches operators,
the launchers are called without going through torch's dispatcher, which takes longer than launching the kernels. Triton
is imported at the first call.
"""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from .triton_launch import choose_form, dot_precision, empty_rows_like, interpreting, is_compile_failure

__all__ = [
    'WEIGHTS',
    'backward',
    'count_kept',
    'forget_tapes',
    'forward',
    'repeated',
    'vil_block_fwd',
    'vil_block_inference',
]

WEIGHTS = (
    'norm_w', 'norm_b', 'up_w', 'up_b', 'conv_w', 'conv_b', 'wq', 'bq', 'wk', 'bk', 'wv', 'bv', 'wi', 'bi', 'wf', 'bf',
    'head_w', 'head_b', 'skip', 'down_w', 'down_b',
)  # fmt: skip
"""Short names of a block's parameters; wi, bi, wf, bf are those of the input and forget gates. Biases may be missing.

Without norm_w the operators run the inner part alone, without norm, drop path and residual. The launchers give the
gates' gradients as one: wg (2 NH, 3E) and gate_b (2 NH), the input gates above the forget gates.
"""
ABSENT = dict.fromkeys(WEIGHTS)
GATES = {'wg': ('wi', 'wf'), 'gate_b': ('bi', 'bf')}

_built: set[tuple] = set()
_repeaters: dict[tuple, Callable] = {}


@functools.cache
def _launchers() -> ModuleType:
    return importlib.import_module('.block', __package__)


@functools.cache
def _backward_launchers() -> ModuleType:
    return importlib.import_module('.block_backward', __package__)


def repeated(function: Callable[..., list[Tensor | None]], first_calls: int = 1) -> Callable[..., list[Tensor | None]]:
    """The one `launch_tape.Repeated` of a function."""
    key = function, first_calls
    if key not in _repeaters:
        _repeaters[key] = importlib.import_module('.launch_tape', __package__).Repeated(*key)
    return _repeaters[key]


def forget_tapes() -> None:
    """Drop all recorded calls, as is needed where something changes that launchers take from their modules."""
    for repeater in _repeaters.values():
        repeater.forget()


@functools.cache
def _form(form: str) -> ModuleType:
    return importlib.import_module(f'.triton_{form}', __package__)


def _cell(shape: object, dtype: torch.dtype, device: torch.device, trains: bool = True) -> ModuleType:
    """The form of the mLSTM that is fastest at this size, with a backward pass or without."""
    return _form(choose_form(shape.tokens, shape.inner // shape.heads, trains, dtype, device))


def _named(names: Sequence[str], tensors: Sequence[Tensor]) -> dict[str, Tensor | None]:
    """All of `WEIGHTS`, with which the tensors start; None for those that the block does not have."""
    return {**ABSENT, **dict(zip(names, tensors, strict=False))}


@functools.lru_cache(maxsize=1024)
def _block_shape(
    batch: int, rows: int, columns: int, heads: int, inner: int, block: int, conv_dims: int, reverse: bool
) -> object:
    return _launchers().BlockShape(batch, (rows, columns), heads, inner, block, conv_dims == 4, reverse)


def _shape(x: Tensor, named: dict[str, Tensor | None], rows: int, columns: int, heads: int, reverse: bool) -> object:
    inner, block = named['skip'].shape[0], named['wq'].shape[-1]
    return _block_shape(x.shape[0], rows, columns, heads, inner, block, named['conv_w'].dim(), reverse)


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
    """Run one block, or without norm_w its inner part.

    Args:
        x: Residual stream, or input of the inner part, (B, S, D), contiguous.
        weights: Parameters of the block.
        names: Their short names, out of `WEIGHTS`, separated by blanks.
        scale: Drop path factor per image, (B,), or None.
        rows: Rows of the token grid.
        columns: Columns of the token grid.
        heads: Heads of the cell.
        reverse: Read the tokens from the last to the first.
        dtype: Type that activations are stored in and multiplied as.

    Returns:
        The new residual stream (the inner part's output in dtype), and after it what the backward pass needs: u, gates,
        h, the convolution's output, v and the cell's statistics.
    """
    return forward(x, tuple(names.split()), weights, scale, (rows, columns, heads, reverse), dtype)


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
    named = dict(zip(names.split(), weights, strict=True))
    inner = named['skip'].shape[0]
    u = x.new_empty(batch, tokens, 2 * inner, dtype=dtype)
    gates = x.new_empty(2, batch, heads, tokens, dtype=torch.float32)
    q = x.new_empty(batch, tokens, heads, inner // heads, dtype=dtype).transpose(1, 2)  # as the launchers lay it out
    shape = _launchers().BlockShape(
        batch, (rows, columns), heads, inner, named['wq'].shape[-1], named['conv_w'].dim() == 4, reverse
    )
    kept = [x.new_empty(batch, tokens, inner, dtype=dtype) for _ in range(2)]
    out = torch.empty_like(x, dtype=x.dtype if 'norm_w' in named else dtype)
    return [out, u, gates, empty_rows_like(q), *kept, *_cell(shape, dtype, x.device).empty_saved(q)]


@torch.library.custom_op('mmvil::vil_block_inference', mutates_args=())
def vil_block_inference(
    x: Tensor,
    weights: Sequence[Tensor],
    names: str,
    scale: Tensor | None,
    rows: int,
    columns: int,
    heads: int,
    reverse: bool,
    dtype: torch.dtype,
) -> Tensor:
    """First result of `vil_block_fwd`, with its arguments, where no backward pass will follow: it has no gradients."""
    return forward(x, tuple(names.split()), weights, scale, (rows, columns, heads, reverse), dtype, keep=False)[0]


@vil_block_inference.register_fake
def _(x: Tensor, weights: Sequence[Tensor], names: str, *sizes: object) -> Tensor:
    return torch.empty_like(x, dtype=x.dtype if 'norm_w' in names.split() else sizes[-1])


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
    # Gradients of weights may else be parts of one buffer, which results of an operator must not be.
    sizes, wanted = (rows, columns, heads, reverse), (True,) * len(weights)
    return backward(dout, x, tuple(names.split()), weights, scale, saved, sizes, wanted, own=True)


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


def _setup_context(ctx: FunctionCtx, inputs: tuple, output: list[Tensor]) -> None:
    x, weights, ctx.names, scale, *ctx.sizes, _ = inputs
    ctx.count, ctx.scaled = len(weights), scale is not None
    ctx.save_for_backward(x, *weights, *([scale] if ctx.scaled else []), *output[1:])


def _operator_backward(ctx: FunctionCtx, gradients: list[Tensor]) -> tuple:
    x, *rest = ctx.saved_tensors
    weights, rest = rest[: ctx.count], rest[ctx.count :]
    scale = rest.pop(0) if ctx.scaled else None
    dx, *found = vil_block_bwd(gradients[0].contiguous(), x, weights, ctx.names, scale, rest, *ctx.sizes)
    return dx, found, None, None, None, None, None, None, None


vil_block_fwd.register_autograd(_operator_backward, setup_context=_setup_context)


def forward(
    x: Tensor, names: tuple[str, ...], weights: Sequence[Tensor], scale: Tensor | None, sizes: tuple,
    dtype: torch.dtype, keep: bool = True, added: Sequence[Tensor | None] = (None, None, None), finish: bool = True,
) -> list[Tensor]:  # fmt: skip
    """Results of `vil_block_fwd`, without `keep` only the first.

    Added is what the block before has left to be added to x, its branch, bias and factor; the sum is the second result
    then. Without `finish` the first result is the branch of this one.
    """
    others = [scale, *added]
    tensors = [x, *weights, *(t for t in others if t is not None)]
    present = tuple(t is not None for t in others)
    settings = names, *sizes, dtype, keep, present, finish, dot_precision(dtype)
    return repeated(_run_forward)(tensors, x.shape, *settings)


def _run_forward(
    tensors: Sequence[Tensor], _: torch.Size, names: tuple[str, ...], rows: int, columns: int, heads: int,
    reverse: bool, dtype: torch.dtype, keep: bool, present: tuple[bool, ...], finish: bool, precision: str,
) -> list[Tensor]:  # fmt: skip
    """What `forward` repeats; the launchers look for the precision themselves."""
    x, *rest = tensors
    named, others = _named(names, rest), iter(rest[len(names) :])
    scale, *added = (next(others) if is_present else None for is_present in present)
    shape, launchers = _shape(x, named, rows, columns, heads, reverse), _launchers()
    stream, x, *saved, statistics = launchers.block_forward(
        shape, _cell(shape, dtype, x.device, keep), launchers.Stream(x, *added), named, dtype, scale, keep
    )
    results = [stream.summed() if finish else stream.branch, *([x] if present[1] else [])]
    if not keep:
        return results
    if not interpreting():
        _build_backward(shape, stream.x, x, saved, statistics, named, scale)
    return [*results, *saved, *statistics]


def count_kept(x: Tensor, names: tuple[str, ...], weights: Sequence[Tensor], sizes: tuple, dtype: torch.dtype) -> int:
    """How many tensors a block keeps for its backward pass: all that `forward` gives behind out and the sum."""
    shape = _shape(x, _named(names, weights), *sizes)
    return len(('u', 'gates', 'h', 'pre', 'v')) + _cell(shape, dtype, x.device).COUNT_SAVED


def _build_backward(
    shape: object, like: Tensor, x: Tensor, saved: Sequence[Tensor], statistics: Sequence[Tensor],
    named: dict[str, Tensor | None], scale: Tensor | None,
) -> None:  # fmt: skip
    """Run the backward pass of the first block of its kind, whose output is like a given tensor.

    If its kernels cannot be built, this must be known while the plain modules can still run: later they would need
    activations that are gone.
    """
    cell = _cell(shape, saved[0].dtype, x.device)
    stores = cell is _form('quadratic') and shape.tokens <= cell.stored_tokens(shape.inner // shape.heads)
    kind = dataclasses.replace(shape, batch=0, grid=()), cell, stores
    dtypes = [None if tensor is None else tensor.dtype for tensor in (x, saved[0], scale, *named.values())]
    key = x.get_device(), *kind, *dtypes
    if key not in _built:
        dout = torch.zeros_like(like)
        _backward_launchers().block_backward(shape, cell, dout, x, *saved, tuple(statistics), named, scale)
        _built.add(key)


def backward(
    dout: Tensor, x: Tensor, names: tuple[str, ...], weights: Sequence[Tensor], scale: Tensor | None,
    saved: Sequence[Tensor], sizes: tuple, wanted: tuple[bool, ...], own: bool,
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of x and of the weights that are wanted, None for others, like these; views or, if `own`, none."""
    tensors = [dout.contiguous(), x, *weights, *([] if scale is None else [scale]), *saved]
    precision = dot_precision(saved[0].dtype)
    return repeated(_run_backward)(tensors, x.shape, names, *sizes, scale is not None, wanted, own, precision)


def _run_backward(
    tensors: Sequence[Tensor], _: torch.Size, names: tuple[str, ...], rows: int, columns: int, heads: int,
    reverse: bool, scaled: bool, wanted: tuple[bool, ...], own: bool, precision: str,
) -> list[Tensor | None]:  # fmt: skip
    """What `backward` repeats; the launchers look for the precision themselves."""
    dout, x, *rest = tensors
    named, rest = _named(names, rest), rest[len(names) :]
    scale = rest.pop(0) if scaled else None
    u, gates, h, pre, v, *statistics = rest
    shape = _shape(x, named, rows, columns, heads, reverse)
    try:
        dx, gradients = _backward_launchers().block_backward(
            shape, _cell(shape, u.dtype, x.device), dout, x, u, gates, h, pre, v, tuple(statistics), named, scale
        )
    except Exception as error:
        if is_compile_failure(error):  # of a kind that could be built before, and too late for the plain modules
            raise RuntimeError(
                'the fused backward pass cannot be built here; build the model with fused=False'
            ) from error
        raise
    for name, parts in GATES.items():
        gradients.update(zip(parts, gradients.pop(name).chunk(2), strict=True))
    found = [
        _like(gradients[name], named[name], own) if is_wanted else None
        for name, is_wanted in zip(names, wanted, strict=True)
    ]
    return [dx, *found]


def _like(gradient: Tensor, weight: Tensor, own: bool) -> Tensor:
    """The gradient in its weight's shape and dtype, if `own` as a copy."""
    return gradient.reshape(weight.shape).to(weight.dtype, copy=own)
