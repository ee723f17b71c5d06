"""A loss that is no longer a number ends the training with a message that helps."""

from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch.utils.data import Dataset

from mmvil.engine import StopOnNonFiniteLossHook


class Numbers(Dataset):
    metainfo = dict(classes=('a',))

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return dict(inputs=torch.ones(2))


class BreakingModel(BaseModel):
    """Its second loss entry is NaN from iteration `bad_from` on, for `bad_count` iterations."""

    def __init__(self, bad_from, bad_count):
        super().__init__()
        self.linear = torch.nn.Linear(2, 1)
        self.bad = range(bad_from, bad_from + bad_count)
        self.iteration = 0

    def forward(self, inputs, mode='tensor'):
        self.iteration += 1
        loss = self.linear(torch.stack(list(inputs))).square().mean()
        extra = torch.tensor(float('nan') if self.iteration in self.bad else 1.0)
        return dict(loss_main=loss, loss_extra=extra)


def make_runner(work_dir, hook, bad_from=3, bad_count=100):
    return Runner(
        model=BreakingModel(bad_from, bad_count),
        work_dir=str(work_dir),
        train_dataloader=dict(batch_size=2, dataset=Numbers(), sampler=dict(type='InfiniteSampler')),
        train_cfg=dict(by_epoch=False, max_iters=6),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.25)),
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=1)),
        custom_hooks=[hook],
        log_level='ERROR',
        default_scope='mmengine',
        experiment_name=work_dir.name,
        cfg=Config(dict()),
    )


def test_message_names_iteration_entry_rate_and_advice(tmp_path):
    runner = make_runner(tmp_path, dict(type='mmvil.StopOnNonFiniteLossHook'))
    with pytest.raises(FloatingPointError) as caught:
        runner.train()
    message = str(caught.value)
    for part in ('iteration 3 of 6', 'loss_extra = nan', 'learning rate 0.25', 'clip'):
        assert part in message
    assert 'loss_main' not in message
    # The weights of the broken iteration were not saved.
    assert sorted(path.name for path in tmp_path.glob('*.pth')) == ['iter_1.pth', 'iter_2.pth']


def test_tolerance_lets_single_iterations_pass(tmp_path):
    runner = make_runner(tmp_path, dict(type='mmvil.StopOnNonFiniteLossHook', tolerance=1), bad_count=1)
    runner.train()
    assert runner.iter == 6


def test_tolerance_counts_iterations_in_a_row(tmp_path):
    runner = make_runner(tmp_path, dict(type='mmvil.StopOnNonFiniteLossHook', tolerance=1), bad_count=2)
    with pytest.raises(FloatingPointError, match=r'2 iterations in a row.*iteration 4 of 6'):
        runner.train()


def fake_runner(iteration, scalars):
    return SimpleNamespace(
        iter=iteration,
        max_iters=100,
        message_hub=SimpleNamespace(log_scalars=scalars),
        optim_wrapper=SimpleNamespace(get_lr=lambda: dict(lr=[1e-3, 1e-4])),
    )


class Untouchable(torch.Tensor):
    """A tensor on a device: reading its value would wait for the device."""

    def __float__(self):
        raise AssertionError('the value was fetched from the device')


def test_values_on_the_host_are_used_and_the_device_is_left_alone():
    scalars = {'train/loss': SimpleNamespace(current=lambda: 1.0)}
    outputs = dict(loss=torch.tensor(1.0).as_subclass(Untouchable))
    StopOnNonFiniteLossHook(interval=1).after_train_iter(fake_runner(0, scalars), 0, outputs=outputs)


def test_without_values_on_the_host_the_check_waits_for_the_interval_or_a_checkpoint():
    hook = StopOnNonFiniteLossHook(interval=5)
    outputs = dict(loss=torch.tensor(float('inf')))
    hook.after_train_iter(fake_runner(1, {}), 1, outputs=outputs)
    with pytest.raises(FloatingPointError, match='loss = inf'):
        hook.before_save_checkpoint(fake_runner(1, {}), {})
    hook = StopOnNonFiniteLossHook(interval=5)
    with pytest.raises(FloatingPointError, match=r'0\.0001 to 0\.001'):
        hook.after_train_iter(fake_runner(4, {}), 4, outputs=outputs)


def test_other_figures_may_be_anything():
    outputs = dict(loss=torch.tensor(1.0), acc=torch.tensor(float('nan')))
    StopOnNonFiniteLossHook(interval=1).after_train_iter(fake_runner(0, {}), 0, outputs=outputs)


@pytest.mark.parametrize('options', [dict(tolerance=-1), dict(interval=0)])
def test_bad_options_are_refused(options):
    with pytest.raises(ValueError, match=str(next(iter(options.values())))):
        StopOnNonFiniteLossHook(**options)
