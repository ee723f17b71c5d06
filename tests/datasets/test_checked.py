"""Data sets that refuse wrong paths and annotations at the start."""

import re
from pathlib import Path

import numpy as np
import pytest
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image

from mmvil.datasets.checked import NUM_PROBES, read_annotations


@pytest.fixture(scope='module', autouse=True)
def _scope():
    init_default_scope('mmpretrain')


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three images in two class folders."""
    for name in ('cat/a.png', 'cat/b c.png', 'dog/d.png'):
        path = tmp_path / 'train' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(path)
    return tmp_path


def build(root: Path, kind: str = 'CustomDataset', **options):
    return DATASETS.build({'type': f'mmvil.{kind}', 'data_root': str(root), **options})


def write(root: Path, text: str) -> str:
    (root / 'list.txt').write_text(text)
    return 'list.txt'


def test_folders_as_upstream(images):
    dataset = build(images, data_prefix='train')
    assert [(Path(item['img_path']).name, item['gt_label']) for item in dataset] == [
        ('a.png', 0),
        ('b c.png', 0),
        ('d.png', 1),
    ]
    assert dataset.CLASSES == ('cat', 'dog')


def test_annotation_list_as_upstream(images):
    text = 'cat/b c.png 1\n\ndog/d.png 0\n'
    dataset = build(images, data_prefix='train', ann_file=write(images, text), classes=['x', 'y'])
    assert [item['gt_label'] for item in dataset] == [1, 0]
    assert dataset[0]['img_path'] == str(images / 'train/cat/b c.png')


def test_list_without_labels(images):
    dataset = build(images, data_prefix='train', ann_file=write(images, 'dog/d.png\n'), with_label=False)
    assert dataset[0]['img_path'] == str(images / 'train/dog/d.png')
    with pytest.raises(FileNotFoundError, match=r'1 of 1 probed images do not exist, for example .*gone\.png'):
        build(images, data_prefix='train', ann_file=write(images, 'gone.png\n'), with_label=False)


@pytest.mark.parametrize('kind', ['CustomDataset', 'ImageNet'])
def test_missing_folder(tmp_path, kind):
    with pytest.raises(FileNotFoundError, match=rf'{kind}: image folder .*nowhere/train does not exist.*data_root'):
        build(tmp_path / 'nowhere', kind, data_prefix='train')


def test_missing_annotation_list(images):
    with pytest.raises(FileNotFoundError, match=r'annotation list .*gone\.txt does not exist'):
        build(images, data_prefix='train', ann_file='gone.txt')


def test_missing_image(images):
    with pytest.raises(FileNotFoundError, match=r'1 of 2 probed images do not exist, for example .*gone\.png'):
        build(images, data_prefix='train', ann_file=write(images, 'dog/d.png 1\ncat/gone.png 0\n'))


def test_probes_are_few_and_spread(images, monkeypatch):
    looked = []
    monkeypatch.setattr('mmvil.datasets.checked.os.path.isfile', lambda path: looked.append(path) or True)
    lines = ''.join(f'{index}.png 0\n' for index in range(1000))
    build(images, data_prefix='train', ann_file=write(images, lines))
    assert NUM_PROBES <= len(looked) <= 2 * NUM_PROBES
    assert int(Path(looked[-1]).stem) > 900


def test_wrong_number_of_class_folders(images):
    with pytest.raises(ValueError, match=r'ImageNet: .*train: The number of subfolders \(2\)'):
        build(images, 'ImageNet', data_prefix='train')


@pytest.mark.parametrize(
    ('line', 'num_classes'),
    [
        pytest.param('a.png', None, id='no-label'),
        pytest.param('a.png one', None, id='word'),
        pytest.param('a.png 1.5', None, id='fraction'),
        pytest.param('a.png -1', None, id='negative'),
        pytest.param('a.png 1000', 1000, id='too-high'),
        pytest.param(' 7', 1000, id='no-file'),
    ],
)
def test_bad_line_is_shown(tmp_path, line, num_classes):
    (tmp_path / 'list.txt').write_text(f'ok.png 0\n{line}\n')
    with pytest.raises(ValueError, match=rf'list\.txt has 1 bad lines.*line 2: {re.escape(repr(line))}'):
        read_annotations(str(tmp_path / 'list.txt'), num_classes)


def test_many_bad_lines_are_cut_short(tmp_path):
    (tmp_path / 'list.txt').write_text('bad\n' * 100)
    with pytest.raises(ValueError, match=r"has 100 bad lines.*line 5: 'bad'; \.\.\.$"):
        read_annotations(str(tmp_path / 'list.txt'), 10)


def test_empty_list(tmp_path):
    (tmp_path / 'list.txt').write_text('\n')
    with pytest.raises(ValueError, match='is empty'):
        read_annotations(str(tmp_path / 'list.txt'), None)
