"""Repeat a launcher's call by its allocations, kernel launches and torch calls alone, without its Python.

What a launcher works out (shapes, strides, views, grids, arguments) is the same at each call with the same sizes and
takes the host several times as long as launching does. A tape is such a call boiled down to what has to be done anew.
It holds no tensors and is found by everything that the launcher's decisions may rest on, asked at each call.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from operator import attrgetter, itemgetter, mul, or_

import torch
from torch import Tensor
from triton.runtime import driver

from .fast_launch import launches_are_direct, launches_are_watched
from .tape_recorder import SPECIALISED_ALIGNMENT, Call, Launch, Memory, View, record, views_among

__all__ = ['Repeated']

MAX_TAPES = 256
PART_ALIGNMENT = 512
"""Bytes: parts of a buffer start at multiples of this, as tensors of their own do with CUDA's allocator."""

Step = Callable[[list, int], object]
"""One thing that a tape does: it reads and writes a list of tensors, addresses and numbers, on a stream.

Gives something true if a tensor turns out to be of another kind than when it was recorded, for which the kernels would
not be the right ones.
"""


REFUSED = -1
"""In place of a tape: there cannot be one."""


class Repeated:
    """A function of tensors that runs as Python a few times and then, for the same settings and layouts, from a tape.

    What the function does may depend on nothing but its settings and the tensors' device, dtypes, numbers of elements,
    strides and addresses modulo 16: it must not read values, nor take shapes from tensors that the settings and the
    numbers of elements leave open. It launches kernels by `FastKernel`, calls no function of torch that changes a
    tensor, and runs without autograd. Where launches or torch's functions are watched it is simply called, and so it is
    where a call of it cannot be recorded.

    Args:
        function: Takes a list of tensors and settings, which are hashable; gives a list of tensors and Nones.
        first_calls: Calls with the same settings and layouts before the one that is recorded. One may compile kernels,
            and may be the only one with its sizes.
    """

    def __init__(self, function: Callable[..., list[Tensor | None]], first_calls: int = 1) -> None:
        self._function, self._first_calls = function, first_calls
        self._tapes: dict[tuple, Tape | int] = {}  # numbers of calls while there is no tape

    def __call__(self, tensors: Sequence[Tensor], *settings: object) -> list[Tensor | None]:
        """Results of the function, run with the tensors' device as the current one."""
        if not launches_are_direct() or launches_are_watched() or torch._C._len_torch_function_stack():
            return self._run(tensors, settings)
        devices, current = set(map(Tensor.get_device, tensors)), driver.active.get_current_device()
        if devices == {current} or devices == {-1}:
            return self._repeat(tensors, settings, current)
        if len(devices) > 1:
            return self._run(tensors, settings)
        with torch.cuda.device_of(tensors[0]):
            return self._repeat(tensors, settings, *devices)

    def forget(self) -> None:
        """Start anew, as is needed if anything else changes that the function depends on."""
        self._tapes.clear()

    def _run(self, tensors: Sequence[Tensor], settings: tuple) -> list[Tensor | None]:
        with torch.cuda.device_of(tensors[0]):
            return self._function(tensors, *settings)

    def _repeat(self, tensors: Sequence[Tensor], settings: tuple, device: int) -> list[Tensor | None]:
        addresses = list(map(Tensor.data_ptr, tensors))
        key = device, settings, *_layouts(tensors), _misalignment(addresses)
        tape = self._tapes.get(key, 0)
        if type(tape) is Tape:
            results = tape.play(tensors, addresses, driver.active.get_current_stream(device))
            return self._run(tensors, settings) if results is None else results
        if tape == REFUSED:
            return self._run(tensors, settings)
        if len(self._tapes) >= MAX_TAPES:
            self._tapes.clear()
        if tape < self._first_calls:
            results, self._tapes[key] = self._run(tensors, settings), tape + 1
        else:
            results, noted = record(self._function, tensors, settings)
            self._tapes[key] = REFUSED if noted is None else _Editor(*noted).tape
        return results


def _layouts(tensors: Sequence[Tensor]) -> tuple:
    """What a launcher asks tensors for; strides only if one is not contiguous, since they take long to get."""
    strides = None if all(map(Tensor.is_contiguous, tensors)) else tuple(map(Tensor.stride, tensors))
    return tuple(map(attrgetter('dtype'), tensors)), tuple(map(Tensor.numel, tensors)), strides


