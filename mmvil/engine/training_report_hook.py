"""What a training leaves behind for the eye: its curves, its confusion matrix and the command to go on with."""

import glob
import importlib.util
import json
import os.path
from collections.abc import Sequence
from typing import Any

import torch
from mmengine.dist import collect_results, master_only
from mmengine.hooks import Hook
from mmengine.runner import IterBasedTrainLoop

from ..registry import HOOKS

__all__ = ['TrainingReportHook', 'read_history']


@HOOKS.register_module()
class TrainingReportHook(Hook):
    """Writes `training_curves.png` and `confusion_matrix.png` into the work dir when the training ends.

    The curves are drawn from the scalars that mmengine has logged, those of the interrupted run included. The matrix is
    that of the validation with the highest `metric` since the start of the process, counted by mmpretrain's
    `ConfusionMatrix`; models without `pred_label` and `gt_label` get the curves alone. Files appear only when complete.

    Args:
        metric (str): The validation metric to draw, as it is called in the log. Default: 'accuracy/top1'.

    Raises:
        ImportError: without matplotlib, before the training starts.
    """

    # After CheckpointHook, which decides on the best checkpoint.
    priority = 'LOWEST'

    def __init__(self, metric: str = 'accuracy/top1') -> None:
        if importlib.util.find_spec('matplotlib') is None:
            raise ImportError("TrainingReportHook needs matplotlib: pip install 'mmvil[openmmlab]'")
        self.metric = metric
        self._labels: list[tuple[int, int]] = []
        self._matrix: torch.Tensor | None = None
        self._matrix_value = float('-inf')
        self._matrix_step = 0

    def before_val_epoch(self, runner: Any) -> None:
        """Forget the predictions of the last validation."""
        self._labels = []

    def after_val_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Sequence | None = None
    ) -> None:
        """Keep predicted and true labels."""
        for sample in outputs or ():
            predicted, true = getattr(sample, 'pred_label', None), getattr(sample, 'gt_label', None)
            if predicted is not None and true is not None and predicted.numel() == true.numel() == 1:
                self._labels.append((int(predicted), int(true)))

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        """Count the confusion matrix of the best validation so far."""
        labels = collect_results(self._labels, len(runner.val_dataloader.dataset), device='cpu')
        value = (metrics or {}).get(self.metric)
        if not labels or value is None or value <= self._matrix_value:
            return
        from mmpretrain.evaluation import ConfusionMatrix

        predicted, true = torch.tensor(labels).unbind(1)
        num_classes = len(_classes(runner)) or int(max(predicted.max(), true.max())) + 1
        self._matrix = ConfusionMatrix.calculate(predicted, true, num_classes=num_classes)
        self._matrix_value = value
        self._matrix_step = runner.iter if _counts_iterations(runner) else runner.epoch

    @master_only
    def after_train(self, runner: Any) -> None:
        """Draw, and say what has been written."""
        from .report_figures import draw_confusion_matrix, draw_training_curves

        unit = 'iteration' if _counts_iterations(runner) else 'epoch'
        history = read_history(runner.work_dir, runner.log_dir, with_earlier_runs=runner._resume)
        written = []
        if history:
            path = os.path.join(runner.work_dir, 'training_curves.png')
            iterations_per_epoch = None if unit == 'iteration' else len(runner.train_dataloader)
            draw_training_curves(history, path, self.metric, iterations_per_epoch)
            written.append(path)
        if self._matrix is not None:
            path = os.path.join(runner.work_dir, 'confusion_matrix.png')
            draw_confusion_matrix(self._matrix, path, _classes(runner), f'Validation, {unit} {self._matrix_step}')
            written.append(path)
        for path in written:
            runner.logger.info(f'Written: {path}')
        best = runner.message_hub.runtime_info.get('best_ckpt')
        last = runner.message_hub.runtime_info.get('last_ckpt')
        if runner.cfg.filename is not None and (best or last):
            config = os.path.join(runner.work_dir, os.path.basename(runner.cfg.filename))
            runner.logger.info(f'Next: python tools/test.py {config} {best or last}')


def read_history(work_dir: str, log_dir: str, with_earlier_runs: bool) -> list[dict[str, float]]:
    """Read the scalars that mmengine's LocalVisBackend has logged.

    Args:
        work_dir (str): The work dir, with one folder of logs for each start of the training.
        log_dir (str): The folder of this start.
        with_earlier_runs (bool): Put the logs of earlier starts before them, up to the step where this one began.

    Returns:
        list[dict[str, float]]: One dict for each line of the log, in order; empty if there is no log.
    """
    paths = [os.path.join(log_dir, 'vis_data', 'scalars.json')]
    if with_earlier_runs:
        found = sorted(glob.glob(os.path.join(glob.escape(work_dir), '*', 'vis_data', 'scalars.json')))
        paths = [path for path in found if path < paths[0]] + paths
    history: list[dict[str, float]] = []
    for path in paths:
        if not os.path.isfile(path):
            continue
        with open(path, encoding='utf-8') as file:
            lines = [json.loads(line) for line in file if line.strip()]
        for is_training in (True, False):
            starts = [line['step'] for line in lines if ('loss' in line) == is_training]
            if starts:
                history = [line for line in history if ('loss' in line) != is_training or line['step'] < starts[0]]
        history += lines
    return history


def _counts_iterations(runner: Any) -> bool:
    return isinstance(runner.train_loop, IterBasedTrainLoop)


def _classes(runner: Any) -> tuple[str, ...]:
    return tuple((getattr(runner.val_dataloader.dataset, 'metainfo', None) or {}).get('classes') or ())
