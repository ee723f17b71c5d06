"""Tables: Markdown, and the state of a campaign."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..datasets.vtab_tasks import Task

if TYPE_CHECKING:
    from .campaign import Campaign

__all__ = ['format_duration', 'format_progress', 'format_table']


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a Markdown table with aligned columns; all but the first column to the right.

    Args:
        header: Titles.
        rows: Cells as text.

    Returns:
        Lines without a final line break.
    """
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
        return '| ' + ' | '.join([cells[0].ljust(widths[0]), *padded]) + ' |'

    rule = '| ' + ' | '.join(['-' * widths[0], *('-' * (width - 1) + ':' for width in widths[1:])]) + ' |'
    return '\n'.join([line(header), rule, *map(line, rows)])


def format_duration(seconds: float) -> str:
    """Write a duration: '45 s', '12 min', '3.5 h'."""
    if seconds < 100:
        return f'{seconds:.0f} s'
    return f'{seconds / 60:.0f} min' if seconds < 5400 else f'{seconds / 3600:.1f} h'


def format_progress(campaign: 'Campaign', tasks: Sequence[Task]) -> str:
    """Write a table of what is done.

    Args:
        campaign: The campaign.
        tasks: Rows.

    Returns:
        Markdown, marked as a smoke run if it is one.
    """
    rows, seeds = [], len(campaign.protocol['seeds'])
    for task in tasks:
        tuned, to_tune = campaign.count_runs(task, ('tune',))
        rate = campaign.chosen_rate(task)
        scores = [record['accuracy'] for run in campaign.final_runs(task) if (record := campaign.record(run))]
        rows.append(
            [
                task.name,
                f'{tuned}/{to_tune}',
                '' if rate is None else f'{rate:g}',
                f'{len(scores)}/{seeds}',
                f'{sum(scores) / len(scores):.2f}' if scores else '',
            ]
        )
    title = 'SMOKE RUN, not VTAB-1K\n\n' if campaign.kind == 'smoke' else ''
    return title + format_table(['task', 'tuned', 'chosen lr', 'final', 'test %'], rows) + '\n'
