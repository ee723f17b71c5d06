"""Command line of the VTAB-1K tool: arguments in, functions of this package called, exit code out."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from .records import write_atomically

__all__ = ['main']


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one of the sub-commands.

    Args:
        arguments: Command line without the program's name. Default: that of the process.

    Returns:
        Exit code: 0 if all went well, 1 if faults were found, 2 for wrong arguments or input.
    """
    options = _parser().parse_args(arguments)
    try:
        return options.function(options)
    except (ValueError, TypeError, FileNotFoundError, FileExistsError, PermissionError, ImportError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    """Describe all sub-commands."""
    parser = argparse.ArgumentParser(prog='vtab.py', description='VTAB-1K: check, prepare, run, summarize, smoke.')
    commands = parser.add_subparsers(required=True, metavar='COMMAND')
    check = commands.add_parser('check', help='list every fault of the data')
    check.set_defaults(function=_check)
    check.add_argument('root', help='folder or zip with the data')
    _add_tasks(check)
    check.add_argument('--lists-only', action='store_true', help='do not decode images, only see that they exist')
    check.add_argument('--json', metavar='FILE', help='write the report with full hashes')
    check.add_argument('--threads', type=int, default=8, help='threads that decode (default 8)')
    return parser


def _add_tasks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--tasks', nargs='+', metavar='NAME', help='tasks or groups (default: all 19)')


def _check(options: argparse.Namespace) -> int:
    from .check import check_root, format_report

    report = check_root(options.root, options.tasks, read_images=not options.lists_only, num_threads=options.threads)
    print(format_report(report))
    if options.json:
        write_atomically(Path(options.json), json.dumps(report.as_dict(), indent=2) + '\n')
    return 1 if report.num_faults else 0
