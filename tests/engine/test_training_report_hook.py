"""The pictures at the end of a training and what they are drawn from."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from mmvil.engine import TrainingReportHook
from mmvil.engine.report_figures import draw_confusion_matrix, draw_training_curves
from mmvil.engine.training_report_hook import read_history


def write_log(work_dir, timestamp, lines):
    folder = work_dir / timestamp / 'vis_data'
    folder.mkdir(parents=True)
    (folder / 'scalars.json').write_text('\n'.join(json.dumps(line) for line in lines) + '\n')
    return work_dir / timestamp


def training(*steps):
    return [dict(loss=1.0 / step, lr=1e-3, step=step) for step in steps]


def validation(*steps):
    return [{'accuracy/top1': 90.0 + step, 'step': step} for step in steps]


def test_history_of_a_resumed_run_has_each_step_once(tmp_path):
    # The first run was interrupted after iteration 30, its last checkpoint was that of iteration 20.
    write_log(
        tmp_path, '20260101_000000', [*training(10), *validation(1), *training(20), *validation(2), *training(30)]
    )
    log_dir = write_log(tmp_path, '20260102_000000', [*training(30), *validation(3), *training(40)])
    history = read_history(str(tmp_path), str(log_dir), with_earlier_runs=True)
    assert [line['step'] for line in history if 'loss' in line] == [10, 20, 30, 40]
    assert [line['step'] for line in history if 'loss' not in line] == [1, 2, 3]
    fresh = read_history(str(tmp_path), str(log_dir), with_earlier_runs=False)
    assert [line['step'] for line in fresh] == [30, 3, 40]
    assert read_history(str(tmp_path), str(tmp_path / 'nothing'), with_earlier_runs=False) == []


def colours(path):
    return len(np.unique(np.asarray(Image.open(path).convert('RGB')).reshape(-1, 3), axis=0))


@pytest.mark.parametrize(
    'history', [[*training(10, 20), *validation(1, 2)], training(10)], ids=['with validation', 'without validation']
)
def test_curves_are_a_complete_picture(tmp_path, history):
    path = tmp_path / 'curves.png'
    draw_training_curves(history, str(path), 'accuracy/top1', iterations_per_epoch=10)
    assert colours(path) > 50
    assert [path.name for path in tmp_path.iterdir()] == ['curves.png']


@pytest.mark.parametrize(
    'classes', [tuple('0123456789'), ('a very long name',) * 10, ()], ids=['short names', 'long names', 'no names']
)
def test_confusion_matrix_is_a_complete_picture(tmp_path, classes):
    path = tmp_path / 'matrix.png'
    draw_confusion_matrix(torch.eye(10, dtype=torch.int64) * 30 + 1, str(path), classes, 'Validation, epoch 3')
    assert colours(path) > 50
    assert [path.name for path in tmp_path.iterdir()] == ['matrix.png']


def test_confusion_matrix_of_many_classes_and_of_empty_ones(tmp_path):
    draw_confusion_matrix(torch.eye(100, dtype=torch.int64), str(tmp_path / 'many.png'), (), 'Validation')
    draw_confusion_matrix(torch.zeros(3, 3, dtype=torch.int64), str(tmp_path / 'empty.png'), (), 'Validation')


def test_matrix_is_that_of_the_best_validation():
    dataset = type('TwoSamples', (), dict(metainfo=dict(classes=('a', 'b')), __len__=lambda self: 2))()
    runner = SimpleNamespace(epoch=0, train_loop=None, val_dataloader=SimpleNamespace(dataset=dataset))
    hook = TrainingReportHook()
    for epoch, predicted, value in [(1, (0, 0), 50.0), (2, (0, 1), 100.0), (3, (1, 0), 0.0)]:
        runner.epoch = epoch
        hook.before_val_epoch(runner)
        for true, label in enumerate(predicted):
            sample = SimpleNamespace(pred_label=torch.tensor([label]), gt_label=torch.tensor([true]))
            hook.after_val_iter(runner, 0, outputs=[sample])
        hook.after_val_epoch(runner, {'accuracy/top1': value})
    assert hook._matrix.tolist() == [[1, 0], [0, 1]]
    assert hook._matrix_step == 2


def test_outputs_without_labels_are_left_alone():
    hook = TrainingReportHook()
    hook.after_val_iter(None, 0, outputs=[SimpleNamespace(pred_sem_seg=1)])
    hook.after_val_iter(None, 0, outputs=None)
    assert hook._labels == []
