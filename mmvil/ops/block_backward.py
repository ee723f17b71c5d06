"""Launchers of the fused ViL block's exact backward pass. Works on tensors, knows no modules.

Everything is token-major and seen as rows of N = B * S tokens. Kept from the forward pass are the input, the
up-projection's output, the gates, the convolution's output, values and the cell's output with its statistics; the rest
is computed again. Sums over tokens end in one kernel for all parameters.
"""

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from . import block_backward_kernels, block_backward_norm_kernels, block_conv_kernels, triton_quadratic
from .block import CELL_EPS, NORM_EPS, BlockShape, as_heads, as_rows, gate_width, qkv_biases
from .fast_launch import FastKernels
from .triton_launch import ceil_div, device_limits, dot_precision, next_power_of_two

__all__ = ['block_backward']

kernels = FastKernels(block_backward_kernels)
norm_kernels = FastKernels(block_backward_norm_kernels)
conv_kernels = FastKernels(block_conv_kernels)

STRIP_COLUMNS = 16
MAX_STRIP_ROWS = 32
# Tiles of whole rows by elements, others by tokens and channels; warps; stages of the loop; and programs per
# multiprocessor. The last are what one holds by its registers, so that a run is one full wave or two, but fewer for
# the norm and the branch, whose partial sums are narrow and cost more to add up. Tiles are the fastest of those tried
# on one H100; the numbers of programs follow from registers and are not timed.
ROW_TILES = {'branch': (1024, 1, 3, 6), 'norm': (1024, 1, 3, 8), 'output': (512, 1, 3, 8)}
FLAT_TILES = {'query': (32, 32, 1, 3, 32), 'mix': (16, 32, 1, 4, 8), 'value': (16, 32, 1, 2, 16)}
# IEEE float32 products run on the plain cores, with more registers for an operand.
FLOAT_TILES = {**FLAT_TILES, 'mix': (16, 16, 2, 3, 4), 'value': (16, 16, 2, 2, 8)}
CONV_TILE = (32, 4, 12)  # channels and warps of the causal convolution's, programs as above of both
GRID_TILE = (1, 64, 1)  # quads of columns, channels, warps
CONV_REGISTERS = 168
SUM_TILE = (128, 32, 8)
# Elements that a program copies, in the finishing kernel and in the first one with its fewer threads.
COPY_BLOCK = 2048
PREPARE_BLOCK = 1024


def _channels(shape: BlockShape, most: int) -> int:
    """Channels of a tile: a power of two that holds whole blocks."""
    return max(16, min(most, next_power_of_two(shape.inner)))


class _Sums:
    """Partial sums of six kernels in one buffer, and their totals.

    Args:
        like: A tensor on the device.
        sizes: (programs, sums per program) of each kernel.
    """

    def __init__(self, like: Tensor, sizes: Sequence[tuple[int, int]]) -> None:
        self.sizes = sizes
        parts = like.new_empty(sum(rows * width for rows, width in sizes), dtype=torch.float32)
        self.parts = parts.split([rows * width for rows, width in sizes])
        self.buffer = parts

    def totals(self, *others: int) -> tuple[Tensor, ...]:
        """Parts of the given sizes that are still to be filled, and sums over programs, the kernels' behind each other.

        All in one buffer, as results of a tape are made by one call then.
        """
        height, width, warps = SUM_TILE
        rows, widths = zip(*self.sizes, strict=True)
        *empty, totals = self.buffer.new_empty(sum(others) + sum(widths)).split([*others, sum(widths)])
        kernels.sum_kernel[(sum(ceil_div(x, width) for x in widths),)](
            self.buffer, totals, *rows, *widths, BM=height, BC=width, num_warps=warps
        )
        return *empty, totals


def _steps(tokens: int, height: int, programs: int) -> tuple[int, int]:
    """Tiles that a program walks, and programs, so that there are about as many as wanted."""
    steps = max(1, ceil_div(tokens, height * programs))
    return steps, ceil_div(tokens, height * steps)


