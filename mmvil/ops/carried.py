"""Launches of the kernels that carry the chunkwise mLSTM's state through a sequence; for Hopper, bfloat16."""

import functools
import warnings
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from . import triton_chunkwise_states
from .fast_launch import FastKernels
from .triton_launch import (
    ceil_div,
    compile_failure_reason,
    device_limits,
    head_pieces,
    interpreting,
    is_compile_failure,
)

__all__ = ['can_carry', 'carry', 'segments_for', 'takes']

KNOWN_TRITON = ((3, 6), (3, 8))
"""First and last Triton version whose Gluon, a language still in the making, is known to compile the kernels."""
CAPABILITY = 9
"""Major compute capability that has the instructions."""
TILE = 64
"""Tokens of a tile: rows of the smallest product of a warp group."""
ALIGNMENT = 8
"""Elements that a copy moves at a time."""
VALUE_COLUMNS = 64
"""Value columns of a program's tiles: half of a head's, and the normaliser's."""
SPLIT = 2
WARPS = 4
STATES_BUFFERS = 4
"""Tiles on their way into a program that makes states alone."""
MAX_SEGMENTS = 32
# Estimated from times on one H200 (benchmarks/results/operator_tiles_h200.json, 'carried'), in parts of the time of a
# tile of a program that has a multiprocessor for itself: of a tile where two programs share it, of a tile where states
# alone are made, of a program's start, and of the scan of the states.
SHARED_TIME, STATES_TIME, START_TIME, SCAN_TIME = 1.5, 0.4, 0.8, 3
SCAN_BLOCK, SCAN_WARPS, SCAN_STAGES = 512, 2, 4

state_kernels = FastKernels(triton_chunkwise_states)

failures: dict[int, str] = {}
"""Head sizes whose kernels did not compile in this process, with the compiler's message."""


def takes(dim: int) -> bool:
    """Whether the kernels take a head size: 64, 80 or 96, which fill a program's registers and leave none empty."""
    return 64 <= dim <= 96 and dim % 16 == 0 and sum(head_pieces(dim)) == dim


@functools.lru_cache(maxsize=1024)
def segments_for(programs: int, tiles: int, processors: int) -> tuple[int, int]:
    """Cut sequences so that the device is full for most of the time.

    Args:
        programs: Programs for each segment.
        tiles: Tiles of a sequence.
        processors: Multiprocessors, each of which has room for two programs.

    Returns:
        Number of segments, and tiles of each but the last.
    """

    def rounds(programs: int) -> float:
        pairs, alone = divmod(ceil_div(programs, processors), 2)
        return pairs * SHARED_TIME + alone

    def time(segments: int) -> float:
        steps = ceil_div(tiles, segments)
        time = rounds(programs * segments) * (steps + START_TIME)
        if segments > 1:
            time += rounds(programs * (segments - 1)) * (STATES_TIME * steps + START_TIME) + SCAN_TIME
        return time

    steps = ceil_div(tiles, min(range(1, min(tiles, MAX_SEGMENTS) + 1), key=time))
    return ceil_div(tiles, steps), steps


@functools.cache
def _kernels() -> FastKernels | None:
    """The kernels, None with a Triton that they are not known to compile with."""
    version = tuple(int(part) for part in triton.__version__.split('.')[:2])
    if not KNOWN_TRITON[0] <= version <= KNOWN_TRITON[1] or interpreting() or torch.version.hip is not None:
        return None
    from . import gluon_carry_kernels

    return FastKernels(gluon_carry_kernels)


def can_carry(dim: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the kernels are made for this. The answer never changes: a block's backward pass relies on it.

    Args:
        dim: DH.
        dtype: Data type of q, k and v.
        device: Their device.

    Returns:
        Whether `carry` will do it, provided that rows are aligned and the kernels compile.
    """
    if device.type != 'cuda' or dtype != torch.bfloat16 or not takes(dim) or _kernels() is None:
        return False
    return device_limits(device).capability[0] == CAPABILITY


def carry(
    q: Tensor, k: Tensor, v: Tensor, h: Tensor, saved: NamedTuple, strides: list[int], unit: int, per_chunk: int,
    scale: float, eps: float, reverse: bool, keep: bool,
) -> bool:  # fmt: skip
    """Fill h, the normaliser and what else a backward pass needs, if the kernels can.

    Args:
        q: Queries, (B, NH, S, DH), on a GPU.
        k: Keys, like q.
        v: Values, like q.
        h: Result, like q.
        saved: `triton_chunkwise.Saved` for tiles of `TILE` tokens, with the gates' scans.
        strides: Of batch, head and row of q, k, v and h, in units of `unit` elements.
        unit: See strides.
        per_chunk: Tiles between two states that are kept.
        scale: Of the scores.
        eps: Added to the denominator.
        reverse: Reading direction.
        keep: Keep states and n; else the sum of each row's weights in place of n.

    Returns:
        Whether it was done.
    """
    batch, heads, length, dim = q.shape
    if unit != ALIGNMENT or any(x.storage_offset() % ALIGNMENT for x in (q, k, v)):
        return False
    if dim in failures or not can_carry(dim, q.dtype, q.device):
        return False
    kernels, (wide, narrow), tiles = _kernels(), head_pieces(dim), ceil_div(length, TILE)
    programs = batch * heads * SPLIT
    segments, steps = segments_for(programs, tiles, device_limits(q.device).multiprocessors)
    constants = {
        'DH': dim, 'KA': wide, 'KB': narrow, 'CA': VALUE_COLUMNS, 'CB': dim // SPLIT, 'SPLIT': SPLIT, 'TILE': TILE,
    }  # fmt: skip
    options = {'REVERSE': reverse, 'UNIT': unit, 'num_warps': WARPS}
    size = VALUE_COLUMNS * dim
    left = q if segments == 1 else q.new_empty((batch * heads, segments - 1, SPLIT, size))
    sizes = heads, length, segments, steps * TILE
    try:
        if segments > 1:
            kernels.segment_state_kernel[(programs * (segments - 1),)](
                k, v, saved.gate, saved.border, left, *strides[3:9], *sizes, **constants, BUFFERS=STATES_BUFFERS,
                **options,
            )  # fmt: skip
            state_kernels.segment_scan_kernel[(programs * size // SCAN_BLOCK,)](
                left, saved.border, segments - 1, steps, tiles, SPLIT=SPLIT, STATE=size, BLOCK=SCAN_BLOCK,
                STAGES=SCAN_STAGES, num_warps=SCAN_WARPS,
            )  # fmt: skip
        kernels.carry_kernel[(programs * segments,)](
            q, k, v, h, left, saved.states, saved.state_normalisers, saved.gate, saved.maximum, saved.border,
            saved.stabiliser, saved.normaliser, *strides, *sizes, saved.states.shape[1], scale, eps, **constants,
            PER_CHUNK=per_chunk, KEEP=keep, **options,
        )  # fmt: skip
    except Exception as error:
        if not is_compile_failure(error):
            raise
        reason = failures[dim] = compile_failure_reason(error)
        warnings.warn(
            f'The kernels that carry the state of the mLSTM do not compile here for DH {dim} ({reason}); the other '
            'chunkwise kernels take over.',
            stacklevel=2,
        )
        return False
    return True
