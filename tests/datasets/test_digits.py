"""The handwritten digits: real images, stratified split, the usual interface of a data set."""

import numpy as np
import pytest
from mmengine.registry import DATASETS
from sklearn.datasets import load_digits

from mmvil.datasets import Digits


@pytest.fixture(scope='module')
def splits():
    return Digits(split='train'), Digits(split='val')


def test_sizes_and_classes(splits):
    train, val = splits
    assert (len(train), len(val)) == (1437, 360)
    assert train.metainfo['classes'] == tuple('0123456789')
    assert not train.test_mode
    assert val.test_mode


def test_split_is_stratified_and_disjoint(splits):
    original = np.bincount(load_digits().target, minlength=10)
    train, val = (np.bincount(split.get_gt_labels(), minlength=10) for split in splits)
    np.testing.assert_array_equal(train + val, original)
    assert np.all(np.abs(val - original * 0.2) < 1)
    # Every image of the original set is in exactly one of the two.
    images = [split.get_data_info(i)['img'][..., 0].tobytes() for split in splits for i in range(len(split))]
    expected = [np.round(image * (255 / 16)).astype(np.uint8).tobytes() for image in load_digits().images]
    assert sorted(images) == sorted(expected)


def test_images_are_grey_and_use_the_full_range(splits):
    sample = splits[0][0]
    assert sample['img'].shape == (8, 8, 3)
    assert sample['img'].dtype == np.uint8
    assert np.all(sample['img'] == sample['img'][..., :1])
    assert max(splits[0][i]['img'].max() for i in range(50)) == 255
    assert isinstance(sample['gt_label'], int)


def test_split_seed_moves_the_images_and_is_repeatable(splits):
    first, again, other = (Digits(split='val', split_seed=seed) for seed in (0, 0, 1))
    pictures = [np.stack([data[i]['img'] for i in range(len(data))]) for data in (first, again, other)]
    np.testing.assert_array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], pictures[2])


def test_is_registered_and_takes_a_pipeline_and_indices():
    pipeline = [dict(type='mmpretrain.Resize', scale=24), dict(type='mmpretrain.PackInputs')]
    data = DATASETS.build(dict(type='mmvil.Digits', split='val', pipeline=pipeline, indices=5))
    assert len(data) == 5
    assert data[0]['inputs'].shape == (3, 24, 24)


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="'train' or 'val', got 'test'"):
        Digits(split='test')
