import numpy as np
import pytest

from mmvil.datasets.vtab_tasks import SPLITS, TASKS
from mmvil.datasets.vtab_tfds import example_to_image, example_to_label, open_builder, split_instructions

# Sizes of the TFDS splits in the versions that the tasks are defined on.
TFDS_SIZES = {
    'caltech101': {'train': 3_060, 'test': 6_084},
    'cifar': {'train': 50_000, 'test': 10_000},
    'dtd': {'train': 1_880, 'validation': 1_880, 'test': 1_880},
    'oxford_flowers102': {'train': 1_020, 'validation': 1_020, 'test': 6_149},
    'oxford_iiit_pet': {'train': 3_680, 'test': 3_669},
    'sun397': {'train': 76_128, 'validation': 10_875, 'test': 21_750},
    'svhn': {'train': 73_257, 'test': 26_032, 'extra': 531_131},
    'patch_camelyon': {'train': 262_144, 'validation': 32_768, 'test': 32_768},
    'eurosat': {'train': 27_000},
    'resisc45': {'train': 31_500},
    'diabetic_retinopathy': {'train': 35_126, 'validation': 10_906, 'test': 42_670, 'sample': 10},
    'clevr_count': {'train': 70_000, 'validation': 15_000, 'test': 15_000},
    'clevr_dist': {'train': 70_000, 'validation': 15_000, 'test': 15_000},
    'dmlab': {'train': 65_550, 'validation': 22_628, 'test': 22_735},
    'kitti': {'train': 6_347, 'validation': 423, 'test': 711},
    'dsprites_loc': {'train': 737_280},
    'dsprites_ori': {'train': 737_280},
    'smallnorb_azi': {'train': 24_300, 'test': 24_300},
    'smallnorb_ele': {'train': 24_300, 'test': 24_300},
}
VAL_AND_TEST = {
    'caltech101': ('train[2754:2954]', 'test'),
    'cifar': ('train[45000:45200]', 'test'),
    'dtd': ('validation[0:200]', 'test'),
    'oxford_flowers102': ('validation[0:200]', 'test'),
    'oxford_iiit_pet': ('train[2944:3144]', 'test'),
    'sun397': ('validation[0:200]', 'test'),
    'svhn': ('train[65931:66131]', 'test'),
    'patch_camelyon': ('validation[0:200]', 'test'),
    'eurosat': ('train[16200:16400]', 'train[21600:]'),
    'resisc45': ('train[18900:19100]', 'train[25200:]'),
    'diabetic_retinopathy': ('validation[0:200]', 'test'),
    'clevr_count': ('train[63000:63200]', 'validation'),
    'clevr_dist': ('train[63000:63200]', 'validation'),
    'dmlab': ('validation[0:200]', 'test'),
    'kitti': ('validation[0:200]', 'test'),
    'dsprites_loc': ('train[589824:590024]', 'train[663552:]'),
    'dsprites_ori': ('train[589824:590024]', 'train[663552:]'),
    'smallnorb_azi': ('test[0:200]', 'test[12150:]'),
    'smallnorb_ele': ('test[0:200]', 'test[12150:]'),
}


@pytest.mark.parametrize('name', TASKS)
def test_the_thousand_are_the_first_of_training_and_validation(name):
    splits = split_instructions(TASKS[name], TFDS_SIZES[name])
    val, test = VAL_AND_TEST[name]
    assert [splits[split] for split in SPLITS] == ['train[:800]', val, f'train[:800]+{val}', test]


def test_a_revision_of_caltech101_is_accepted():
    assert split_instructions(TASKS['caltech101'], {'train': 3_059, 'test': 6_085})['val200'] == 'train[2753:2953]'


@pytest.mark.parametrize(
    ('name', 'sizes'),
    [
        ('cifar', {'train': 50_000}),
        ('cifar', {}),
        ('cifar', {'train': 50_001, 'test': 10_000}),
        ('caltech101', {'train': 3_060, 'test': 6_085}),
        ('caltech101', {'train': 3_061, 'test': 6_083}),
        ('kitti', {'train': 6_347, 'validation': 423, 'test': 710}),
        ('eurosat', {'train': 26_999}),
        ('smallnorb_azi', {'train': 24_300}),
    ],
)
def test_other_data_are_refused(name, sizes):
    with pytest.raises(ValueError, match=r'lacks the splits|is defined on'):
        split_instructions(TASKS[name], sizes)


def test_labels():
    objects = {
        'size': [0] * 4,
        'pixel_coords': np.array([[1, 2, 9.2], [3, 4, 8.5], [0, 0, 30], [0, 0, 12]], np.float32),
    }
    assert example_to_label(TASKS['clevr_count'], {'objects': objects}) == 1
    assert example_to_label(TASKS['clevr_dist'], {'objects': objects}) == 1
    cars = {'type': np.array([3, 1]), 'location': np.array([[0, 0, 2.0], [9, 9, 15.0]], np.float32)}
    assert example_to_label(TASKS['kitti'], {'objects': cars}) == 1
    nobody = {'type': np.array([], np.int64), 'location': np.zeros((0, 3), np.float32)}
    assert example_to_label(TASKS['kitti'], {'objects': nobody}) == 3
    sprite = {'label_x_position': 31, 'label_orientation': 39}
    assert [example_to_label(TASKS[name], sprite) for name in ('dsprites_loc', 'dsprites_ori')] == [15, 15]
    toy = {'label_azimuth': 17, 'label_elevation': 8}
    assert [example_to_label(TASKS[name], toy) for name in ('smallnorb_azi', 'smallnorb_ele')] == [17, 8]
    assert example_to_label(TASKS['cifar'], {'label': np.int64(99)}) == 99
    with pytest.raises(ValueError, match='labels from 0 to 99, got 100'):
        example_to_label(TASKS['cifar'], {'label': 100})


def test_images():
    grey = np.array([[[0], [1]], [[1], [0]]], np.uint8)
    sprite = example_to_image(TASKS['dsprites_loc'], {'image': grey})
    assert sprite.dtype == np.uint8
    assert sprite[..., 2].tolist() == [[0, 255], [255, 0]]
    toy = example_to_image(TASKS['smallnorb_azi'], {'image': grey * 100})
    assert toy.shape == (2, 2, 3)
    assert toy.max() == 100
    for bad in (grey[..., 0], grey.astype(np.float32), np.zeros((2, 2, 4), np.uint8)):
        with pytest.raises(ValueError, match='expected uint8 images'):
            example_to_image(TASKS['cifar'], {'image': bad})


def test_without_tfds_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'tensorflow_datasets', None)
    with pytest.raises(ImportError, match=r'mmvil\[tfds\]'):
        open_builder(TASKS['cifar'], tmp_path)


@pytest.mark.parametrize(
    'name', ['cifar', 'eurosat', 'sun397', 'dmlab', 'dsprites_loc', 'dsprites_ori', 'smallnorb_azi']
)
def test_features_of_the_real_builders(name, tmp_path):
    """Runs where tensorflow-datasets is installed: its mock gives random examples with the true features."""
    tfds = pytest.importorskip('tensorflow_datasets')
    task = TASKS[name]
    with tfds.testing.mock_data(num_examples=3):
        builder = open_builder(task, tmp_path)
        for example in tfds.as_numpy(builder.as_dataset(split='train')):
            assert example_to_image(task, example).shape[2] == 3
            assert 0 <= example_to_label(task, example) < task.num_classes
