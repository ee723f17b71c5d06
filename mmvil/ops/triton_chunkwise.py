"""Chunkwise mLSTM on Triton kernels: buffers, grids, launches. Time and memory grow linearly with the sequence."""

import contextlib
import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import carried, triton_chunkwise_products, triton_chunkwise_states
from .fast_launch import FastKernels
from .triton_chunkwise_tiles import ProductTiles, StateTiles, Tiles, choose_tiles, split_dim
from .triton_launch import device_limits, dot_precision, empty_rows_like, rows_contiguous

__all__ = [
    'COUNT_SAVED',
    'Saved',
    'backward',
    'empty_saved',
    'forward',
    'row_sums',
]

products = FastKernels(triton_chunkwise_products)
state_kernels = FastKernels(triton_chunkwise_states)

OUTPUT, QUERY_GRADIENT, KEY_GRADIENT, VALUE_GRADIENT = range(4)
ALIGNMENT = 8
"""Strides that are all multiples of this many elements let the kernels use 16-byte accesses."""


class Saved(NamedTuple):
    """What the backward pass needs besides inputs and output; BH = B * NH heads, NC chunks, in reading order.

    Attributes:
        states: State before each chunk, (BH, NC, DH, DH).
        state_normalisers: Its normaliser, float32 (BH, NC, DH).
        gate: g - E after the own tile, as float32 and remainder, float32 (2, BH, S).
        maximum: M - E after the own tile, likewise.
        write: exp(g - E after the own tile), float32 (BH, S).
        read: exp(E before the own tile - M), float32 (BH, S).
        border: E before each tile and after the last, float64 (BH, tiles + 1).
        stabiliser: m, float32 (BH, S).
        normaliser: n, float32 (BH, S).
    """

    states: Tensor
    state_normalisers: Tensor
    gate: Tensor
    maximum: Tensor
    write: Tensor
    read: Tensor
    border: Tensor
    stabiliser: Tensor
    normaliser: Tensor


COUNT_SAVED = len(Saved._fields)


def _default_tiles(q: Tensor) -> Tiles:
    """Tile sizes for q on its device."""
    return choose_tiles(q.shape[-1], q.dtype, device_limits(q.device))


