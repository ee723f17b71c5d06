import numpy as np
import pytest

from mmvil.datasets.vtab import VTAB1K
from mmvil.datasets.vtab_tasks import DERIVED_NAMES, SPLITS, TASKS, label_names
from mmvil.datasets.vtab_tfds import example_to_image, example_to_label, open_builder, split_instructions
from mmvil.evaluation.check import check_root
from mmvil.evaluation.prepare import prepare_tasks

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


@pytest.mark.parametrize('name', [name for name in TASKS if name not in DERIVED_NAMES])
def test_label_names_are_those_of_the_real_builders(name, tmp_path):
    tfds = pytest.importorskip('tensorflow_datasets')
    with tfds.testing.mock_data(num_examples=1):
        builder = open_builder(TASKS[name], tmp_path, any_version=True)
    names = builder.info.features['label'].names
    assert len(names) == TASKS[name].num_classes
    if names[0] != '0':  # three of them have numbers until their records are there
        assert tuple(names) == label_names(name)


def make_kitti(count, offset, box):
    """Examples whose number is written into the pixels, the closest car 5, 15 or 30 m away in turn."""
    for index in range(count):
        image = np.full((3, 5, 3), 40, np.uint8)
        image[0, 0] = (offset + index) // 256, (offset + index) % 256, index % 3
        thing = dict(alpha=0.0, bbox=box, dimensions=[1.0] * 3, occluded=0, rotation_y=0.0)
        thing.update(location=[0.0, 0.0, (5.0, 15.0, 30.0)[index % 3]], truncated=0.0, type=0)
        yield index, {'image': image, 'image/file_name': f'{index}.png', 'objects': [thing]}


def test_real_records_are_read_and_written_out_alike(tmp_path, monkeypatch):
    """Runs where tensorflow-datasets is installed: records as its KITTI builder writes them, in the true numbers."""
    tfds = pytest.importorskip('tensorflow_datasets')
    pytest.importorskip('importlib_resources')
    builder = tfds.builder('kitti', data_dir=str(tmp_path / 'tfds'))
    box = tfds.features.BBox(0.0, 0.0, 1.0, 1.0)
    sizes = (('train', 6_347), ('validation', 423), ('test', 711))
    parts = {name: make_kitti(count, 10_000 * number, box) for number, (name, count) in enumerate(sizes)}
    monkeypatch.setattr(type(builder), '_split_generators', lambda self, manager: parts)
    builder.download_and_prepare()
    assert prepare_tasks(tmp_path / 'png', tmp_path / 'tfds', ['kitti'], download=False) == {}
    reports = [check_root(tmp_path / place, ['kitti']).tasks[0] for place in ('tfds', 'png')]
    assert [(report.storage, report.faults) for report in reports] == [('TFDS', []), ('lossless (PNG)', [])]
    for split in SPLITS:
        records, files = (VTAB1K(tmp_path / place, 'kitti', split) for place in ('tfds', 'png'))
        images = [records.read_image(index) for index in range(len(records))]
        assert all((files.read_image(index) == image).all() for index, image in enumerate(images))
        assert [int(image[0, 0, 0]) for image in images] == records.labels.tolist() == files.labels.tolist()
        numbers = [int(image[0, 0, 2]) * 256 + int(image[0, 0, 1]) for image in images]
        assert len(set(numbers)) == len(numbers)
        assert {number // 10_000 for number in numbers} == {
            'train800': {0},
            'val200': {1},
            'train800val200': {0, 1},
            'test': {2},
        }[split]
    shard = next((tmp_path / 'tfds/kitti').rglob('*validation.tfrecord*'))
    shard.write_bytes(shard.read_bytes()[:4_000])
    faults = check_root(tmp_path / 'tfds', ['kitti']).tasks[0].faults
    assert [fault.split(':')[0] for fault in faults] == ['val200', 'train800val200']
    assert all(' of kitti/3.3.0 is unreadable or truncated' in fault for fault in faults)
