"""Everything the Triton launchers share: what a device can run, row strides and alignment, buffers, choice of tiles.

No device code here. Tiles are chosen from the shared memory and the compute capability that the device reports, never
from its name.
"""

import functools
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    'ANY_CARD_VARIABLE',
    'KNOWN_CAPABILITIES',
    'MAX_HEAD_DIM',
    'DeviceLimits',
    'Tiles',
    'ceil_div',
    'choose_form',
    'compile_failure_reason',
    'constant_when_compiled',
    'device_limits',
    'dot_precision',
    'empty_rows_like',
    'fitting_tiles',
    'head_pieces',
    'interpreting',
    'is_compile_failure',
    'launch_first_fitting',
    'log_scale',
    'next_power_of_two',
    'row_alignment',
    'row_strides',
    'rows_contiguous',
    'why_not_dtype',
    'why_not_on_device',
]

MAX_HEAD_DIM = 512
"""Largest head size the kernels are made for."""

KNOWN_CAPABILITIES = ((7, 5), (8, 0), (8, 6), (8, 7), (8, 9), (9, 0))
"""Compute capabilities that compilers of the declared Triton versions are settled on. Newer ones must pass
the self-check first: wrong gradients on a new family have been seen in other libraries."""

BFLOAT16_CAPABILITY = (8, 0)

# (largest DH, largest S given to the quadratic form with and without a backward pass), by time on one H200,
# interpolated between the lengths of `benchmarks/bench_mlstm.py --rows forms` (benchmarks/results/mlstm_h200.json).
QUADRATIC_MAX_TOKENS = ((128, 1024, 1152), (256, 1024, 1408), (MAX_HEAD_DIM, 2304, 2304))
# The same, DH 64 to 96, where the chunkwise form's forward pass carries its state along (`carried.py`), between the
# lengths of 'carried' in benchmarks/results/operator_tiles_h200.json.
CARRIED_MAX_TOKENS = (704, 640)
ANY_CARD_VARIABLE = 'MMVIL_TRITON_ANY_CARD'
"""Environment variable: 1 lets the kernels run on a card of unknown compute capability."""


@dataclass(frozen=True)
class DeviceLimits:
    """What a kernel may use on one device.

    Attributes:
        capability: CUDA compute capability, (0, 0) for the interpreter.
        shared_memory: Bytes of shared memory one program may take.
        multiprocessors: Number of multiprocessors.
    """

    capability: tuple[int, int]
    shared_memory: int
    multiprocessors: int


@dataclass(frozen=True)
class Tiles:
    """Compile-time settings of one kernel.

    Attributes:
        rows: Rows of the output tile (BM).
        columns: Rows of the streamed tile (BN).
        warps: Warps per program.
        stages: Software pipelining depth.
        small: Rows of the reduced last tile, 0 to compute it in full.
        registers: Cap on registers per thread, None for the compiler's choice.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    small: int = 0
    registers: int | None = None

    def options(self) -> dict[str, int]:
        """Launch options for Triton."""
        cap = {} if self.registers is None else {'maxnreg': self.registers}
        return {'num_warps': self.warps, 'num_stages': self.stages, **cap}


def constant_when_compiled(function: Callable) -> Callable:
    """Mark a function whose answer torch.compile may take for a constant.

    Does what `torch.compiler.assume_constant_result` does, without its import of the whole compiler, which would make
    `import mmvil.ops` slow and load Triton.
    """
    function._dynamo_marked_constant = True
    return function


def interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter (TRITON_INTERPRET=1, set before the kernels are imported)."""
    return os.environ.get('TRITON_INTERPRET', '0') == '1'


def device_limits(device: torch.device) -> DeviceLimits:
    """Ask the device for its limits.

    Args:
        device: A CUDA device, or the CPU under the interpreter.

    Returns:
        The limits; for the interpreter those of a large card.
    """
    if device.type != 'cuda':
        return DeviceLimits((0, 0), 227 * 1024, 1)
    return _cuda_limits(device.index if device.index is not None else torch.cuda.current_device())


