import io
import pickle
import shutil
import zipfile

import numpy as np
import pytest
from mmengine.registry import DATASETS
from PIL import Image

from mmvil.datasets.vtab import VTAB1K, decode_image
from mmvil.datasets.vtab_lists import Entry, hash_entries, parse_list
from mmvil.datasets.vtab_sources import DataRoot, RestrictedSource
from mmvil.datasets.vtab_tasks import TASKS
from mmvil.evaluation.miniature import write_miniature

SIZES = {'train800': 8, 'val200': 4, 'train800val200': 12, 'test': 6}
RESIZE = dict(type='mmpretrain.Resize', scale=(16, 16), keep_ratio=False, interpolation='bicubic', backend='pillow')


@pytest.fixture(scope='module')
def template(tmp_path_factory):
    return write_miniature(tmp_path_factory.mktemp('template'), ['cifar', 'kitti'], SIZES)


@pytest.fixture
def root(tmp_path, template):
    return shutil.copytree(template, tmp_path / 'vtab-1k')


def zip_folder(folder, archive, prefix):
    with zipfile.ZipFile(archive, 'w') as opened:
        for path in sorted(folder.rglob('*')):
            opened.write(path, prefix + path.relative_to(folder).as_posix())


def jpeg(array):
    content = io.BytesIO()
    Image.fromarray(array).save(content, format='JPEG')
    return content.getvalue()


# --- lists -----------------------------------------------------------------------------------------------------------


def test_every_fault_of_a_list_is_reported_at_once():
    content = b'a.jpg 0\r\n\nb c.jpg 9\nc.jpg -1\nd.jpg x\na.jpg 3\nlonely\n../e.jpg 1\n/f.jpg 1\ng.jpg 10\n\nh.jpg 1'
    entries, faults = parse_list('test.txt', content, num_classes=10, sizes=(8, 9))
    assert entries == [Entry('a.jpg', 0, 1), Entry('b c.jpg', 9, 3), Entry('h.jpg', 1, 12)]
    assert faults == [
        'test.txt: CRLF line ends at line 1',
        'test.txt: blank lines at lines 2, 11',
        'test.txt line 4: the label must be from 0 to 9, got -1',
        "test.txt line 5: the label must be a whole number, got 'x'",
        'test.txt line 6: a.jpg was listed before, at line 1',
        "test.txt line 7: expected a path, a space and a label, got 'lonely'",
        "test.txt line 8: the path must stay in the folder of the task and use forward slashes, got '../e.jpg'",
        "test.txt line 9: the path must stay in the folder of the task and use forward slashes, got '/f.jpg'",
        'test.txt line 10: the label must be from 0 to 9, got 10',
        'test.txt: 10 lines, expected 8 or 9',
    ]


def test_a_good_list_has_no_faults_and_its_hash_depends_on_content_only():
    entries, faults = parse_list('val200.txt', b'a b.jpg 1\nc.jpg 0', 2, (2,))
    crlf, crlf_faults = parse_list('val200.txt', b'a b.jpg 1\r\nc.jpg 0\r\n', 2, (2,))
    assert faults == []
    assert crlf_faults == ['val200.txt: CRLF line ends at lines 1-2']
    assert hash_entries(entries) == hash_entries(crlf)
    assert hash_entries(entries) != hash_entries(entries[::-1])
    assert hash_entries(entries) != hash_entries([entries[0], Entry('c.jpg', 1, 2)])


def test_a_list_that_is_no_text():
    assert parse_list('test.txt', b'\xff\xfe\x00', 2, (1,))[1][0].startswith('test.txt: not UTF-8 text')


# --- images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('mode', ['L', 'LA', 'P', 'RGBA', 'CMYK', '1', 'I;16'])
def test_every_kind_of_image_becomes_three_channels(mode):
    content = io.BytesIO()
    grey = Image.fromarray(np.full((5, 7), 200, np.uint8))
    image = Image.fromarray(np.full((5, 7), 200, np.uint16)) if mode == 'I;16' else grey.convert(mode)
    image.save(content, format='TIFF')
    decoded = decode_image(content.getvalue(), 'x')
    assert (decoded.shape, decoded.dtype) == ((5, 7, 3), np.uint8)
    assert (decoded[..., 0] == decoded[..., 2]).all()


