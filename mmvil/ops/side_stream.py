"""Work side by side on two streams, inside of a CUDA graph, where launches cost the host nothing."""

import functools
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ['Aside', 'at_once', 'is_captured', 'side_by_side']

Result = TypeVar('Result')


def is_captured(x: Tensor) -> bool:
    """Whether work with this tensor is being captured."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


@functools.cache
def _stream_beside(device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def side_by_side(function: Callable[[Sequence[Tensor]], Result], parts: Sequence[Sequence[Tensor]]) -> list[Result]:
    """Call a function with the first part on this stream and with the others, if there are any, on one beside it.

    What comes next on this stream waits for both. Memory of results may be freed like any other: whoever uses the
    stream beside waits for this one first.

    Args:
        function: Launches kernels, on the current stream.
        parts: What it is called with, on one device.

    Returns:
        What the function gave, in order.
    """
    if len(parts) == 1:
        return [function(parts[0])]
    device = parts[0][0].get_device()
    here, beside = torch.cuda.current_stream(device), _stream_beside(device)
    beside.wait_stream(here)
    results = [function(parts[0])]
    with torch.cuda.stream(beside):
        results += [function(part) for part in parts[1:]]
    here.wait_stream(beside)
    return results


def at_once(work: Callable[[], Result]) -> Result:
    """Do some work here and now."""
    return work()


class Aside:
    """Does work whose results are not needed soon on the stream beside, such as gradients of weights.

    It holds what the work needs until that is done: by the end of the next turn, as memory of this stream must not be
    used again before.

    Args:
        device: Number of the CUDA device.
    """

    def __init__(self, device: int) -> None:
        self._here, self._beside = torch.cuda.current_stream(device), _stream_beside(device)
        self._held: list[Callable[[], object]] = []
        self._before: tuple[torch.cuda.Event, list] | None = None

    def __call__(self, work: Callable[[], Result]) -> Result:
        """Do some work behind all that has been launched so far. Its results are there after `join`, or for others."""
        self._beside.wait_stream(self._here)
        self._held.append(work)
        with torch.cuda.stream(self._beside):
            return work()

    def turn(self) -> None:
        """Wait for the work of the last turn and forget what it needed."""
        if self._before is not None:
            self._here.wait_event(self._before[0])
        self._before, self._held = (self._beside.record_event(), self._held), []

    def join(self) -> None:
        """Wait for all work."""
        self._here.wait_stream(self._beside)
        self._before, self._held = None, []
