"""Bar plot of a campaign against published scores."""

import io
from collections.abc import Sequence

from ..datasets.vtab_tasks import GROUPS, TASKS
from .published import PUBLISHED, PUBLISHED_TASKS, SOURCES

__all__ = ['draw_summary']

OWN_COLOUR = '#c0392b'
# One colour per family, the darker the larger the model.
FAMILY_COLOURS = {'ViL': 'Oranges', 'DeiT': 'Blues', 'DeiT-III': 'Purples', 'Vim': 'Greens'}
SHADES = {'T': 0.35, 'S': 0.6, 'B': 0.85}


def draw_summary(summary: dict, references: Sequence[str] | None = None) -> bytes:
    """Draw group means and single tasks, own and published.

    Args:
        summary: See `summarize`. A smoke run is drawn without published scores, since it cannot be compared.
        references: Names in `PUBLISHED`. Default: all.

    Returns:
        A PNG file.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If a reference is unknown.
    """
    from matplotlib.figure import Figure

    references = list(PUBLISHED) if references is None else list(references)
    unknown = [name for name in references if name not in PUBLISHED]
    if unknown:
        raise ValueError(f'no published scores for {unknown}; known are {list(PUBLISHED)}')
    is_smoke = summary['kind'] == 'smoke'
    references = [] if is_smoke else references
    figure = Figure(figsize=(13, 8), layout='constrained')
    upper, lower = figure.subplots(2, 1)
    average = summary['smoke_average'] if is_smoke else summary['average']
    own_groups = [*(summary['groups'][group]['mean'] for group in GROUPS), average]
    own, average_name = ('smoke run', 'smoke mean') if is_smoke else ('this campaign', 'mean over 19')
    series = {own: own_groups}
    for name in references:
        score = PUBLISHED[name]
        series[name] = [score.natural, score.specialized, score.structured, score.average]
    _bars(upper, series, [*GROUPS, average_name])
    with_tasks = [name for name in references if name in PUBLISHED_TASKS]
    series = {own: [entry['mean'] for entry in summary['tasks']]}
    series.update({name: [PUBLISHED_TASKS[name][task] for task in TASKS] for name in with_tasks})
    errors = [entry['std'] or 0.0 for entry in summary['tasks']]
    _bars(lower, series, list(TASKS), errors)
    if is_smoke:
        figure.suptitle('SMOKE RUN on a miniature: these are not VTAB scores', color=OWN_COLOUR)
    else:
        protocol = '' if summary['kind'] == 'standard' else ', not by the published protocol'
        figure.suptitle(f'VTAB-1K, {summary["complete"]}/19 tasks complete{protocol}')
        sources = (
            f'groups: {SOURCES["ViL"]}\nsingle tasks: {SOURCES["VIOLIN"]}; error bars: standard deviation over seeds'
        )
        figure.supxlabel(sources, fontsize=7)
    buffer = io.BytesIO()
    figure.savefig(buffer, format='png', dpi=110)
    return buffer.getvalue()


def _bars(axes, series: dict[str, list[float | None]], names: list[str], errors: list[float] | None = None) -> None:
    """Draw groups of bars; a missing value leaves a gap."""
    width = 0.85 / len(series)
    for number, (label, values) in enumerate(series.items()):
        is_own = number == 0
        shown = [index for index, value in enumerate(values) if value is not None]
        places, heights = [index + number * width for index in shown], [values[index] for index in shown]
        spread = [errors[index] for index in shown] if is_own and errors else None
        axes.bar(places, heights, width, yerr=spread, label=label, color=OWN_COLOUR if is_own else _colour(label))
    middles = [index + 0.42 - width / 2 for index in range(len(names))]
    tilt = {'rotation': 30, 'ha': 'right', 'rotation_mode': 'anchor'} if len(names) > 8 else {}
    axes.set_xticks(middles, names, **tilt)
    axes.set_ylabel('top-1 %')
    axes.set_ylim(0, 100)
    axes.grid(axis='y', alpha=0.3)
    axes.legend(fontsize=7, ncols=6, loc='upper right')


def _colour(name: str) -> tuple[float, float, float, float]:
    """Colour of a published model, by family and size."""
    from matplotlib import colormaps

    family, _, size = name.rpartition('-')
    return colormaps[FAMILY_COLOURS[family]](SHADES[size])