def test_colours_come_in_the_order_of_mmcv():
    red = jpeg(np.broadcast_to(np.array([250, 5, 5], np.uint8), (8, 8, 3)).copy())
    blue, _, red_channel = decode_image(red, 'x')[4, 4]
    assert red_channel > 200 > 50 > blue


def test_a_truncated_image_is_refused_not_filled_with_grey():
    content = jpeg(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    for broken in (content[: len(content) // 2], content[:-200], b'', b'no image'):
        with pytest.raises(ValueError, match=r'images/test/000003.jpg \(line 4\) is unreadable or truncated'):
            decode_image(broken, 'images/test/000003.jpg (line 4)')


# --- data set --------------------------------------------------------------------------------------------------------


def test_builds_from_a_config_with_labels_and_classes(root):
    dataset = DATASETS.build(
        dict(
            type='mmvil.VTAB1K',
            data_root=str(root),
            task='cifar100',
            split='val200',
            cached_pipeline=[RESIZE],
            pipeline=[dict(type='mmpretrain.PackInputs')],
        )
    )
    assert len(dataset) == 4
    assert len(dataset.CLASSES) == 100  # the head's size comes from the table, not from the labels that occur
    sample = dataset[1]
    assert sample['inputs'].shape == (3, 16, 16)
    assert int(sample['data_samples'].gt_label) == dataset.labels[1]
    assert dataset.task.name == 'cifar'


def test_images_are_decoded_once_and_a_pipeline_cannot_spoil_them(root, monkeypatch):
    def blacken(results):
        results['img'][:] = 0
        return results

    dataset = VTAB1K(root, 'cifar', 'train800', cached_pipeline=[RESIZE], pipeline=[blacken])
    reads = []
    read = dataset.source.source.read
    monkeypatch.setattr(dataset.source.source, 'read', lambda path: reads.append(path) or read(path))
    first = dataset.read_image(0)
    for _ in range(3):
        assert dataset[0]['img'].max() == 0
    assert (dataset.read_image(0) == first).all()
    assert first.max() > 0
    assert len(reads) == 2  # one by hand, one by the first access


def test_beyond_the_memory_limit_images_are_decoded_at_every_access(root):
    limit = 3 * 16 * 16 * 3 / (1 << 30)
    dataset = VTAB1K(root, 'cifar', 'train800', cached_pipeline=[RESIZE], memory_limit=limit)
    images = [dataset[index]['img'] for index in range(8)]
    assert len(dataset._kept) == 3
    assert all((dataset[index]['img'] == image).all() for index, image in enumerate(images))


def test_extreme_aspect_ratios_are_squashed_not_cropped(root):
    wide = np.zeros((375, 1242, 3), np.uint8)
    wide[:, :621] = 255
    (root / 'kitti/images/val200/000000.jpg').write_bytes(jpeg(wide))
    image = VTAB1K(root, 'kitti', 'val200', cached_pipeline=[RESIZE]).read_image(0)
    assert image.shape == (16, 16, 3)
    assert image[:, :7].min() > 240
    assert image[:, 9:].max() < 15


def test_the_resize_is_the_published_one(root):
    image = VTAB1K(root, 'kitti', 'val200', cached_pipeline=[RESIZE]).read_image(0)
    with Image.open(root / 'kitti/images/val200/000000.jpg') as stored:
        expected = np.asarray(stored.convert('RGB').resize((16, 16), Image.Resampling.BICUBIC))
    assert (image[:, :, ::-1] == expected).all()


def test_missing_classes_are_normal(root):
    path = root / 'cifar/train800.txt'
    path.write_text(''.join(line.rsplit(' ', 1)[0] + ' 7\n' for line in path.read_text().splitlines()))
    train = VTAB1K(root, 'cifar', 'train800')
    assert (train.labels == 7).all()
    assert len(train.CLASSES) == 100
    assert set(VTAB1K(root, 'cifar', 'val200').labels) - set(train.labels)  # validation classes unseen in training


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda path: path.unlink(), r'images/val200/000002.jpg \(val200.txt line 3\) does not exist'),
        (lambda path: path.write_bytes(path.read_bytes()[:300]), r'line 3\) is unreadable or truncated'),
        (lambda path: path.write_bytes(b''), r'line 3\) is unreadable or truncated'),
    ],
)
def test_a_bad_image_stops_with_its_name_and_line(root, change, message):
    change(root / 'cifar/images/val200/000002.jpg')
    dataset = VTAB1K(root, 'cifar', 'val200')
    with pytest.raises(ValueError, match=message):
        dataset.read_image(2)