def _row_tile(name: str, dims: int) -> tuple[int, int]:
    """Rows and columns of a tile that holds whole rows of `dims` elements."""
    width = next_power_of_two(dims)
    return max(1, ROW_TILES[name][0] // width), width


class _Backward:
    """One run: sizes, tiles and the buffers of sums."""

    def __init__(self, shape: BlockShape, u: Tensor, dims: int, weights: dict[str, Tensor | None]) -> None:
        self.shape, self.weights, self.dtype = shape, weights, u.dtype
        self.count, self.dims = shape.batch * shape.tokens, dims
        self.u = u.view(self.count, 2 * shape.inner)
        self.a, self.z = self.u.chunk(2, 1)
        self.taps = weights['conv_w'].flatten(1).shape[1]
        self.flat_tiles = FLOAT_TILES if u.dtype == torch.float32 else FLAT_TILES
        self.processors = device_limits(u.device).multiprocessors
        self.branch = self._by_rows('branch', dims)
        self.norm = self._by_rows('norm', dims)
        self.output = self._by_rows('output', shape.inner // shape.heads, shape.heads)
        self.mix = self._flat('mix')
        self.value = self._flat('value')
        self.conv = self._strips()
        inner, block, heads = shape.inner, shape.block, shape.heads
        common = inner * (block + 1 + 2 * heads)
        self.sums = _Sums(
            u,
            (
                (self.branch[1], dims),
                (self.norm[1] if weights['norm_w'] is not None else 0, 2 * dims),
                (self.mix[1], common + inner * (block + 1) + 2 * heads),
                (self.value[1], common),
                (self.conv[1] * self.conv[2], inner * (self.taps + 2)),
                (self.output[1], 4 * inner),
            ),
        )

    def _parts(self, channels: int) -> int:
        return ceil_div(self.shape.inner, channels)

    def _by_rows(self, name: str, dims: int, columns: int = 1) -> tuple[int, int]:
        """Steps and programs of a kernel on tiles of whole rows, `columns` of which lie beside each other."""
        return _steps(self.count, _row_tile(name, dims)[0], max(1, ROW_TILES[name][3] * self.processors // columns))

    def _flat(self, name: str) -> tuple[int, int]:
        """Steps and programs of a kernel on tiles of tokens and channels."""
        height, most, *_, held = self.flat_tiles[name]
        parts = self._parts(_channels(self.shape, most))
        return _steps(self.count, height, max(1, held * self.processors // parts))

    def _strips(self) -> tuple[int, int, int, int]:
        """Rows of the convolution's strips, strips above each other, groups of programs beside these, images.

        The latter are those of a group, or on a grid those that all groups are in at a time. There are programs enough,
        but few partial sums.
        """
        shape, batch = self.shape, self.shape.batch
        rows = shape.grid[0] if shape.two_dimensional else ceil_div(shape.tokens, STRIP_COLUMNS)
        height = min(rows, MAX_STRIP_ROWS)
        strips = ceil_div(rows, height)
        most = GRID_TILE[1] if shape.two_dimensional else CONV_TILE[0]
        groups = CONV_TILE[2] * self.processors // (self._parts(_channels(shape, most)) * strips)
        if not shape.two_dimensional:
            images = ceil_div(batch, max(1, min(batch, groups)))
            return height, strips, ceil_div(batch, images), images
        quads = ceil_div(shape.grid[1], 4)
        images = max(1, min(batch, groups * GRID_TILE[0] // quads))
        images = ceil_div(batch, ceil_div(batch, images))  # as many at all times
        return height, strips, ceil_div(images * quads, GRID_TILE[0]), images

    def queries_and_keys(self, pre: Tensor) -> tuple[Tensor, Tensor]:
        """q and k (N, E)."""
        shape, weights = self.shape, self.weights
        height, most, warps, stages, _ = self.flat_tiles['query']
        channels = _channels(shape, most)
        steps, programs = self._flat('query')
        q, k = torch.empty_like(pre), torch.empty_like(pre)
        kernels.query_key_kernel[(self._parts(channels), programs)](
            pre, weights['wq'], weights['wk'], *qkv_biases(weights)[:2], q, k, self.count, shape.inner, steps,
            QB=shape.block, HAS_BIAS=weights['bq'] is not None, PRECISION=dot_precision(self.dtype), BM=height,
            BC=channels, STAGES=stages, num_warps=warps,
        )  # fmt: skip
        return q, k

    def output_gradients(
        self, branch: Tensor, down_w: Tensor, h: Tensor, pre: Tensor, dz: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """dh, dc (N, E), rows' dh.h (B, NH, S) and the gradient of the down-projection's weight; dz in place."""
        shape, weights = self.shape, self.weights
        dy = branch @ down_w
        dim = shape.inner // shape.heads
        height, width = _row_tile('output', dim)
        y, dh, dc = (torch.empty_like(pre) for _ in range(3))
        products = h.new_empty(shape.batch, shape.heads, shape.tokens, dtype=torch.float32)
        bias = weights['head_b']
        steps, programs = self.output
        norm_kernels.output_backward_kernel[(programs, shape.heads)](
            h, pre, self.z, self.z.stride(0), weights['head_w'], weights['head_w'] if bias is None else bias,
            weights['skip'], dy, y, dz, dz.stride(0), dh, dc, products, self.sums.parts[5], self.count, shape.tokens,
            shape.inner, NORM_EPS, steps, HAS_BIAS=bias is not None, DH=dim, BM=height, BD=width,
            STAGES=ROW_TILES['output'][2], num_warps=ROW_TILES['output'][1],
        )  # fmt: skip
        return dh, dc, products, branch.t() @ y

    def prepare(self, dout: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The branch's gradient (N, D) and the outer projections' weights, both in the activations' dtype; the gates.

        The last are maps of c and a, (2, E, columns).
        """
        shape, weights = self.shape, self.weights
        channels, gates = _channels(shape, 32), gate_width(shape)
        wide = [weights['up_w'], weights['down_w']]
        sizes = [0 if x.dtype == self.dtype else x.numel() for x in wide]
        maps, *copies = self.u.new_empty(2 * shape.inner * gates + sum(sizes)).split([2 * shape.inner * gates, *sizes])
        branch = torch.empty_like(dout, dtype=self.dtype)
        height, width = _row_tile('branch', self.dims)
        steps, programs = self.branch
        parts = self._parts(channels)
        others = 2 * parts + ceil_div(max(sizes), PREPARE_BLOCK)
        norm_kernels.prepare_backward_kernel[(others + programs,)](
            dout, dout if scale is None else scale, branch, self.sums.parts[0], weights['wq'], weights['wk'],
            weights['wv'], weights['wi'], weights['wf'], maps, *wide, *copies, *sizes, parts, others, shape.inner,
            self.count, shape.tokens, self.dims, steps, QB=shape.block, HEADS=shape.heads, BC=channels, BG=gates,
            BLOCK=PREPARE_BLOCK, SCALED=scale is not None, BM=height, BD=width, STAGES=ROW_TILES['branch'][2],
            num_warps=ROW_TILES['branch'][1],
        )  # fmt: skip
        up, down = (x.view_as(w) if size else w for x, w, size in zip(copies, wide, sizes, strict=True))
        return branch, up, down, maps.view(2, shape.inner, gates)

    def mix_gradient(
        self, pre: Tensor, dq: Tensor, dk: Tensor, dc: Tensor, dgates: Sequence[Tensor], maps: Tensor
    ) -> Tensor:
        """Gradient of `pre`, in the memory of dc."""
        shape, weights = self.shape, self.weights
        height, most, warps, stages, _ = self.flat_tiles['mix']
        channels = _channels(shape, most)
        steps, programs = self.mix
        kernels.mix_backward_kernel[(self._parts(channels), programs)](
            pre, dq, dk, dc, *dgates, weights['wq'], weights['wk'], maps, dc, self.sums.parts[2], self.count,
            shape.tokens, shape.inner, steps, self.sums.sizes[2][1], QB=shape.block, HEADS=shape.heads,
            PRECISION=dot_precision(self.dtype), BM=height, BC=channels, BG=maps.shape[2], STAGES=stages,
            num_warps=warps,
        )  # fmt: skip
        return dc

    def value_gradient(self, dv: Tensor, dgates: Sequence[Tensor], maps: Tensor, da: Tensor) -> None:
        """Write what comes to a through v and the gates."""
        shape, weights = self.shape, self.weights
        height, most, warps, stages, _ = self.flat_tiles['value']
        channels = _channels(shape, most)
        steps, programs = self.value
        kernels.value_backward_kernel[(self._parts(channels), programs)](
            self.a, self.a.stride(0), dv, *dgates, weights['wv'], maps, da, da.stride(0), self.sums.parts[3],
            self.count, shape.tokens, shape.inner, steps, self.sums.sizes[3][1], QB=shape.block, HEADS=shape.heads,
            PRECISION=dot_precision(self.dtype), BM=height, BC=channels, BG=maps.shape[2], STAGES=stages,
            num_warps=warps,
        )  # fmt: skip

    def conv_gradient(self, dpre: Tensor, da: Tensor) -> None:
        """Add what comes to a through the convolution."""
        shape, conv_w, sums = self.shape, self.weights['conv_w'], self.sums.parts[4]
        height, strips, groups, images = self.conv
        last = self.taps - 1 if shape.reverse else 0
        pitch = self.sums.sizes[4][1]
        if shape.two_dimensional:
            quads, most, warps = GRID_TILE
            channels = _channels(shape, most)
            conv_kernels.conv2d_backward_kernel[(self._parts(channels) * strips * groups,)](
                self.a, dpre, conv_w, da, sums, shape.batch, *shape.grid, height, strips, images, last, pitch,
                E=shape.inner, A_ROW=self.a.stride(0), DA_ROW=da.stride(0), QUADS=quads, BC=channels, num_warps=warps,
            )  # fmt: skip
        else:
            most, warps, _ = CONV_TILE
            channels = _channels(shape, most)
            conv_kernels.conv1d_backward_kernel[(self._parts(channels), strips, groups)](
                self.a, self.a.stride(0), dpre, conv_w, da, da.stride(0), sums, shape.batch, shape.tokens, shape.inner,
                height, strips, images, 0 if shape.reverse else -3, last, pitch, BW=STRIP_COLUMNS, BC=channels,
                num_warps=warps, maxnreg=CONV_REGISTERS,
            )  # fmt: skip

    def norm_gradient(self, x: Tensor, dnorm: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient of x, the residual's included, and the norm's output."""
        weight, bias = self.weights['norm_w'], self.weights['norm_b']
        height, width = _row_tile('norm', self.dims)
        dx, normalised = torch.empty_like(x), torch.empty_like(dnorm)
        steps, programs = self.norm
        norm_kernels.layer_norm_backward_kernel[(programs,)](
            x, weight, weight if bias is None else bias, dnorm, dout, dx, normalised, self.sums.parts[1], self.count,
            self.dims, NORM_EPS, steps, HAS_BIAS=bias is not None, BM=height, BD=width,
            STAGES=ROW_TILES['norm'][2], num_warps=ROW_TILES['norm'][1],
        )  # fmt: skip
        return dx, normalised

    def parameter_gradients(self, dup_w: Tensor, ddown_w: Tensor) -> dict[str, Tensor]:
        """All gradients: sums over tokens, float32, flat; the given ones in their weights' dtypes."""
        shape, weights, inner, block = self.shape, self.weights, self.shape.inner, self.shape.block
        gates = 2 * shape.heads
        matrices, biases, wg, totals = self.sums.totals(3 * inner * block, 3 * inner, gates * 3 * inner)
        matrices, biases, wg = matrices.view(3, -1), biases.view(3, inner), wg.view(gates, 3 * inner)
        branch, norm, mix, value, conv, output = totals.split([width for _, width in self.sums.sizes])
        channels = _channels(shape, 32)
        wide = [dup_w, ddown_w]
        copies = [
            x if x.dtype == weights[name].dtype else torch.empty_like(x, dtype=weights[name].dtype)
            for name, x in zip(('up_w', 'down_w'), wide, strict=True)
        ]
        sizes = [0 if copy is x else x.numel() for copy, x in zip(copies, wide, strict=True)]
        parts = self._parts(channels)
        kernels.finish_kernel[(parts + ceil_div(max(sizes), COPY_BLOCK), 3)](
            mix, value, weights['wq'], weights['wk'], weights['wv'], weights['wi'], weights['wf'],
            *qkv_biases(weights), matrices, biases, wg, *wide, *copies, *sizes, parts, inner, QB=block,
            HEADS=shape.heads, HAS_BIAS=weights['bq'] is not None, BC=channels, BG=gate_width(shape),
            BLOCK=COPY_BLOCK, num_warps=4,
        )  # fmt: skip
        _, head_w, head_b, skip = output.view(4, inner)
        conv_w, conv_b, _ = conv.split([inner * self.taps, inner, inner])
        up_b = totals[-5 * inner : -3 * inner]  # sums of da, the last of the convolution's, and dz, the output's first
        return {
            'up_w': copies[0], 'down_w': copies[1], 'norm_w': norm[: self.dims], 'norm_b': norm[self.dims :],
            'down_b': branch, 'up_b': up_b, 'conv_w': conv_w, 'conv_b': conv_b,
            'wq': matrices[0], 'wk': matrices[1], 'wv': matrices[2], 'bq': biases[0], 'bk': biases[1], 'bv': biases[2],
            'wg': wg, 'gate_b': mix[-gates:], 'head_w': head_w, 'head_b': head_b, 'skip': skip,
        }  # fmt: skip


def block_backward(
    shape: BlockShape, cell: ModuleType, dout: Tensor, x: Tensor, u: Tensor, gates: Tensor, h: Tensor, pre: Tensor,
    v: Tensor, statistics: Sequence[Tensor], weights: dict[str, Tensor | None], scale: Tensor | None,
) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
    """Gradients of one block.

    Args:
        shape: Sizes and direction.
        cell: Module with the mLSTM's `forward` and `backward`, such as `triton_quadratic`.
        dout: Gradient of the new residual stream, or of the inner part's output, (B, S, D).
        x: The block's input.
        u: From the forward pass, like the following up to `statistics`.
        gates: Gates' pre-activations.
        h: Output of the cell.
        pre: Output of the convolution.
        v: Values.
        statistics: What the cell keeps.
        weights: The block's parameters by short name.
        scale: Drop path factor per image, or None.

    Returns:
        Gradient of x, and of every parameter by short name, float32 or the activations' dtype.
    """
    run = _Backward(shape, u, x.shape[2], weights)
    x_rows, dout, pre = x.flatten(0, 1), dout.contiguous().flatten(0, 1), pre.flatten(0, 1)
    branch, up_w, down_w, maps = run.prepare(dout, scale)
    du = torch.empty_like(run.u)
    da, dz = du.chunk(2, 1)
    dh, dc, products, ddown_w = run.output_gradients(branch, down_w, as_rows(h), pre, dz)
    q, k = run.queries_and_keys(pre)
    heads = [as_heads(t.view(v.shape), shape.heads) for t in (dh, q, k, v)]
    known = {'products': products} if cell is triton_quadratic else {}
    *dqkv, di, df = cell.backward(*heads, gates[0], gates[1], h, statistics, shape.reverse, CELL_EPS, **known)
    dq, dk, dv = (as_rows(t) for t in dqkv)
    dpre = run.mix_gradient(pre, dq, dk, dc, (di, df), maps)
    run.value_gradient(dv, (di, df), maps, da)
    run.conv_gradient(dpre, da)
    if weights['norm_w'] is None:
        dx, normalised = (du @ up_w).to(x.dtype), x_rows.to(run.dtype)
    else:
        dx, normalised = run.norm_gradient(x_rows, du @ up_w, dout)
    return dx.view_as(x), run.parameter_gradients(du.t() @ normalised, ddown_w)
