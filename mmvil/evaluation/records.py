"""Files of a campaign: written whole or not at all, and locks that die with their process."""

import fcntl
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ['lock_file', 'read_record', 'write_atomically', 'write_once']


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file under a temporary name and rename it, so that readers see the old file or the new one.

    Args:
        path: Where to; the folder is created.
        content: Text (written as UTF-8) or bytes.
    """
    temporary = _write_temporary(path, content)
    os.replace(temporary, path)


def write_once(path: Path, content: str | bytes) -> bool:
    """Write a file unless it exists; of several processes that try, exactly one succeeds.

    Args:
        path: Where to; the folder is created.
        content: Text (written as UTF-8) or bytes.

    Returns:
        Whether it was this call that wrote it.
    """
    temporary = _write_temporary(path, content)
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        os.unlink(temporary)
    return True


def read_record(path: Path) -> dict:
    """Read a JSON object.

    Args:
        path: The file.

    Returns:
        The object.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no JSON object.
    """
    try:
        record = json.loads(path.read_text(encoding='utf-8'))
    except json.JSONDecodeError as error:
        raise ValueError(f'{path} is no JSON file: {error}') from error
    if not isinstance(record, dict):
        raise ValueError(f'{path} must hold a JSON object, got {type(record).__name__}')
    return record


@contextmanager
def lock_file(path: Path) -> Iterator[bool]:
    """Try to hold a lock, without waiting.

    The kernel frees the lock when the process ends, however it ends, so a killed run leaves nothing behind that had to
    be cleaned up. The file itself stays; deleting it would split those who wait for it.

    Args:
        path: The lock's file; created with its folder.

    Yields:
        Whether this process holds the lock now.

    Raises:
        OSError: If the file system has no locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError as error:
            raise OSError(
                error.errno, f'the file system of {path} has no file locks (flock); choose another --work-dir: {error}'
            ) from error
        yield True
    finally:
        os.close(descriptor)  # frees the lock


def _write_temporary(path: Path, content: str | bytes) -> str:
    """Write a temporary file beside `path` and return its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode('utf-8') if isinstance(content, str) else content
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}.')
    with os.fdopen(descriptor, 'wb') as file:
        os.fchmod(descriptor, 0o644)
        file.write(data)
        file.flush()
        os.fsync(descriptor)
    return temporary
