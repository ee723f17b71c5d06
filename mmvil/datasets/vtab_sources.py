"""Where the files of VTAB-1K lie: folders, one big zip, one zip per task, or TFDS records.

Source: folder names and list files of the zip that NOAH and RepAdapter hand out; zips per task as vtab1k-pytorch makes
them.
"""

import json
import os
import zipfile
import zlib
from pathlib import Path, PurePosixPath
from typing import ClassVar

from .vtab_tasks import ALIASES, SPLITS, Task

__all__ = ['SMOKE_MARK', 'DataRoot', 'FolderSource', 'RestrictedSource', 'TfdsSource', 'ZipSource']

TOP_FOLDERS = ('', 'vtab-1k')
SMOKE_MARK = 'smoke.json'
# What zipfile raises for damaged members: wrong checksums, broken streams, unknown or encrypted methods.
DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError)


class FolderSource:
    """Files of one task in a folder.

    Args:
        folder: The folder that holds `train800.txt` and the others.
    """

    kind: ClassVar[str] = 'folder'

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __str__(self) -> str:
        return str(self.folder)

    def read(self, path: str) -> bytes:
        """Read one file, given relative to the task's folder.

        Raises:
            FileNotFoundError: If there is none.
        """
        return (self.folder / path).read_bytes()

    def names(self) -> set[str]:
        """All files of the task, as paths relative to its folder with forward slashes."""
        found = set()
        for folder, _, files in os.walk(self.folder):
            relative = PurePosixPath(Path(folder).relative_to(self.folder).as_posix())
            found.update((relative / file).as_posix() for file in files)
        return found


class ZipSource:
    """Files of one task in a zip. Every process opens the zip anew, so instances may go to worker processes.

    Args:
        archive: The zip file.
        prefix: Folder of the task inside of it, '' or with a final slash.
    """

    kind: ClassVar[str] = 'zip'

    def __init__(self, archive: Path, prefix: str) -> None:
        self.archive, self.prefix = archive, prefix
        self._opened: tuple[int, zipfile.ZipFile] | None = None

    def __str__(self) -> str:
        return f'{self.archive}:{self.prefix}'

    def __getstate__(self) -> dict:
        return {**self.__dict__, '_opened': None}

    @property
    def _zip(self) -> zipfile.ZipFile:
        if self._opened is None or self._opened[0] != os.getpid():
            self._opened = os.getpid(), open_zip(self.archive)
        return self._opened[1]

    def read(self, path: str) -> bytes:
        """Read one file, given relative to the task's folder.

        Raises:
            FileNotFoundError: If there is none.
            OSError: If it is damaged.
        """
        try:
            return self._zip.read(self.prefix + path)
        except KeyError as error:
            raise FileNotFoundError(f'{self.archive} has no file {self.prefix + path}') from error
        except DAMAGE as error:
            raise OSError(f'{self.prefix + path} in {self.archive} is damaged: {error}') from error

    def names(self) -> set[str]:
        """All files of the task, as paths relative to its folder."""
        start = len(self.prefix)
        return {
            name[start:] for name in self._zip.namelist() if name.startswith(self.prefix) and not name.endswith('/')
        }


class TfdsSource:
    """TFDS records of one task; images come from TFDS in the order of its split, not by file name.

    Args:
        data_dir: TFDS data folder.
        task: The task.
    """

    kind: ClassVar[str] = 'tfds'

    def __init__(self, data_dir: Path, task: Task) -> None:
        self.data_dir, self.task = data_dir, task

    def __str__(self) -> str:
        return f'{self.data_dir}/{self.task.builder} (TFDS records)'


class RestrictedSource:
    """A source that gives out the files of some splits only, so that tuning cannot see the test images.

    Args:
        source: The source to guard.
        splits: The splits that may be read.
    """

    def __init__(self, source: FolderSource | ZipSource | TfdsSource, splits: tuple[str, ...]) -> None:
        unknown = set(splits) - set(SPLITS)
        if unknown:
            raise ValueError(f'unknown splits {sorted(unknown)}; accepted are {list(SPLITS)}')
        self.source, self.splits = source, splits

    def __str__(self) -> str:
        return str(self.source)

    @property
    def kind(self) -> str:
        """Kind of the guarded source."""
        return self.source.kind

    def allow(self, split: str) -> None:
        """Refuse a split that is not open.

        Raises:
            PermissionError: If it is not.
        """
        if split not in self.splits:
            raise PermissionError(f'{split} of {self.source} is closed here; open are {list(self.splits)}')

    def read(self, path: str) -> bytes:
        """Read a list or an image of an open split.

        Raises:
            PermissionError: If the path belongs to another split.
        """
        parts = PurePosixPath(path).parts
        if '..' in parts:
            raise PermissionError(f'{path} leaves its folder')
        split = parts[0].removesuffix('.txt') if len(parts) == 1 else parts[1] if parts[0] == 'images' else path
        self.allow(split)
        return self.source.read(path)

    def names(self) -> set[str]:
        """Files of the open splits."""
        starts = tuple(f'images/{split}/' for split in self.splits)
        return {name for name in self.source.names() if name.startswith(starts) or name[:-4] in self.splits}


