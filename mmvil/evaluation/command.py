"""Command line of the VTAB-1K tool: arguments in, functions of this package called, exit code out."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from mmengine.config import DictAction

from .records import write_atomically

__all__ = ['main']

SMOKE_CONFIG = Path(__file__).parents[2] / 'configs' / 'vtab' / 'smoke_vil-nano.py'


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
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    """Describe all sub-commands; --help shows the options of each."""
    parser = argparse.ArgumentParser(
        prog='vtab.py',
        description='VTAB-1K from the check of the data to the summary of the scores.',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar='COMMAND')
    _describe_data_commands(commands)
    _describe_run_commands(commands)
    parser.epilog = ''.join(command.format_usage() for command in commands.choices.values())
    return parser


def _describe_data_commands(commands: argparse._SubParsersAction) -> None:
    """Describe `check` and `prepare`."""
    check = commands.add_parser('check', help='list every fault of the data')
    check.set_defaults(function=_check)
    check.add_argument('root', help='folder or zip with the data')
    _add_tasks(check)
    check.add_argument('--lists-only', action='store_true', help='do not decode images, only see that they exist')
    check.add_argument('--json', metavar='FILE', help='write the report with full hashes')
    check.add_argument('--threads', type=int, default=8, help='threads that decode (default 8)')
    prepare = commands.add_parser('prepare', help='write the standard layout from TensorFlow Datasets')
    prepare.set_defaults(function=_prepare)
    prepare.add_argument('root', help='folder to write')
    prepare.add_argument('--tfds-dir', required=True, help='TFDS data folder (manual files in downloads/manual)')
    _add_tasks(prepare)
    prepare.add_argument('--format', choices=('png', 'jpeg'), default='png', help='png is lossless (default)')
    prepare.add_argument('--any-version', action='store_true', help='accept other versions of the data sets')
    prepare.add_argument('--no-download', action='store_true', help='use the records that are there')


def _describe_run_commands(commands: argparse._SubParsersAction) -> None:
    """Describe `run`, `summarize` and `smoke`."""
    run = commands.add_parser('run', help='tune, train anew, test; may be started many times on one folder')
    run.set_defaults(function=_run)
    run.add_argument('--config', help='VTAB config, or any mmpretrain config with a backbone')
    run.add_argument('--checkpoint', help='weights: of mmpretrain, mmvil, or an official ViL file')
    run.add_argument('--from-scratch', action='store_true', help='random weights instead of a checkpoint')
    run.add_argument('--data-root', help='folder or zip (default: data_root of the config)')
    run.add_argument('--work-dir', help='folder of the campaign (default: work_dirs/vtab/NAME)')
    _add_tasks(run)
    run.add_argument('--phase', choices=('tune', 'final', 'all'), default='all')
    run.add_argument('--device', help='cpu, cuda, cuda:1, ... (default: a GPU per worker)')
    run.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE', help='replace config values')
    summary = commands.add_parser('summarize', help='tables, CSV, JSON and bar plot of a campaign')
    summary.set_defaults(function=_summarize)
    summary.add_argument('work_dir', help='folder of the campaign')
    summary.add_argument('--out', help='folder for the files (default: that of the campaign)')
    smoke = commands.add_parser('smoke', help='the whole protocol on a miniature, in minutes on a CPU')
    smoke.set_defaults(function=_smoke)
    smoke.add_argument('--work-dir', default='work_dirs/vtab/smoke', help='folder for data and results')
    smoke.add_argument('--config', default=str(SMOKE_CONFIG), help='config of the smoke run')
    _add_tasks(smoke)


def _add_tasks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument('--tasks', nargs='+', metavar='NAME', help='tasks or groups (default: all 19)')


def _run(options: argparse.Namespace) -> int:
    from .run import run_campaign

    name = Path(options.config or options.checkpoint or '.').stem
    work_dir = options.work_dir or Path('work_dirs/vtab') / name
    run_campaign(
        work_dir,
        options.config,
        options.checkpoint,
        options.data_root,
        options.tasks,
        options.phase,
        options.cfg_options,
        options.device,
        options.from_scratch,
        say=lambda text: print(text, flush=True),
    )
    return 0


def _smoke(options: argparse.Namespace) -> int:
    import torch

    from .miniature import write_miniature
    from .run import run_campaign

    if not Path(options.config).is_file():
        raise FileNotFoundError(f'{options.config} does not exist; run from a checkout, or name a config')
    torch.set_num_threads(1)  # images this small gain nothing from more, and lose much where cores are shared
    work_dir = Path(options.work_dir)
    start = time.perf_counter()
    root = write_miniature(work_dir / 'data', options.tasks)
    run_campaign(
        work_dir / 'campaign',
        options.config,
        None,
        str(root),
        options.tasks,
        device='cpu',
        from_scratch=True,
        say=lambda text: print(text, flush=True),
    )
    options.work_dir, options.out = work_dir / 'campaign', None
    code = _summarize(options)
    print(f'SMOKE RUN finished in {time.perf_counter() - start:.0f} s; it says nothing about VTAB-1K')
    return code


def _prepare(options: argparse.Namespace) -> int:
    from .prepare import prepare_tasks

    failures = prepare_tasks(
        options.root, options.tfds_dir, options.tasks, options.format, options.any_version, not options.no_download
    )
    for task, reason in failures.items():
        print(f'{task}: not prepared: {reason}', file=sys.stderr)
    return 1 if failures else 0


def _summarize(options: argparse.Namespace) -> int:
    from .summary import format_summary, summarize, write_summary

    summary = summarize(options.work_dir)
    print(format_summary(summary))
    for path in write_summary(summary, options.out or options.work_dir):
        print(f'written: {path}')
    return 0


def _check(options: argparse.Namespace) -> int:
    from .check import check_root, format_report

    report = check_root(options.root, options.tasks, read_images=not options.lists_only, num_threads=options.threads)
    print(format_report(report))
    if options.json:
        write_atomically(Path(options.json), json.dumps(report.as_dict(), indent=2) + '\n')
    return 1 if report.num_faults else 0
