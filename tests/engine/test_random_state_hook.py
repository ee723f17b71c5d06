"""Straight runs against interrupted ones, bit by bit."""

import pathlib
import random
import uuid

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.registry import METRICS
from mmengine.runner import Runner
from torch.utils.data import Dataset

BATCH_SIZE = 4


class NoisySamples(Dataset):
    """Ten samples with an augmentation from each of the three global generators."""

    metainfo = dict(classes=('a', 'b'))

    def __len__(self):
        return 10

    def __getitem__(self, index):
        noise = random.random() + np.random.rand() + torch.rand(()).item()
        image = torch.full((6,), float(index)) + noise
        return dict(inputs=image, index=index)


class NoisyModel(BaseModel):
    """Dropout, batch norm and noise from Python and NumPy; remembers every batch it is trained on."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(6, 5), torch.nn.BatchNorm1d(5), torch.nn.Dropout(0.5), torch.nn.Linear(5, 2)
        )
        self.seen = []

    def forward(self, inputs, index, mode='tensor'):
        inputs = torch.stack(list(inputs))
        outputs = self.layers(inputs)
        if mode != 'loss':
            return outputs
        self.seen.append((list(map(int, index)), inputs.clone()))
        return dict(loss=(outputs * (np.random.rand() + random.random())).square().mean())


@METRICS.register_module(name='RandomMetric', force=True)
class RandomMetric(BaseMetric):
    """Spends random numbers, as a validation may."""

    def process(self, data_batch, data_samples):
        self.results.append(random.random() + np.random.rand() + torch.rand(()).item())

    def compute_metrics(self, results):
        return dict(score=1.0 + len(results))


def make_runner(work_dir, loop, steps, num_workers=0, seed=5, with_val=False, checkpoint=None, **extra):
    epoch_based = loop == 'epoch'
    checkpoint = dict(by_epoch=epoch_based, interval=1) | (checkpoint or {})
    sampler = dict(epoch='DefaultSampler', iteration='InfiniteSampler', finite='DefaultSampler')[loop]
    loader = dict(
        batch_size=BATCH_SIZE,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        dataset=NoisySamples(),
        sampler=dict(type=sampler, shuffle=True),
    )
    val = {}
    if with_val:
        val = dict(val_dataloader=loader, val_cfg=dict(type='ValLoop'), val_evaluator=dict(type='RandomMetric'))
    torch.manual_seed(0)
    config = dict(
        model=NoisyModel(),
        work_dir=str(work_dir),
        train_dataloader=loader,
        train_cfg=dict(by_epoch=True, max_epochs=steps) if epoch_based else dict(by_epoch=False, max_iters=steps),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.05)),
        param_scheduler=[
            dict(type='LinearLR', start_factor=0.1, begin=0, end=4, by_epoch=False),
            dict(type='CosineAnnealingLR', T_max=4, by_epoch=epoch_based),
        ],
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', **checkpoint)),
        custom_hooks=[dict(type='mmvil.RandomStateHook'), dict(type='EMAHook', momentum=0.1)],
        log_level='ERROR',
        randomness=dict(seed=seed),
        default_scope='mmengine',
        **val,
    )
    config.update(extra)
    config['experiment_name'] = uuid.uuid4().hex
    return Runner(**config, cfg=Config(dict()))


def train(runner):
    runner.train()
    # Left to the garbage collector, torch waits five seconds for each persistent worker.
    for loop in (runner.train_loop, runner.val_loop):
        if loop is not None:
            loop.dataloader._iterator = None
    if hasattr(runner.train_loop, 'dataloader_iterator'):
        runner.train_loop.dataloader_iterator = None


def checkpoint_of(work_dir, name):
    # The defaults of torch: weights only, plus what mmengine's log buffers need.
    from mmengine.runner.checkpoint import get_torch_safe_globals

    with torch.serialization.safe_globals(get_torch_safe_globals()):
        return torch.load(work_dir / name, weights_only=True)


def flattened(value, path=''):
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in flattened(item, f'{path}/{key}').items()}
    if isinstance(value, (list, tuple)):
        return {k: v for key, item in enumerate(value) for k, v in flattened(item, f'{path}/{key}').items()}
    return {path: value}


def assert_same_training(straight, resumed):
    for part in ('state_dict', 'ema_state_dict', 'optimizer', 'param_schedulers', 'random_state'):
        one, other = flattened(straight[part]), flattened(resumed[part])
        assert one.keys() == other.keys()
        for key, value in one.items():
            same = torch.equal(value, other[key]) if torch.is_tensor(value) else value == other[key]
            assert same, f'{part}{key} differs: {value} and {other[key]}'


def assert_same_batches(straight, resumed):
    assert len(straight) == len(resumed)
    for (indices, images), (resumed_indices, resumed_images) in zip(straight, resumed, strict=True):
        assert indices == resumed_indices
        assert torch.equal(images, resumed_images)


def resume_and_compare(straight, work_dir, loop, steps, source, last, done, **options):
    """Resume from one of the straight run's checkpoints and compare what both did after it."""
    source = str(pathlib.Path(straight.work_dir) / source)
    resumed = make_runner(work_dir, loop, steps, resume=True, load_from=source, **options)
    train(resumed)
    assert_same_batches(straight.model.seen[done:], resumed.model.seen)
    assert_same_training(checkpoint_of(pathlib.Path(straight.work_dir), last), checkpoint_of(work_dir, last))
    return resumed