def _misalignment(addresses: Sequence[int]) -> tuple[int, ...] | None:
    """The addresses modulo 16, None if all of that is 0."""
    if reduce(or_, addresses) % SPECIALISED_ALIGNMENT:
        return tuple(address % SPECIALISED_ALIGNMENT for address in addresses)
    return None


class Tape:
    """What a recorded call has to do anew.

    Args:
        values: List that the steps work on; at its start there is room for the tensors and for their addresses.
        steps: In order.
        results: Places of the results in the list.
    """

    def __init__(self, values: list[object], steps: Sequence[Step], results: Sequence[int]) -> None:
        self._values, self._steps, self._results = values, steps, results

    def play(self, tensors: Sequence[Tensor], addresses: Sequence[int], stream: int) -> list[Tensor | None] | None:
        """Results for other tensors of the same layouts, None if the tape does not fit after all."""
        values = self._values.copy()
        values[: 2 * len(tensors)] = *tensors, *addresses
        for step in self._steps:
            if step(values, stream):
                return None
        return [values[place] for place in self._results]


class _Buffer:
    """Memory of a tape.

    Attributes:
        place: Where its tensor is in the tape's list.
        size: The tensor's.
        stride: The tensor's.
        dtype: The tensor's.
        addresses: By distance in bytes from the tensor's start: where that address is in the tape's list.
    """

    def __init__(self, place: int, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype) -> None:
        self.place, self.size, self.stride, self.dtype = place, tuple(size), tuple(stride), dtype
        self.addresses: dict[int, int] = {}


