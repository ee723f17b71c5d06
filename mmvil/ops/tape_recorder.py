"""Take down what a launcher allocates, launches and computes, and in which memory, for `launch_tape.py`."""

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .fast_launch import recording

__all__ = ['SPECIALISED_ALIGNMENT', 'Call', 'Launch', 'Memory', 'View', 'record', 'views_among']

SPECIALISED_ALIGNMENT = 16
"""Bytes: Triton asks of addresses whether they are multiples of this."""

ALLOCATIONS = (torch.empty, torch.empty_like, torch.empty_strided, Tensor.new_empty, Tensor.new_empty_strided)
NUMBERS_AND_KINDS = (int, float, torch.Size, torch.dtype, torch.device)
ASSIGNMENTS = ('__set__', '__setitem__', '__iadd__', '__isub__', '__imul__', '__itruediv__')


class Memory:
    """What the tensors of a recorded call that share memory have in common. Holds no tensor: memory is freed as ever.

    Attributes:
        size: Of the tensor that came first.
        stride: Likewise.
        dtype: Likewise.
        start: Bytes from the start of its storage to its first element.
        bytes: Size of its storage.
        given: Whether it was an argument of the recorded function.
        allocated: Whether nothing has to be computed for it.
        returned: Whether a result of the function lies in it.
        passed: Whether a function of torch takes it as a tensor.
        first: Number of the first step that uses it, None if none does.
        last: Number of the last one.
    """

    def __init__(self, tensor: Tensor, given: bool = False, allocated: bool = False) -> None:
        self.size, self.stride, self.dtype = tuple(tensor.size()), tensor.stride(), tensor.dtype
        self.start, self.bytes = _start(tensor), tensor.untyped_storage().nbytes()
        self.given, self.allocated = given, allocated
        self.returned = self.passed = False
        self.first: int | None = None
        self.last: int | None = None

    def is_used_by(self, step: int) -> None:
        """Note one more step that uses it; steps come in order."""
        self.first, self.last = step if self.first is None else self.first, step


@dataclass(frozen=True, eq=False)
class View:
    """A tensor of a recorded call: where it lies in which memory, and how."""

    memory: Memory
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Launch:
    """A kernel's launch. Tensors among the arguments are views."""

    run: Callable[..., None]
    grid: tuple[int, int, int]
    arguments: tuple[object, ...]


@dataclass(frozen=True, eq=False)
class Call:
    """A call of a function of torch that computes a tensor. Tensors among the arguments are views."""

    function: Callable[..., Tensor]
    arguments: tuple[object, ...]
    options: dict[str, object]
    result: Memory


Noted = tuple[Sequence[Memory], Sequence[Launch | Call], Sequence[View | None]]
"""Memory of the arguments; launches and calls in order; where the results are."""


def record(
    function: Callable[..., list[Tensor | None]], tensors: Sequence[Tensor], settings: tuple
) -> tuple[list[Tensor | None], Noted | None]:
    """Call a function of tensors and settings and take down what it does.

    Args:
        function: As for `launch_tape.Repeated`.
        tensors: Its tensors.
        settings: Its settings.

    Returns:
        Its results, and what it did, None if that is more than a tape can do.
    """
    aliases = [x.detach() for x in tensors]  # a tensor may be given twice, here, but not the next time
    recorder = _Recorder(aliases)
    with recorder:
        results = function(aliases, *settings)
    return results, recorder.noted(results)


