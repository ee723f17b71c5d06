"""The VTAB-1K protocol behind the published ViL numbers: its values, its runs, its way of choosing.

For every task: train on `train800` with every learning rate and seed, score on `val200`; take the learning rate with
the highest mean over the seeds; train anew on `train800val200` with every seed and score on `test`; report the mean.

Source: released VTAB-1K pipelines of ViL, DeiT, DeiT-III and Vim, which are identical.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mmengine.config import Config, ConfigDict

from ..datasets.vtab_tasks import Task

__all__ = [
    'FINAL_SPLITS',
    'STANDARD',
    'TUNING_SPLITS',
    'Run',
    'find_deviations',
    'load_settings',
    'plan_final_runs',
    'plan_tuning_runs',
    'select_learning_rate',
]

TUNING_SPLITS = ('train800', 'val200')
FINAL_SPLITS = ('train800val200', 'test')

# The values of the protocol. `configs/_base_/schedules/vtab.py` and `configs/_base_/datasets/vtab1k.py` repeat them in
# plain sight; a test holds the two against each other.
STANDARD: dict = {
    'protocol': {
        'learning_rates': [1e-3, 7.5e-4, 5e-4, 2.5e-4, 1e-4],
        'seeds': [0, 1, 2, 3, 4],
        'epochs': 50,
        'batch_size': 64,
    },
    'cached_pipeline': [
        {
            'type': 'mmpretrain.Resize',
            'scale': (224, 224),
            'keep_ratio': False,
            'interpolation': 'bicubic',
            'backend': 'pillow',
        }
    ],
    'data_preprocessor': {'mean': [123.675, 116.28, 103.53], 'std': [58.395, 57.12, 57.375], 'to_rgb': True},
    'backbone_overrides': {'drop_path_rate': 0.0},
    'task_head': {
        'type': 'mmpretrain.LinearClsHead',
        'loss': {'type': 'mmpretrain.CrossEntropyLoss', 'loss_weight': 1.0},
        'init_cfg': {'type': 'TruncNormal', 'layer': 'Linear', 'std': 2e-5},
    },
    'optim_wrapper': {
        'type': 'AmpOptimWrapper',
        'dtype': 'bfloat16',
        'loss_scale': {'enabled': False},
        'optimizer': {'type': 'AdamW', 'lr': 1e-3, 'betas': (0.9, 0.999), 'eps': 1e-8, 'weight_decay': 0.05},
        'constructor': 'mmvil.LayerDecayOptimWrapperConstructor',
        'paramwise_cfg': {
            'layer_decay_rate': 0.65,
            'bias_decay_mult': 0.0,
            'norm_decay_mult': 0.0,
            'flat_decay_mult': 0.0,
        },
    },
    'param_scheduler': {
        'type': 'mmvil.WarmupCosineLR',
        'warmup': 5,
        'eta_min': 0.0,
        'by_epoch': True,
        'convert_to_iter_based': True,
    },
    # No part of the protocol: how the work is done, without influence on what comes out.
    'runtime': {'eval_batch_size': 256, 'num_threads': 8, 'memory_limit': 32.0, 'cuda_graph': True},
}
FREE_KEYS = ('runtime', 'data_preprocessor')  # a backbone is normalised as it was trained
PHASES = ('tune', 'final')


@dataclass(frozen=True, order=True)
class Run:
    """One training with its evaluation.

    Args:
        task: Name of the task.
        phase: 'tune' or 'final'.
        learning_rate: Highest learning rate of the schedule.
        seed: Seed of the head and of the order of the batches.
    """

    task: str
    phase: str
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        """Name of the run's record, without suffix."""
        return f'{self.task}/{self.phase}-lr{self.learning_rate:g}-seed{self.seed}'


def load_settings(config: str | Path | Config | None = None, overrides: Mapping[str, object] | None = None) -> Config:
    """Read a config and fill in the values of the protocol.

    Args:
        config: A VTAB config (it has `protocol`), or any mmpretrain config, of which the model and its normalisation
            are taken and nothing else; None for official weights, which describe their own model.
        overrides: Values that replace those of the config, `{'protocol.epochs': 10}`.

    Returns:
        A config with the keys of `STANDARD` and, unless `config` is None, `model`.

    Raises:
        ValueError: If the config has no model, or a value of the protocol makes no sense.
    """
    given = Config.fromfile(str(config)) if isinstance(config, (str, Path)) else config
    settings = Config({'data_root': 'data/vtab-1k', **copy.deepcopy(STANDARD)})
    if given is not None:
        given = given.to_dict() if isinstance(given, Config) else dict(given)
        if 'model' not in given:
            raise ValueError(f'the config has no model; its keys are {sorted(given)}')
        wanted = ('model', 'data_preprocessor') if 'protocol' not in given else (*STANDARD, 'model', 'data_root')
        for key in wanted:
            if key in ('protocol', 'runtime') and key in given:
                settings[key].update(given[key])
            elif key in given:
                settings[key] = ConfigDict(given[key]) if isinstance(given[key], dict) else given[key]
        inner = settings.model.pop('data_preprocessor', None)
        if inner:
            settings.data_preprocessor = inner
    if overrides:
        settings.merge_from_dict(dict(overrides))
        _refuse_unknown('an override', settings, (*STANDARD, 'model', 'data_root'))
    _refuse_unknown('runtime', settings.runtime, STANDARD['runtime'])
    _check_protocol(settings.protocol)
    return settings


