"""Looks for the folders and files of the data sets before a training starts, not an epoch later."""

import inspect
import os.path
from collections.abc import Iterator, Sequence
from typing import Any

from mmengine.config import Config
from mmengine.registry import DATASETS

__all__ = ['check_data_folders']


def check_data_folders(config: Config, loaders: Sequence[str]) -> None:
    """Check that the data roots, image folders and annotation files that a config names exist.

    Data sets that download themselves, and paths of remote storage, are left out.

    Args:
        config (Config): The config.
        loaders (Sequence[str]): Names of the loaders, such as 'train_dataloader'.

    Raises:
        ValueError: names the loader, the option of the data set and the path that is missing, all in one message.
    """
    missing = []
    for loader in loaders:
        for dataset in _datasets((config.get(loader) or {}).get('dataset'), config.get('default_scope')):
            for option, path in _paths(dataset):
                if not os.path.exists(path):
                    missing.append(f'{loader}: {option} of {_name(dataset)}: {path!r}')
    if missing:
        lines = '\n  '.join(dict.fromkeys(missing))
        raise ValueError(
            f'data not found (paths are relative to {os.getcwd()!r}):\n  {lines}\n'
            'Put or link the data there, or give its place with --cfg-options train_dataloader.dataset.data_root=... '
            '(likewise val_dataloader, test_dataloader).'
        )


def _name(dataset: dict) -> str:
    kind = dataset.get('type')
    return kind if isinstance(kind, str) else getattr(kind, '__name__', str(kind))


def _datasets(dataset: Any, scope: str | None) -> Iterator[dict]:
    """Yield the data set configs inside wrappers such as RepeatDataset and ConcatDataset."""
    if isinstance(dataset, (list, tuple)):
        for item in dataset:
            yield from _datasets(item, scope)
    elif isinstance(dataset, dict):
        for key in ('dataset', 'datasets'):
            yield from _datasets(dataset.get(key), scope)
        if not _downloads_itself(dataset, scope):
            yield dataset


def _downloads_itself(dataset: dict, scope: str | None) -> bool:
    kind = dataset.get('type')
    if isinstance(kind, str):
        with DATASETS.switch_scope_and_registry(scope) as registry:
            kind = registry.get(kind)
    if not inspect.isclass(kind):
        return False
    parameter = inspect.signature(kind.__init__).parameters.get('download')
    return parameter is not None and bool(dataset.get('download', parameter.default))


def _paths(dataset: dict) -> Iterator[tuple[str, str]]:
    """Yield (option, local path) pairs; prefixes and lists are relative to the data root."""
    root = dataset.get('data_root') or ''
    if root:
        yield from _local('data_root', root)
        if not os.path.isdir(root):
            return
    prefix = dataset.get('data_prefix') or {}
    prefixes = prefix if isinstance(prefix, dict) else {'': prefix}
    for key, value in prefixes.items():
        if isinstance(value, str) and value:
            yield from _local(f'data_prefix {key}'.strip(), os.path.join(root, value))
    if dataset.get('ann_file'):
        yield from _local('ann_file', os.path.join(root, dataset['ann_file']))


def _local(option: str, path: str) -> Iterator[tuple[str, str]]:
    if '://' not in path and 's3:' not in path:
        yield option, os.path.expanduser(path)
