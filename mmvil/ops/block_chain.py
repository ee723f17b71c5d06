"""Fused ViL blocks behind each other as one call: one node of autograd, and one tape each for forward and backward.

It is repeated as a whole: one look at all parameters, one buffer for what is needed in between.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from .block_op import backward, forward, repeated
from .side_stream import is_captured, side_by_side
from .triton_launch import dot_precision

__all__ = ['fused_blocks']

# Taking down several blocks costs as much host time as some thirty calls gain by it.
FIRST_CALLS = 8
# Fewest and most values of the inner part, tokens times channels of all images, for which halves run side by side.
BESIDE = {'inference': (1, 1 << 40), 'training': (1, 1 << 40)}


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


def fused_blocks(
    x: Tensor,
    weights: Sequence[dict[str, Tensor]],
    scales: Sequence[Tensor | None],
    kinds: Sequence[tuple[int, bool]],
    grid: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    """Run ViL blocks behind each other as one call, with exact gradients, where operators may be skipped.

    Args:
        x: Residual stream, (B, S, D).
        weights: Of each block as for `fused_block`, with norms.
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
    arguments = x.contiguous(), tuple(chain), grid, dtype
    if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *tensors)):
        return _EagerBlocks.apply(*arguments, *tensors)
    return _forward(*arguments, tensors, _parts(x, chain, tensors, keep=False), keep=False)[0]


def _parts(x: Tensor, chain: tuple[_Kind, ...], weights: Sequence[Tensor], keep: bool) -> int:
    """How many parts of the batch to run side by side.

    In a CUDA graph two halves of a small model take less time than the whole: where the kernels of one start and end,
    those of the other fill the device.
    """
    if x.shape[0] == 1 or not is_captured(x):
        return 1
    inner = weights[chain[0].names.index('skip')].numel()
    least, most = BESIDE['training' if keep else 'inference']
    return 2 if least <= x.shape[0] * x.shape[1] * inner <= most else 1


def _split(
    x: Tensor, chain: tuple[_Kind, ...], tensors: Sequence[Tensor], parts: int
) -> list[tuple[Tensor, list[Tensor]]]:
    """x and the blocks' tensors for each part of the batch, of which only the factors differ."""
    if parts == 1:
        return [(x, list(tensors))]
    split, rest = [(part, []) for part in x.chunk(parts)], iter(tensors)
    for kind in chain:
        weights, scale = kind.take(rest)
        for number, (_, own) in enumerate(split):
            own += weights if scale is None else [*weights, scale.chunk(parts)[number]]
    return split


def _forward(
    x: Tensor, chain: tuple[_Kind, ...], grid: tuple[int, int], dtype: torch.dtype, tensors: Sequence[Tensor],
    parts: int, keep: bool,
) -> list[Tensor]:  # fmt: skip
    """The last block's output, and with `keep` what `_backward` needs, of each part of the batch behind each other."""
    run, precision = repeated(_run_forward, FIRST_CALLS), dot_precision(dtype)

    def of_part(x: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
        return run([x, *tensors], x.shape, chain, *grid, dtype, keep, precision)

    outputs, kept = [], []
    for out, *saved in side_by_side(of_part, _split(x, chain, tensors, parts)):
        outputs.append(out)
        kept += saved
    return [outputs[0] if len(outputs) == 1 else torch.cat(outputs), *kept]


def _run_forward(
    tensors: Sequence[Tensor], _: torch.Size, chain: tuple[_Kind, ...], rows: int, columns: int, dtype: torch.dtype,
    keep: bool, precision: str,
) -> list[Tensor]:  # fmt: skip
    """Output, and with `keep` the inputs of all blocks but the first and what each keeps. Blocks are repeated alone."""
    x, *given = tensors
    rest, inputs, kept = iter(given), [], []
    for kind in chain:
        inputs.append(x)
        weights, scale = kind.take(rest)
        x, *saved = forward(x, kind.names, weights, scale, (rows, columns, kind.heads, kind.reverse), dtype, keep)
        kept += saved
    return [x, *inputs[1:], *kept] if keep else [x]


def _run_backward(
    tensors: Sequence[Tensor], _: torch.Size, chain: tuple[_Kind, ...], rows: int, columns: int,
    wanted: tuple[bool, ...], precision: str,
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of x and of the other tensors, None where they are not wanted. Blocks are repeated alone."""
    dx, x, *given = tensors
    rest, asked = iter(given), iter(wanted)
    blocks = [(kind, *kind.take(rest), kind.take(asked)[0]) for kind in chain]
    inputs, kept = [x, *islice(rest, len(chain) - 1)], list(rest)
    each, found = len(kept) // len(chain), []
    for (kind, weights, scale, are_wanted), start in zip(reversed(blocks), reversed(inputs), strict=True):
        saved, kept = kept[-each:], kept[:-each]
        sizes = rows, columns, kind.heads, kind.reverse
        dx, *gradients = backward(dx, start, kind.names, weights, scale, saved, sizes, tuple(are_wanted), own=False)
        found = [*gradients, *[None] * kind.scaled, *found]
    return [dx, *found]


def _backward(
    dout: Tensor, x: Tensor, chain: tuple[_Kind, ...], grid: tuple[int, int], dtype: torch.dtype,
    tensors: Sequence[Tensor], kept: Sequence[Tensor], wanted: tuple[bool, ...], parts: int,
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of x and of the blocks' tensors, None where they are not wanted."""
    run, precision, each = repeated(_run_backward, FIRST_CALLS), dot_precision(dtype), len(kept) // parts

    def of_part(dout: Tensor, x: Tensor, tensors: Sequence[Tensor], kept: Sequence[Tensor]) -> list[Tensor | None]:
        return run([dout, x, *tensors, *kept], x.shape, chain, *grid, wanted, precision)

    split = zip(dout.contiguous().chunk(parts), _split(x, chain, tensors, parts), strict=True)
    calls = [(part, *own, kept[number * each : (number + 1) * each]) for number, (part, own) in enumerate(split)]
    (dx, *found), *others = side_by_side(of_part, calls)
    for dx_part, *more in others:
        dx = torch.cat([dx, dx_part])
        torch._foreach_add_([t for t in found if t is not None], [t for t in more if t is not None])
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
        ctx.settings, ctx.count, ctx.parts = (chain, grid, dtype), len(tensors), _parts(x, chain, tensors, keep=True)
        out, *kept = _forward(x, *ctx.settings, tensors, ctx.parts, keep=True)
        ctx.save_for_backward(x, *tensors, *kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, *rest = ctx.saved_tensors
        tensors, kept, wanted = rest[: ctx.count], rest[ctx.count :], ctx.needs_input_grad[4:]
        dx, *found = _backward(dout, x, *ctx.settings, tensors, kept, wanted, ctx.parts)
        return dx, None, None, None, *found
