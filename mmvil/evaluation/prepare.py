"""Write the standard layout of VTAB-1K from TensorFlow Datasets, its origin."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from ..datasets.vtab_sources import DataRoot, TfdsSource
from ..datasets.vtab_tasks import SPLITS, Task, select_tasks
from ..datasets.vtab_tfds import iterate_split, naming_errors, open_builder, split_instructions, split_sizes
from .records import write_atomically

__all__ = ['SUFFIXES', 'prepare_tasks']

SUFFIXES = {'png': '.png', 'jpeg': '.jpg'}
PROVENANCE = 'source.json'


def prepare_tasks(
    root: str | Path,
    tfds_dir: str | Path,
    tasks: Sequence[str] | None = None,
    image_format: str = 'png',
    any_version: bool = False,
    download: bool = True,
    say: Callable[[str], None] = print,
) -> dict[str, str]:
    """Write tasks in the layout of the common zip.

    A task appears under its name when it is complete; tasks that are there already are left alone.

    Args:
        root: Folder to write.
        tfds_dir: TFDS data folder. Manual downloads lie in its `downloads/manual`.
        tasks: Names of tasks or groups. Default: all 19.
        image_format: 'png' keeps every pixel; 'jpeg' writes Pillow's default quality, as the common zip has it.
        any_version: Accept other versions of a data set than the one that the task is defined on, if the numbers of
            images are right; noted in `source.json`.
        download: Let TFDS download and prepare what is missing.
        say: Where messages go. Default: print.

    Returns:
        Task -> reason for those that could not be written; empty if all went well.

    Raises:
        ImportError: If tensorflow-datasets is not installed.
        ValueError: If the format or a task is unknown.
    """
    if image_format not in SUFFIXES:
        raise ValueError(f'image_format must be one of {list(SUFFIXES)}, got {image_format!r}')
    root, failures = Path(root), {}
    root.mkdir(parents=True, exist_ok=True)
    for task in select_tasks(tasks):
        if (root / task.name).exists():
            if isinstance(_source_at(root, task), TfdsSource):
                raise ValueError(f'{root} is a TFDS data folder; choose another folder to write to')
            say(f'{task.name}: there already')
            continue
        try:
            count = _prepare_task(root, Path(tfds_dir), task, image_format, any_version, download)
        except (ValueError, AssertionError, OSError) as error:
            failures[task.name] = f'{error}' + (f' It needs a manual download: {task.manual}.' if task.manual else '')
        else:
            say(f'{task.name}: {count} images written')
    return failures


def _source_at(root: Path, task: Task) -> object:
    """What lies at a task's place."""
    return DataRoot(root).source(task)


def _prepare_task(root: Path, tfds_dir: Path, task: Task, image_format: str, any_version: bool, download: bool) -> int:
    """Write one task; returns the number of images."""
    builder = open_builder(task, tfds_dir, any_version)
    if download:
        with naming_errors(f'{builder.info.full_name} could not be downloaded and prepared'):
            builder.download_and_prepare()
    instructions = split_instructions(task, split_sizes(builder))
    partial = root / f'.{task.name}.partial'
    shutil.rmtree(partial, ignore_errors=True)
    count = 0
    for split in SPLITS:
        written = _write_split(partial, tfds_dir, task, split, image_format, any_version)
        expected = task.accepted_sizes(split)
        if written not in expected:
            raise ValueError(f'TFDS gave {written} images for {split}, expected {" or ".join(map(str, expected))}')
        count += written
    provenance = {'tfds': builder.info.full_name, 'wanted_version': task.versions, 'splits': instructions}
    provenance['format'] = 'lossless (PNG)' if image_format == 'png' else 'JPEG, default quality of Pillow'
    write_atomically(partial / PROVENANCE, json.dumps(provenance, indent=2) + '\n')
    partial.rename(root / task.name)
    return count


def _write_split(folder: Path, tfds_dir: Path, task: Task, split: str, image_format: str, any_version: bool) -> int:
    """Write the images and the list of one split; returns the number of images."""
    (folder / 'images' / split).mkdir(parents=True)
    lines = []
    for number, (image, label) in enumerate(iterate_split(task, split, tfds_dir, any_version)):
        path = f'images/{split}/{number:06d}{SUFFIXES[image_format]}'
        Image.fromarray(image).save(folder / path, format=image_format.upper())
        lines.append(f'{path} {label}\n')
    (folder / f'{split}.txt').write_text(''.join(lines), encoding='utf-8', newline='\n')
    return len(lines)
