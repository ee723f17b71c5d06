from pathlib import Path

import pytest
from mmengine.config import Config

from mmvil.datasets.vtab_tasks import TASKS
from mmvil.evaluation.campaign import plain
from mmvil.evaluation.protocol import (
    STANDARD,
    find_deviations,
    load_settings,
    plan_final_runs,
    plan_tuning_runs,
    select_learning_rate,
)

CONFIGS = Path(__file__).parents[2] / 'configs'
RATES = [1e-3, 7.5e-4, 5e-4, 2.5e-4, 1e-4]


@pytest.mark.parametrize('name', ['vil-tiny', 'vil-small', 'vil-base', 'deit-tiny', 'deit-small', 'deit-base'])
def test_configs_are_the_protocol_to_the_letter(name):
    path = CONFIGS / 'vtab' / f'{name}_vtab1k.py'
    assert find_deviations(load_settings(path)) == []
    config = Config.fromfile(str(path))
    assert {key: plain(config[key]) for key in STANDARD} == plain(STANDARD)


def test_the_values_of_the_protocol():
    protocol = STANDARD['protocol']
    assert (protocol['learning_rates'], protocol['seeds']) == (RATES, [0, 1, 2, 3, 4])
    assert (protocol['epochs'], protocol['batch_size']) == (50, 64)
    assert 19 * len(plan_tuning_runs(TASKS['cifar'], protocol)) == 475
    assert 19 * len(plan_final_runs(TASKS['cifar'], protocol, 1e-3)) == 95
    wrapper = STANDARD['optim_wrapper']
    assert (wrapper['type'], wrapper['dtype']) == ('AmpOptimWrapper', 'bfloat16')
    assert set(wrapper) == {'type', 'dtype', 'loss_scale', 'optimizer', 'constructor', 'paramwise_cfg'}  # no clipping
    optimizer = wrapper['optimizer']
    assert (optimizer['type'], optimizer['betas'], optimizer['weight_decay']) == ('AdamW', (0.9, 0.999), 0.05)
    assert STANDARD['task_head']['loss'] == {'type': 'mmpretrain.CrossEntropyLoss', 'loss_weight': 1.0}
    assert len(STANDARD['cached_pipeline']) == 1  # the resize, no augmentation
    resize = STANDARD['cached_pipeline'][0]
    assert (resize['scale'], resize['keep_ratio']) == ((224, 224), False)
    assert (resize['interpolation'], resize['backend']) == ('bicubic', 'pillow')
    assert STANDARD['data_preprocessor'] == {
        'mean': [123.675, 116.28, 103.53],
        'std': [58.395, 57.12, 57.375],
        'to_rgb': True,
    }


def test_selection_takes_the_highest_mean_over_seeds_not_the_highest_score():
    scores = {1e-3: [100, 0, 0], 5e-4: [40, 41, 42], 1e-4: [39, 40, 41]}
    assert select_learning_rate(scores, [1e-3, 5e-4, 1e-4]) == 5e-4


def test_of_equal_means_the_first_is_taken():
    scores = {1e-3: [1, 2], 5e-4: [10, 13], 2.5e-4: [11, 12], 1e-4: [12, 11]}
    assert select_learning_rate(scores, [1e-3, 5e-4, 2.5e-4, 1e-4]) == 5e-4
    assert select_learning_rate(scores, [1e-4, 2.5e-4, 5e-4, 1e-3]) == 1e-4


@pytest.mark.parametrize('scores', [{1e-3: [1, 2]}, {1e-3: [1, 2], 1e-4: [3]}, {1e-3: [], 1e-4: []}, {}])
def test_selection_needs_complete_scores(scores):
    with pytest.raises(ValueError, match='the same number of seeds for every learning rate'):
        select_learning_rate(scores, [1e-3, 1e-4])


def test_overrides_and_what_deviates():
    settings = load_settings(
        CONFIGS / 'vtab/vil-tiny_vtab1k.py',
        {'protocol.epochs': 10, 'optim_wrapper.paramwise_cfg.layer_decay_rate': 0.8, 'runtime.num_threads': 2},
    )
    assert find_deviations(settings) == [
        'protocol.epochs: 10 instead of 50',
        'optim_wrapper.paramwise_cfg.layer_decay_rate: 0.8 instead of 0.65',
    ]


def test_an_mmpretrain_config_gives_its_model_and_nothing_else(tmp_path):
    path = tmp_path / 'config.py'
    path.write_text(
        "model = dict(type='ImageClassifier', backbone=dict(type='ResNet', depth=18),"
        " neck=dict(type='GlobalAveragePooling'), data_preprocessor=dict(mean=[1.0, 2.0, 3.0], to_rgb=False))\n"
        "optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.1))\n"
        "param_scheduler = dict(type='MultiStepLR')\n"
    )
    settings = load_settings(path)
    assert find_deviations(settings) == []
    assert settings.model.backbone.type == 'ResNet'
    assert settings.data_preprocessor == dict(mean=[1.0, 2.0, 3.0], to_rgb=False)


@pytest.mark.parametrize(
    ('overrides', 'message'),
    [
        ({'protocol.epochs': 0}, 'epochs must be a positive whole number, got 0'),
        ({'protocol.batch_size': 0.5}, 'batch_size must be'),
        ({'protocol.seeds': [1, 1]}, 'seeds must be a list of different numbers'),
        ({'protocol.learning_rates': []}, 'learning_rates must be a list'),
        ({'protocol.learning_rates': [-1e-3]}, 'learning_rates must be positive'),
        ({'protocol.epoch': 3}, r"protocol has unknown keys \['epoch'\]"),
        ({'runtime.num_thread': 3}, r"runtime has unknown keys \['num_thread'\]"),
        ({'optimwrapper.optimizer.lr': 3}, r"an override has unknown keys \['optimwrapper'\]"),
    ],
)
def test_values_that_make_no_sense(overrides, message):
    with pytest.raises(ValueError, match=message):
        load_settings(None, overrides)


def test_a_config_without_a_model(tmp_path):
    (tmp_path / 'config.py').write_text('a = 1\n')
    with pytest.raises(ValueError, match=r"has no model; its keys are \['a'\]"):
        load_settings(tmp_path / 'config.py')
