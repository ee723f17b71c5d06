"""The 19 tasks of VTAB-1K: groups, classes, sizes, label names, and where their images come from."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

__all__ = ['GROUPS', 'SPLITS', 'TASKS', 'Task', 'find_task', 'label_names', 'select_tasks']

GROUPS = ('natural', 'specialized', 'structured')
SPLITS = ('train800', 'val200', 'train800val200', 'test')
TRAIN_SIZES = {'train800': 800, 'val200': 200, 'train800val200': 1000}


@dataclass(frozen=True)
class Task:
    """One task of VTAB-1K.

    Args:
        name: Folder name in the common zip.
        group: 'natural', 'specialized' or 'structured'.
        num_classes: Number of classes of the whole data set, which is the width of the head.
        builder: Name of the TFDS builder, with its configuration after a slash.
        versions: TFDS version that the task is defined on; '3.*' accepts every 3.x.y.
        train: Number of training images of the full (not the 1,000 image) task.
        val: Number of validation images of the full task.
        test: Number of test images.
        other_test_sizes: Further sizes that are accepted, with the reason in the documentation.
        manual: What has to be downloaded by hand for TFDS, '' if nothing.
    """

    name: str
    group: str
    num_classes: int
    builder: str
    versions: str
    train: int
    val: int
    test: int
    other_test_sizes: tuple[int, ...] = ()
    manual: str = ''

    def accepted_sizes(self, split: str) -> tuple[int, ...]:
        """Numbers of images that a list of this split may have.

        Raises:
            ValueError: If the split is unknown.
        """
        if split not in SPLITS:
            raise ValueError(f'split must be one of {list(SPLITS)}, got {split!r}')
        return (self.test, *self.other_test_sizes) if split == 'test' else (TRAIN_SIZES[split],)


RETINOPATHY = (
    'train.zip.001 to .005, test.zip.001 to .007 and trainLabels.csv.zip of the Kaggle competition '
    'diabetic-retinopathy-detection (its terms have to be accepted there)'
)
RESISC45 = 'NWPU-RESISC45.rar from the page of the NWPU-RESISC45 data set'

# Source: sizes, classes and builders as google-research/task_adaptation defines and tests them. One revision of TFDS'
# caltech101, the one in the common zip, has one test image more.
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task('caltech101', 'natural', 102, 'caltech101', '3.*', 2_754, 306, 6_084, other_test_sizes=(6_085,)),
        Task('cifar', 'natural', 100, 'cifar100', '3.*', 45_000, 5_000, 10_000),
        Task('dtd', 'natural', 47, 'dtd', '3.*', 1_880, 1_880, 1_880),
        Task('oxford_flowers102', 'natural', 102, 'oxford_flowers102', '2.*', 1_020, 1_020, 6_149),
        Task('oxford_iiit_pet', 'natural', 37, 'oxford_iiit_pet', '3.*', 2_944, 736, 3_669),
        Task('sun397', 'natural', 397, 'sun397/tfds', '4.*', 76_128, 10_875, 21_750),
        Task('svhn', 'natural', 10, 'svhn_cropped', '3.*', 65_931, 7_326, 26_032),
        Task('patch_camelyon', 'specialized', 2, 'patch_camelyon', '2.*', 262_144, 32_768, 32_768),
        Task('eurosat', 'specialized', 10, 'eurosat/rgb', '2.*', 16_200, 5_400, 5_400),
        Task('resisc45', 'specialized', 45, 'resisc45', '3.*', 18_900, 6_300, 6_300, manual=RESISC45),
        Task(
            'diabetic_retinopathy',
            'specialized',
            5,
            'diabetic_retinopathy_detection/btgraham-300',
            '3.*',
            35_126,
            10_906,
            42_670,
            manual=RETINOPATHY,
        ),
        Task('clevr_count', 'structured', 8, 'clevr', '3.*', 63_000, 7_000, 15_000),
        Task('clevr_dist', 'structured', 6, 'clevr', '3.*', 63_000, 7_000, 15_000),
        Task('dmlab', 'structured', 6, 'dmlab', '2.0.1', 65_550, 22_628, 22_735),
        Task('kitti', 'structured', 4, 'kitti', '3.*', 6_347, 423, 711),
        Task('dsprites_loc', 'structured', 16, 'dsprites', '2.*', 589_824, 73_728, 73_728),
        Task('dsprites_ori', 'structured', 16, 'dsprites', '2.*', 589_824, 73_728, 73_728),
        Task('smallnorb_azi', 'structured', 18, 'smallnorb', '2.*', 24_300, 12_150, 12_150),
        Task('smallnorb_ele', 'structured', 9, 'smallnorb', '2.*', 24_300, 12_150, 12_150),
    )
}

# Names under which other tools keep the same folders.
ALIASES = {
    'cifar100': 'cifar',
    'flowers102': 'oxford_flowers102',
    'oxford_pet': 'oxford_iiit_pet',
    'pets': 'oxford_iiit_pet',
    'camelyon': 'patch_camelyon',
    'pcam': 'patch_camelyon',
    'retinopathy': 'diabetic_retinopathy',
}

# Labels that the tasks define themselves; the names of the others are those of TFDS, in its order.
DERIVED_NAMES = {
    'clevr_count': tuple(f'{count} objects' for count in range(3, 11)),
    'clevr_dist': ('up to 8', '8 to 8.5', '8.5 to 9', '9 to 9.5', '9.5 to 10', 'beyond 10'),
    'kitti': ('vehicle up to 8 m', 'vehicle up to 20 m', 'vehicle beyond 20 m', 'no vehicle'),
    'dsprites_loc': tuple(f'x positions {2 * pair} and {2 * pair + 1}' for pair in range(16)),
    'dsprites_ori': tuple(f'orientations {-(-5 * i // 2)} to {-(-5 * (i + 1) // 2) - 1}' for i in range(16)),
    'smallnorb_azi': tuple(f'{20 * step} degrees' for step in range(18)),
    'smallnorb_ele': tuple(f'{30 + 5 * step} degrees' for step in range(9)),
}


def find_task(name: str) -> Task:
    """Look a task up by its exact name or a known alias.

    Args:
        name: For example 'cifar' or 'cifar100'.

    Returns:
        The task.

    Raises:
        ValueError: If there is no such task; parts of names are not accepted.
    """
    task = TASKS.get(ALIASES.get(name, name))
    if task is None:
        raise ValueError(f'unknown VTAB task {name!r}; accepted are {list(TASKS)} and the aliases {sorted(ALIASES)}')
    return task


def select_tasks(names: list[str] | tuple[str, ...] | None = None) -> list[Task]:
    """Look tasks up by names of tasks or groups.

    Args:
        names: Names, aliases and groups in any order; None or 'all' stands for all 19.

    Returns:
        The tasks in the order of the table, without repetition.

    Raises:
        ValueError: If a name is unknown.
    """
    wanted: set[str] = set()
    for name in names or ['all']:
        if name in (*GROUPS, 'all'):
            wanted.update(task.name for task in TASKS.values() if name in (task.group, 'all'))
        else:
            wanted.add(find_task(name).name)
    return [task for task in TASKS.values() if task.name in wanted]


@cache
def _tfds_names() -> dict[str, list[str]]:
    """Label names of the data sets that are used with their own labels, in the order of TFDS 4.9."""
    return json.loads(Path(__file__).with_name('vtab_label_names.json').read_text(encoding='utf-8'))


def label_names(task: str) -> tuple[str, ...]:
    """Names of a task's labels, in the order of the labels.

    Args:
        task: Name or alias.

    Returns:
        One name per class.

    Raises:
        ValueError: If the task is unknown.
    """
    name = find_task(task).name
    return DERIVED_NAMES.get(name) or tuple(_tfds_names()[name])
