"""Places of samples, and random numbers that depend on them alone."""

import copy
import pickle
import random

import numpy as np
import torch
from mmengine.dataset import InfiniteSampler

from mmvil.engine.seeded_loading import PlacedIndex, PlacedSampler, SeededFetch, preserved_generators, seed_generators


def draw():
    return random.random(), np.random.rand(), torch.rand(()).item()


def test_same_key_same_numbers_and_other_key_other_numbers():
    draws = []
    for key in [(0, 0, 1), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 0, 1, 0)]:
        seed_generators(*key)
        draws.append(draw())
    assert draws[0] == draws[1]
    for number in range(3):
        assert len({values[number] for values in draws[1:]}) == 4


def test_numbers_of_neighbouring_keys_look_independent():
    values = []
    for place in range(2000):
        seed_generators(7, place, devices=False)
        values.append(draw())
    values = np.array(values)
    # Standard error of a mean of 2000 uniform numbers: 0.0065; of a correlation: 0.022. Bounds are five of them.
    assert np.all(np.abs(values.mean(0) - 0.5) < 0.033)
    for column in values.T:
        assert abs(np.corrcoef(column[:-1], column[1:])[0, 1]) < 0.11
    correlations = np.corrcoef(values.T)
    assert np.all(np.abs(correlations[np.triu_indices(3, 1)]) < 0.11)


def test_preserved_generators_come_back():
    seed_generators(3)
    expected = draw()
    seed_generators(3)
    with preserved_generators():
        draw()
        seed_generators(4)
    assert draw() == expected


def test_placed_index_is_an_int_that_travels():
    index = PlacedIndex(7, (1, 0, 30))
    assert [10, 11, 12, 13, 14, 15, 16, 17][index] == 17
    for other in (pickle.loads(pickle.dumps(index)), copy.deepcopy(index)):
        assert (other, other.place) == (7, (1, 0, 30))


def test_sampler_counts_places_passes_and_skips_once():
    sampler = PlacedSampler([5, 6, 7])
    sampler.start_epoch(4, skipped=2)
    assert [(int(i), i.place) for i in sampler] == [(7, (4, 0, 2))]
    assert [(int(i), i.place) for i in sampler] == [(5, (4, 1, 0)), (6, (4, 1, 1)), (7, (4, 1, 2))]
    sampler.start_epoch(0, first_place=100)
    assert next(iter(sampler)).place == (0, 0, 100)
    assert len(sampler) == 3


def test_sampler_looks_like_the_wrapped_one():
    inner = InfiniteSampler(range(10), shuffle=False, seed=3)
    sampler = copy.copy(PlacedSampler(inner))
    assert sampler.seed == 3
    assert hasattr(sampler, 'skip') == hasattr(inner, 'skip')
    assert not hasattr(sampler, 'no_such_name')


def test_fetch_gives_each_place_its_numbers_and_leaves_the_generators_alone():
    class Noise:
        def __getitem__(self, index):
            assert type(index) is int
            return index, draw()

    fetch = SeededFetch(Noise(), (0, 0))
    seed_generators(9)
    expected = draw()
    seed_generators(9)
    batch = fetch([PlacedIndex(1, (0, 0, 0)), PlacedIndex(2, (0, 0, 1))])
    assert draw() == expected
    assert [index for index, _ in batch] == [1, 2]
    assert batch[0][1] != batch[1][1]
    assert fetch([PlacedIndex(2, (0, 0, 1))])[0] == batch[1]
