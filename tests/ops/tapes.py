"""What the tests of tapes share: kernels that are interpreted from the addresses that a tape gives."""

import ctypes
import functools
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from mmvil.ops.fast_launch import launches_are_direct, recording
from mmvil.ops.triton_launch import interpreting

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
needs_kernels = pytest.mark.skipif(
    not (interpreting() or launches_are_direct()), reason='needs the interpreter of Triton, or one that is known'
)


def at(address: int, dtype: torch.dtype) -> Tensor:
    """A tensor of one element in memory that belongs to others."""
    memory = (ctypes.c_char * dtype.itemsize).from_address(address)
    return torch.frombuffer(memory, dtype=dtype)


class Interpreted:
    """Stands for a `FastKernel`: its launcher interprets the kernel, given addresses."""

    def __init__(self, kernel: object) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: object, **constants: object) -> None:
            dtypes = [x.dtype if isinstance(x, Tensor) else None for x in arguments]
            run = functools.partial(self.run, dtypes, constants)
            values = [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]
            run(*grid, *(1,) * (3 - len(grid)), 7, 'function', 'metadata', None, None, None, *values, 'rest')
            if recording.recorder is not None:
                whole = (*grid, 1, 1)[:3]
                recording.recorder.note_launch(run, whole, ('function', 'metadata'), arguments, ['rest'])

        return launch

    def run(self, dtypes: Sequence, constants: dict, x: int, y: int, z: int, stream: int, *rest: object) -> None:
        assert (stream, *rest[:5], rest[-1]) == (7, 'function', 'metadata', None, None, None, 'rest')
        arguments = [
            value if dtype is None else at(value, dtype) if value else torch.empty(0, dtype=dtype)
            for dtype, value in zip(dtypes, rest[5:-1], strict=True)
        ]
        self.kernel[(x, y, z)](*arguments, **constants)


def interpreted(module: object) -> SimpleNamespace:
    names = [name for name in vars(module) if name.endswith('_kernel')]
    return SimpleNamespace(**{name: Interpreted(getattr(module, name)) for name in names})


def assert_equal(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert one.stride() == other.stride()
        assert torch.equal(one, other)