@functools.cache
def _cuda_limits(index: int) -> DeviceLimits:
    from triton.runtime import driver

    properties = driver.active.utils.get_device_properties(index)
    return DeviceLimits(
        torch.cuda.get_device_capability(index), properties['max_shared_mem'], properties['multiprocessor_count']
    )


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up; as `triton.cdiv`, but without its wrapper, which costs almost as much as a launch."""
    return -(-a // b)


def next_power_of_two(n: int) -> int:
    """Smallest power of two that is at least n, for n of at least 1; as `triton.next_power_of_2`, but cheap."""
    return 1 << (n - 1).bit_length()


def head_pieces(head_dim: int) -> tuple[int, int]:
    """Split DH columns into two powers of two, so that 96, 192 and 384 need no padding.

    Args:
        head_dim: DH, 1 to 512.

    Returns:
        (DA, DB) with DA + DB >= DH, each a power of two of at least 16; DB is 0 where one piece is as good.
    """
    first = max(16, 1 << (head_dim.bit_length() - 1))
    rest = head_dim - first
    if rest <= 0:
        return first, 0
    second = max(16, 1 << (rest - 1).bit_length())
    return (2 * first, 0) if second >= first else (first, second)


def log_scale(head_dim: int) -> float:
    """Base-2 logarithm of the score scale 1 / sqrt(DH)."""
    return -0.5 * math.log2(head_dim)


def dot_precision(dtype: torch.dtype) -> str:
    """Input precision of `tl.dot`: IEEE, or TF32 for float32 where the user allowed it in torch."""
    return 'tf32' if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else 'ieee'


def rows_contiguous(x: Tensor) -> Tensor:
    """Return x with adjacent elements along its last dimension, copied only if they are not."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def row_alignment(*tensors: Tensor) -> int:
    """Largest of 8, 4, 2, 1 elements that divides every row start's offset, so that loads can be wide."""
    kinds = {x.stride()[:-1] for x in tensors}  # tensors of a launch mostly have the same strides
    return math.gcd(8, *[stride for strides in kinds for stride in strides])


