"""A stand-in for Gluon on plain torch tensors, so that what kernels compute can be tested without a GPU.

Programs run one after the other, copies and products at once. Layouts, fences and waits mean nothing here: what may go
wrong between threads is left to the tests on a card. What a copy leaves out is NaN, as are tensors before they are
written.
"""

import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType, SimpleNamespace
from unittest import mock

import torch
from torch import Tensor

__all__ = ['load_kernels']

Number = int | Tensor


class Pointer:
    """Addresses of elements of one tensor, which has no gaps."""

    def __init__(self, memory: Tensor, offset: Number = 0) -> None:
        self.memory, self.offset = memory, offset
        self.dtype = SimpleNamespace(element_ty=memory.dtype)

    def __add__(self, offset: Number) -> 'Pointer':
        return Pointer(self.memory, self.offset + offset)


class Shared:
    """Shared memory, or a view of it."""

    def __init__(self, memory: Tensor) -> None:
        self.memory, self.shape, self.dtype = memory, tuple(memory.shape), memory.dtype

    def index(self, number: Number) -> 'Shared':
        return Shared(self.memory[int(number)])

    def permute(self, order: Sequence[int]) -> 'Shared':
        return Shared(self.memory.permute(*order))

    def load(self, layout: object) -> Tensor:
        return self.memory.clone()

    def store(self, value: Tensor) -> None:
        assert value.dtype == self.dtype
        self.memory.copy_(value)


def _load(pointer: Pointer, mask: Tensor | None = None, other: float = float('nan')) -> Tensor:
    offset = torch.as_tensor(pointer.offset)
    if mask is None:
        assert ((offset >= 0) & (offset < pointer.memory.numel())).all(), 'a load beyond the end'
        return pointer.memory.flatten()[offset]
    offset, mask = torch.broadcast_tensors(offset, mask)
    found = torch.full(offset.shape, other, dtype=pointer.memory.dtype)
    found[mask] = _load(Pointer(pointer.memory, offset[mask]))
    return found


def _store(pointer: Pointer, value: Tensor, mask: Tensor | None = None) -> None:
    mask = torch.tensor(True) if mask is None else mask
    offset, value, mask = torch.broadcast_tensors(torch.as_tensor(pointer.offset), value, mask)
    offset = offset[mask]
    assert ((offset >= 0) & (offset < pointer.memory.numel())).all(), 'a store beyond the end'
    pointer.memory.view(-1)[offset] = value[mask].to(pointer.memory.dtype)


def _copy(shared: Shared, pointer: Pointer, mask: Tensor | None = None) -> None:
    shared.memory.copy_(_load(pointer, mask))


def _product(
    left: Shared | Tensor, right: Shared, sums: Tensor, use_acc: bool = True, is_async: bool = False
) -> Tensor:
    left, right = (x.memory if isinstance(x, Shared) else x for x in (left, right))
    assert left.dtype == right.dtype == torch.bfloat16
    return left.float() @ right.float() + (sums if use_acc else 0)


def _of(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A function of tensors that takes numbers, too."""
    return lambda *x: function(*(torch.as_tensor(y) for y in x))


def _where(condition: Tensor, first: Number | float, second: Number | float) -> Tensor:
    return torch.where(condition, torch.as_tensor(first), torch.as_tensor(second))


def _language(warps: int) -> ModuleType:
    """What kernels import as `gl`, without the program's number."""
    language = ModuleType('triton.experimental.gluon.language')
    kinds = 'BlockedLayout', 'SliceLayout', 'DotOperandLayout', 'NVMMADistributedLayout', 'SwizzledSharedLayout'
    language.__dict__.update({kind: lambda *_: None for kind in kinds})
    language.__dict__.update(
        constexpr=lambda x: x, float32=torch.float32, int64=torch.int64, num_warps=lambda: warps,
        NVMMASharedLayout=SimpleNamespace(get_default_for=lambda *_: None),
        arange=lambda start, stop, layout: torch.arange(start, stop),
        zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
        full=lambda shape, value, dtype, layout: torch.full(shape, value, dtype=dtype),
        allocate_shared_memory=lambda dtype, shape, layout: Shared(torch.full(shape, float('nan'), dtype=dtype)),
        convert_layout=lambda x, layout: x, load=_load, store=_store, where=_where, sum=lambda x, axis: x.sum(axis),
        minimum=_of(torch.minimum), maximum=_of(torch.maximum), exp2=torch.exp2, abs=torch.abs,
        cdiv=lambda x, y: -(-x // y), static_range=range,
    )  # fmt: skip
    return language


def load_kernels(*names: str, warps: int = 4) -> tuple[SimpleNamespace, ...]:
    """Load modules of `mmvil.ops` whose kernels are written in Gluon.

    Args:
        names: Their names without the package; those that others import come first.
        warps: Warps of a program.

    Returns:
        The kernels of each, to be called as `kernel[grid](*arguments, **constants)`, with one number as the grid.
        Tensors that they get must have no gaps, or be views of one that has none.
    """
    language = _language(warps)
    experimental, gluon, ampere, hopper = (ModuleType(x) for x in ('experimental', 'gluon', 'ampere', 'hopper'))
    experimental.gluon, gluon.language = gluon, language
    gluon.jit = lambda function=None, **_: function or (lambda x: x)
    ampere.async_copy = SimpleNamespace(
        async_copy_global_to_shared=_copy, commit_group=lambda: None, wait_group=lambda _: None
    )
    hopper.fence_async_shared = lambda: None
    hopper.warpgroup_mma, hopper.warpgroup_mma_wait = _product, lambda _, deps: deps[0]
    modules = {
        'triton.experimental': experimental, 'triton.experimental.gluon': gluon,
        'triton.experimental.gluon.language': language,
        'triton.experimental.gluon.language.nvidia.ampere': ampere,
        'triton.experimental.gluon.language.nvidia.hopper': hopper,
    }  # fmt: skip
    found = []
    for name in names:
        spec = importlib.util.find_spec(f'mmvil.ops.{name}')
        modules[spec.name] = module = importlib.util.module_from_spec(spec)
        with mock.patch.dict(sys.modules, modules):
            spec.loader.exec_module(module)
        kernels = {key: Kernel(value, language) for key, value in vars(module).items() if key.endswith('_kernel')}
        found.append(SimpleNamespace(**kernels))
    return tuple(found)


class Kernel:
    """A kernel whose programs run one after the other."""

    def __init__(self, function: Callable[..., None], language: ModuleType) -> None:
        self.function, self.language = function, language

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*arguments: Tensor | float, num_warps: int, **constants: object) -> None:
            assert num_warps == self.language.num_warps()
            given = [_given(x) for x in arguments]
            for program in range(grid[0]):
                self.language.program_id = lambda axis, program=program: torch.tensor(program)
                self.function(*given, **constants)

        return launch


def _given(argument: Tensor | float) -> Pointer | Tensor | float:
    """An argument as kernels see it: whole numbers as tensors, which have the methods that kernels call."""
    if isinstance(argument, Tensor):
        whole = argument.as_strided((argument.untyped_storage().nbytes() // argument.itemsize,), (1,), 0)
        return Pointer(whole, argument.storage_offset())
    return torch.tensor(argument) if isinstance(argument, int) else argument
