"""From a config file and command line options to a config that a runner can be built from, on any device.

Every function changes the config in place where it has to and returns the lines that tell the user so; the tools log
them once the runner has its logger.
"""

import difflib
import inspect
import os
import zipfile
from argparse import ArgumentError, ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.device import get_device
from mmengine.registry import RUNNERS
from mmengine.runner import Runner, find_latest_checkpoint

__all__ = [
    'CfgOptions',
    'adapt_to_device',
    'add_common_arguments',
    'apply_amp',
    'apply_auto_scale_lr',
    'build_runner',
    'check_checkpoint',
    'load_config',
    'merge_options',
    'resolve_resume',
    'set_loader_defaults',
    'set_work_dir',
]

LOADERS = ('train_dataloader', 'val_dataloader', 'test_dataloader')
# What a config may hold at its top level beyond the runner's own arguments.
OTHER_KEYS = {'runner_type', 'custom_imports', 'auto_scale_lr', 'tta_model', 'tta_pipeline', 'compile', 'cpu_threads'}
DEVICES_WITHOUT_AMP = ('cpu', 'mps')


class CfgOptions(DictAction):
    """The argparse action of `--cfg-options`: mmengine's, with a usage error instead of a traceback."""

    def __call__(self, parser: ArgumentParser, namespace: Namespace, values: Any, option_string: str | None = None):
        """Parse the options; see mmengine.config.DictAction."""
        for option in values or ():
            key, separator, _ = option.partition('=')
            if not separator or not key:
                raise ArgumentError(self, f'expected KEY=VALUE, got {option!r}')
        try:
            super().__call__(parser, namespace, values, option_string)
        except (AssertionError, ValueError) as error:
            raise ArgumentError(self, f'cannot read {values}: {error}') from error


def add_common_arguments(parser: ArgumentParser) -> None:
    """Add the options that training and testing share."""
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=CfgOptions,
        metavar='KEY=VALUE',
        help='override settings of the config, for example optim_wrapper.optimizer.lr=1e-4 model.backbone.arch=small; '
        'a list is written as key="[1,2]"',
    )
    parser.add_argument(
        '--launcher', choices=('none', 'pytorch', 'slurm', 'mpi'), default='none', help='how processes are started'
    )


def build_runner(config: Config, messages: list[str]) -> Runner:
    """Build the runner and log what was changed in the config."""
    runner = RUNNERS.build(config) if 'runner_type' in config else Runner.from_cfg(config)
    for message in messages:
        runner.logger.info(message)
    return runner


def load_config(path: str | Path) -> Config:
    """Read a config file.

    Args:
        path (str | Path): The file: .py, .json or .yaml.

    Returns:
        Config: The config with its `_base_` files merged.

    Raises:
        ValueError: if the file does not exist, is no config file or does not say which package's scope it uses.
    """
    if not os.path.isfile(path):
        raise ValueError(f'config file {str(path)!r} does not exist')
    if Path(path).suffix not in ('.py', '.json', '.yaml', '.yml'):
        raise ValueError(f'a config file ends in .py, .json, .yaml or .yml, got {str(path)!r}')
    try:
        return Config.fromfile(str(path))
    except FileNotFoundError as error:
        raise ValueError(f'a _base_ file of {str(path)!r} is missing: {error}') from error
    except (SyntaxError, KeyError, TypeError) as error:
        raise ValueError(f'config file {str(path)!r} cannot be read: {type(error).__name__}: {error}') from error


