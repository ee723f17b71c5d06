"""Tile sizes of the chunkwise Triton mLSTM: what there is to choose, and the choice for head size, dtype and device."""

from typing import NamedTuple

import torch

from .triton_launch import DeviceLimits

__all__ = [
    'Pieces',
    'ProductTiles',
    'ScanTiles',
    'StateTiles',
    'Tiles',
    'choose_tiles',
    'shared_memory_needed',
    'split_dim',
    'tile_candidates',
]

SMALLEST_PIECE = 16
"""Tensor cores multiply nothing smaller."""
CHUNK = 256
"""Tokens between two states where a card has the shared memory; shorter chunks keep more states."""


class Pieces(NamedTuple):
    """How DH columns are held: `split` programs with a tile of `wide` and one of `narrow` (or no) columns each."""

    wide: int
    narrow: int = 0
    split: int = 1


class ProductTiles(NamedTuple):
    """Tile sizes of `product_kernel`.

    Attributes:
        stream: Tokens multiplied at a time, a divisor of `Tiles.tile`.
        depth: Channels of a state multiplied at a time.
        pieces: Columns of the result.
        warps: Warps of a program.
        stages: Loads in flight.
        registers: Most registers of a thread, None for no limit.
    """

    stream: int
    depth: int
    pieces: Pieces
    warps: int
    stages: int
    registers: int | None = None


class StateTiles(NamedTuple):
    """Tile sizes of `chunk_state_kernel`.

    Attributes:
        stream: Tokens added at a time, a divisor of `Tiles.tile`.
        rows: Rows of a state.
        columns: Columns of a state; there are rows.split * columns.split programs.
        warps: Warps of a program.
        stages: Loads in flight.
        registers: Most registers of a thread, None for no limit.
    """

    stream: int
    rows: Pieces
    columns: Pieces
    warps: int
    stages: int
    registers: int | None = None


class ScanTiles(NamedTuple):
    """Tile sizes of `state_scan_kernel`.

    Attributes:
        block: Elements of a state carried from chunk to chunk by one program.
        warps: Warps of a program.
        stages: Chunks in flight.
    """

    block: int = 1024
    warps: int = 4
    stages: int = 4


class Tiles(NamedTuple):
    """All tile sizes; every size is a power of two.

    Attributes:
        tile: Tokens of a tile.
        chunk: Tokens between two states, a multiple of tile.
        output: Product of the forward pass.
        gradient: Products of the backward pass.
        state: States of the forward pass.
        state_gradient: States of the backward pass.
        scan: Both scans.
    """

    tile: int
    chunk: int
    output: ProductTiles
    gradient: ProductTiles
    state: StateTiles
    state_gradient: StateTiles
    scan: ScanTiles = ScanTiles()


