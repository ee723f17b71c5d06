"""Work side by side on two streams, inside of a CUDA graph, where launches cost the host nothing."""

import functools
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

__all__ = ['is_captured', 'side_by_side']

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
