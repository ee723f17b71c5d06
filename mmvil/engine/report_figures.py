"""The pictures of a training. Drawn without matplotlib's global state, so no display and no backend is needed."""

import os
from collections.abc import Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

__all__ = ['draw_confusion_matrix', 'draw_training_curves', 'save_figure']

MAX_CLASSES_WITH_NUMBERS = 25
BLUE, ORANGE, GREY = '#1f5fa8', '#d9730d', '#666666'
METRIC_NAMES = {'accuracy/top1': 'top-1 accuracy [%]', 'accuracy/top5': 'top-5 accuracy [%]', 'mIoU': 'mean IoU [%]'}


def save_figure(figure: Figure, path: str) -> None:
    """Write a figure as PNG; the file appears only when it is complete."""
    temporary = f'{path}.tmp'
    FigureCanvasAgg(figure)
    figure.savefig(temporary, format='png', dpi=150)
    os.replace(temporary, path)


def draw_training_curves(
    history: Sequence[dict[str, float]], path: str, metric: str, iterations_per_epoch: int | None
) -> None:
    """Draw training loss, validation metric and learning rate.

    Args:
        history (Sequence[dict[str, float]]): Lines of mmengine's scalars file.
        path (str): The PNG file.
        metric (str): The validation metric.
        iterations_per_epoch (int | None): Draws over epochs; None: over iterations.
    """
    training = [line for line in history if 'loss' in line]
    validation = [line for line in history if metric in line]
    unit = 'iteration' if iterations_per_epoch is None else 'epoch'
    places = [line['step'] / (iterations_per_epoch or 1) for line in training]
    figure = Figure(figsize=(12, 3.8), layout='constrained')
    loss_axes, metric_axes, rate_axes = figure.subplots(1, 3)

    marker = 'o' if len(training) <= 60 else None
    loss_axes.plot(places, [line['loss'] for line in training], color=BLUE, marker=marker, markersize=3)
    loss_axes.set(title='Training loss', ylabel='loss')
    loss_axes.set_ylim(bottom=0)
    rate_axes.plot(places, [line.get('lr', float('nan')) for line in training], color=GREY, marker=marker, markersize=3)
    rate_axes.set(title='Learning rate', ylabel='learning rate')
    rate_axes.ticklabel_format(axis='y', style='sci', scilimits=(0, 0))
    rate_axes.set_ylim(bottom=0)
    _draw_metric(metric_axes, validation, metric, unit)
    for axes in (loss_axes, metric_axes, rate_axes):
        axes.set_xlabel(unit)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        axes.grid(alpha=0.3)
        axes.spines[['top', 'right']].set_visible(False)
    save_figure(figure, path)


def _draw_metric(axes, validation: Sequence[dict[str, float]], metric: str, unit: str) -> None:
    axes.set(title='Validation', ylabel=METRIC_NAMES.get(metric, metric))
    if not validation:
        axes.text(0.5, 0.5, f'no {metric} in the log', ha='center', va='center', transform=axes.transAxes, color=GREY)
        return
    steps, values = [line['step'] for line in validation], [line[metric] for line in validation]
    best = max(range(len(values)), key=values.__getitem__)
    marker = 'o' if len(values) <= 60 else None
    axes.plot(steps, values, color=ORANGE, marker=marker, markersize=3)
    axes.plot(steps[best], values[best], color=ORANGE, marker='*', markersize=14, markeredgecolor='white', linestyle='')
    axes.annotate(
        f'best: {values[best]:.2f} ({unit} {steps[best]:g})',
        xy=(0.97, 0.06),
        xycoords='axes fraction',
        ha='right',
        fontsize=11,
    )


def draw_confusion_matrix(matrix: Tensor, path: str, classes: Sequence[str], title: str) -> None:
    """Draw a confusion matrix: counts as numbers, the share of the true class as colour.

    Args:
        matrix (Tensor): (C, C), int64; rows are true classes, columns predicted ones.
        path (str): The PNG file.
        classes (Sequence[str]): Names of the classes; may be empty.
        title (str): What the predictions are; the accuracy is added.
    """
    total, right = int(matrix.sum()), int(matrix.diagonal().sum())
    num_classes = len(matrix)
    names = list(classes) or [str(number) for number in range(num_classes)]
    shares = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    figure = Figure(figsize=(6.4, 5.8), layout='constrained')
    axes = figure.subplots()
    image = axes.imshow(shares, cmap='Blues', vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, shrink=0.85, label='share of the true class')
    axes.set_title(f'{title}\n{right} of {total} right ({100 * right / max(total, 1):.2f} %)', fontsize=12)
    axes.set(xlabel='predicted class', ylabel='true class')
    if num_classes > MAX_CLASSES_WITH_NUMBERS:
        save_figure(figure, path)
        return
    long_names = max(map(len, names)) > 3
    axes.set_xticks(range(num_classes), names, rotation=45 if long_names else 0, ha='right' if long_names else 'center')
    axes.set_yticks(range(num_classes), names)
    for row, column in matrix.nonzero().tolist():
        wrong = row != column
        axes.text(
            column,
            row,
            int(matrix[row, column]),
            ha='center',
            va='center',
            color='white' if shares[row, column] > 0.5 else ('#b00020' if wrong else 'black'),
            fontweight='bold' if wrong else 'normal',
        )
    save_figure(figure, path)