class _Editor:
    """Makes a tape of what was recorded.

    Args:
        given: Memory of the function's arguments.
        steps: Launches and calls.
        results: The function's results.
    """

    def __init__(self, given: Sequence[Memory], steps: Sequence[Launch | Call], results: Sequence[View | None]) -> None:
        self._values: list[object] = [None] * (2 * len(given))
        self._steps: list[Step] = []
        self._constants: dict[object, int] = {}
        self._tensors: dict[tuple, int] = {}
        self._homes: dict[Memory, tuple[_Buffer, int]] = {}  # with the distance from the buffer's start
        for number, memory in enumerate(given):
            buffer = _Buffer(number, memory.size, memory.stride, memory.dtype)
            buffer.addresses[0] = len(given) + number
            self._homes[memory] = buffer, 0
        arguments = [x for step in steps for x in views_among(step.arguments)]
        allocated = [
            x for x in dict.fromkeys(view.memory for view in [*arguments, *views_among(results)]) if x.allocated
        ]
        own: dict[Memory, list[View]] = {memory: [] for memory in allocated if memory.returned}
        for view in views_among(results):
            if view.memory in own:
                own[view.memory].append(view)
        shared = self._shared_buffers([memory for memory in allocated if not memory.returned])
        for number, step in enumerate(steps):
            self._allocate(number, own)
            self._steps.append(self._call(step) if isinstance(step, Call) else self._launch(step))
            done = [x for x in self._homes if not (x.given or x.allocated or x.returned) and x.last == number]
            if done:
                self._steps.append(_releasing(self._tensors_in(done)))
        self._allocate(len(steps), own)
        for memory, views in own.items():
            self._split(memory, views)
        places = [self._place(None) if view is None else self._tensor(view) for view in results]
        first = [_allocating(buffer) for buffer in shared]
        first += [_locating(x) for x in (self._homes[memory][0] for memory in given) if len(x.addresses) > 1]
        self.tape = Tape(self._values, [*first, *self._steps], places)

    def _place(self, value: object) -> int:
        """Room for something in the tape's list, and what is there from the start."""
        self._values.append(value)
        return len(self._values) - 1

    def _constant(self, value: object) -> int:
        """Place of something that stays as it is; equal numbers have one, as the list is copied at each call."""
        key = value if type(value) is int else (id(value),)  # the list keeps it alive
        if key not in self._constants:
            self._constants[key] = self._place(value)
        return self._constants[key]

    def _allocate(self, number: int, own: Mapping[Memory, Sequence[View]]) -> None:
        """Buffers for memory that others must not share, as results must not that outlive each other.

        They are made before the step that needs them: what is done with by then may give its memory. A result that
        fills one gives it its layout.
        """
        for memory, views in own.items():
            if memory.first == number:
                count = memory.bytes // memory.dtype.itemsize
                whole = [(view.size, view.stride) for view in views if _fills(view, count)]
                size, stride = whole[0] if whole else ([count], [1])
                buffer = _Buffer(self._place(None), size, stride, memory.dtype)
                self._homes[memory] = buffer, 0
                self._steps.append(_allocating(buffer))

    def _shared_buffers(self, memories: Sequence[Memory]) -> list[_Buffer]:
        """A buffer for each dtype of the tensors that torch is called with; others lie in one of them."""
        if not memories:
            return []
        dtypes = list(dict.fromkeys(x.dtype for x in memories if x.passed)) or [torch.uint8]
        buffers = []
        for dtype in dtypes:
            inside = [x for x in memories if (x.dtype if x.passed else dtypes[0]) == dtype]
            starts, total = _pack(inside)
            buffers.append(_Buffer(self._place(None), [total // dtype.itemsize], [1], dtype))
            self._homes.update((memory, (buffers[-1], start)) for memory, start in starts.items())
        return buffers

    def _tensors_in(self, memories: Sequence[Memory]) -> list[int]:
        """Places of the tensors that lie in memory which nothing needs any more."""
        owners = {self._homes[memory][0].place for memory in memories}
        return [*owners, *(place for (owner, *_), place in self._tensors.items() if owner in owners)]

    def _address(self, view: View) -> int:
        """Place of a tensor's address."""
        if 0 in view.size:
            return self._constant(0)
        buffer, start = self._homes[view.memory]
        offset = start + view.offset
        if offset not in buffer.addresses:
            buffer.addresses[offset] = self._place(None)
        return buffer.addresses[offset]

    def _tensor(self, view: View) -> int:
        """Place of a tensor, which is made before the next step."""
        buffer, start = self._homes[view.memory]
        offset, size, stride = start + view.offset, view.size, view.stride
        if (offset, size, stride) == (0, buffer.size, buffer.stride):
            return buffer.place
        key = buffer.place, offset, size, stride
        if key not in self._tensors:
            self._tensors[key] = place = self._place(None)
            offset //= view.memory.dtype.itemsize
            viewing = _viewing_inside if view.memory.given and offset else _viewing
            self._steps.append(viewing(buffer.place, size, stride, offset, place))
        return self._tensors[key]

    def _split(self, memory: Memory, views: Sequence[View]) -> None:
        """Make results that lie behind each other in a flat buffer of their own by one call, as gradients do."""
        buffer, itemsize = self._homes[memory][0], memory.dtype.itemsize
        parts = {(view.offset // itemsize, view.size) for view in views if view.stride == _dense(view.size)}
        if len(buffer.size) > 1 or len(parts) < 2:
            return
        sizes, flat, shaped, end = [], [], [], 0
        for start, size in sorted(parts):
            if start < end:  # the same elements twice
                continue
            place = self._place(None)
            self._tensors[buffer.place, start * itemsize, size, _dense(size)] = place
            sizes += [start - end] if start > end else []
            if len(size) == 1:
                flat.append((len(sizes), place))
            else:
                shaped.append((len(sizes), place, (size, _dense(size))))
            sizes.append(math.prod(size))
            end = start + sizes[-1]
        sizes += [buffer.size[0] - end] if buffer.size[0] > end else []
        self._steps.append(_splitting(buffer.place, sizes, flat, shaped))

    def _launch(self, launch: Launch) -> Step:
        places = [self._address(x) if isinstance(x, View) else self._constant(x) for x in launch.arguments]
        return _launching(launch.run, *launch.grid, itemgetter(*places))

    def _call(self, call: Call) -> Step:
        places = [self._tensor(x) if isinstance(x, View) else self._constant(x) for x in call.arguments]
        result = call.result
        buffer = _Buffer(self._place(None), result.size, result.stride, result.dtype)
        self._homes[call.result] = buffer, 0
        return _calling(call.function, places, call.options, buffer)


def _dense(size: Sequence[int]) -> tuple[int, ...]:
    """Strides of a contiguous tensor."""
    return tuple(itertools.accumulate([1, *size[:0:-1]], mul))[::-1]


def _fills(view: View, count: int) -> bool:
    """Whether a tensor has each of so many elements once."""
    pairs = sorted(zip(view.stride, view.size, strict=True), reverse=True)
    sizes = [size for _, size in pairs]
    return math.prod(sizes) == count and tuple(stride for stride, _ in pairs) == _dense(sizes)


def _pack(memories: Sequence[Memory]) -> tuple[dict[Memory, int], int]:
    """Starts in a buffer, in bytes, where what is used at the same time does not overlap; and the buffer's size.

    Large parts come first: small ones then fit in between.
    """
    placed: list[tuple[int, int, Memory]] = []
    for memory in sorted(memories, key=attrgetter('bytes'), reverse=True):
        start, size = 0, -(-memory.bytes // PART_ALIGNMENT) * PART_ALIGNMENT
        for other_start, other_end, other in sorted(placed, key=itemgetter(0)):
            if other.last < memory.first or memory.last < other.first:
                continue
            if start + size <= other_start:
                break
            start = max(start, other_end)
        placed.append((start, start + size, memory))
    return {memory: start for start, _, memory in placed}, max((end for _, end, _ in placed), default=0)


def _allocating(buffer: _Buffer) -> Step:
    """A buffer without content."""
    size, stride, dtype, place = buffer.size, buffer.stride, buffer.dtype, buffer.place

    def step(values: list, stream: int) -> int:
        values[place] = tensor = values[0].new_empty_strided(size, stride, dtype=dtype)
        start = tensor.data_ptr()
        for offset, target in buffer.addresses.items():
            values[target] = start + offset
        return start % SPECIALISED_ALIGNMENT

    return step


def _locating(buffer: _Buffer) -> Step:
    """Addresses inside of a given tensor."""
    source, addresses = buffer.addresses[0], [(offset, place) for offset, place in buffer.addresses.items() if offset]

    def step(values: list, stream: int) -> None:
        for offset, target in addresses:
            values[target] = values[source] + offset

    return step


def _viewing(source: int, size: Sequence[int], stride: Sequence[int], offset: int, target: int) -> Step:
    """A view of memory that starts with its storage, or one that starts where a given tensor does."""
    layout = (size, stride, offset) if offset else (size, stride)

    def step(values: list, stream: int) -> None:
        values[target] = values[source].as_strided(*layout)

    return step


def _viewing_inside(source: int, size: Sequence[int], stride: Sequence[int], offset: int, target: int) -> Step:
    """A view that starts inside of a given tensor, which may itself start anywhere in its storage."""

    def step(values: list, stream: int) -> None:
        base = values[source]
        values[target] = base.as_strided(size, stride, base.storage_offset() + offset)

    return step


def _splitting(
    source: int, sizes: Sequence[int], flat: Sequence[tuple[int, int]], shaped: Sequence[tuple[int, int, tuple]]
) -> Step:
    """Parts of a flat tensor: numbers of parts, where they go, their sizes and strides if these have several."""

    def step(values: list, stream: int) -> None:
        parts = values[source].split_with_sizes(sizes)
        for number, place in flat:
            values[place] = parts[number]
        for number, place, layout in shaped:
            values[place] = parts[number].as_strided(*layout)  # sooner than .view(size)

    return step


def _calling(function: Callable, places: Sequence[int], options: dict[str, object], buffer: _Buffer) -> Step:
    """What a function of torch computes."""
    target, dtype = buffer.place, buffer.dtype

    def step(values: list, stream: int) -> int | bool:
        values[target] = result = function(*[values[place] for place in places], **options)
        start = result.data_ptr()
        for offset, place in buffer.addresses.items():
            values[place] = start + offset
        return start % SPECIALISED_ALIGNMENT or result.dtype is not dtype  # autocast may differ in a backward pass

    return step


def _releasing(places: Sequence[int]) -> Step:
    """Let go of tensors, so that their memory is free."""

    def step(values: list, stream: int) -> None:
        for place in places:
            values[place] = None

    return step


def _launching(run: Callable[..., None], x: int, y: int, z: int, pick: Callable[[list], tuple]) -> Step:
    """A kernel's launch on a grid (x, y, z), with what is picked from the tape's list."""

    def step(values: list, stream: int) -> None:
        run(x, y, z, stream, *pick(values))

    return step
