"""Random numbers of data loading as a function of the place of a sample in the training, not of what ran before it.

A worker process that has been alive for a while cannot be put back into its random state by a resumed run. So the
sampler hands out each index together with its place in the stream, and the data set seeds the generators from that
place before it loads the sample. The numbers are then the same for any number of workers, and after any resume.
"""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info


def seed_generators(*key: int, devices: bool = True) -> None:
    """Seed the global generators of Python, NumPy and torch from a tuple of integers.

    Args:
        *key (int): Non-negative integers; different keys give independent streams.
        devices (bool): Also seed the generators of every accelerator. Leave it off in worker processes, where touching
            a device is not allowed. Default: True.

    Source: numpy.random.SeedSequence, which hashes the whole key.
    """
    # SeedSequence fills short keys up with zeros; the length keeps (1,) and (1, 0) apart.
    words = np.random.SeedSequence((len(key), *key)).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch_seed = (int(words[2]) << 31) ^ int(words[3])
    if devices:
        torch.manual_seed(torch_seed)
    else:
        torch.default_generator.manual_seed(torch_seed)


@contextmanager
def preserved_generators() -> Iterator[None]:
    """Put the CPU generators of Python, NumPy and torch back at the end of the block."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


class PlacedIndex(int):
    """A sample index that knows its place in the training.

    Args:
        index (int): Index of the sample in the data set.
        place (tuple[int, ...]): Epoch, pass within the epoch and place within the pass.
    """

    place: tuple[int, ...]

    def __new__(cls, index: int, place: tuple[int, ...]) -> 'PlacedIndex':
        """Make the integer; the place is an ordinary attribute."""
        self = super().__new__(cls, index)
        self.place = place
        return self

    def __reduce__(self) -> tuple:
        """Keep the place when the index travels to a worker process."""
        return PlacedIndex, (int(self), self.place)


class PlacedSampler:
    """Wraps a sampler; yields its indices with their places. Every other attribute is that of the wrapped sampler.

    Args:
        sampler (Iterable[int]): The sampler to wrap.
    """

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler
        self.start_epoch(0)

    def start_epoch(self, epoch: int, first_place: int = 0, skipped: int = 0) -> None:
        """Set the places of the next pass.

        Args:
            epoch (int): Number of the epoch.
            first_place (int): Place of the first index that the sampler yields, for a sampler that has been
                fast-forwarded. Default: 0.
            skipped (int): Indices to take from the sampler and throw away, in the next pass alone. Default: 0.
        """
        self._epoch, self._pass_number = epoch, 0
        self._first_place, self._skipped = first_place, skipped

    def __iter__(self) -> Iterator[PlacedIndex]:
        """Iterate over the wrapped sampler once."""
        epoch, pass_number = self._epoch, self._pass_number
        first_place, skipped = self._first_place, self._skipped
        self._pass_number, self._first_place, self._skipped = pass_number + 1, 0, 0
        for number, index in enumerate(self.sampler):
            if number >= skipped:
                yield PlacedIndex(index, (epoch, pass_number, first_place + number))

    def __len__(self) -> int:
        """Length of the wrapped sampler."""
        return len(self.sampler)

    def __getattr__(self, name: str) -> Any:
        """Look everything else up in the wrapped sampler, so that `set_epoch` and `skip` reach it."""
        if name == 'sampler':
            raise AttributeError(name)
        return getattr(self.sampler, name)


class SeededFetch:
    """Loads the samples of one batch, each from its own seed; torch calls it as the data set's `__getitems__`.

    Args:
        dataset (Dataset): The data set.
        key (tuple[int, ...]): Integers that start every seed: seed of the run, rank, ...
    """

    def __init__(self, dataset: Dataset, key: tuple[int, ...]) -> None:
        self.dataset = dataset
        self.key = key

    def __call__(self, indices: Sequence[int]) -> list:
        """Return the samples at `indices`; indices without a place are loaded from the current random state."""
        if get_worker_info() is not None:
            return [self._load(index) for index in indices]
        with preserved_generators():
            return [self._load(index) for index in indices]

    def _load(self, index: int) -> Any:
        if isinstance(index, PlacedIndex):
            seed_generators(*self.key, *index.place, devices=False)
        return self.dataset[int(index)]
