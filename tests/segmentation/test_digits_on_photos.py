"""The embedded data set: written once, whole, with the right labels and split."""

import numpy as np
import pytest
from PIL import Image

from mmvil.segmentation import DigitsOnPhotos, digits_on_photos
from mmvil.segmentation.digits_on_photos import write_digits_on_photos


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(digits_on_photos, 'COUNTS', {'training': 6, 'validation': 4})


def files(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob('*') if path.is_file()}


def test_layout_and_labels(small, tmp_path):
    root = write_digits_on_photos(tmp_path / 'data' / 'digits')
    for split, count in (('training', 6), ('validation', 4)):
        images = sorted((root / 'images' / split).glob('*.jpg'))
        masks = sorted((root / 'annotations' / split).glob('*.png'))
        assert [path.stem for path in images] == [path.stem for path in masks]
        assert len(images) == count
        for image, mask in zip(images, masks, strict=True):
            assert np.asarray(Image.open(image)).shape == (96, 96, 3)
            labels = np.asarray(Image.open(mask))
            assert labels.shape == (96, 96)
            assert labels.max() <= 11
            assert (labels == 1).mean() > 0.5
            assert {0, 1} < set(np.unique(labels))
    assert [path.name for path in root.parent.iterdir()] == ['digits']


def test_same_data_every_time_and_written_only_once(small, tmp_path):
    first, second = (write_digits_on_photos(tmp_path / name) for name in ('a', 'b'))
    assert files(first) == files(second)
    stamp = (first / 'description.json').stat().st_mtime_ns
    assert write_digits_on_photos(first) == first
    assert (first / 'description.json').stat().st_mtime_ns == stamp


def test_splits_share_no_digit():
    classes = np.arange(1797) % 10
    train, val = (digits_on_photos._split_digits(classes, split) for split in ('training', 'validation'))
    assert sorted([*train, *val]) == list(range(1797))
    assert np.bincount(classes[val]).min() >= 35


@pytest.mark.parametrize('content', [None, '{"format": 0}'])
def test_other_data_is_not_touched(small, tmp_path, content):
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'photo.jpg').touch()
    if content:
        (tmp_path / 'mine' / 'description.json').write_text(content)
    with pytest.raises(FileExistsError, match='does not hold the digits-on-photographs data'):
        write_digits_on_photos(tmp_path / 'mine')
    assert (tmp_path / 'mine' / 'photo.jpg').exists()


def test_interrupted_writing_leaves_nothing(small, tmp_path, monkeypatch):
    original = digits_on_photos._draw

    def failing(split):
        yield next(iter(original(split)))
        raise KeyboardInterrupt

    monkeypatch.setattr(digits_on_photos, '_draw', failing)
    with pytest.raises(KeyboardInterrupt):
        write_digits_on_photos(tmp_path / 'digits')
    assert list(tmp_path.iterdir()) == []


def test_faster_process_wins(small, tmp_path, monkeypatch):
    original, root = digits_on_photos._draw, tmp_path / 'digits'

    def slow(split):
        if split == 'validation':
            monkeypatch.setattr(digits_on_photos, '_draw', original)
            write_digits_on_photos(root)
        yield from original(split)

    monkeypatch.setattr(digits_on_photos, '_draw', slow)
    assert write_digits_on_photos(root) == root
    assert [path.name for path in tmp_path.iterdir()] == ['digits']


def test_dataset_shifts_the_labels(small, tmp_path):
    pipeline = [
        dict(type='mmvil.LoadCheckedImage'),
        dict(type='mmvil.LoadSegAnnotations', num_classes=11),
        dict(type='PackSegInputs'),
    ]
    data = DigitsOnPhotos(
        data_root=str(tmp_path / 'digits'),
        data_prefix=dict(img_path='images/validation', seg_map_path='annotations/validation'),
        pipeline=pipeline,
    )
    assert len(data) == 4
    labels = data[0]['data_samples'].gt_sem_seg.data[0].numpy()
    stored = np.asarray(Image.open(data.get_data_info(0)['seg_map_path']))
    assert (labels[stored == 0] == 255).all()
    assert (labels[stored > 0] == stored[stored > 0] - 1).all()
    assert data.metainfo['classes'][labels[stored > 1].min()] in '0123456789'


def test_without_download_the_data_must_be_there(tmp_path):
    with pytest.raises(FileNotFoundError, match='does not exist'):
        DigitsOnPhotos(data_root=str(tmp_path / 'none'), download=False, data_prefix=dict(img_path='a'))
    assert list(tmp_path.iterdir()) == []
