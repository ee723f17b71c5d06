"""VTAB-1K from its origin: which examples of TFDS make up each list, and how they become image and label.

Needs `tensorflow-datasets`, which is imported where it is used; nothing else of mmvil needs it.

Source: split and label definitions of google-research/task_adaptation; the first 800 training and the first 200
validation examples in the fixed order of TFDS.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np

from .vtab_labels import (
    clevr_count_label,
    clevr_distance_label,
    dsprites_location_label,
    dsprites_orientation_label,
    kitti_distance_label,
)
from .vtab_lists import Entry
from .vtab_tasks import SPLITS, Task

__all__ = [
    'example_to_image',
    'example_to_label',
    'iterate_split',
    'naming_errors',
    'open_builder',
    'record_entry',
    'split_instructions',
    'split_sizes',
]

# Percentages of TFDS' training split that are train and validation, for data sets without a validation split.
CARVED = {
    'caltech101': (90, 10),
    'cifar': (90, 10),
    'svhn': (90, 10),
    'clevr_count': (90, 10),
    'clevr_dist': (90, 10),
    'oxford_iiit_pet': (80, 20),
    'eurosat': (60, 20),
    'resisc45': (60, 20),
    'dsprites_loc': (80, 10),
    'dsprites_ori': (80, 10),
}
TEST_IS_VALIDATION = ('clevr_count', 'clevr_dist')
HALVED_TEST = ('smallnorb_azi', 'smallnorb_ele')

LABELS: dict[str, Callable[[Mapping], int]] = {
    'clevr_count': lambda example: clevr_count_label(len(example['objects']['size'])),
    'clevr_dist': lambda example: clevr_distance_label(np.asarray(example['objects']['pixel_coords'])[:, 2]),
    'kitti': lambda example: kitti_distance_label(
        np.asarray(example['objects']['type']).tolist(), np.asarray(example['objects']['location'])[:, 2].tolist()
    ),
    'dsprites_loc': lambda example: dsprites_location_label(int(example['label_x_position'])),
    'dsprites_ori': lambda example: dsprites_orientation_label(int(example['label_orientation'])),
    'smallnorb_azi': lambda example: int(example['label_azimuth']),
    'smallnorb_ele': lambda example: int(example['label_elevation']),
}


def split_instructions(task: Task, num_examples: Mapping[str, int]) -> dict[str, str]:
    """Write the TFDS split of each list.

    Args:
        task: The task.
        num_examples: Numbers of examples of TFDS' own splits, for example {'train': 50000, 'test': 10000}.

    Returns:
        For each of the four lists a TFDS split, for example {'val200': 'train[45000:45200]', ...}.

    Raises:
        ValueError: If a split that is needed is missing, or the numbers are not those that the task is defined on.
    """
    if task.name in HALVED_TEST:
        needed, half = ('train', 'test'), num_examples.get('test', 0) // 2
        val, test, sizes = ('test', 0), f'test[{half}:]', (num_examples.get('train'), half, half)
    elif task.name in CARVED:
        train_percent, val_percent = CARVED[task.name]
        total = num_examples.get('train', 0)
        start, end = total * train_percent // 100, total * (train_percent + val_percent) // 100
        val = ('train', start)
        if end == total:  # a test split of its own
            test = 'validation' if task.name in TEST_IS_VALIDATION else 'test'
            needed, sizes = ('train', test), (start, total - start, num_examples.get(test))
        else:
            needed, test, sizes = ('train',), f'train[{end}:]', (start, end - start, total - end)
    else:
        needed, val, test = ('train', 'validation', 'test'), ('validation', 0), 'test'
        sizes = tuple(num_examples.get(name) for name in needed)
    missing = [name for name in needed if not num_examples.get(name)]
    if missing:
        raise ValueError(f'TFDS data for {task.name} lacks the splits {missing}, it has {dict(num_examples)}')
    published = (task.train, task.val, task.test)
    # A revision may move an image between the splits, which then hold as many as before together.
    is_revision = sizes[2] in task.other_test_sizes and sum(sizes) == sum(published)
    if sizes != published and not is_revision:
        raise ValueError(
            f'TFDS data for {task.name} gives {sizes} training, validation and test images, but the task is defined on '
            f'{published}: another version of {task.builder}? wanted is {task.versions}'
        )
    train800, val200 = 'train[:800]', f'{val[0]}[{val[1]}:{val[1] + 200}]'
    return {'train800': train800, 'val200': val200, 'train800val200': f'{train800}+{val200}', 'test': test}


def example_to_label(task: Task, example: Mapping[str, Any]) -> int:
    """Compute the label of a TFDS example.

    Args:
        task: The task.
        example: Features as numpy arrays.

    Returns:
        The label, from 0.

    Raises:
        ValueError: If the features are outside of what the task is defined on.
    """
    label = LABELS[task.name](example) if task.name in LABELS else int(example['label'])
    if not 0 <= label < task.num_classes:
        raise ValueError(f'{task.name} has labels from 0 to {task.num_classes - 1}, got {label}')
    return label


def example_to_image(task: Task, example: Mapping[str, Any]) -> np.ndarray:
    """Take the image out of a TFDS example.

    One channel is repeated three times; dSprites' zeros and ones become 0 and 255.

    Returns:
        uint8 of shape (H, W, 3), RGB.

    Raises:
        ValueError: If it is no image of one or three channels.
    """
    image = np.asarray(example['image'])
    if image.ndim != 3 or image.shape[2] not in (1, 3) or image.dtype != np.uint8:
        raise ValueError(f'expected uint8 images (H, W, 1 or 3), got {image.dtype} of shape {image.shape}')
    if task.builder == 'dsprites':
        image = image * np.uint8(255)
    return np.repeat(image, 3, axis=2) if image.shape[2] == 1 else image


def open_builder(task: Task, data_dir: str | Path, any_version: bool = False) -> Any:
    """Open the TFDS builder of a task, which neither downloads nor needs the records yet.

    Args:
        task: The task.
        data_dir: TFDS data folder.
        any_version: Take the newest version that there is, even if the task is defined on another one.

    Returns:
        The builder.

    Raises:
        ImportError: If tensorflow-datasets is not installed.
        ValueError: If the only version that there is differs from the one that the task is defined on.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ImportError(
            "TFDS records need tensorflow-datasets and TensorFlow: pip install 'mmvil[tfds]'; no other layout does"
        ) from error
    name, _, config = task.builder.partition('/')
    reference = f'{name}/{config}' if config else name
    wanted = reference if any_version else f'{reference}:{_version_pattern(task.versions)}'
    try:
        builder = tfds.builder(wanted, data_dir=str(data_dir))
    except (AssertionError, ValueError, tfds.core.DatasetNotFoundError) as error:
        raise ValueError(
            f'{task.name} is defined on {reference} version {task.versions}, which this tensorflow-datasets '
            f'({tfds.__version__}) cannot give: {error}'
        ) from error
    if not any_version and not fnmatch(str(builder.version), task.versions):
        raise ValueError(f'{task.name} is defined on {reference} {task.versions}, TFDS gave {builder.version}')
    return builder