def empty_saved(q: Tensor, tiles: Tiles | None = None) -> Saved:
    """Allocate what `forward` saves; shapes and dtypes alone for a meta or fake tensor.

    Args:
        q: Queries, (B, NH, S, DH).
        tiles: Tile sizes. Default: `choose_tiles`.

    Returns:
        Tensors without content.
    """
    batch, heads, length, dim = q.shape
    tiles = tiles or _default_tiles(q)
    total, chunks = batch * heads, -(-length // tiles.chunk)
    state_dtype = torch.bfloat16 if q.dtype == torch.bfloat16 else torch.float32
    return Saved(
        states=q.new_empty((total, chunks, dim, dim), dtype=state_dtype),
        state_normalisers=q.new_empty((total, chunks, dim), dtype=torch.float32),
        gate=q.new_empty((2, total, length), dtype=torch.float32),
        maximum=q.new_empty((2, total, length), dtype=torch.float32),
        write=q.new_empty((total, length), dtype=torch.float32),
        read=q.new_empty((total, length), dtype=torch.float32),
        border=q.new_empty((total, -(-length // tiles.tile) + 1), dtype=torch.float64),
        stabiliser=q.new_empty((total, length), dtype=torch.float32),
        normaliser=q.new_empty((total, length), dtype=torch.float32),
    )


def row_sums(saved: tuple[Tensor, ...]) -> Tensor:
    """Sum of each row's weights, (B * NH, S), in reading order, of what `forward` kept with `sums`."""
    return Saved(*saved).normaliser


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    igate: Tensor,
    fgate: Tensor,
    reverse: bool,
    eps: float,
    tiles: Tiles | None = None,
    sums: bool = False,
) -> tuple[Tensor, Saved]:
    """Run the mLSTM.

    Args:
        q: Queries, (B, NH, S, DH), any strides, float32, bfloat16 or float16, DH at most 512.
        k: Keys, like q.
        v: Values, like q.
        igate: Input gate pre-activations, contiguous float32 (B, NH, S).
        fgate: Forget gate pre-activations, like igate.
        reverse: Read the sequence from its end.
        eps: Added to the denominator.
        tiles: Tile sizes. Default: `choose_tiles`.
        sums: Keep the sum of each row's weights, which is n over the denominator, in place of n. `backward` needs n.

    Returns:
        h like q, and what `backward` needs.
    """
    may_carry, tiles = tiles is None, tiles or _default_tiles(q)
    h, saved = empty_rows_like(q), empty_saved(q, tiles)
    if q.numel() == 0:
        return h, saved
    q, k, v = (rows_contiguous(x) for x in (q, k, v))
    call = _Call(q, (q, k, v, h), tiles, reverse, eps)
    states, normalisers = saved.states, saved.state_normalisers
    with call.device():
        call.scan_gates(igate, fgate, saved)
        if may_carry and call.carry(q, k, v, h, saved, not sums):
            return h, saved
        call.make_states(k, v, h, states, normalisers, saved, None, None, None)
        call.scan_states(states, normalisers, saved, None)
        call.product(OUTPUT, q, k, v, h, q, states, normalisers, saved, saved.read, None, None, None, sums)
    return h, saved


def backward(
    dh: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    igate: Tensor,
    fgate: Tensor,
    h: Tensor,
    saved: tuple[Tensor, ...],
    reverse: bool,
    eps: float,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute the gradients of `forward`'s inputs.

    Args:
        dh: Gradient of h, like h.
        q: As given to `forward`; so are k, v, igate, fgate, reverse, eps and tiles.
        k: See q.
        v: See q.
        igate: See q.
        fgate: See q.
        h: Result of `forward`.
        saved: Result of `forward`.
        reverse: See q.
        eps: See q.
        tiles: See q.

    Returns:
        Gradients of q, k and v in their dtype, of igate and fgate in float32.
    """
    tiles = tiles or _default_tiles(q)
    saved = Saved(*saved)
    dq, dk, dv = (empty_rows_like(x) for x in (q, k, v))
    digate, dfgate = torch.empty_like(igate), torch.empty_like(fgate)
    if q.numel() == 0:
        return dq, dk, dv, digate, dfgate
    q, k, v, h, dh = (rows_contiguous(x) for x in (q, k, v, h, dh.to(q.dtype)))
    call = _Call(q, (q, k, v, h, dh, dq, dk, dv), tiles, reverse, eps)
    total, length, parts = call.total, call.length, tiles.state_gradient.columns.split
    states = torch.empty_like(saved.states)
    sums = saved.state_normalisers.new_empty((parts, *saved.state_normalisers.shape))
    inverse, read_inverse = torch.empty_like(saved.normaliser), torch.empty_like(saved.normaliser)
    delta = inverse.new_empty((parts, total, length))
    query_dot, key_dot = (inverse.new_empty((tiles.gradient.pieces.split, total, length)) for _ in range(2))
    crossing = inverse.new_empty((total, call.chunks, call.scan_blocks + 1))
    before = saved.states, saved.state_normalisers
    with call.device():
        call.make_states(q, dh, h, states, sums, saved, inverse, read_inverse, delta)
        call.scan_states(states, sums, saved, crossing)
        call.product(QUERY_GRADIENT, dh, v, k, dq, q, *before, saved, saved.read, inverse, delta, query_dot)
        call.product(KEY_GRADIENT, v, dh, q, dk, k, states, sums, saved, read_inverse, inverse, delta, key_dot)
        call.product(VALUE_GRADIENT, k, q, dh, dv, v, states, sums, saved, read_inverse, inverse, delta, None)
        call.gate_gradients(query_dot, key_dot, crossing, fgate, digate, dfgate)
    return dq, dk, dv, digate, dfgate


class _Call:
    """Sizes, strides and launches that forward and backward share.

    Args:
        q: Queries, for the sizes.
        tensors: All (B, NH, S, DH) tensors that kernels will see.
        tiles: Tile sizes.
        reverse: Reading direction.
        eps: Added to the denominator.
    """

    def __init__(self, q: Tensor, tensors: tuple[Tensor, ...], tiles: Tiles, reverse: bool, eps: float):
        batch, self.heads, self.length, self.dim = q.shape
        self.total = batch * self.heads
        self.chunks, self.tile_count = -(-self.length // tiles.chunk), -(-self.length // tiles.tile)
        self.tiles, self.reverse, self.eps = tiles, bool(reverse), float(eps)
        self.target, self.dtype = q.device, q.dtype
        self.scale = 1 / math.sqrt(self.dim)
        aligned = all(stride % ALIGNMENT == 0 for x in tensors for stride in _strides(x))
        self.unit = ALIGNMENT if aligned else 1
        self.precision = dot_precision(q.dtype)
        self.scan_blocks = -(-self.dim * self.dim // tiles.scan.block)

    def device(self) -> contextlib.AbstractContextManager:
        """Make the tensors' GPU the current one."""
        return torch.cuda.device(self.target) if self.target.type == 'cuda' else contextlib.nullcontext()

    def strides(self, *tensors: Tensor) -> list[int]:
        """Strides of batch, head and row of each tensor, in the kernels' unit."""
        return [stride // self.unit for x in tensors for stride in _strides(x)]

    def scan_gates(self, igate: Tensor, fgate: Tensor, saved: Saved) -> None:
        """Fill gate, maximum, border and stabiliser."""
        grid, sums = (self.total * self.tile_count,), saved.border.new_empty((2, self.total, self.tile_count))
        constants = {'TILE': self.tiles.tile, 'REVERSE': self.reverse, 'num_warps': 2}
        state_kernels.gate_sum_kernel[grid](igate, fgate, sums[0], sums[1], self.length, self.tile_count, **constants)
        state_kernels.gate_scan_kernel[grid](
            igate, fgate, sums[0], sums[1], saved.gate, saved.maximum, saved.write, saved.read, saved.stabiliser,
            saved.border, self.total, self.length, self.tile_count, **constants,
        )  # fmt: skip

    def carry(self, q, k, v, h, saved, keep: bool) -> bool:
        """States and output in one, where the kernels for that run; whether they did."""
        if self.tiles.tile != carried.TILE:
            return False
        return carried.carry(
            q, k, v, h, saved, self.strides(q, k, v, h), self.unit, self.tiles.chunk // self.tiles.tile, self.scale,
            self.eps, self.reverse, keep,
        )  # fmt: skip

    def make_states(self, x, y, h, states, sums, saved, inverse, read_inverse, delta) -> None:
        """Each chunk's own contribution; backward (inverse given) also 1 / d and delta."""
        is_backward = inverse is not None
        tiles = self.tiles.state_gradient if is_backward else self.tiles.state
        made = (inverse, read_inverse, delta) if is_backward else (saved.normaliser,) * 3
        state_kernels.chunk_state_kernel[(self.total * self.chunks * tiles.rows.split * tiles.columns.split,)](
            x, y, h, states, sums, saved.write, saved.read, saved.border, saved.stabiliser, saved.normaliser,
            *made, *self.strides(x, y, h), self.total, self.heads, self.length, self.chunks, self.eps,
            DH=self.dim, RA=tiles.rows.wide, RB=tiles.rows.narrow, ROW_SPLIT=tiles.rows.split,
            CA=tiles.columns.wide, CB=tiles.columns.narrow, SPLIT=tiles.columns.split, CHUNK=self.tiles.chunk,
            TILE=self.tiles.tile, STREAM=tiles.stream, BACKWARD=is_backward, REVERSE=self.reverse,
            UNIT=self.unit, PRECISION=self.precision, **_options(tiles),
        )  # fmt: skip

    def scan_states(self, states, sums, saved, crossing) -> None:
        """Turn contributions into states; backward (crossing given) from the end."""
        tiles, is_backward = self.tiles.scan, crossing is not None
        state_kernels.state_scan_kernel[(self.total * (self.scan_blocks + 1),)](
            states, sums, saved.states, saved.state_normalisers, saved.border, crossing if is_backward else sums,
            self.total, self.chunks, self.tile_count, PER_CHUNK=self.tiles.chunk // self.tiles.tile,
            STATE=self.dim * self.dim, DH=self.dim, BLOCKS=self.scan_blocks, BLOCK=tiles.block,
            WIDTH=_power_of_two(self.dim),
            PARTS=self.tiles.state_gradient.columns.split if is_backward else 1, BACKWARD=is_backward,
            TF32=self.dtype == torch.float16, STAGES=tiles.stages, num_warps=tiles.warps,
        )  # fmt: skip

    def product(
        self, product, x, y, z, out, partner, states, normalisers, saved, read, inverse, delta, row_dot, sums=False
    ) -> None:
        """One of the four products."""
        tiles, inner = self.tiles.output if product == OUTPUT else self.tiles.gradient, split_dim(self.dim)
        unused = saved.normaliser
        products.product_kernel[(self.total * self.tile_count * tiles.pieces.split,)](
            x, y, z, out, partner, states, normalisers, saved.gate, saved.maximum, saved.write, read, saved.border,
            saved.stabiliser, saved.normaliser, unused if inverse is None else inverse,
            unused if delta is None else delta, unused if row_dot is None else row_dot,
            *self.strides(x, y, z, out, partner), self.total, self.heads, self.length, self.chunks, self.scale,
            self.eps, DH=self.dim, KA=inner.wide, KB=inner.narrow,
            CA=tiles.pieces.wide, CB=tiles.pieces.narrow, SPLIT=tiles.pieces.split,
            DELTAS=self.tiles.state_gradient.columns.split, CHUNK=self.tiles.chunk, TILE=self.tiles.tile,
            STREAM=tiles.stream, BK=tiles.depth, PRODUCT=product, SUMS=sums, REVERSE=self.reverse, UNIT=self.unit,
            PRECISION=self.precision, **_options(tiles),
        )  # fmt: skip

    def gate_gradients(self, query_dot, key_dot, crossing, fgate, digate, dfgate) -> None:
        """Gradients of both gates from the row products."""
        state_kernels.gate_gradient_kernel[(self.total * self.chunks,)](
            query_dot, key_dot, crossing, fgate, digate, dfgate, self.total, self.length, self.chunks, self.scale,
            SPLIT=self.tiles.gradient.pieces.split, BLOCKS=self.scan_blocks, WIDTH=_power_of_two(self.scan_blocks + 1),
            CHUNK=self.tiles.chunk, REVERSE=self.reverse, num_warps=4,
        )  # fmt: skip


def _options(tiles: ProductTiles | StateTiles) -> dict[str, int]:
    """Compiler options of a kernel."""
    limit = {} if tiles.registers is None else {'maxnreg': tiles.registers}
    return {'num_warps': tiles.warps, 'num_stages': tiles.stages, **limit}


def _strides(x: Tensor) -> list[int]:
    """Strides of batch, head and row; 0 where there is one only, since such strides mean nothing."""
    return [stride if size > 1 else 0 for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True)]


def _power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << max(number - 1, 0).bit_length()
