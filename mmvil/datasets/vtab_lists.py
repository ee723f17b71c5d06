"""List files of VTAB-1K: one relative path, a space and a label per line. Every fault is found at once."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

__all__ = ['Entry', 'hash_entries', 'parse_list']


@dataclass(frozen=True)
class Entry:
    """One line of a list.

    Args:
        path: Path relative to the task's folder.
        label: Label, from 0.
        line: Line number, from 1.
    """

    path: str
    label: int
    line: int


def parse_list(name: str, content: bytes, num_classes: int, sizes: Sequence[int]) -> tuple[list[Entry], list[str]]:
    """Parse a list file.

    Args:
        name: Name of the file, for messages.
        content: Its bytes.
        num_classes: Number of classes of the task.
        sizes: Numbers of lines that are accepted.

    Returns:
        The good lines, and one message per fault: blank lines, CRLF, a missing or bad label, a path that leaves the
        folder or occurs twice, a wrong number of lines.
    """
    try:
        text = content.decode('utf-8')
    except UnicodeDecodeError as error:
        return [], [f'{name}: not UTF-8 text ({error})']
    lines = text.split('\n')
    if lines[-1] == '':
        lines.pop()
    faults: list[str] = []
    for what, numbers in (
        ('CRLF line ends', [number for number, line in enumerate(lines, 1) if line.endswith('\r')]),
        ('blank lines', [number for number, line in enumerate(lines, 1) if not line.strip()]),
    ):
        if numbers:
            faults.append(f'{name}: {what} at {_ranges(numbers)}')
    entries: list[Entry] = []
    first_seen: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        entry, fault = _parse_line(line.rstrip('\r'), number, num_classes)
        if fault:
            faults.append(f'{name} line {number}: {fault}')
        if entry and entry.path in first_seen:
            faults.append(f'{name} line {number}: {entry.path} was listed before, at line {first_seen[entry.path]}')
        elif entry:
            first_seen[entry.path] = number
            entries.append(entry)
    num_lines = sum(bool(line.strip()) for line in lines)
    if num_lines not in sizes:
        faults.append(f'{name}: {num_lines} lines, expected {" or ".join(map(str, sizes))}')
    return entries, faults


def _parse_line(line: str, number: int, num_classes: int) -> tuple[Entry | None, str]:
    """Parse one line; returns the entry or None, and the fault or ''. A path may hold spaces."""
    path, _, label = line.rpartition(' ')
    if not path:
        return None, f'expected a path, a space and a label, got {line[:120]!r}'
    if not label.removeprefix('-').isdecimal():
        return None, f'the label must be a whole number, got {label!r}'
    if not 0 <= int(label) < num_classes:
        return None, f'the label must be from 0 to {num_classes - 1}, got {label}'
    pure = PurePosixPath(path)
    if pure.is_absolute() or '..' in pure.parts or '\\' in path:
        return None, f'the path must stay in the folder of the task and use forward slashes, got {path!r}'
    return Entry(pure.as_posix(), int(label), number), ''


def hash_entries(entries: Sequence[Entry]) -> str:
    """SHA-256 of paths and labels in their order: equal lists have equal hashes, whatever their line ends."""
    return hashlib.sha256(''.join(f'{entry.path} {entry.label}\n' for entry in entries).encode()).hexdigest()


def _ranges(numbers: Sequence[int]) -> str:
    """Write line numbers in short: 'lines 1-3, 7'."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    words = [str(first) if first == last else f'{first}-{last}' for first, last in runs]
    return f'{"line" if len(numbers) == 1 else "lines"} {", ".join(words)}'