@pytest.mark.parametrize('num_workers', [0, 2])
@pytest.mark.parametrize('loop', ['epoch', 'iteration'])
def test_four_steps_equal_two_and_two(tmp_path, loop, num_workers):
    straight = make_runner(tmp_path / 'straight', loop, 4, num_workers)
    train(straight)
    name = dict(epoch='epoch', iteration='iter')[loop]
    done = dict(epoch=2 * 3, iteration=2)[loop]
    resume_and_compare(
        straight, tmp_path / 'resumed', loop, 4, f'{name}_2.pth', f'{name}_4.pth', done, num_workers=num_workers
    )


@pytest.mark.parametrize(('checkpoint', 'done'), [('iter_4.pth', 4), ('iter_5.pth', 5), ('iter_6.pth', 6)])
def test_epoch_based_run_resumes_in_the_middle_and_at_the_end_of_an_epoch(tmp_path, checkpoint, done):
    # Three batches an epoch, the last one with two samples; the checkpoint of iteration 6 comes before the epoch's end.
    options = dict(checkpoint=dict(by_epoch=False))
    straight = make_runner(tmp_path / 'straight', 'epoch', 3, **options)
    train(straight)
    resumed = resume_and_compare(straight, tmp_path / 'resumed', 'epoch', 3, checkpoint, 'iter_9.pth', done, **options)
    assert (resumed.iter, resumed.epoch) == (9, 3)


def test_iteration_based_run_over_a_finite_sampler_resumes_in_a_later_pass(tmp_path, monkeypatch):
    monkeypatch.setattr('time.sleep', lambda seconds: None)  # mmengine waits two seconds between two passes
    straight = make_runner(tmp_path / 'straight', 'finite', 8)
    train(straight)
    resume_and_compare(straight, tmp_path / 'resumed', 'finite', 8, 'iter_4.pth', 'iter_8.pth', 4)


def test_seed_that_mmengine_drew_is_kept(tmp_path):
    straight = make_runner(tmp_path / 'straight', 'iteration', 4, seed=None)
    train(straight)
    resume_and_compare(straight, tmp_path / 'resumed', 'iteration', 4, 'iter_2.pth', 'iter_4.pth', 2, seed=None)


def test_training_depends_neither_on_workers_nor_on_validation(tmp_path):
    plain = make_runner(tmp_path / 'plain', 'epoch', 2)
    other = make_runner(tmp_path / 'other', 'epoch', 2, num_workers=2, with_val=True)
    train(plain)
    train(other)
    assert_same_batches(plain.model.seen, other.model.seen)
    assert_same_training(*(checkpoint_of(tmp_path / name, 'epoch_2.pth') for name in ('plain', 'other')))


def test_augmentation_changes_from_epoch_to_epoch_and_with_the_seed(tmp_path):
    runner = make_runner(tmp_path / 'one', 'epoch', 2, num_workers=2)
    train(runner)
    other = make_runner(tmp_path / 'other', 'epoch', 2, num_workers=2, seed=6)
    train(other)
    noise = [
        {
            index: float(image[0]) - index
            for indices, images in epoch
            for index, image in zip(indices, images, strict=True)
        }
        for epoch in (runner.model.seen[:3], runner.model.seen[3:], other.model.seen[:3])
    ]
    values = [round(value, 5) for epoch in noise for value in epoch.values()]
    assert len(set(values)) == len(values) == 30


def test_best_checkpoint_cannot_be_resumed(tmp_path):
    options = dict(with_val=True, checkpoint=dict(save_best='score', rule='greater'))
    train(make_runner(tmp_path, 'epoch', 1, **options))
    source = str(tmp_path / 'best_score_epoch_1.pth')
    with pytest.raises(ValueError, match=r'no optimizer state.*Resume from'):
        make_runner(tmp_path, 'epoch', 2, resume=True, load_from=source, **options).train()


def resume_with_log(tmp_path, checkpoint_changes=None, **options):
    """Resume from a checkpoint with changed entries; return the log."""
    train(make_runner(tmp_path / 'first', 'iteration', 1))
    checkpoint = torch.load(tmp_path / 'first' / 'iter_1.pth', weights_only=False)
    checkpoint = (checkpoint_changes or (lambda same: same))(checkpoint)
    torch.save(checkpoint, tmp_path / 'changed.pth')
    runner = make_runner(
        tmp_path / 'second', 'iteration', 2, resume=True, load_from=str(tmp_path / 'changed.pth'), log_level='INFO'
    )
    train(runner)
    return '\n'.join(path.read_text() for path in (tmp_path / 'second').glob('*/*.log'))


def test_warns_about_a_checkpoint_without_random_state(tmp_path):
    def without(checkpoint):
        del checkpoint['random_state']
        return checkpoint

    assert 'written without RandomStateHook' in resume_with_log(tmp_path, without)


def test_warns_about_another_batch_size(tmp_path):
    def with_other_batch_size(checkpoint):
        checkpoint['random_state']['batch_size'] = 16
        return checkpoint

    assert 'written with batch_size=16, now it is 4' in resume_with_log(tmp_path, with_other_batch_size)