class _Recorder(TorchFunctionMode):
    """Takes down what is launched and computed while it is active.

    Args:
        given: Arguments of the function that is recorded.
    """

    def __init__(self, given: Sequence[Tensor]) -> None:
        super().__init__()
        self._refused = False
        self._steps: list[Launch | Call] = []
        self._device = given[0].get_device()
        self._given = [Memory(x, given=True) for x in given]
        # By the tensor's id, for as long as the tensor lives.
        self._views: dict[int, View] = {}
        self._living: dict[int, weakref.ref] = {}
        for tensor, memory in zip(given, self._given, strict=True):
            self._know(tensor, memory)

    def __enter__(self) -> '_Recorder':
        recording.recorder = self
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        recording.recorder = None
        super().__exit__(*error)

    def _know(self, tensor: Tensor, memory: Memory) -> None:
        """Keep in mind where a tensor lies until it dies, when another one may get its id."""
        key = id(tensor)

        def forget(_: object) -> None:
            self._views.pop(key, None)
            self._living.pop(key, None)

        self._views[key] = View(memory, _start(tensor) - memory.start, tuple(tensor.size()), tensor.stride())
        self._living[key] = weakref.ref(tensor, forget)

    def refuse(self) -> None:
        """Give this call up: it does something that tapes cannot."""
        self._refused = True

    def note_launch(
        self,
        run: Callable[..., None],
        grid: tuple[int, int, int],
        handles: tuple[object, object],
        arguments: Sequence[object],
        constants: Sequence[object],
    ) -> None:
        """See `LaunchRecorder`."""
        views = self._as_views(arguments)
        self._steps.append(Launch(run, grid, (*handles, None, None, None, *views, *constants)))

    def __torch_function__(
        self, function: Callable, types: object, args: tuple = (), kwargs: dict[str, object] | None = None
    ) -> object:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if isinstance(result, NUMBERS_AND_KINDS):
            return result
        name = getattr(function, '__name__', '')
        if name in ASSIGNMENTS or (name.endswith('_') and not name.endswith('__')) or 'out' in kwargs:
            self.refuse()
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor) and id(tensor) not in self._views and not self._is_view(tensor, args):
                self._note_new(tensor, function, args, kwargs)
                if tensor is not result:
                    self.refuse()
        return result

    def _is_view(self, tensor: Tensor, args: Sequence[object]) -> bool:
        """Whether a tensor lies in the memory of an argument; if so it is known from now on."""
        for base in args:
            if isinstance(base, Tensor) and id(base) in self._views and _storage(base) == _storage(tensor):
                memory = self._views[id(base)].memory
                self._know(tensor, memory)
                if tensor.dtype != memory.dtype:
                    self.refuse()
                return True
        return False

    def _note_new(self, tensor: Tensor, function: Callable, args: tuple, kwargs: dict[str, object]) -> None:
        """Take down how a tensor with memory of its own came to be."""
        memory = Memory(tensor, allocated=function in ALLOCATIONS)
        self._know(tensor, memory)
        elsewhere = tensor.get_device() != self._device or tensor.storage_offset()
        if elsewhere or tensor.data_ptr() % SPECIALISED_ALIGNMENT:
            self.refuse()
        if memory.allocated:
            return
        arguments = self._as_views(args)
        if any(isinstance(x, Tensor) or _holds_tensors(x) for x in kwargs.values()):
            self.refuse()
        self._steps.append(Call(function, arguments, kwargs, memory))
        for view in views_among(arguments):
            view.memory.passed = True

    def _as_views(self, arguments: Sequence[object]) -> tuple[object, ...]:
        """Arguments with views in place of tensors, all of which must be known."""
        if any(_holds_tensors(x) or (isinstance(x, Tensor) and id(x) not in self._views) for x in arguments):
            self.refuse()
        return tuple(self._views.get(id(x)) if isinstance(x, Tensor) else x for x in arguments)

    def noted(self, results: Sequence[Tensor | None]) -> Noted | None:
        """What was taken down, with the steps that use each memory."""
        found = [None if x is None else self._views.get(id(x)) for x in results]
        if self._refused or any(view is None and x is not None for view, x in zip(found, results, strict=True)):
            return None
        for number, step in enumerate(self._steps):
            for view in views_among(step.arguments):
                view.memory.is_used_by(number)
        for view in views_among(found):
            view.memory.returned = True
            view.memory.is_used_by(len(self._steps))
        return self._given, self._steps, found


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _start(tensor: Tensor) -> int:
    """Bytes from the start of a tensor's storage to its first element."""
    return tensor.storage_offset() * tensor.itemsize


def _holds_tensors(argument: object) -> bool:
    return isinstance(argument, (tuple, list)) and any(isinstance(x, Tensor) for x in argument)


def views_among(arguments: Sequence[object]) -> Iterator[View]:
    """Tensors among the arguments of a launch or a call."""
    return (x for x in arguments if isinstance(x, View))
