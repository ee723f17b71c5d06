"""Archives for the test server: written, checked, refused."""

import zipfile
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from mmvil.segmentation.submission import check_archive, list_test_images, without_annotations, write_archive

SIZES = {'ADE_test_00000001': (6, 8), 'ADE_test_00000002': (9, 5)}


def predictions(seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.integers(0, 150, size) for name, size in SIZES.items()}


def png(values, mode=None):
    content = BytesIO()
    Image.fromarray(values, mode).save(content, format='PNG')
    return content.getvalue()


def archive_with(path, members):
    with zipfile.ZipFile(path, 'w') as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


def good_members():
    return [(f'{name}.png', png((labels + 1).astype(np.uint8))) for name, labels in predictions().items()]


def test_values_names_and_sizes(tmp_path):
    path = tmp_path / 'out' / 'submission.zip'
    extreme = {**predictions(), 'ADE_test_00000001': np.array([[0, 149]] * 2)}
    sizes = {**SIZES, 'ADE_test_00000001': (2, 2)}
    assert write_archive(extreme.items(), path, sizes, count=2) == 2
    with zipfile.ZipFile(path) as archive:
        assert sorted(archive.namelist()) == ['ADE_test_00000001.png', 'ADE_test_00000002.png']
        first = Image.open(BytesIO(archive.read('ADE_test_00000001.png')))
        assert first.mode == 'L'
        assert np.asarray(first).tolist() == [[1, 150], [1, 150]]
        second = np.asarray(Image.open(BytesIO(archive.read('ADE_test_00000002.png'))))
        assert np.array_equal(second, extreme['ADE_test_00000002'] + 1)
    assert [file.name for file in path.parent.iterdir()] == ['submission.zip']


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'ADE_test_00000001': np.full((6, 8), 150)}, 'must be from 0 to 149'),
        ({'ADE_test_00000001': np.full((6, 8), -1)}, 'must be from 0 to 149'),
        ({'ADE_test_00000001': np.zeros((6, 8))}, 'expected integers'),
        ({'ADE_test_00000001': np.zeros((8, 6), int)}, r'is \(8, 6\), the image has \(6, 8\)'),
        ({'ADE_val_00000001': np.zeros((6, 8), int)}, 'no name such as'),
        ({'ADE_test_00000003': np.zeros((6, 8), int)}, '1 unknown pictures: ADE_test_00000003'),
    ],
)
def test_wrong_predictions_leave_no_archive(tmp_path, change, message):
    path = tmp_path / 'submission.zip'
    with pytest.raises(ValueError, match=message):
        write_archive({**predictions(), **change}.items(), path, SIZES, count=None)
    assert list(tmp_path.iterdir()) == []


def test_interrupted_run_leaves_the_old_archive(tmp_path):
    path = tmp_path / 'submission.zip'
    path.write_bytes(b'old')

    def failing():
        yield 'ADE_test_00000001', np.zeros((6, 8), int)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_archive(failing(), path, SIZES)
    assert path.read_bytes() == b'old'
    assert len(list(tmp_path.iterdir())) == 1


def test_count_is_that_of_the_release(tmp_path):
    path = archive_with(tmp_path / 'a.zip', good_members())
    with pytest.raises(ValueError, match='2 pictures instead of 3352'):
        check_archive(path, SIZES)
    assert check_archive(path, SIZES, count=2) == check_archive(path, count=None) == 2


@pytest.mark.parametrize(
    ('member', 'message'),
    [
        (('sub/ADE_test_00000001.png', png(np.ones((6, 8), np.uint8))), 'no name such as'),
        (('ADE_test_00000001.jpg', b''), 'no name such as'),
        (('ADE_test_00000001.png', png(np.zeros((6, 8), np.uint8))), 'must be from 1 to 150, got 0 to 0'),
        (('ADE_test_00000001.png', png(np.full((6, 8), 151, np.uint8))), 'must be from 1 to 150, got 151 to 151'),
        (('ADE_test_00000001.png', png(np.ones((6, 8, 3), np.uint8))), 'of mode RGB'),
        (('ADE_test_00000001.png', png(np.ones((8, 6), np.uint8))), r'is \(8, 6\), the image has \(6, 8\)'),
        (('ADE_test_00000001.png', good_members()[0][1][:60]), 'cannot be read'),
        (('ADE_test_00000001.png', b'no picture'), 'cannot be read'),
        (('ADE_test_00000002.png', good_members()[1][1]), 'names that occur twice: ADE_test_00000002.png'),
    ],
)
@pytest.mark.filterwarnings('ignore:Duplicate name')
def test_wrong_members_are_named(tmp_path, member, message):
    path = archive_with(tmp_path / 'a.zip', [member, good_members()[1]])
    with pytest.raises(ValueError, match=message):
        check_archive(path, SIZES, count=2)


def test_missing_pictures_are_named(tmp_path):
    path = archive_with(tmp_path / 'a.zip', good_members()[:1])
    with pytest.raises(ValueError, match='1 missing pictures: ADE_test_00000002'):
        check_archive(path, SIZES, count=None)


def test_no_zip_file(tmp_path):
    with pytest.raises(FileNotFoundError, match='does not exist'):
        check_archive(tmp_path / 'a.zip')
    (tmp_path / 'a.zip').write_bytes(b'nothing')
    with pytest.raises(ValueError, match='is not a zip file'):
        check_archive(tmp_path / 'a.zip')


def test_image_folder_is_checked(tmp_path):
    with pytest.raises(FileNotFoundError, match='does not exist'):
        list_test_images(tmp_path / 'none')
    with pytest.raises(ValueError, match='holds 0 test images'):
        list_test_images(tmp_path, None)
    (tmp_path / 'ADE_test_00000001.jpg').touch()
    with pytest.raises(ValueError, match=r'holds 1 test images .* expected 3352'):
        list_test_images(tmp_path)
    (tmp_path / 'ADE_val_00000001.jpg').touch()
    with pytest.raises(ValueError, match=r'no test images .*: ADE_val_00000001\.jpg'):
        list_test_images(tmp_path)


def test_pipelines_lose_their_masks():
    pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='mmvil.LoadSegAnnotations', num_classes=150),
        dict(type='TestTimeAug', transforms=[[dict(type='Resize')], [dict(type='LoadAnnotations')]]),
    ]
    assert without_annotations(pipeline) == [
        dict(type='LoadImageFromFile'),
        dict(type='TestTimeAug', transforms=[[dict(type='Resize')]]),
    ]
    assert len(pipeline) == 3
