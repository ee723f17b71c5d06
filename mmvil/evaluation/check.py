"""Check of a VTAB-1K data root: every fault of every task at once, and hashes that identify the data."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..datasets.vtab import decode_image, storage_format
from ..datasets.vtab_lists import Entry, hash_entries, parse_list
from ..datasets.vtab_sources import DataRoot, FolderSource, RestrictedSource, TfdsSource, ZipSource
from ..datasets.vtab_tasks import SPLITS, Task, select_tasks

STORAGE = {'jpeg': 'zip (JPEG)', 'png': 'lossless (PNG)', 'other': 'other'}

__all__ = ['STORAGE', 'RootReport', 'TaskReport', 'check_root', 'format_report']


@dataclass
class ListReport:
    """What was found for one list.

    Args:
        count: Number of good lines.
        num_classes: Number of classes that occur.
        list_hash: SHA-256 of paths and labels.
        images_hash: SHA-256 over the files (TFDS: the pixels) in the order of the list; '' if they were not read.
        formats: Kinds of storage that occur: 'jpeg', 'png', 'other'.
    """

    count: int = 0
    num_classes: int = 0
    list_hash: str = ''
    images_hash: str = ''
    formats: list[str] = field(default_factory=list)


@dataclass
class TaskReport:
    """What was found for one task.

    Args:
        task: Name.
        source: Where it lies, '' if it is missing.
        storage: 'zip (JPEG)', 'lossless', 'TFDS', 'not read', ...; results of different storage must not be mixed.
        faults: What has to be repaired.
        notes: What is worth knowing but normal.
        lists: One report per list.
    """

    task: str
    source: str = ''
    storage: str = 'not read'
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    lists: dict[str, ListReport] = field(default_factory=dict)


@dataclass
class RootReport:
    """What was found in a data root.

    Args:
        root: The data root.
        smoke: Whether it is the miniature of smoke runs.
        tasks: One report per task that was asked for.
    """

    root: str
    smoke: bool
    tasks: list[TaskReport]

    @property
    def num_faults(self) -> int:
        """Number of faults of all tasks."""
        return sum(len(task.faults) for task in self.tasks)

    def as_dict(self) -> dict:
        """The report as plain values."""
        return asdict(self)


def check_root(
    root: str | Path,
    tasks: Sequence[str] | None = None,
    splits: Sequence[str] = SPLITS,
    read_images: bool = True,
    num_threads: int = 8,
) -> RootReport:
    """Check a data root. Faults are collected, not raised.

    Args:
        root: Folder or zip in any of the layouts.
        tasks: Names of tasks or groups. Default: all 19.
        splits: Lists to look at; the others are not opened.
        read_images: Whether to read and decode every image. Without, lists and the existence of files are checked.
        num_threads: Number of threads that decode.

    Returns:
        The report.

    Raises:
        FileNotFoundError: If there is nothing at `root`.
        ValueError: If `root` is a damaged zip, or a task is unknown.
    """
    data_root = DataRoot(root)
    reports = []
    with ThreadPoolExecutor(num_threads) as pool:
        for task in select_tasks(tasks):
            report = TaskReport(task.name)
            try:
                source = data_root.source(task)
            except (FileNotFoundError, ValueError) as error:
                report.faults.append(f'missing: {error}')
            else:
                report.source = str(source)
                if isinstance(source, TfdsSource):
                    _check_tfds(report, task, source, tuple(splits), read_images)
                else:
                    _check_task(report, data_root, task, source, tuple(splits), pool if read_images else None)
            reports.append(report)
    return RootReport(str(data_root.root), data_root.is_smoke, reports)


def _check_task(
    report: TaskReport,
    data_root: DataRoot,
    task: Task,
    source: FolderSource | ZipSource,
    splits: tuple[str, ...],
    pool: ThreadPoolExecutor | None,
) -> None:
    """Check the lists and images of one task that is not kept as TFDS records."""
    guarded = RestrictedSource(source, splits)
    names = guarded.names()
    lists: dict[str, list[Entry]] = {}
    for split in splits:
        if f'{split}.txt' not in names:
            report.faults.append(f'{split}.txt is missing')
            continue
        try:
            content = guarded.read(f'{split}.txt')
        except OSError as error:
            report.faults.append(f'{split}.txt is unreadable: {error}')
            continue
        sizes = data_root.accepted_sizes(task, split)
        lists[split], faults = parse_list(f'{split}.txt', content, task.num_classes, sizes)
        report.faults.extend(faults)
        found = report.lists[split] = ListReport(len(lists[split]))
        found.num_classes = len({entry.label for entry in lists[split]})
        found.list_hash = hash_entries(lists[split])
        _check_files(report, guarded, split, lists[split], names, pool)
    _compare_lists(report, task, lists)
    formats = sorted({kind for found in report.lists.values() for kind in found.formats})
    if len(formats) > 1:
        report.faults.append(f'images of different storage are mixed: {formats}')
    if formats:
        report.storage = 'mixed' if len(formats) > 1 else STORAGE[formats[0]]


def _check_files(
    report: TaskReport,
    source: RestrictedSource,
    split: str,
    entries: list[Entry],
    names: set[str],
    pool: ThreadPoolExecutor | None,
) -> None:
    """Check that the images of a list exist and, with a pool, decode them all."""
    present = []
    for entry in entries:
        name = f'{split}.txt line {entry.line}: {entry.path}'
        other = next((s for s in SPLITS if s != split and entry.path.startswith(f'images/{s}/')), None)
        if other:
            report.faults.append(f'{name} belongs to {other}')
        elif entry.path not in names:
            report.faults.append(f'{name} is missing')
        else:
            present.append(entry)
    listed = {entry.path for entry in entries}
    unlisted = sum(name.startswith(f'images/{split}/') and name not in listed for name in names)
    if unlisted:
        report.notes.append(f'images/{split} holds {unlisted} files that {split}.txt does not list')
    if pool is None:
        return
    digest, formats = hashlib.sha256(), set()
    for entry, (fault, content_hash, kind) in zip(
        present, pool.map(lambda entry: _check_image(source, split, entry), present), strict=True
    ):
        if fault:
            report.faults.append(f'{split}.txt line {entry.line}: {fault}')
        else:
            formats.add(kind)
        digest.update(content_hash)
    report.lists[split].images_hash = digest.hexdigest()
    report.lists[split].formats = sorted(formats)


def _check_image(source: RestrictedSource, split: str, entry: Entry) -> tuple[str, bytes, str]:
    """Decode one image; returns a fault or '', the hash of the file and its kind of storage."""
    try:
        content = source.read(entry.path)
        decode_image(content, entry.path)
    except OSError as error:
        return f'{entry.path} is unreadable: {error}', b'', ''
    except ValueError as error:
        return str(error), b'', ''
    return '', hashlib.sha256(content).digest(), storage_format(content)


def _compare_lists(report: TaskReport, task: Task, lists: dict[str, list[Entry]]) -> None:
    """Compare the lists of a task with each other and note what is unusual but normal."""
    labels = {split: [entry.label for entry in entries] for split, entries in lists.items()}
    is_whole = set(SPLITS[:3]) <= set(labels) and not report.faults
    if is_whole and labels['train800val200'] != labels['train800'] + labels['val200']:
        report.faults.append('the labels of train800val200.txt are not those of train800.txt and val200.txt')
    for split, values in labels.items():
        if len(set(values)) < task.num_classes:
            normal = '' if split == 'test' else ', which is normal'
            report.notes.append(f'{split} has {len(set(values))} of {task.num_classes} classes{normal}')
    unseen = set(labels.get('val200', ())) - set(labels.get('train800', range(task.num_classes)))
    if unseen:
        report.notes.append(f'{len(unseen)} classes of val200 do not occur in train800, which is normal')
    if task.other_test_sizes and 'test' in lists:
        sizes = ' and '.join(map(str, task.accepted_sizes('test')))
        report.notes.append(f'test has {len(lists["test"])} images; revisions with {sizes} are in use')


def _check_tfds(report: TaskReport, task: Task, source: TfdsSource, splits: tuple[str, ...], read_images: bool) -> None:
    """Check version and sizes of TFDS records and, if asked to, read them."""
    from ..datasets.vtab_tfds import open_builder, split_instructions, split_sizes

    report.storage = 'TFDS'
    try:
        builder = open_builder(task, source.data_dir)
        instructions = split_instructions(task, split_sizes(builder))
    except (ImportError, ValueError) as error:
        report.faults.append(str(error))
        return
    lists: dict[str, list[Entry]] = {}
    for split in splits:
        report.notes.append(f'{split} is {instructions[split]} of {builder.info.full_name}')
        if read_images:
            try:
                lists[split], report.lists[split] = _read_records(task, split, source)
            except ValueError as error:
                report.faults.append(f'{split}: {error}')
                continue
            if len(lists[split]) not in task.accepted_sizes(split):
                report.faults.append(f'{split}: {len(lists[split])} images, expected {task.accepted_sizes(split)}')
    _compare_lists(report, task, lists)


def _read_records(task: Task, split: str, source: TfdsSource) -> tuple[list[Entry], ListReport]:
    """Read the TFDS records of one list; the hash of the images is that of their pixels."""
    from ..datasets.vtab_tfds import iterate_split, record_entry

    entries, digest = [], hashlib.sha256()
    for index, (image, label) in enumerate(iterate_split(task, split, source.data_dir)):
        entries.append(record_entry(split, index, label))
        digest.update(hashlib.sha256(image.tobytes()).digest())
    classes = {entry.label for entry in entries}
    return entries, ListReport(len(entries), len(classes), hash_entries(entries), digest.hexdigest())


def format_report(report: RootReport) -> str:
    """Write a report as text, all faults included.

    Args:
        report: The report.

    Returns:
        Several lines.
    """
    lines = [f'data root {report.root}']
    if report.smoke:
        lines.append('SMOKE data: the miniature for trying things out, not VTAB-1K')
    for task in report.tasks:
        counts = ', '.join(f'{split} {found.count}' for split, found in task.lists.items())
        state = 'ok' if not task.faults else f'{len(task.faults)} FAULTS'
        lines.append(f'{task.task}: {state}; {task.storage}' + (f'; {counts}' if counts else ''))
        lines.extend(f'  fault: {fault}' for fault in task.faults)
        lines.extend(f'  note: {note}' for note in task.notes)
        for split, found in task.lists.items():
            images = f', images sha256 {found.images_hash[:16]}' if found.images_hash else ''
            lines.append(f'  {split}: list sha256 {found.list_hash[:16]}{images}')
    complete = sum(not task.faults for task in report.tasks)
    lines.append(f'{complete}/{len(report.tasks)} tasks without fault, {report.num_faults} faults')
    return '\n'.join(lines)