def split_dim(dim: int) -> Pieces:
    """Cover DH by one power of two, or by two where that saves a quarter: 96 = 64 + 32.

    Args:
        dim: DH, at least 1.

    Returns:
        Pieces of one program.
    """
    whole = max(SMALLEST_PIECE, 1 << (dim - 1).bit_length())
    if whole >= 4 * SMALLEST_PIECE and 4 * dim <= 3 * whole:
        return Pieces(whole // 2, whole // 4)
    return Pieces(whole)


def tile_candidates(dim: int, dtype: torch.dtype) -> list[Tiles]:
    """List the tile sizes for DH and dtype.

    Not every size is safe on Hopper: ptxas 12.8 leaves some matrix descriptors unset, mostly those of pieces of 32
    columns. `benchmarks/check_codegen.py` finds such kernels.

    Args:
        dim: DH, 1 to 512.
        dtype: Data type of q, k and v.

    Returns:
        Fastest first; the last fits 64 KiB of shared memory.
    """
    pieces = split_dim(dim)
    wide = pieces.wide + pieces.narrow
    rows = 32 if wide <= 128 else 16
    small_product = ProductTiles(rows, 16, _blocks(dim, 32), 4, 1)
    small_state = StateTiles(rows, pieces, _blocks(dim, 32 if wide <= 256 else 16), 4, 1)
    small = Tiles(rows, 128, small_product, small_product, small_state, small_state)
    if dtype == torch.float32 and wide <= 128:
        product, state = ProductTiles(32, 16, pieces, 4, 1), StateTiles(32, pieces, _blocks(dim, 32), 4, 1)
        return [Tiles(32, 128, product, product, state, state), small]
    if dtype == torch.float32 or wide > 384:
        return [small]
    if dtype == torch.float16:
        return [*_float16_tiles(dim, pieces), small]
    return [*_bfloat16_tiles(dim, pieces), small]


def _float16_tiles(dim: int, pieces: Pieces) -> list[Tiles]:
    """Tile sizes for float16, whose states are multiplied as TF32."""
    if pieces.wide + pieces.narrow > 256:
        return []
    product, state = ProductTiles(64, 32, pieces, 4, 2), StateTiles(64, pieces, _blocks(dim, 32), 4, 2)
    return [Tiles(64, CHUNK, product, product, state, state)]


def _bfloat16_tiles(dim: int, pieces: Pieces) -> list[Tiles]:
    """Tile sizes for bfloat16, the fastest of those tried on one H100."""
    wide = pieces.wide + pieces.narrow
    scan = ScanTiles(256, 1, 8)
    if wide <= 128:
        whole = max(SMALLEST_PIECE, 1 << (dim - 1).bit_length())
        product = ProductTiles(32, 32, pieces, 4, 3, 168 if pieces.narrow else None)
        state = StateTiles(64, Pieces(whole), _blocks(dim, 64 if whole > 32 else 32), 4, 3)
        return [Tiles(64, CHUNK, product, product, state, state, scan)]
    if wide == 256:
        product, state = ProductTiles(64, 64, Pieces(128, 0, 2), 8, 2), StateTiles(64, pieces, _blocks(dim, 64), 8, 2)
        return [Tiles(64, CHUNK, product, product, state, state, scan)]
    if wide == 192:
        product, state = ProductTiles(32, 32, pieces, 4, 3), StateTiles(64, pieces, _blocks(dim, 64), 4, 3)
        return [Tiles(64, CHUNK, product, product, state, StateTiles(64, pieces, Pieces(64, 32, 2), 8, 3), scan)]
    product = ProductTiles(32, 32, Pieces(128, 64, 2), 8, 2)
    state = StateTiles(64, Pieces(128, 64, 2), _blocks(dim, 64), 4, 3)
    large = Tiles(128, CHUNK, product, product, state, StateTiles(64, pieces, _blocks(dim, 64), 8, 2), ScanTiles())
    product = ProductTiles(32, 32, Pieces(128, 0, 3), 4, 2)
    return [large, large._replace(tile=64, output=product, gradient=product)]


def shared_memory_needed(tiles: Tiles, dim: int, dtype: torch.dtype) -> int:
    """Estimate the shared memory of the largest of the programs from above.

    Args:
        tiles: Tile sizes.
        dim: DH.
        dtype: Data type of q, k and v.

    Returns:
        Bytes.
    """
    inner = split_dim(dim)
    inner = inner.wide + inner.narrow
    needed, size = [4096], dtype.itemsize
    state_size = 2 if dtype == torch.bfloat16 else 4
    for product in (tiles.output, tiles.gradient):
        outer = product.pieces.wide + product.pieces.narrow
        streamed = product.stages * (inner + outer) if product.stages > 1 else max(inner, outer)
        from_state = product.stages * product.depth * (tiles.tile * size + outer * state_size)
        vectors = 0 if product.stages == 1 else 2048
        needed.append(tiles.tile * inner * size + max(product.stream * streamed * size, from_state) + vectors)
    for state in (tiles.state, tiles.state_gradient):
        rows, columns = state.rows.wide + state.rows.narrow, state.columns.wide + state.columns.narrow
        loaded = state.stages * (rows + 2 * columns) * size if state.stages > 1 else 0
        converted = columns * size if dtype == torch.bfloat16 else 4 * (rows + columns)
        needed.append(state.stream * (loaded + converted) + 2048)
    return max(needed)


def choose_tiles(dim: int, dtype: torch.dtype, limits: DeviceLimits) -> Tiles:
    """Pick the fastest tile sizes that a device has the shared memory for.

    Args:
        dim: DH, 1 to 512.
        dtype: Data type of q, k and v.
        limits: What a kernel may use.

    Returns:
        Tile sizes.
    """
    *others, smallest = tile_candidates(dim, dtype)
    return next((x for x in others if shared_memory_needed(x, dim, dtype) <= limits.shared_memory), smallest)


def _blocks(dim: int, wide: int) -> Pieces:
    """Cover DH by programs of `wide` columns each."""
    return Pieces(wide, 0, -(-dim // wide))