def test_list_faults_stop_the_data_set_with_all_of_them(root):
    path = root / 'cifar/val200.txt'
    path.write_bytes(path.read_bytes().replace(b'\n', b'\r\n') + b'\nx.jpg 100\n')
    with pytest.raises(ValueError, match='has 4 faults') as error:
        VTAB1K(root, 'cifar', 'val200')
    assert 'CRLF line ends at lines 1-4' in str(error.value)
    assert 'from 0 to 99, got 100' in str(error.value)


def test_unknown_names(root):
    with pytest.raises(ValueError, match=r"split must be one of .* got 'val'"):
        VTAB1K(root, 'cifar', 'val')
    with pytest.raises(ValueError, match="unknown VTAB task 'cif'"):
        VTAB1K(root, 'cif', 'val200')
    with pytest.raises(FileNotFoundError, match='has no dtd'):
        VTAB1K(root, 'dtd', 'val200')
    with pytest.raises(FileNotFoundError, match='does not exist'):
        VTAB1K(root / 'nowhere', 'dtd', 'val200')


# --- layouts ---------------------------------------------------------------------------------------------------------


def arrange(root, layout, tmp_path):
    if layout == 'parent folder':
        return root.parent
    if 'zip' in layout and 'task' not in layout:
        (root / 'smoke.json').unlink()  # a miniature is not read from a zip
    if layout == 'big zip':
        zip_folder(root, tmp_path / 'all.zip', 'vtab-1k/')
        return tmp_path / 'all.zip'
    if layout == 'zip without top folder':
        zip_folder(root, tmp_path / 'flat.zip', '')
        return tmp_path / 'flat.zip'
    if layout in ('zip per task', 'zip per task without folder'):
        zip_folder(root / 'cifar', root / 'cifar.zip', 'cifar/' if layout == 'zip per task' else '')
        shutil.rmtree(root / 'cifar')
    if layout == 'alias':
        (root / 'cifar').rename(root / 'cifar100')
    return root


@pytest.mark.parametrize(
    'layout',
    [
        'folder',
        'parent folder',
        'alias',
        'big zip',
        'zip without top folder',
        'zip per task',
        'zip per task without folder',
    ],
)
def test_layouts_give_the_same_data(root, layout, tmp_path):
    expected = VTAB1K(root, 'cifar', 'val200')
    expected_images = [expected.read_image(index) for index in range(4)]
    place = arrange(root, layout, tmp_path)
    if place.suffix == '.zip':  # without its mark, the sizes of the miniature are not accepted
        with pytest.raises(ValueError, match='4 lines, expected 200'):
            VTAB1K(place, 'cifar', 'val200')
        source = DataRoot(place).source(TASKS['cifar'])
        assert source.names() >= {'val200.txt', 'images/val200/000003.jpg'}
        images = [decode_image(source.read(f'images/val200/00000{index}.jpg'), '') for index in range(4)]
    else:
        dataset = VTAB1K(place, 'cifar', 'val200')
        assert dataset.list_hash == expected.list_hash
        dataset = pickle.loads(pickle.dumps(dataset))  # as worker processes get it
        images = [dataset.read_image(index) for index in range(4)]
    assert all((a == b).all() for a, b in zip(images, expected_images, strict=True))


