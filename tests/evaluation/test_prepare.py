"""Preparation from TFDS, on a stand-in with the builders' recorded sizes and a handful of its functions."""

import hashlib
import json
import re
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from mmvil.datasets.vtab import VTAB1K
from mmvil.datasets.vtab_tasks import SPLITS
from mmvil.evaluation.check import check_root
from mmvil.evaluation.command import main
from mmvil.evaluation.prepare import prepare_tasks

SIZES = {
    'kitti': {'train': 6_347, 'validation': 423, 'test': 711},
    'resisc45': {'train': 31_500},
}
LATEST = {'kitti': '3.3.0', 'resisc45': '4.0.0'}
DISTANCES = (5.0, 15.0, 30.0)


def make_example(index):
    """KITTI-like example number `index` of the training split: its number is written into the pixels."""
    image = np.full((3, 5, 3), 40, np.uint8)
    image[0, 0] = index // 256, index % 256, 7
    objects = {'type': np.array([0]), 'location': np.array([[0.0, 0.0, DISTANCES[index % 3]]])}
    return {'image': image, 'objects': objects}


class StandInBuilder:
    def __init__(self, name, version):
        sizes = SIZES[name] if self.is_prepared else {}
        splits = {split: SimpleNamespace(num_examples=count) for split, count in sizes.items()}
        self.version = version
        self.info = SimpleNamespace(full_name=f'{name}/{version}', splits=splits)
        self.name = name

    is_prepared = True

    def download_and_prepare(self):
        if self.name == 'resisc45':
            raise AssertionError('Manual directory does not exist or is empty.')

    def as_dataset(self, split, shuffle_files, read_config):
        assert shuffle_files is False
        assert read_config == {'interleave_cycle_length': 1}
        name, start, end = re.fullmatch(r'(\w+)(?:\[(\d*):(\d*)\])?', split).groups()
        size = SIZES[self.name][name]
        offset = {'train': 0, 'validation': 10_000, 'test': 20_000}[name]
        return [make_example(offset + index) for index in range(int(start or 0), int(end or size))]


@pytest.fixture
def stand_in(monkeypatch):
    def builder(reference, data_dir):
        name, _, version = reference.partition(':')
        if version and not LATEST[name].startswith(version.split('.')[0]):
            raise ValueError(f'{name} cannot be loaded at version {version}')
        return StandInBuilder(name, LATEST[name])

    module = SimpleNamespace(
        builder=builder,
        as_numpy=lambda examples: examples,
        ReadConfig=dict,
        core=SimpleNamespace(DatasetNotFoundError=KeyError),
        __version__='4.9',
    )
    monkeypatch.setitem(sys.modules, 'tensorflow_datasets', module)


def test_writes_the_standard_layout_without_loss(stand_in, tmp_path, capsys):
    root = tmp_path / 'vtab-1k'
    assert main(['prepare', str(root), '--tfds-dir', str(tmp_path / 'tfds'), '--tasks', 'kitti']) == 0
    assert 'kitti: 2711 images written' in capsys.readouterr().out
    report = check_root(root, ['kitti'])
    assert report.num_faults == 0
    assert report.tasks[0].storage == 'lossless (PNG)'
    assert not report.smoke
    first = (root / 'kitti/val200.txt').read_text().splitlines()
    assert first[0] == 'images/val200/000000.png 1'  # number 10,000, 15 m away
    numbers = []
    for index in (0, 799, 800, 999):
        with Image.open(root / f'kitti/images/train800val200/{index:06d}.png') as image:
            pixel = np.asarray(image)[0, 0].tolist()
        numbers.append(pixel[0] * 256 + pixel[1])
    assert numbers == [0, 799, 10_000, 10_199]
    provenance = json.loads((root / 'kitti/source.json').read_text())
    assert provenance['tfds'] == 'kitti/3.3.0'
    assert provenance['splits']['val200'] == 'validation[0:200]'
    assert prepare_tasks(root, tmp_path, ['kitti'], say=lambda _: None) == {}  # left alone


def test_jpeg_as_in_the_common_zip(stand_in, tmp_path):
    assert prepare_tasks(tmp_path / 'out', tmp_path, ['kitti'], image_format='jpeg') == {}
    assert check_root(tmp_path / 'out', ['kitti']).tasks[0].storage == 'zip (JPEG)'
    with pytest.raises(ValueError, match=r"image_format must be one of .* got 'webp'"):
        prepare_tasks(tmp_path / 'out', tmp_path, ['kitti'], image_format='webp')