class DataRoot:
    """A folder or zip that holds some or all tasks, in any mixture of the layouts.

    Args:
        root: Folder with one folder or zip per task, a folder that holds `vtab-1k`, the big zip itself, or a TFDS data
            folder.

    Raises:
        FileNotFoundError: If there is nothing at `root`.
        ValueError: If `root` is a file but no zip, or a damaged one.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).expanduser()
        if not self.root.exists():
            raise FileNotFoundError(f'VTAB-1K data root {self.root} does not exist')
        self._members = _zip_folders(self.root) if self.root.is_file() else None
        self.smoke_sizes = self._read_smoke_mark()

    @property
    def is_smoke(self) -> bool:
        """Whether this is the embedded miniature, whose scores are no VTAB scores."""
        return self.smoke_sizes is not None

    def accepted_sizes(self, task: Task, split: str) -> tuple[int, ...]:
        """Numbers of images that a list may have: those of VTAB-1K, or of the miniature."""
        return (self.smoke_sizes[split],) if self.is_smoke else task.accepted_sizes(split)

    def source(self, task: Task) -> FolderSource | ZipSource | TfdsSource:
        """Find the files of a task.

        Raises:
            FileNotFoundError: If the task is not there; the message says where it was looked for.
        """
        names = [task.name, *(alias for alias, name in ALIASES.items() if name == task.name)]
        if self._members is not None:
            for name in names:
                if name in self._members:
                    return ZipSource(self.root, self._members[name])
            raise FileNotFoundError(f'{self.root} has no folder {task.name} (nor {names[1:]})')
        builder = task.builder.split('/')[0]
        for top in TOP_FOLDERS:
            if _is_tfds_folder(self.root / top / builder):
                return TfdsSource(self.root / top, task)
        for top in TOP_FOLDERS:
            for name in names:
                if (self.root / top / name).is_dir():
                    return FolderSource(self.root / top / name)
                archive = self.root / top / f'{name}.zip'
                if archive.is_file():
                    return ZipSource(archive, _zip_folders(archive).get(name, ''))
        hint = ''
        if (self.root / 'vtab_trainval_splits.json').is_file():
            hint = '; vtab_trainval_splits.json gives file names of 16 of the 19 sets but no images, it is not enough'
        raise FileNotFoundError(f'{self.root} has no {task.name}: neither folder, zip nor TFDS records{hint}')

    def _read_smoke_mark(self) -> dict[str, int] | None:
        """Read the sizes of the embedded miniature, None if this is not one."""
        if self._members is not None:
            with open_zip(self.root) as opened:
                is_miniature = any(PurePosixPath(name).name == SMOKE_MARK for name in opened.namelist())
            if is_miniature:
                raise ValueError(f'{self.root}: the miniature is read from its folder only')
            return None
        for top in TOP_FOLDERS:
            mark = self.root / top / SMOKE_MARK
            if mark.is_file():
                sizes = json.loads(mark.read_text(encoding='utf-8'))['sizes']
                return {split: int(sizes[split]) for split in SPLITS}
        return None


def open_zip(path: Path) -> zipfile.ZipFile:
    """Open a zip.

    Raises:
        ValueError: If it is none or damaged, for example cut off while it was downloaded.
    """
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f'{path} is no zip or was cut off while it was downloaded: {error}') from error


def _zip_folders(archive: Path) -> dict[str, str]:
    """Map the names of folders at the top and one level below to their paths in the zip, with a final slash."""
    folders: dict[str, str] = {}
    with open_zip(archive) as opened:
        for name in opened.namelist():
            parts = name.split('/')[:-1][:2]
            for depth, part in enumerate(parts):
                if part not in folders:
                    folders[part] = '/'.join(parts[: depth + 1]) + '/'
    return folders


def _is_tfds_folder(folder: Path) -> bool:
    """Whether a folder holds TFDS records: `<version>/dataset_info.json`, with or without a configuration above."""
    return any(True for pattern in ('*/dataset_info.json', '*/*/dataset_info.json') for _ in folder.glob(pattern))