def split_sizes(builder: Any) -> dict[str, int]:
    """Numbers of examples of a builder's splits; empty until its records are there."""
    return {name: info.num_examples for name, info in builder.info.splits.items()}


def iterate_split(
    task: Task, split: str, data_dir: str | Path, any_version: bool = False
) -> Iterator[tuple[np.ndarray, int]]:
    """Go through a list in the fixed order of TFDS.

    Args:
        task: The task.
        split: 'train800', 'val200', 'train800val200' or 'test'.
        data_dir: TFDS data folder with prepared records.
        any_version: See `open_builder`.

    Yields:
        Image (uint8, (H, W, 3), RGB) and label.

    Raises:
        ImportError: If tensorflow-datasets is not installed.
        ValueError: If the records are not those that the task is defined on, or cannot be read.
    """
    if split not in SPLITS:
        raise ValueError(f'split must be one of {list(SPLITS)}, got {split!r}')
    builder = open_builder(task, data_dir, any_version)
    import tensorflow_datasets as tfds

    name, instructions = builder.info.full_name, split_instructions(task, split_sizes(builder))
    # One file after the other: the order is then that of the records, whatever the number of their files.
    read_config = tfds.ReadConfig(interleave_cycle_length=1)
    for part in instructions[split].split('+'):
        examples = builder.as_dataset(split=part, shuffle_files=False, read_config=read_config)
        with naming_errors(f'{part} of {name} is unreadable or truncated'):
            for example in tfds.as_numpy(examples):
                yield example_to_image(task, example), example_to_label(task, example)


@contextmanager
def naming_errors(what: str) -> Iterator[None]:
    """Turn errors of TensorFlow and TFDS, most of which are plain exceptions, into a ValueError that says more.

    Args:
        what: What went wrong.

    Raises:
        ValueError: In their place.
    """
    try:
        yield
    except Exception as error:
        if not type(error).__module__.startswith('tensorflow'):  # also tensorflow_datasets
            raise
        raise ValueError(f'{what}: {error}') from error


def record_entry(split: str, index: int, label: int) -> Entry:
    """Name an example that has no file as if it stood in a list."""
    return Entry(f'tfds/{split}/{index:06d}', label, index + 1)


def _version_pattern(versions: str) -> str:
    """Write a version as TFDS wants it: '3.*' becomes '3.*.*'."""
    parts = versions.split('.')
    return '.'.join([*parts, *['*'] * (3 - len(parts))])
