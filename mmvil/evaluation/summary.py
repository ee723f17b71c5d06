"""Summary of a campaign: scores per task and group, and the mean over 19 only when there are 19."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

from ..datasets.vtab_tasks import GROUPS, TASKS, Task
from .campaign import Campaign
from .progress import format_table
from .published import PUBLISHED, SOURCES
from .records import write_atomically

__all__ = ['format_summary', 'summarize', 'write_summary']

SMOKE_TITLE = 'SMOKE RUN, not VTAB-1K: no figure below is a VTAB score'
COLUMNS = ('task', 'group', 'mean', 'std', 'seeds', 'learning_rate', 'validation', 'test_images', 'storage', 'diverged')


def summarize(work_dir: str | Path) -> dict:
    """Summarize a campaign, finished or not.

    Args:
        work_dir: Folder of the campaign.

    Returns:
        `tasks` (one entry per task, see `COLUMNS`), `groups`, `average` (mean over the 19 tasks; None for a smoke run),
        `mean_of_groups`, `complete` (number of complete tasks), `remarks`, and `campaign`: settings, checkpoint,
        versions, commit, device and data hashes. Every mean is None unless all of its tasks are complete and of one
        kind of storage.

    Raises:
        FileNotFoundError: If there is no campaign.
        ValueError: If runs of one task were done on different data, or a record is damaged.
    """
    campaign = Campaign(work_dir)
    tasks, hashes, devices = [], {}, set()
    for task in TASKS.values():
        records = [record for run in campaign.tuning_runs(task) if (record := campaign.record(run))]
        finals = [record for run in campaign.final_runs(task) if (record := campaign.record(run))]
        hashes[task.name] = _same_data(task, [*records, *finals])
        devices.update(record['environment']['device'] for record in [*records, *finals])
        tasks.append(_summarize_task(campaign, task, records, finals))
    complete = [entry for entry in tasks if entry['is_complete']]
    storages = sorted({entry['storage'] for entry in complete})
    is_smoke = campaign.kind == 'smoke'
    mean = _mean_score(complete, len(TASKS))
    groups = {group: _summarize_group(group, complete) for group in GROUPS}
    remarks = _remarks(campaign, storages, complete)
    return {
        'kind': campaign.kind,
        'tasks': tasks,
        'groups': groups,
        'complete': len(complete),
        'average': None if is_smoke else mean,
        'smoke_average': mean if is_smoke else None,
        'mean_of_groups': None if mean is None else fmean(group['mean'] for group in groups.values()),
        'remarks': remarks,
        'campaign': {**campaign.header, 'devices': sorted(devices), 'data': hashes},
    }


def _summarize_task(campaign: Campaign, task: Task, tuning: Sequence[dict], finals: Sequence[dict]) -> dict:
    """Summarize one task."""
    scores = [record['accuracy'] for record in finals]
    rate = campaign.chosen_rate(task)
    chosen = [record['accuracy'] for record in tuning if record['run']['learning_rate'] == rate]
    num_seeds = len(campaign.protocol['seeds'])
    return {
        'task': task.name,
        'group': task.group,
        'mean': fmean(scores) if scores else None,
        'std': stdev(scores) if len(scores) > 1 else None,
        'seeds': len(scores),
        'num_seeds': num_seeds,
        'scores': scores,
        'learning_rate': rate,
        'validation': fmean(chosen) if rate is not None else None,
        'tuning_runs': len(tuning),
        'test_images': finals[0]['total'] if finals else None,
        'storage': finals[0]['data']['test']['storage'] if finals else None,
        'diverged': sum(record['training']['diverged'] for record in [*tuning, *finals]),
        'is_complete': len(scores) == num_seeds,
    }


def _same_data(task: Task, records: Sequence[dict]) -> dict:
    """Collect the data that a task was run on.

    Raises:
        ValueError: If it was not the same for all runs.
    """
    found: dict[str, dict] = {}
    for record in records:
        for split, identity in record['data'].items():
            known = found.setdefault(split, dict(identity))
            # The hash is not taken where the images exceed the memory limit, which may differ between workers.
            known['images_hash'] = known['images_hash'] or identity['images_hash']
            if known != {**identity, 'images_hash': identity['images_hash'] or known['images_hash']}:
                raise ValueError(
                    f'runs of {task.name} saw different data for {split}: {known} and {identity}; '
                    'runs on different data must not be mixed'
                )
    storages = {split: identity['storage'] for split, identity in found.items()}
    if len(set(storages.values())) > 1:
        raise ValueError(f'runs of {task.name} saw images of different storage, which must not be mixed: {storages}')
    return found


def _summarize_group(group: str, complete: Sequence[dict]) -> dict:
    """Mean of a group, with the number of its tasks."""
    entries = [entry for entry in complete if entry['group'] == group]
    size = sum(task.group == group for task in TASKS.values())
    return {'mean': _mean_score(entries, size), 'complete': len(entries), 'size': size}


def _mean_score(complete: Sequence[dict], size: int) -> float | None:
    """Mean over tasks, None unless all are complete and of one kind of storage."""
    storages = {entry['storage'] for entry in complete}
    return fmean(entry['mean'] for entry in complete) if len(complete) == size and len(storages) == 1 else None


def _remarks(campaign: Campaign, storages: Sequence[str], complete: Sequence[dict]) -> list[str]:
    """What a reader has to know about these figures."""
    remarks = []
    if campaign.kind == 'smoke':
        remarks.append(SMOKE_TITLE)
    elif campaign.kind == 'modified':
        remarks.append('Not the published protocol: ' + '; '.join(campaign.header['deviations']))
    if len(storages) > 1:
        remarks.append(f'Tasks were read from different storage ({", ".join(storages)}): no mean mixes them')
    elif storages:
        remarks.append(f'Data: {storages[0]}')
    for entry in complete:
        if TASKS[entry['task']].other_test_sizes and campaign.kind != 'smoke':
            remarks.append(f'{entry["task"]}: revision with {entry["test_images"]:,} test images')
        if entry['diverged']:
            remarks.append(f'{entry["task"]}: {entry["diverged"]} runs diverged and count as 0 %')
    return remarks


def format_summary(summary: dict) -> str:
    """Write a summary as Markdown.

    Args:
        summary: See `summarize`.

    Returns:
        Several lines, ending with a line break.
    """
    is_smoke = summary['kind'] == 'smoke'
    prefix = 'smoke ' if is_smoke else ''
    title = '# Smoke run (not VTAB-1K)' if is_smoke else '# VTAB-1K'
    rows = [
        [
            entry['task'],
            entry['group'],
            _number(entry['mean']),
            _number(entry['std']),
            f'{entry["seeds"]}/{entry["num_seeds"]}',
            '' if entry['learning_rate'] is None else f'{entry["learning_rate"]:g}',
            _number(entry['validation']),
        ]
        for entry in summary['tasks']
    ]
    header = ['task', 'group', f'{prefix}test top-1 %', 'std', 'seeds', 'chosen lr', 'val top-1 %']
    means = [
        [f'{prefix}mean of {group}', _number(value['mean']) or _why_not(value['complete'], value['size'])]
        for group, value in summary['groups'].items()
    ]
    average = summary['smoke_average'] if is_smoke else summary['average']
    reason = _why_not(summary['complete'])
    means.append([f'{prefix}mean over 19 tasks', _number(average) or reason])
    means.append([f'{prefix}mean of the 3 group means', _number(summary['mean_of_groups']) or reason])
    lines = [title, '', *(f'- {remark}' for remark in summary['remarks']), '', format_table(header, rows), '']
    lines += [format_table(['', 'top-1 %'], means), '']
    if not is_smoke:
        lines += ['The published averages are means over the 19 tasks. Published for comparison:', '', _published(), '']
    return '\n'.join(lines)


def _why_not(complete: int, size: int = len(TASKS)) -> str:
    """Say why there is no mean."""
    return f'{complete}/{size}' if complete < size else 'mixed data'


def _published() -> str:
    """Table of published group means."""
    rows = [
        [name, *(f'{value:.1f}' for value in (score.natural, score.specialized, score.structured, score.average))]
        for name, score in PUBLISHED.items()
    ]
    return format_table(['model', *GROUPS, 'mean over 19'], rows) + f'\n\nSource: {SOURCES["ViL"]}.'


def write_summary(summary: dict, folder: str | Path) -> list[Path]:
    """Write a summary as Markdown, CSV, JSON and bar plot.

    Args:
        summary: See `summarize`.
        folder: Where to; the files are called `summary.*`, those of a smoke run `smoke_summary.*`.

    Returns:
        The files.
    """
    from .figure import draw_summary

    stem = Path(folder) / ('smoke_summary' if summary['kind'] == 'smoke' else 'summary')
    table = io.StringIO()
    writer = csv.writer(table, lineterminator='\n')
    writer.writerow(['kind', *COLUMNS])
    for entry in summary['tasks']:
        writer.writerow([summary['kind'], *('' if entry[key] is None else entry[key] for key in COLUMNS)])
    contents = {
        '.md': format_summary(summary),
        '.csv': table.getvalue(),
        '.json': json.dumps(summary, indent=2) + '\n',
        '.png': draw_summary(summary),
    }
    paths = [stem.with_suffix(suffix) for suffix in contents]
    for path, content in zip(paths, contents.values(), strict=True):
        write_atomically(path, content)
    return paths


def _number(value: float | None) -> str:
    """Write a percentage, '' for None."""
    return '' if value is None else f'{value:.2f}'