def merge_options(config: Config, options: dict[str, Any] | None) -> list[str]:
    """Merge `--cfg-options` into the config.

    Args:
        config (Config): The config.
        options (dict[str, Any] | None): Dotted keys and their values.

    Returns:
        list[str]: Lines for the log: options that only change a variable of the config file.

    Raises:
        ValueError: for a key whose first part is neither in the config nor an argument of the runner, or that does not
            fit the config's structure.
    """
    if not options:
        return []
    known = set(inspect.signature(Runner.__init__).parameters) - {'self', 'cfg'} | OTHER_KEYS
    messages = []
    for key in options:
        first = key.split('.')[0]
        if first not in known and first not in config:
            hints = difflib.get_close_matches(first, [*known, *config.keys()], n=1)
            hint = f'; did you mean {hints[0]!r}?' if hints else ''
            raise ValueError(f'--cfg-options {key}: the config has no {first!r}{hint}')
        if first not in known:
            messages.append(
                f'--cfg-options {key}: {first!r} is a variable of the config file; values already computed from it are '
                'not changed.'
            )
    try:
        config.merge_from_dict(options)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'--cfg-options {options} do not fit the config: {error}') from error
    return messages


def set_work_dir(config: Config, config_path: str | Path, work_dir: str | None) -> None:
    """Choose the folder for logs and checkpoints: the option, else the config's, else `work_dirs/<config name>`."""
    if work_dir is not None:
        config.work_dir = work_dir
    elif config.get('work_dir') is None:
        config.work_dir = os.path.join('work_dirs', Path(config_path).stem)
    if os.path.exists(config.work_dir) and not os.path.isdir(config.work_dir):
        raise ValueError(f'the work dir must be a folder, {config.work_dir!r} is a file')


def apply_amp(config: Config) -> list[str]:
    """Turn on mixed precision: bfloat16 where the device has it, else float16 with dynamic loss scaling.

    Settings of an `AmpOptimWrapper` that is already in the config are kept.
    """
    device = get_device()
    if device in DEVICES_WITHOUT_AMP:
        return [f'--amp has no effect on {device}: training runs in float32.']
    wrapper = config.optim_wrapper
    if _type_name(wrapper) == 'AmpOptimWrapper':
        return ['--amp changes nothing: the config already uses AmpOptimWrapper.']
    if wrapper.get('type') not in (None, 'OptimWrapper'):
        raise ValueError(f"--amp needs an optim_wrapper of type 'OptimWrapper', got {wrapper.type!r}")
    wrapper.type = 'AmpOptimWrapper'
    bfloat16 = device != 'cuda' or torch.cuda.is_bf16_supported(including_emulation=False)
    wrapper.dtype = 'bfloat16' if bfloat16 else 'float16'
    # bfloat16 has the range of float32: scaling the loss would only cost a synchronisation in each step.
    wrapper.loss_scale = dict(enabled=False) if bfloat16 else 'dynamic'
    return [f'Mixed precision: {wrapper.dtype}.']


def apply_auto_scale_lr(config: Config) -> None:
    """Turn on scaling of the learning rate with the batch size.

    Raises:
        ValueError: if the config does not say which batch size its learning rate is for.
    """
    if config.get('auto_scale_lr', {}).get('base_batch_size') is None:
        raise ValueError(
            '--auto-scale-lr needs auto_scale_lr=dict(base_batch_size=...) in the config: the total batch size that '
            'its learning rate is meant for'
        )
    config.auto_scale_lr.enable = True


def adapt_to_device(config: Config) -> list[str]:
    """Make a config for GPUs run where there is none, and one for several processes run in one.

    On a CPU, a `cpu_threads` entry of the config sets the number of torch's threads, unless the environment variable
    OMP_NUM_THREADS does.

    Returns:
        list[str]: One line for each kind of change.

    Raises:
        ValueError: for several processes on a device that mmengine cannot start them on.
    """
    messages = []
    device = get_device()
    if device == 'cpu' and config.get('cpu_threads') and 'OMP_NUM_THREADS' not in os.environ:
        torch.set_num_threads(config.cpu_threads)
        messages.append(f'torch uses {config.cpu_threads} CPU threads, as the config says (cpu_threads).')
    launcher = config.get('launcher', 'none')
    if device in DEVICES_WITHOUT_AMP:
        if launcher != 'none':
            raise ValueError(f'--launcher {launcher} needs one accelerator for each process, this machine has {device}')
        changed = [_to_plain_wrapper(part) for part in _dicts(config.get('optim_wrapper'))]
        if any(changed):
            messages.append(f'AmpOptimWrapper is not available on {device}: OptimWrapper (float32) is used.')
    if launcher == 'none':
        changed = [part for part in _dicts(config.get('model')) if _type_name(part) == 'SyncBN']
        for part in changed:
            part['type'] = 'BN'
        if changed:
            messages.append(f'SyncBN needs several processes: BN is used ({len(changed)} places in the model).')
    return messages