def test_a_zip_cut_off_in_the_download_is_named(root, tmp_path):
    zip_folder(root, tmp_path / 'all.zip', 'vtab-1k/')
    content = (tmp_path / 'all.zip').read_bytes()
    (tmp_path / 'all.zip').write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r'all.zip is no zip or was cut off'):
        DataRoot(tmp_path / 'all.zip')


def test_the_big_zip_is_read_like_its_folder(root, tmp_path):
    """With the sizes of VTAB-1K, which is what a zip has to have."""
    paths = [f'images/val200/{index:06d}.jpg' for index in range(200)]
    labels = [index % 100 for index in range(200)]
    with zipfile.ZipFile(tmp_path / 'all.zip', 'w', zipfile.ZIP_DEFLATED) as opened:
        opened.writestr('vtab-1k/cifar/val200.txt', ''.join(f'{p} {n}\n' for p, n in zip(paths, labels, strict=True)))
        for index, path in enumerate(paths):
            opened.writestr(f'vtab-1k/cifar/{path}', jpeg(np.full((8, 8, 3), index, np.uint8)))
    dataset = VTAB1K(tmp_path / 'all.zip', 'cifar', 'val200')
    assert dataset.labels.tolist() == labels
    dataset = pickle.loads(pickle.dumps(dataset))  # as worker processes get it
    assert [int(dataset[index]['img'].mean()) for index in (0, 7, 199)] == [0, 7, 199]
    folder = tmp_path / 'extracted'
    zipfile.ZipFile(tmp_path / 'all.zip').extractall(folder)
    assert VTAB1K(folder, 'cifar', 'val200').list_hash == dataset.list_hash


def test_a_zipped_miniature_is_not_taken_for_the_real_thing(root, tmp_path):
    for number, prefix in enumerate(('', 'vtab-1k/')):
        zip_folder(root, tmp_path / f'{number}.zip', prefix)
        with pytest.raises(ValueError, match='the miniature is read from its folder only'):
            DataRoot(tmp_path / f'{number}.zip')


def test_damage_inside_of_a_zip_is_named(root):
    zip_folder(root / 'cifar', root / 'cifar.zip', 'cifar/')
    stored = (root / 'cifar/images/val200/000001.jpg').read_bytes()
    shutil.rmtree(root / 'cifar')
    content = (root / 'cifar.zip').read_bytes()
    assert content.count(stored) == 2  # its own copy in train800val200
    (root / 'cifar.zip').write_bytes(content.replace(stored, stored[:-9] + b'?' * 9))
    with pytest.raises(ValueError, match=r'000001.jpg \(val200.txt line 2\) is unreadable: .*damaged'):
        VTAB1K(root, 'cifar', 'val200').read_image(1)


def test_other_layouts_are_explained(root, tmp_path):
    (root / 'dtd/banded').mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match='folders of classes are not enough'):
        VTAB1K(root, 'dtd', 'val200')
    (tmp_path / 'vtab_trainval_splits.json').write_text('{}')
    with pytest.raises(FileNotFoundError, match='16 of the 19 sets but no images'):
        VTAB1K(tmp_path, 'svhn', 'val200')


def test_closed_splits_cannot_be_read(root):
    with pytest.raises(PermissionError, match=r'test of .* is closed here'):
        VTAB1K(root, 'cifar', 'test', open_splits=('train800', 'val200'))
    guarded = RestrictedSource(DataRoot(root).source(TASKS['cifar']), ('train800', 'val200'))
    for path in (
        'test.txt',
        'images/test/000000.jpg',
        'train800val200.txt',
        'images/../test.txt',
        'images/val200/../test/0.jpg',
    ):
        with pytest.raises(PermissionError):
            guarded.read(path)
    assert not any('test' in name or 'train800val200' in name for name in guarded.names())
    assert guarded.read('val200.txt')
    with pytest.raises(ValueError, match='unknown splits'):
        RestrictedSource(guarded.source, ('val',))
