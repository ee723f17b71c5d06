"""Fused ViL blocks, one or several behind each other as one call: one node of autograd.

Several are repeated as a whole, by one tape each for forward and backward: one look at all parameters, one buffer for
what is needed in between.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from .block_op import backward, count_kept, forward, repeated, vil_block_fwd, vil_block_inference
from .eager import operators_may_be_skipped
from .side_stream import is_captured, side_by_side
from .triton_launch import dot_precision

__all__ = ['fused_block', 'fused_blocks']

# Taking down several blocks costs as much host time as some thirty calls gain by it.
FIRST_CALLS = 8
# Values of the inner part, tokens times channels of all images, for which halves in a CUDA graph are 2 to 6 % faster
# than the whole on an H200. With fewer they are slower, with more they gain less or lose, as does training at 224 px.
BESIDE = range(8_000_000, 15_000_000)


class _Kind(NamedTuple):
    """What is fixed of a block.

    Attributes:
        names: Short names of its parameters.
        heads: Heads of its cell.
        reverse: Its reading direction.
        scaled: Whether it has a drop path factor, which comes behind its parameters.
    """

    names: tuple[str, ...]
    heads: int
    reverse: bool
    scaled: bool

    def take(self, given: Iterator) -> tuple[list, object | None]:
        """What comes next: one thing for each parameter, and one for the factor."""
        return list(islice(given, len(self.names))), next(given) if self.scaled else None

    def bias(self, weights: Sequence[Tensor]) -> Tensor | None:
        """That of the down-projection."""
        return weights[self.names.index('down_b')] if 'down_b' in self.names else None


def fused_block(
    x: Tensor,
    weights: dict[str, Tensor],
    scale: Tensor | None,
    grid: tuple[int, int],
    heads: int,
    reverse: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Run one ViL block on fused kernels, with exact gradients, as an operator where somebody could tell.

    Args:
        x: Residual stream, (B, S, D); its dtype is kept. Without norm_w: input of the inner part, whose output has
            `dtype`.
        weights: Parameters by the short names of `mmvil.ops.block_op.WEIGHTS`; biases may be missing.
        scale: Drop path factor per image, (B,), or None.
        grid: Rows and columns of the token grid.
        heads: Heads of the cell.
        reverse: Read the tokens from the last to the first.
        dtype: Type that activations are stored in and multiplied as: float32, bfloat16 or float16.

    Returns:
        (B, S, D).
    """
    tensors = list(weights.values())
    if operators_may_be_skipped(x, *tensors):
        return fused_blocks(x, [weights], [scale], [(heads, reverse)], grid, dtype)
    arguments = x.contiguous(), tensors, ' '.join(weights), scale, *grid, heads, reverse, dtype
    return vil_block_fwd(*arguments)[0] if _want_gradients(x, tensors) else vil_block_inference(*arguments)