def row_strides(alignment: int, *tensors: Tensor) -> list[int]:
    """Batch, head and sequence strides of each (B, NH, S, DH) tensor, in units of `alignment` elements."""
    return [stride // alignment for x in tensors for stride in x.stride()[:-1]]


def empty_rows_like(x: Tensor) -> Tensor:
    """Allocate a dense (B, NH, S, DH) tensor, token-major (B, S, NH, DH) in memory where x is."""
    batch, heads, length, dim = x.shape
    if x.stride(1) < x.stride(2) and heads > 1:
        return x.new_empty(batch, length, heads, dim).transpose(1, 2)
    return x.new_empty(batch, heads, length, dim)


def fitting_tiles(
    candidates: Sequence[Tiles], bytes_needed: Callable[[Tiles], int], limits: DeviceLimits
) -> list[Tiles]:
    """Keep the candidates whose tiles fit the device's shared memory, fastest first.

    Args:
        candidates: Tile settings, fastest first; the last one is the smallest.
        bytes_needed: Shared memory of one program, in bytes.
        limits: The device's limits.

    Returns:
        The fitting ones in order; the last candidate is always among them.
    """
    return [tiles for tiles in candidates[:-1] if bytes_needed(tiles) <= limits.shared_memory] + [candidates[-1]]


def _out_of_resources() -> type[Exception]:
    """Triton's exception for kernels that need more than the card has; importing it takes time at each launch."""
    from triton.runtime.errors import OutOfResources

    return OutOfResources


def launch_first_fitting(candidates: Sequence[Tiles], launch: Callable[[Tiles], object]) -> Tiles:
    """Run a launch with the first tile settings that the compiled kernel's real needs allow.

    Args:
        candidates: Tile settings that should fit, fastest first.
        launch: Launches the kernel with the given settings.

    Returns:
        The settings that ran.

    Raises:
        triton.runtime.errors.OutOfResources: Not even the last settings fit.
    """
    for tiles in candidates[:-1]:
        try:
            launch(tiles)
        except _out_of_resources():  # evaluated only if the launch raises
            continue
        return tiles
    launch(candidates[-1])
    return candidates[-1]


def is_compile_failure(error: Exception) -> bool:
    """Whether an exception means that a kernel cannot be built for this device, as opposed to a failing launch.

    Args:
        error: What a kernel launch raised.

    Returns:
        True for Triton's own errors and failed compiler passes; False for CUDA errors and exhausted memory.
    """
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return False
    origin = type(error).__module__
    return origin.startswith('triton') or 'PassManager' in str(error) or 'ptxas' in str(error)


def compile_failure_reason(error: Exception) -> str:
    """Name a compile failure in one line."""
    message = str(error).strip().splitlines()
    return f'{type(error).__name__}: {message[0] if message else ""}'


def why_not_on_device(device_type: str, index: int | None) -> str | None:
    """Tell why the kernels cannot run on a device.

    Args:
        device_type: Type of a torch device.
        index: Its index, None for the current one.

    Returns:
        None if they can, else the reason.
    """
    try:
        import triton  # noqa: F401
    except ImportError:
        return 'the package triton is not installed'
    if interpreting():
        return None
    if not torch.cuda.is_available():
        return 'there is no CUDA device'
    if device_type != 'cuda':
        return f'the tensors are on {device_type!r}, the kernels need a CUDA device'
    if torch.version.hip is not None:
        return 'the kernels have not been tried on ROCm'
    capability = torch.cuda.get_device_capability(index)
    if capability not in KNOWN_CAPABILITIES and os.environ.get(ANY_CARD_VARIABLE) != '1':
        return (
            f'compute capability {capability[0]}.{capability[1]} is unknown to this version; run '
            f'{ANY_CARD_VARIABLE}=1 python -m mmvil.ops.selfcheck and keep the variable set if it passes'
        )
    return None


def why_not_dtype(dtype: torch.dtype, device_type: str, index: int | None) -> str | None:
    """Tell why the kernels cannot take a dtype on a device that they run on.

    Args:
        dtype: Data type of q, k and v.
        device_type: Type of a torch device.
        index: Its index, None for the current one.

    Returns:
        None if they can, else the reason.
    """
    if dtype == torch.float64:
        return 'the kernels have no float64'
    if dtype != torch.bfloat16:
        return None
    if interpreting():
        return "Triton's interpreter computes bfloat16 wrongly"
    capability = torch.cuda.get_device_capability(index)
    if device_type == 'cuda' and capability < BFLOAT16_CAPABILITY:
        return f'a card of compute capability {capability[0]}.{capability[1]} has no bfloat16; use float16 or float32'
    return None


@constant_when_compiled
def _carries(head_dim: int, dtype: torch.dtype, device_type: str, index: int | None) -> bool:
    """Whether the chunkwise form carries its state along, which changes from where on it is faster."""
    if device_type != 'cuda':
        return False
    from .carried import can_carry  # imports Triton

    return can_carry(head_dim, dtype, torch.device(device_type if index is None else f'{device_type}:{index}'))


def choose_form(
    length: int, head_dim: int, trains: bool, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> str:
    """Pick the form of the kernels.

    Args:
        length: S.
        head_dim: DH.
        trains: Whether a backward pass follows.
        dtype: Data type of q, k and v.
        device: Their device. Default: one where the chunkwise form does not carry its state along (`carried.py`).

    Returns:
        'quadratic'; or 'chunkwise' for sequences from which on it is faster.
    """
    limits = next(limits for largest, *limits in QUADRATIC_MAX_TOKENS if head_dim <= largest)
    if device is not None and _carries(head_dim, dtype, device.type, device.index):
        limits = CARRIED_MAX_TOKENS
    return 'quadratic' if length <= limits[0 if trains else 1] else 'chunkwise'
