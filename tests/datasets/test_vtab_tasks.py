import pytest

from mmvil.datasets.vtab_labels import dsprites_orientation_label
from mmvil.datasets.vtab_tasks import ALIASES, GROUPS, SPLITS, TASKS, find_task, label_names, select_tasks


def test_groups_and_totals():
    groups = [[task for task in TASKS.values() if task.group == group] for group in GROUPS]
    assert [len(tasks) for tasks in groups] == [7, 4, 8]
    # Totals of the common zip, whose caltech101 has the larger of the two accepted sizes.
    assert [sum(max(task.accepted_sizes('test')) for task in tasks) for tasks in groups] == [75_565, 87_138, 225_202]


def test_accepted_sizes():
    assert TASKS['caltech101'].accepted_sizes('test') == (6_084, 6_085)
    assert TASKS['kitti'].accepted_sizes('test') == (711,)
    assert [TASKS['sun397'].accepted_sizes(split) for split in SPLITS[:3]] == [(800,), (200,), (1000,)]
    with pytest.raises(ValueError, match="got 'train'"):
        TASKS['kitti'].accepted_sizes('train')


def test_builders_and_versions():
    table = [(task.builder, task.versions) for task in TASKS.values()]
    assert table == [
        ('caltech101', '3.*'),
        ('cifar100', '3.*'),
        ('dtd', '3.*'),
        ('oxford_flowers102', '2.*'),
        ('oxford_iiit_pet', '3.*'),
        ('sun397/tfds', '4.*'),
        ('svhn_cropped', '3.*'),
        ('patch_camelyon', '2.*'),
        ('eurosat/rgb', '2.*'),
        ('resisc45', '3.*'),
        ('diabetic_retinopathy_detection/btgraham-300', '3.*'),
        ('clevr', '3.*'),
        ('clevr', '3.*'),
        ('dmlab', '2.0.1'),
        ('kitti', '3.*'),
        ('dsprites', '2.*'),
        ('dsprites', '2.*'),
        ('smallnorb', '2.*'),
        ('smallnorb', '2.*'),
    ]
    assert [task.name for task in TASKS.values() if task.manual] == ['resisc45', 'diabetic_retinopathy']


@pytest.mark.parametrize('name', TASKS)
def test_label_names(name):
    names = label_names(name)
    assert len(names) == len(set(names)) == TASKS[name].num_classes


def test_label_names_keep_the_order_of_tfds():
    assert label_names('oxford_flowers102')[:2] == ('pink primrose', 'hard-leaved pocket orchid')
    assert label_names('caltech101').index('background_google') == 4  # other packages put it first
    assert label_names('sun397')[0] == '/a/abbey'
    assert label_names('dsprites_ori')[:2] == ('orientations 0 to 2', 'orientations 3 to 4')
    ranges = [[int(word) for word in name.split() if word.isdigit()] for name in label_names('dsprites_ori')]
    assert all(
        dsprites_orientation_label(value) == label
        for label, ends in enumerate(ranges)
        for value in range(ends[0], ends[1] + 1)
    )


def test_find_task_takes_exact_names_and_aliases_only():
    assert find_task('cifar') is find_task('cifar100')
    assert {find_task(alias).name for alias in ALIASES} <= set(TASKS)
    for name in ('clevr', 'cifa', 'CIFAR', ''):
        with pytest.raises(ValueError, match='unknown VTAB task'):
            find_task(name)


def test_select_tasks():
    assert len(select_tasks()) == len(select_tasks(['all'])) == 19
    assert [task.name for task in select_tasks(['kitti', 'specialized', 'pets', 'eurosat'])] == [
        'oxford_iiit_pet',
        'patch_camelyon',
        'eurosat',
        'resisc45',
        'diabetic_retinopathy',
        'kitti',
    ]