def set_loader_defaults(config: Config) -> None:
    """Fill in what the upstream scripts fill in, and drop what torch refuses or warns of here.

    Classification configs of mmpretrain rely on their train script for `collate_fn`; those of mmsegmentation do not.
    """
    classification = config.get('default_scope') == 'mmpretrain'
    for name in LOADERS:
        loader = config.get(name)
        if not isinstance(loader, dict):
            continue
        if classification:
            loader.setdefault('collate_fn', dict(type='default_collate'))
            loader.setdefault('pin_memory', True)
            loader.setdefault('persistent_workers', True)
        if not torch.cuda.is_available():
            loader['pin_memory'] = False
        if loader.get('num_workers', 0) == 0:
            loader['persistent_workers'] = False


def check_checkpoint(path: str) -> str:
    """Check that a checkpoint exists and is complete.

    Args:
        path (str): A local file, or an address that mmengine fetches (then nothing is checked).

    Returns:
        str: The path.

    Raises:
        ValueError: for a missing, empty, truncated or foreign file.
    """
    if '://' in path:
        return path
    if not os.path.isfile(path):
        raise ValueError(f'checkpoint {path!r} does not exist')
    with open(path, 'rb') as file:
        start = file.read(2)
    # torch writes zip archives, whose table of contents is at the end; very old files are pickles (0x80).
    if not zipfile.is_zipfile(path) and start[:1] != b'\x80':
        reason = 'it is truncated' if start == b'PK' else 'it is not a PyTorch checkpoint'
        raise ValueError(f'checkpoint {path!r} cannot be read: {reason} ({os.path.getsize(path)} bytes)')
    return path


def resolve_resume(config: Config, resume: str | None) -> list[str]:
    """Set `resume` and `load_from` from the option `--resume [CKPT]`.

    Args:
        config (Config): The config, with its work dir.
        resume (str | None): None: as the config says; 'auto': the latest checkpoint in the work dir; else a file.

    Returns:
        list[str]: A line for the log when there is nothing to resume yet.

    Raises:
        ValueError: if the checkpoint, or the one that the work dir names as its latest, is missing or broken.
    """
    if resume is not None:
        config.resume = True
        config.load_from = None if resume == 'auto' else resume
    if config.get('load_from') is not None:
        check_checkpoint(config.load_from)
        return []
    if not config.get('resume', False):
        return []
    latest = find_latest_checkpoint(config.work_dir) if os.path.isdir(config.work_dir) else None
    if latest is None:
        config.resume = False
        return [f'There is no checkpoint in {config.work_dir} yet: training starts from the beginning.']
    if not os.path.isfile(latest):
        # The work dir has been moved since, or is seen from another folder.
        latest = os.path.join(config.work_dir, os.path.basename(latest))
    config.load_from = check_checkpoint(latest)
    return []


def _to_plain_wrapper(wrapper: ConfigDict) -> bool:
    if _type_name(wrapper) != 'AmpOptimWrapper':
        return False
    wrapper['type'] = 'OptimWrapper'
    for key in ('dtype', 'loss_scale', 'use_fsdp'):
        wrapper.pop(key, None)
    return True


def _type_name(config: dict) -> str:
    """Name of a registered type without its scope; types may also be classes."""
    value = config.get('type')
    return value.split('.')[-1] if isinstance(value, str) else getattr(value, '__name__', '')


def _dicts(value: Any) -> Iterator[dict]:
    """Yield every dict in a nested config."""
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _dicts(item)