def _refuse_unknown(what: str, given: Iterable[str], accepted: Iterable[str]) -> None:
    """Refuse keys that nothing reads, since a misspelt value would go unnoticed."""
    unknown = sorted(set(given) - set(accepted))
    if unknown:
        raise ValueError(f'{what} has unknown keys {unknown}; accepted are {sorted(accepted)}')


def _check_protocol(protocol: Mapping) -> None:
    """Refuse values that make no sense."""
    _refuse_unknown('protocol', protocol, STANDARD['protocol'])
    for key in ('learning_rates', 'seeds'):
        values = protocol[key]
        if not isinstance(values, (list, tuple)) or not values or len(set(values)) != len(values):
            raise ValueError(f'protocol.{key} must be a list of different numbers, got {values!r}')
    if not all(isinstance(rate, (int, float)) and rate > 0 for rate in protocol['learning_rates']):
        raise ValueError(f'protocol.learning_rates must be positive, got {protocol["learning_rates"]}')
    for key in ('epochs', 'batch_size'):
        if not isinstance(protocol[key], int) or protocol[key] < 1:
            raise ValueError(f'protocol.{key} must be a positive whole number, got {protocol[key]!r}')


def find_deviations(settings: Mapping) -> list[str]:
    """List where settings differ from the protocol.

    Args:
        settings: What `load_settings` returned.

    Returns:
        One line per value, 'protocol.epochs: 10 instead of 50'; empty for the protocol itself.
    """
    own = settings.to_dict() if isinstance(settings, Config) else settings
    found: list[str] = []
    for key, standard in STANDARD.items():
        if key not in FREE_KEYS:
            _compare(key, own[key], standard, found)
    return found


def _compare(name: str, value: object, standard: object, found: list[str]) -> None:
    """Compare two values, dictionaries key by key."""
    if isinstance(value, Mapping) and isinstance(standard, Mapping):
        for key in sorted({*value, *standard}):
            _compare(f'{name}.{key}', value.get(key, 'nothing'), standard.get(key, 'nothing'), found)
        return
    if isinstance(value, (list, tuple)) and isinstance(standard, (list, tuple)):
        value, standard = _as_lists(value), _as_lists(standard)
    if value != standard:
        found.append(f'{name}: {value} instead of {standard}')


def _as_lists(value: object) -> object:
    """Turn tuples into lists, so that configs compare equal however they were written."""
    if isinstance(value, Mapping):
        return {key: _as_lists(item) for key, item in value.items()}
    return [_as_lists(item) for item in value] if isinstance(value, (list, tuple)) else value


def plan_tuning_runs(task: Task, protocol: Mapping) -> list[Run]:
    """Runs of the tuning phase of a task, in the order in which they are done."""
    return [Run(task.name, 'tune', rate, seed) for rate in protocol['learning_rates'] for seed in protocol['seeds']]


def plan_final_runs(task: Task, protocol: Mapping, learning_rate: float) -> list[Run]:
    """Runs of the final phase of a task with the learning rate that was chosen."""
    return [Run(task.name, 'final', learning_rate, seed) for seed in protocol['seeds']]


def select_learning_rate(scores: Mapping[float, Sequence[int]], learning_rates: Sequence[float]) -> float:
    """Choose the learning rate of a task.

    Args:
        scores: Learning rate -> number of correctly classified validation images for every seed. Whole numbers, so
            that equal means are equal.
        learning_rates: The grid; of several best ones the first is taken.

    Returns:
        The learning rate with the highest mean over the seeds.

    Raises:
        ValueError: If a learning rate has no scores or another number of seeds than the others.
    """
    counts = {rate: len(scores.get(rate, ())) for rate in learning_rates}
    if len(set(counts.values())) != 1 or 0 in counts.values():
        raise ValueError(f'choosing needs the same number of seeds for every learning rate, got {counts}')
    return max(learning_rates, key=lambda rate: sum(scores[rate]))  # max keeps the first of equals
