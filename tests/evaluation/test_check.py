import shutil
import zipfile

import pytest
from PIL import Image

from mmvil.datasets.vtab_tasks import SPLITS, TASKS
from mmvil.evaluation.check import check_root, format_report
from mmvil.evaluation.miniature import write_miniature

SIZES = {'train800': 8, 'val200': 4, 'train800val200': 12, 'test': 6}


@pytest.fixture(scope='module')
def template(tmp_path_factory):
    return write_miniature(tmp_path_factory.mktemp('template'), None, SIZES)


@pytest.fixture
def root(tmp_path, template):
    return shutil.copytree(template, tmp_path / 'vtab-1k')


def faults_of(report):
    return {task.task: task.faults for task in report.tasks if task.faults}


def test_good_data_has_no_faults(template):
    report = check_root(template)
    assert faults_of(report) == {}
    assert [task.task for task in report.tasks] == list(TASKS)
    assert all(task.storage == 'zip (JPEG)' for task in report.tasks)
    assert report.smoke
    assert 'SMOKE data' in format_report(report)
    assert any('of 397 classes, which is normal' in note for task in report.tasks for note in task.notes)
    assert any('classes of val200 do not occur in train800' in note for task in report.tasks for note in task.notes)
    assert len({found.list_hash for task in report.tasks for found in task.lists.values()}) > 19


def test_every_fault_of_every_task_is_listed_at_once(root):
    shutil.rmtree(root / 'dtd')
    (root / 'svhn/test.txt').unlink()
    (root / 'cifar/images/test/000001.jpg').unlink()
    image = root / 'cifar/images/val200/000003.jpg'
    image.write_bytes(image.read_bytes()[:250])
    lines = (root / 'kitti/train800.txt').read_text().splitlines()
    (root / 'kitti/train800.txt').write_bytes('\r\n'.join([*lines[:3], '', lines[0], 'a b.jpg 4', 'c.jpg -1']).encode())
    (root / 'eurosat/val200.txt').write_text((root / 'eurosat/test.txt').read_text())
    faults = faults_of(check_root(root))
    assert set(faults) == {'dtd', 'svhn', 'cifar', 'kitti', 'eurosat'}
    assert faults['dtd'][0].startswith('missing: ')
    assert faults['svhn'] == ['test.txt is missing']
    assert faults['cifar'][0].startswith('val200.txt line 4: images/val200/000003.jpg is unreadable or truncated')
    assert faults['cifar'][1:] == ['test.txt line 2: images/test/000001.jpg is missing']
    assert [fault.split(':')[0] for fault in faults['kitti']] == [
        'train800.txt',  # CRLF
        'train800.txt',  # blank line
        'train800.txt line 5',  # listed before
        'train800.txt line 6',  # label too high
        'train800.txt line 7',  # negative label
        'train800.txt',  # number of lines
    ]
    assert 'val200.txt: 6 lines, expected 4' in faults['eurosat']
    assert 'val200.txt line 1: images/test/000000.jpg belongs to test' in faults['eurosat']


def test_lists_only_finds_missing_files_without_reading_images(root):
    (root / 'cifar/images/test/000001.jpg').unlink()
    (root / 'cifar/images/test/000002.jpg').write_bytes(b'')
    report = check_root(root, ['cifar'], read_images=False)
    assert faults_of(report) == {'cifar': ['test.txt line 2: images/test/000001.jpg is missing']}
    assert report.tasks[0].storage == 'not read'


def test_some_splits_only(root):
    (root / 'cifar/test.txt').unlink()
    assert faults_of(check_root(root, ['cifar'], splits=SPLITS[:2])) == {}


