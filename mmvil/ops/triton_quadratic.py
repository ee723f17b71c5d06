"""Launchers of the quadratic Triton mLSTM: buffers, grids and tile settings. Works on tensors, knows no autograd."""

import functools

import torch
from torch import Tensor

from . import triton_quadratic_backward_kernels, triton_quadratic_kernels, triton_quadratic_stored_kernels
from .fast_launch import FastKernels
from .triton_launch import (
    DeviceLimits,
    Tiles,
    ceil_div,
    device_limits,
    dot_precision,
    empty_rows_like,
    fitting_tiles,
    head_pieces,
    launch_first_fitting,
    log_scale,
    next_power_of_two,
    row_alignment,
    row_strides,
    rows_contiguous,
)

__all__ = [
    'BLOCK',
    'COUNT_SAVED',
    'SCAN_SPANS',
    'backward',
    'empty_saved',
    'forward',
    'row_sums',
    'scan_gates',
    'stored_tokens',
    'tile_candidates',
]

kernels = FastKernels(triton_quadratic_kernels)
backward_kernels = FastKernels(triton_quadratic_backward_kernels)
stored_kernels = FastKernels(triton_quadratic_stored_kernels)

COUNT_SAVED = 1  # tensors of `empty_saved`
STATS_PLANES = 7
NORMALISER_PLANE = 5
ROW_PLANES = 5
Q_DQ_PLANE = 3
BLOCK = 64
SCAN_SPANS = {'SHORT_SPAN': 256, 'LONG_SPAN': 1024}
"""Positions that the scans take at a time: 256 where that is the whole sequence, 1,024 elsewhere."""

# Fastest first, by kernel and largest DA + DB, measured on one H100 (benchmarks/results/mlstm_tiles_h100.json). The
# last entry of each list is the smallest and fits 64 KiB of shared memory a program (float32 above DH 256: 72 KiB).
HALF_TILES: dict[str, dict[int, list[Tiles]]] = {
    'forward': {
        128: [Tiles(64, 32, 4, 3, 16, 128), Tiles(64, 32, 4, 2, 16, 128), Tiles(16, 16, 4, 1)],
        256: [Tiles(64, 32, 4, 3, 16), Tiles(64, 32, 4, 2, 16), Tiles(64, 16, 4, 2, 16), Tiles(16, 16, 4, 1)],
        512: [Tiles(128, 32, 8, 2), Tiles(64, 16, 8, 2, 16), Tiles(32, 16, 4, 2), Tiles(16, 16, 4, 1)],
    },
    'query': {
        128: [Tiles(64, 32, 4, 3, 16, 128), Tiles(64, 32, 4, 2, 16, 128), Tiles(16, 16, 4, 1)],
        256: [Tiles(64, 32, 4, 3, 16), Tiles(64, 32, 4, 2, 16), Tiles(64, 16, 4, 2, 16), Tiles(16, 16, 4, 1)],
        512: [Tiles(128, 32, 8, 2), Tiles(64, 16, 8, 2, 16), Tiles(32, 16, 4, 2), Tiles(16, 16, 4, 1)],
    },
    'key': {
        128: [Tiles(64, 64, 4, 2), Tiles(64, 32, 4, 3), Tiles(64, 32, 4, 2), Tiles(16, 16, 4, 1)],
        256: [Tiles(64, 32, 4, 3), Tiles(64, 32, 4, 2), Tiles(32, 16, 4, 2), Tiles(16, 16, 4, 1)],
        512: [Tiles(128, 32, 8, 2), Tiles(64, 32, 8, 3), Tiles(64, 16, 8, 2), Tiles(32, 16, 4, 2), Tiles(16, 16, 4, 1)],
    },
    'value': {
        128: [Tiles(64, 32, 4, 3, 0, 128), Tiles(64, 32, 4, 2, 0, 128), Tiles(16, 16, 4, 1)],
        256: [Tiles(64, 32, 4, 3), Tiles(64, 32, 4, 2), Tiles(32, 16, 4, 2), Tiles(16, 16, 4, 1)],
        512: [Tiles(128, 32, 8, 2), Tiles(64, 16, 8, 2), Tiles(32, 16, 4, 2), Tiles(16, 16, 4, 1)],
    },
}
# IEEE float32 products run on the plain cores: small tiles keep operands in registers.
FLOAT_TILES: dict[int, list[Tiles]] = {
    128: [Tiles(32, 32, 4, 1), Tiles(16, 16, 4, 1)],
    512: [Tiles(16, 16, 4, 1)],
}
# dk and dv in one kernel read q and dh once but hold two accumulators; above this many columns they are two launches.
JOINT_KEY_COLUMNS = 128
# Longest sequence of 16-bit inputs whose backward pass stores matrices of S x S, by largest DH. For small heads those
# kernels are hardly faster, and only if dh.h of each row is at hand; at 576 tokens they are slower. For others these
# are the lengths up to which 'auto' trains in the quadratic form; beyond, nothing was timed, and memory grows with S^2.
STORED_TOKENS = {128: 256, 256: 1024, 512: 2304}
STORED_WITHOUT_PRODUCTS = 128
STORED_COLUMNS = 192
ROW_ELEMENTS = 2048
# Of rows of a block; columns are channels or tokens of a step. The last of each fit every card.
STORED_TILES = {
    'matrix': (Tiles(BLOCK, 32, 4, 3, 16, 128), Tiles(BLOCK, 32, 4, 1, 16)),
    'gradient': (Tiles(BLOCK, 32, 4, 4), Tiles(BLOCK, 32, 4, 1)),
}