def test_manual_downloads_and_versions_are_explained(stand_in, tmp_path, capsys):
    arguments = ['prepare', str(tmp_path / 'out'), '--tfds-dir', str(tmp_path), '--tasks', 'resisc45']
    assert main(arguments) == 1
    assert 'is defined on resisc45 version 3.*' in capsys.readouterr().err
    assert main([*arguments, '--any-version']) == 1
    error = capsys.readouterr().err
    assert 'Manual directory does not exist' in error
    assert 'needs a manual download: NWPU-RESISC45.rar' in error
    assert not (tmp_path / 'out/resisc45').exists()


def test_a_download_that_fails_does_not_keep_the_other_tasks_from_being_written(stand_in, tmp_path, monkeypatch):
    class NonMatchingChecksumError(Exception):
        """As TFDS's, which is a plain exception."""

    def download_and_prepare(self):
        if self.name == 'resisc45':
            raise NonMatchingChecksumError('got another file')

    monkeypatch.setattr(NonMatchingChecksumError, '__module__', 'tensorflow_datasets.core.download.download_manager')
    monkeypatch.setattr(StandInBuilder, 'download_and_prepare', download_and_prepare)
    failures = prepare_tasks(tmp_path / 'out', tmp_path, ['resisc45', 'kitti'], any_version=True)
    assert list(failures) == ['resisc45']
    assert failures['resisc45'].startswith('resisc45/4.0.0 could not be downloaded and prepared: got another file')
    assert (tmp_path / 'out/kitti/test.txt').is_file()


def test_records_are_read_without_writing_them_out(stand_in, tmp_path):
    (tmp_path / 'kitti/3.3.0').mkdir(parents=True)
    (tmp_path / 'kitti/3.3.0/dataset_info.json').write_text('{}')
    dataset = VTAB1K(tmp_path, 'kitti', 'val200')
    assert dataset.source.kind == 'tfds'
    assert dataset.read_image(3)[0, 0].tolist() == [7, 10_003 % 256, 10_003 // 256]  # BGR
    assert dataset.labels[:3].tolist() == [1, 2, 0]
    report = check_root(tmp_path, ['kitti'])
    assert (report.num_faults, report.tasks[0].storage) == (0, 'TFDS')
    assert 'val200 is validation[0:200] of kitti/3.3.0' in report.tasks[0].notes
    found = report.tasks[0].lists
    assert {split: found[split].count for split in SPLITS} == dict(zip(SPLITS, (800, 200, 1000, 711), strict=True))
    assert found['val200'].list_hash == dataset.list_hash
    digest = hashlib.sha256(b''.join(dataset.read_with_hash(index)[1] for index in range(200)))
    assert found['val200'].images_hash == digest.hexdigest()
    assert check_root(tmp_path, ['kitti'], read_images=False).tasks[0].lists == {}
    with pytest.raises(PermissionError):
        VTAB1K(tmp_path, 'kitti', 'test', open_splits=('train800',))


def test_records_that_cannot_be_read_are_a_fault(stand_in, tmp_path, monkeypatch):
    class DataLossError(Exception):
        """As TensorFlow's, which is neither an OSError nor a ValueError."""

    def as_dataset(self, split, **options):
        yield make_example(0)
        raise DataLossError('truncated record at 3655')

    (tmp_path / 'kitti/3.3.0').mkdir(parents=True)
    (tmp_path / 'kitti/3.3.0/dataset_info.json').write_text('{}')
    monkeypatch.setattr(StandInBuilder, 'as_dataset', as_dataset)
    monkeypatch.setattr(DataLossError, '__module__', 'tensorflow.python.framework.errors_impl')
    faults = check_root(tmp_path, ['kitti']).tasks[0].faults
    assert len(faults) == len(SPLITS)
    assert faults[3] == 'test: test of kitti/3.3.0 is unreadable or truncated: truncated record at 3655'
    with pytest.raises(ValueError, match=r'train\[:800\] of kitti/3.3.0'):
        VTAB1K(tmp_path, 'kitti', 'train800val200')


def test_records_that_are_not_there_are_a_fault(stand_in, tmp_path, monkeypatch):
    monkeypatch.setattr(StandInBuilder, 'is_prepared', False)
    (tmp_path / 'kitti/3.3.0').mkdir(parents=True)
    (tmp_path / 'kitti/3.3.0/dataset_info.json').write_text('{}')
    assert 'lacks the splits' in check_root(tmp_path, ['kitti']).tasks[0].faults[0]