def fused_blocks(
    x: Tensor,
    weights: Sequence[dict[str, Tensor]],
    scales: Sequence[Tensor | None],
    kinds: Sequence[tuple[int, bool]],
    grid: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    """Run one or several ViL blocks behind each other, with exact gradients, where operators may be skipped.

    Args:
        x: Residual stream, (B, S, D).
        weights: Of each block as for `fused_block`, of several with norms.
        scales: Of each block as for `fused_block`.
        kinds: Heads and reverse of each block.
        grid: Rows and columns of the token grid.
        dtype: As for `fused_block`.

    Returns:
        (B, S, D).
    """
    tensors, chain = [], []
    for named, scale, kind in zip(weights, scales, kinds, strict=True):
        tensors += named.values() if scale is None else (*named.values(), scale)
        chain.append(_Kind(tuple(named), *kind, scale is not None))
    settings = tuple(chain), grid, dtype
    if _want_gradients(x, tensors):
        return _EagerBlocks.apply(x.contiguous(), *settings, *tensors)
    parts = _parts(x.contiguous(), settings[0], tensors)
    outputs = side_by_side(lambda part: _forward(part[0], *settings, part[1:], keep=False)[0], parts)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _want_gradients(x: Tensor, tensors: Sequence[Tensor]) -> bool:
    """Not so in inference, and for frozen blocks that nothing before them needs a gradient through."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in (x, *tensors))


def _repeat(function: Callable[..., list[Tensor | None]], chain: tuple[_Kind, ...]) -> Callable:
    """A function that runs each block by a tape of its own; several blocks from some calls on by one of all."""
    return repeated(function, FIRST_CALLS) if len(chain) > 1 else function


def _parts(x: Tensor, chain: tuple[_Kind, ...], tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """x and the blocks' tensors, which only differ by factors, of each part of the batch that runs side by side.

    In a CUDA graph two halves may take less time than the whole: where the kernels of one start and end, those of the
    other fill the device.
    """
    inner = tensors[chain[0].names.index('skip')].numel()
    if len(chain) == 1 or x.shape[0] == 1 or not is_captured(x) or x.shape[0] * x.shape[1] * inner not in BESIDE:
        return [[x, *tensors]]
    parts, rest = [[half] for half in x.chunk(2)], iter(tensors)
    for kind in chain:
        weights, scale = kind.take(rest)
        for number, part in enumerate(parts):
            part += weights if scale is None else [*weights, scale.chunk(2)[number]]
    return parts


def _forward(
    x: Tensor, chain: tuple[_Kind, ...], grid: tuple[int, int], dtype: torch.dtype, tensors: Sequence[Tensor],
    keep: bool,
) -> list[Tensor]:  # fmt: skip
    """The last block's output, and with `keep` what the backward pass needs."""
    run = _repeat(_run_forward, chain)
    return run([x, *tensors], x.shape, chain, *grid, dtype, keep, dot_precision(dtype))


def _run_forward(
    tensors: Sequence[Tensor], _: torch.Size, chain: tuple[_Kind, ...], rows: int, columns: int, dtype: torch.dtype,
    keep: bool, precision: str,
) -> list[Tensor]:  # fmt: skip
    """Output, and with `keep` the inputs of all blocks but the first and what each keeps. Blocks are repeated alone.

    A block's norm makes the sum of the residual stream that the block before ends with.
    """
    x, *given = tensors
    rest, left, inputs, kept = iter(given), (None, None, None), [], []
    for number, kind in enumerate(chain):
        weights, scale = kind.take(rest)
        sizes, finish = (rows, columns, kind.heads, kind.reverse), number == len(chain) - 1
        out, *saved = forward(x, kind.names, weights, scale, sizes, dtype, keep, left, finish)
        if number:
            x, *saved = saved
        if number and keep:
            inputs.append(x)
        kept += saved
        left = out, kind.bias(weights), scale
    return [out, *inputs, *kept] if keep else [out]


def _run_backward(
    tensors: Sequence[Tensor], _: torch.Size, chain: tuple[_Kind, ...], rows: int, columns: int, dtype: torch.dtype,
    wanted: tuple[bool, ...], precision: str,
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of x and of the other tensors, None where they are not wanted. Blocks are repeated alone."""
    dx, x, *given = tensors
    rest, asked = iter(given), iter(wanted)
    blocks = [(kind, *kind.take(rest), kind.take(asked)[0]) for kind in chain]
    inputs, kept = [x, *islice(rest, len(chain) - 1)], list(rest)
    found = []
    for (kind, weights, scale, are_wanted), start in zip(reversed(blocks), reversed(inputs), strict=True):
        sizes = rows, columns, kind.heads, kind.reverse
        first = len(kept) - count_kept(start, kind.names, weights, sizes, dtype)
        saved, kept = kept[first:], kept[:first]
        dx, *gradients = backward(dx, start, kind.names, weights, scale, saved, sizes, tuple(are_wanted), own=False)
        found = [*gradients, *[None] * kind.scaled, *found]
    return [dx, *found]


class _EagerBlocks(torch.autograd.Function):
    """The blocks in a graph of autograd."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x: Tensor,
        chain: tuple[_Kind, ...],
        grid: tuple[int, int],
        dtype: torch.dtype,
        *tensors: Tensor,
    ) -> Tensor:
        out, *kept = _forward(x, chain, grid, dtype, tensors, keep=True)
        ctx.chain, ctx.sizes, ctx.precision = chain, (*grid, dtype), dot_precision(dtype)
        ctx.save_for_backward(x, *tensors, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, *others = ctx.saved_tensors
        run, wanted = _repeat(_run_backward, ctx.chain), ctx.needs_input_grad[4:]
        dx, *found = run([dout.contiguous(), x, *others], x.shape, ctx.chain, *ctx.sizes, wanted, ctx.precision)
        return dx, None, None, None, *found