@functools.lru_cache(maxsize=64)
def tile_candidates(kernel: str, head_dim: int, item_size: int, limits: DeviceLimits) -> list[Tiles]:
    """Tile settings for one kernel on one device, fastest first.

    Args:
        kernel: 'forward', 'query' (dq), 'key' (dk, or dk and dv) or 'value' (dv).
        head_dim: DH.
        item_size: Bytes per element of q.
        limits: The device's limits.

    Returns:
        At least one setting.
    """
    columns = sum(head_pieces(head_dim))
    table = FLOAT_TILES if item_size == 4 else HALF_TILES[kernel]
    candidates = next(tiles for limit, tiles in sorted(table.items()) if columns <= limit)
    held = 2 if kernel == 'key' and columns <= JOINT_KEY_COLUMNS else 1

    def bytes_needed(tiles: Tiles) -> int:
        return columns * item_size * (held * tiles.rows + 2 * tiles.stages * tiles.columns)

    return fitting_tiles(candidates, bytes_needed, limits)


def empty_saved(q: Tensor) -> tuple[Tensor]:
    """Allocate what the forward pass keeps for the backward pass besides inputs and h.

    Args:
        q: Queries, (B, NH, S, DH).

    Returns:
        One float32 tensor (7, B, NH, S rounded up to 64): scans and statistics of each row, in reading order.
    """
    batch, heads, length = q.shape[:3]
    return (q.new_empty((STATS_PLANES, batch, heads, -(-length // BLOCK) * BLOCK), dtype=torch.float32),)


def _shared_constants(q: Tensor, alignment: int) -> dict[str, object]:
    """Compile-time arguments that every kernel here takes."""
    first, second = head_pieces(q.shape[-1])
    return {'DH': q.shape[-1], 'DA': first, 'DB': second, 'ALIGN': alignment, 'PRECISION': dot_precision(q.dtype)}


def _tiles(given: Tiles | None, kernel: str, q: Tensor) -> list[Tiles]:
    """Tile settings to try for q: the given ones, or the table's."""
    if given is not None:
        return [given]
    return tile_candidates(kernel, q.shape[-1], q.element_size(), device_limits(q.device))


def stored_tokens(head_dim: int) -> int:
    """Look up where matrices are stored.

    Args:
        head_dim: DH, 1 to 512.

    Returns:
        Tokens of the longest sequence whose backward pass may store matrices of S x S.
    """
    return next(tokens for largest, tokens in STORED_TOKENS.items() if head_dim <= largest)


def row_sums(saved: tuple[Tensor]) -> Tensor:
    """Sum of each row's weights, (B, NH, S rounded up to 64), in reading order, of what `forward` kept with `sums`."""
    return saved[0][NORMALISER_PLANE]


def scan_gates(q: Tensor, igate: Tensor, fgate: Tensor, reverse: bool) -> Tensor:
    """Scan the gates.

    Args:
        q: Queries, for their shape; see `forward`, as for the others.
        igate: Input gate pre-activations.
        fgate: Forget gate pre-activations.
        reverse: Read the sequence from its end.

    Returns:
        What `empty_saved` allocates, filled but for the normaliser.
    """
    (stats,) = empty_saved(q)
    batch, heads, length = q.shape[:3]
    pitch = ceil_div(length, BLOCK)
    if q.numel():
        kernels.gate_scan_kernel[(batch * heads,)](
            igate, fgate, stats, length, pitch, batch * heads * pitch, int(reverse), **SCAN_SPANS
        )
    return stats


def forward(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, reverse: bool, eps: float,
    tiles: Tiles | None = None, stats: Tensor | None = None, scores: Tensor | None = None, sums: bool = False,
) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
    """Run the quadratic mLSTM.

    Args:
        q: Queries, (B, NH, S, DH), any strides; float32, bfloat16 or float16.
        k: Keys, like q.
        v: Values, like q.
        igate: Input gate pre-activations, (B, NH, S), float32, contiguous.
        fgate: Forget gate pre-activations, (B, NH, S), float32, contiguous.
        reverse: Read the sequence from its end.
        eps: Added to the denominator.
        tiles: Tile settings; default: the table's.
        stats: What `scan_gates` gives for these gates, if they have been scanned.
        scores: Added to all products of a query with keys, (B, NH, S), float32, contiguous; `backward` knows none.
        sums: Keep the sum of each row's weights, which is n over the denominator, in place of n. `backward` needs n.

    Returns:
        h, (B, NH, S, DH) in q's dtype, and the tensors that `backward` wants.
    """
    q, k, v = (rows_contiguous(x) for x in (q, k, v))
    batch, heads, length, dim = q.shape
    h = empty_rows_like(q)
    stats = scan_gates(q, igate, fgate, reverse) if stats is None else stats
    if q.numel() == 0:
        return h, (stats,)
    sign = int(reverse)
    pitch = ceil_div(length, BLOCK)
    plane = batch * heads * pitch
    alignment = row_alignment(q, k, v, h)
    strides = row_strides(alignment, q, k, v, h)
    constants = _shared_constants(q, alignment)

    def launch(tiles: Tiles) -> object:
        grid = (batch * heads * ceil_div(length, tiles.rows),)
        return kernels.quadratic_forward_kernel[grid](
            q, k, v, h, stats if scores is None else scores, stats, *strides, length, heads, pitch, plane, sign,
            log_scale(dim), eps, WITH_E=scores is not None, SUMS=sums, **constants, BM=tiles.rows, BN=tiles.columns,
            SMALL=tiles.small, **tiles.options(),
        )  # fmt: skip

    launch_first_fitting(_tiles(tiles, 'forward', q), launch)
    return h, (stats,)


def backward(
    dh: Tensor, q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, h: Tensor, saved: tuple[Tensor, ...],
    reverse: bool, eps: float, query_tiles: Tiles | None = None, key_tiles: Tiles | None = None,
    joint: bool | None = None, stored: bool | None = None, products: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Exact gradients of `forward`, the normaliser's included.

    Args:
        dh: Gradient of h, (B, NH, S, DH), any strides, q's dtype.
        q: As in `forward`, like the next four.
        k: Keys.
        v: Values.
        igate: Input gate pre-activations.
        fgate: Forget gate pre-activations.
        h: Output of `forward`.
        saved: Second output of `forward`.
        reverse: As in `forward`.
        eps: As in `forward`.
        query_tiles: Tile settings of the dq kernel; default: the table's.
        key_tiles: Tile settings of the dk / dv kernel; default: the table's.
        joint: Whether dk and dv share a kernel; default: by DH.
        stored: Whether to keep matrices of S x S in memory meanwhile; default: by S and dtype.
        products: dh.h of each row, (B, NH, S) float32, contiguous, if they are at hand.

    Returns:
        dq, dk, dv in q's dtype and digate, dfgate, (B, NH, S) float32.
    """
    dh, q, k, v = (rows_contiguous(x) for x in (dh, q, k, v))
    (stats,) = saved
    dq, dk, dv = (empty_rows_like(x) for x in (q, k, v))
    digate, dfgate = torch.empty_like(igate), torch.empty_like(fgate)
    if q.numel() == 0:
        return dq, dk, dv, digate, dfgate
    batch, heads, length, _ = q.shape
    sign = int(reverse)
    pitch = ceil_div(length, BLOCK)
    plane = batch * heads * pitch
    alignment = row_alignment(q, k, v, h, dh, dq, dk, dv)
    if _stores_matrices(q, products) if stored is None else stored:
        products = _row_products(h, dh, alignment) if products is None else products
        sums, parts = _stored_gradients(dh, q, k, v, products, stats, dq, dk, dv, alignment, sign, eps), pitch
    else:
        rows = stats.new_empty((ROW_PLANES, *stats.shape[1:]))
        sums, parts = rows[Q_DQ_PLANE:], 1
        _fresh_gradients(
            dh, q, k, v, h, products, stats, rows, dq, dk, dv, alignment, sign, eps, query_tiles, key_tiles, joint
        )  # fmt: skip
    backward_kernels.gate_gradient_kernel[(batch * heads,)](
        fgate, sums, digate, dfgate, length, pitch, plane, parts, sign, **SCAN_SPANS
    )
    return dq, dk, dv, digate, dfgate


def _fresh_gradients(
    dh: Tensor, q: Tensor, k: Tensor, v: Tensor, h: Tensor, products: Tensor | None, stats: Tensor, rows: Tensor,
    dq: Tensor, dk: Tensor, dv: Tensor, alignment: int, sign: int, eps: float, query_tiles: Tiles | None,
    key_tiles: Tiles | None, joint: bool | None,
) -> None:  # fmt: skip
    """Fill dq, dk, dv and all planes of rows, with every kernel making the S x S products that it needs."""
    batch, heads, length, dim = q.shape
    pitch = ceil_div(length, BLOCK)
    plane = batch * heads * pitch
    constants = _shared_constants(q, alignment)

    def launch_query(tiles: Tiles) -> object:
        grid = (batch * heads * ceil_div(length, tiles.rows),)
        return backward_kernels.query_gradient_kernel[grid](
            q, k, v, h, dh, dq, stats if products is None else products, stats, rows,
            *row_strides(alignment, q, k, v, h, dh, dq), length, heads, pitch, plane, sign, log_scale(dim), eps,
            WITH_H=products is None, **constants,
            BM=tiles.rows, BN=tiles.columns, SMALL=tiles.small, **tiles.options(),
        )  # fmt: skip

    def launch_key(with_k: bool, with_v: bool, tiles: Tiles) -> object:
        grid = (batch * heads * ceil_div(length, tiles.rows),)
        return backward_kernels.key_gradient_kernel[grid](
            q, k, v, dh, dk, dv, stats, rows, *row_strides(alignment, q, k, v, dh, dk, dv),
            length, heads, pitch, plane, sign, log_scale(dim), WITH_K=with_k, WITH_V=with_v, **constants,
            BM=tiles.rows, BN=tiles.columns, **tiles.options(),
        )  # fmt: skip

    launch_first_fitting(_tiles(query_tiles, 'query', q), launch_query)
    joint = constants['DA'] + constants['DB'] <= JOINT_KEY_COLUMNS if joint is None else joint
    for with_k, with_v in [(True, True)] if joint else [(True, False), (False, True)]:
        name = 'key' if with_k else 'value'
        launch_first_fitting(_tiles(key_tiles, name, q), functools.partial(launch_key, with_k, with_v))


def _stores_matrices(q: Tensor, products: Tensor | None) -> bool:
    """Whether the backward pass stores matrices of S x S, which for small heads must not need another kernel first."""
    length, dim = q.shape[2:]
    is_faster = products is not None or dim > STORED_WITHOUT_PRODUCTS
    return q.element_size() == 2 and length <= stored_tokens(dim) and is_faster


def _row_products(h: Tensor, dh: Tensor, alignment: int) -> Tensor:
    """dh_i.h_i, (B, NH, S) float32."""
    batch, heads, length, dim = h.shape
    width = next_power_of_two(dim)
    height = max(1, ROW_ELEMENTS // width)
    products = h.new_empty(batch, heads, length, dtype=torch.float32)
    stored_kernels.row_product_kernel[(batch * heads * ceil_div(length, height),)](
        h, dh, products, *row_strides(alignment, h, dh), length, heads, DH=dim, BM=height, BD=width, ALIGN=alignment,
        num_warps=4,
    )  # fmt: skip
    return products


def _stored_gradients(
    dh: Tensor, q: Tensor, k: Tensor, v: Tensor, products: Tensor, stats: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
    alignment: int, sign: int, eps: float,
) -> Tensor:  # fmt: skip
    """Fill dq, dk, dv; the planes of q.dq and of k.dk to add up."""
    batch, heads, length, dim = q.shape
    total, pitch = batch * heads, ceil_div(length, BLOCK)
    blocks = total * pitch * (pitch + 1) // 2
    p, d = q.new_empty(2, blocks, BLOCK, BLOCK)
    sums = stats.new_empty(2 * pitch, total, pitch * BLOCK)

    def launch_matrix(tiles: Tiles) -> None:
        stored_kernels.matrix_kernel[(blocks,)](
            q, k, v, dh, p, d, products, stats, sums, *row_strides(alignment, q, k, v, dh), length, heads, pitch,
            total * pitch, sign, log_scale(dim), eps, DH=dim, BK=tiles.columns, SMALL=tiles.small, ALIGN=alignment,
            **tiles.options(),
        )  # fmt: skip

    split = ceil_div(dim, STORED_COLUMNS)
    first, second = head_pieces(ceil_div(dim, split))

    def launch_gradients(turned: bool, *tensors: Tensor) -> None:
        programs = total * pitch * split * (2 if turned else 1)

        def launch(tiles: Tiles) -> None:
            stored_kernels.matrix_gradient_kernel[(programs,)](
                *tensors, *row_strides(alignment, *tensors[2:]), length, heads, pitch, sign, TURNED=turned, DH=dim,
                CA=first, CB=second, SPLIT=split, BN=tiles.columns, ALIGN=alignment, **tiles.options(),
            )  # fmt: skip

        launch_first_fitting(STORED_TILES['gradient'], launch)

    launch_first_fitting(STORED_TILES['matrix'], launch_matrix)
    launch_gradients(False, d, d, k, k, dq, dq)
    launch_gradients(True, d, p, q, dh, dk, dv)
    return sums