def test_hashes_tell_data_apart(root):
    before = check_root(root, ['cifar']).tasks[0].lists
    assert before['train800'].list_hash != before['val200'].list_hash
    lines = (root / 'cifar/val200.txt').read_text().splitlines()
    path, label = lines[0].rsplit(' ', 1)
    (root / 'cifar/val200.txt').write_text('\n'.join([f'{path} {(int(label) + 1) % 100}', *lines[1:]]))
    Image.new('RGB', (8, 8)).save(root / 'cifar/images/test/000000.jpg')
    report = check_root(root, ['cifar']).tasks[0]
    after = report.lists
    assert after['val200'].list_hash != before['val200'].list_hash
    assert after['val200'].images_hash == before['val200'].images_hash
    assert after['test'].list_hash == before['test'].list_hash
    assert after['test'].images_hash != before['test'].images_hash
    assert report.faults == ['the labels of train800val200.txt are not those of train800.txt and val200.txt']


def test_storage_is_told_and_never_mixed(tmp_path, root):
    lossless = write_miniature(tmp_path / 'png', ['cifar'], SIZES, suffix='.png')
    assert check_root(lossless, ['cifar']).tasks[0].storage == 'lossless (PNG)'
    shutil.copy(lossless / 'cifar/images/test/000000.png', root / 'cifar/images/test/000000.jpg')
    report = check_root(root, ['cifar']).tasks[0]
    assert report.faults == ["images of different storage are mixed: ['jpeg', 'png']"]
    assert report.storage == 'mixed'


@pytest.mark.parametrize(('size', 'is_good'), [(6083, False), (6084, True), (6085, True), (6086, False)])
def test_both_revisions_of_caltech101_are_accepted(tmp_path, size, is_good):
    archive = tmp_path / 'vtab-1k.zip'
    with zipfile.ZipFile(archive, 'w') as opened:
        for split, count in zip(SPLITS, (800, 200, 1000, size), strict=True):
            paths = [f'images/{split}/{index:06d}.jpg' for index in range(count)]
            opened.writestr(f'vtab-1k/caltech101/{split}.txt', ''.join(f'{path} 0\n' for path in paths))
            for path in paths:
                opened.writestr(f'vtab-1k/caltech101/{path}', b'')
    report = check_root(archive, ['caltech101'], read_images=False)
    assert not report.smoke
    assert (faults_of(report) == {}) == is_good
    assert f'test has {size} images; revisions with 6084 and 6085 are in use' in report.tasks[0].notes


def test_a_damaged_archive_is_reported_member_by_member(root, tmp_path):
    archive, damaged = tmp_path / 'vtab-1k.zip', ['images/test/000002.jpg', 'val200.txt']
    with zipfile.ZipFile(archive, 'w', zipfile.ZIP_DEFLATED) as opened:
        for path in sorted((root / 'cifar').rglob('*')):
            opened.write(path, f'vtab-1k/cifar/{path.relative_to(root / "cifar").as_posix()}')
        starts = [opened.getinfo(f'vtab-1k/cifar/{name}').header_offset + 30 + 14 + len(name) for name in damaged]
    content = bytearray(archive.read_bytes())
    for start in starts:
        content[start] = 0xFF  # a kind of block that deflate does not have
    archive.write_bytes(content)
    faults = check_root(archive, ['cifar']).tasks[0].faults
    assert any(f.startswith('val200.txt is unreadable: vtab-1k/cifar/val200.txt in ') for f in faults)
    assert any(f.startswith('test.txt line 3: images/test/000002.jpg is unreadable: ') for f in faults)


def test_an_archive_with_12_of_19_sets_names_the_other_seven(template, tmp_path):
    names = list(TASKS)[:12]
    archive = tmp_path / 'vtab-1k.zip'
    with zipfile.ZipFile(archive, 'w') as opened:
        for name in names:
            opened.write(template / name / 'test.txt', f'vtab-1k/{name}/test.txt')
    report = check_root(archive, read_images=False)
    missing = [task.task for task in report.tasks if task.faults[0].startswith('missing: ')]
    assert missing == list(TASKS)[12:]


def test_unlisted_files_are_noted(root):
    (root / 'cifar/images/test/Thumbs.db').write_bytes(b'')
    report = check_root(root, ['cifar']).tasks[0]
    assert report.faults == []
    assert 'images/test holds 1 files that test.txt does not list' in report.notes
