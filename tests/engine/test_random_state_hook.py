"""Straight runs against interrupted ones, bit by bit."""

import random
import uuid

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch.utils.data import Dataset

from mmvil.engine.seeded_loading import PlacedIndex, PlacedSampler, SeededFetch, preserved_generators, seed_generators

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


def make_runner(work_dir, loop, steps, num_workers=0, seed=5, with_val=False, **extra):
    epoch_based = loop == 'epoch'
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
        val = dict(val_dataloader=loader, val_cfg=dict(type='ValLoop'), val_evaluator=dict(type='ConstantMetric'))
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
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', by_epoch=epoch_based, interval=1)),
        custom_hooks=[dict(type='mmvil.RandomStateHook'), dict(type='EMAHook', momentum=0.1)],
        log_level='ERROR',
        randomness=dict(seed=seed),
        default_scope='mmengine',
        **val,
    )
    config.update(extra)
    config['experiment_name'] = uuid.uuid4().hex
    return Runner(**config, cfg=Config(dict()))


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


@pytest.mark.parametrize('num_workers', [0, 2])
@pytest.mark.parametrize(
    ('loop', 'checkpoint', 'last'),
    [('epoch', 'epoch_2.pth', 'epoch_4.pth'), ('iteration', 'iter_2.pth', 'iter_4.pth')],
)
def test_resumed_run_equals_straight_run(tmp_path, loop, checkpoint, last, num_workers):
    straight = make_runner(tmp_path / 'straight', loop, 4, num_workers)
    straight.train()
    done = len(straight.model.seen) // 2
    resumed = make_runner(
        tmp_path / 'resumed', loop, 4, num_workers, resume=True, load_from=str(tmp_path / 'straight' / checkpoint)
    )
    resumed.train()
    assert_same_batches(straight.model.seen[done:], resumed.model.seen)
    assert_same_training(checkpoint_of(tmp_path / 'straight', last), checkpoint_of(tmp_path / 'resumed', last))
