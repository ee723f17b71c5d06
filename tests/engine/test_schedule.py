"""The recipe's learning rate against its formula, evaluated in 50 digits."""

import mpmath
import pytest
import torch
from mmengine.registry import PARAM_SCHEDULERS

from mmvil.engine import WarmupCosineLR


def exact_lr(step: int, num_steps: int, warmup: int, lr: str, end: str) -> float:
    """Evaluate the formula of the released training code independently of the code under test."""
    with mpmath.workdps(50):
        lr, end = mpmath.mpf(lr), mpmath.mpf(end)
        if step < warmup:
            return float(lr * (step + 1) / (warmup + 1))
        return float(end + (lr - end) * (1 + mpmath.cos(mpmath.pi * (step - warmup) / (num_steps - warmup - 1))) / 2)


def make_optimizer(*options: dict, lr: float = 2e-3) -> torch.optim.Optimizer:
    groups = [{'params': [torch.nn.Parameter(torch.zeros(1))], **option} for option in options or [{}]]
    return torch.optim.AdamW(groups, lr=lr)


def build(optimizer, epoch_length=None, **options):
    config = {'type': 'mmvil.WarmupCosineLR', **options}
    return PARAM_SCHEDULERS.build(config, default_args={'optimizer': optimizer, 'epoch_length': epoch_length})


def jump(schedule: WarmupCosineLR, step: int) -> float:
    """Let the schedule compute the value of any step; it holds no state but the step's number."""
    schedule.last_step = schedule._global_step = step - 1
    schedule.optimizer._global_step = step
    schedule.step()
    return schedule.optimizer.param_groups[0]['lr']


@pytest.mark.parametrize(
    ('epochs', 'warmup', 'epoch_length', 'lr', 'end'),
    [
        pytest.param(800, 5, 625, '2e-3', '1e-6', id='pretrain-800'),
        pytest.param(400, 5, 625, '2e-3', '1e-6', id='pretrain-400'),
        pytest.param(20, 5, 1251, '1e-5', '1e-6', id='finetune-20'),
        pytest.param(5, 1, 1251, '1e-5', '1e-6', id='finetune-5'),
        pytest.param(30, 5, 1251, '1e-5', '1e-5', id='stride8-constant'),
        pytest.param(3, 0, 7, '1e-3', '0', id='no-warmup'),
    ],
)
def test_recipe_values(epochs, warmup, epoch_length, lr, end):
    optimizer = make_optimizer(lr=float(lr))
    schedule = build(
        optimizer,
        epoch_length,
        warmup=warmup,
        eta_min=float(end),
        end=epochs,
        by_epoch=True,
        convert_to_iter_based=True,
    )
    assert not schedule.by_epoch
    total, warm = epochs * epoch_length, warmup * epoch_length
    for step in sorted({0, 1, max(warm - 1, 0), warm, warm + 1, (warm + total) // 2, total - 2, total - 1}):
        expected = exact_lr(step, total, warm, lr, end)
        assert jump(schedule, step) == pytest.approx(expected, rel=1e-9, abs=1e-18), step
    assert jump(schedule, total - 1) == pytest.approx(float(end), rel=1e-12)


def test_every_step_of_a_run():
    optimizer = make_optimizer()
    schedule = build(optimizer, warmup=7, eta_min=1e-6, end=50, by_epoch=False)
    for step in range(50):
        expected = exact_lr(step, 50, 7, '2e-3', '1e-6')
        assert optimizer.param_groups[0]['lr'] == pytest.approx(expected, rel=1e-12)
        optimizer.step()
        schedule.step()
    assert optimizer.param_groups[0]['lr'] == pytest.approx(1e-6, rel=1e-12)  # stays at the end


def test_first_and_highest_rate():
    optimizer = make_optimizer()
    schedule = build(optimizer, warmup=4, end=20, by_epoch=False)
    assert optimizer.param_groups[0]['lr'] == pytest.approx(2e-3 / 5)
    assert jump(schedule, 4) == 2e-3


@pytest.mark.parametrize('key', ['lr_scale', 'lr_mult'])
def test_scaled_groups_scale_their_end_too(key):
    optimizer = make_optimizer({}, {'lr': 2e-4, key: 0.1})
    schedule = build(optimizer, warmup=3, eta_min=1e-6, end=30, by_epoch=False)
    for step in (0, 2, 3, 17, 29):
        full = jump(schedule, step)
        assert optimizer.param_groups[1]['lr'] == pytest.approx(0.1 * full, rel=1e-12)


def test_group_without_a_mark_ends_at_the_absolute_value():
    optimizer = make_optimizer({}, {'lr': 2e-4})
    jump(build(optimizer, eta_min=1e-6, end=30, by_epoch=False), 29)
    assert [group['lr'] for group in optimizer.param_groups] == pytest.approx([1e-6, 1e-6])


def test_resume_continues_exactly():
    straight, resumed = make_optimizer(), make_optimizer()
    first = build(straight, warmup=3, eta_min=1e-6, end=12, by_epoch=False)
    for _ in range(5):
        straight.step()
        first.step()
    second = build(resumed, warmup=3, eta_min=1e-6, end=12, by_epoch=False)
    resumed.load_state_dict(straight.state_dict())
    second.load_state_dict(first.state_dict())
    for _ in range(6):
        for optimizer, schedule in ((straight, first), (resumed, second)):
            optimizer.step()
            schedule.step()
        assert straight.param_groups[0]['lr'] == resumed.param_groups[0]['lr']


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'by_epoch': False}, 'needs its length'),
        ({'warmup': 10, 'end': 10, 'by_epoch': False}, 'longer than its warm-up of 10'),
        ({'warmup': -1, 'end': 10, 'by_epoch': False}, 'warmup=-1'),
        ({'eta_min': -1e-6, 'end': 10, 'by_epoch': False}, 'eta_min=-1e-06'),
        ({'eta_min': 1e-2, 'end': 10, 'by_epoch': False}, r'end value of the schedule \(0.01\)'),
        ({'end': 10, 'convert_to_iter_based': True}, 'epoch_length=None'),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        build(make_optimizer(), **options)
