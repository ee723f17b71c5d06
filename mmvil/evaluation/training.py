"""One run: train a classifier on a split in memory, count its hits on another."""

import copy
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from mmengine.logging import print_log
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.optim.scheduler.param_scheduler import _ParamScheduler
from mmengine.registry import PARAM_SCHEDULERS
from torch import nn

from .data import LoadedSplit
from .models import quiet_logger
from .updates import Updater

__all__ = ['Evaluation', 'Training', 'build_optimizer', 'count_correct', 'now', 'train_model']


@dataclass(frozen=True)
class Training:
    """Outcome of a training.

    Args:
        steps: Number of updates done.
        final_loss: Loss of the last batch.
        diverged: Whether training stopped early because the loss was not finite any more.
        seconds: Time it took.
        images_per_second: Training images per second.
    """

    steps: int
    final_loss: float
    diverged: bool
    seconds: float
    images_per_second: float


@dataclass(frozen=True)
class Evaluation:
    """Outcome of an evaluation.

    Args:
        correct: Number of images whose label was found.
        total: Number of images.
        seconds: Time it took.
    """

    correct: int
    total: int
    seconds: float


def build_optimizer(
    model: nn.Module, settings: Mapping, learning_rate: float, steps_per_epoch: int
) -> tuple[OptimWrapper, list[_ParamScheduler]]:
    """Build optimizer and schedules from the settings.

    Args:
        model: The classifier.
        settings: See `load_settings`.
        learning_rate: Replaces that of `optim_wrapper.optimizer`.
        steps_per_epoch: Length of an epoch, by which schedules in epochs are converted.

    Returns:
        Optimizer wrapper and schedules. bf16 needs a GPU here; on a CPU training runs in float32.

    Raises:
        ValueError: If the backbone has no depths for layer-wise decay, or a schedule runs by epoch.
    """
    config = copy.deepcopy(_plain(settings['optim_wrapper']))
    config['optimizer']['lr'] = learning_rate
    device = next(model.parameters()).device
    if config.get('type') == 'AmpOptimWrapper' and device.type == 'cpu':
        config = {key: value for key, value in config.items() if key not in ('dtype', 'loss_scale', 'use_fsdp')}
        config['type'] = 'OptimWrapper'
    if device.type == 'cuda' and config['optimizer'].get('type') in ('Adam', 'AdamW'):
        config['optimizer'].setdefault('fused', True)  # one kernel per group instead of a dozen
    with quiet_logger():  # one line per parameter, for each of hundreds of runs
        try:
            optim_wrapper = build_optim_wrapper(model, config)
        except NotImplementedError as error:  # mmpretrain's ResNet knows the depths of some of its sizes only
            raise ValueError(
                f'{type(model.backbone).__name__} gives no depths for layer-wise learning-rate decay at this size; set '
                'optim_wrapper.paramwise_cfg.layer_decay_rate=1 to train it without'
            ) from error
    schedules = settings['param_scheduler']
    schedules = [schedules] if isinstance(schedules, Mapping) else list(schedules or ())
    epochs = settings['protocol']['epochs']
    return optim_wrapper, [_build_schedule(_plain(each), optim_wrapper, epochs, steps_per_epoch) for each in schedules]


def _build_schedule(config: dict, optimizer: OptimWrapper, epochs: int, steps_per_epoch: int) -> _ParamScheduler:
    """Build one schedule that is stepped once per update."""
    config = dict(config)
    kind = PARAM_SCHEDULERS.get(config.pop('type'))
    by_epoch, convert = config.pop('by_epoch', True), config.pop('convert_to_iter_based', False)
    if by_epoch and not convert:
        raise ValueError('schedules run by iteration here: set convert_to_iter_based=True, or by_epoch=False')
    if convert:
        config.setdefault('end', epochs)
        return kind.build_iter_from_epoch(optimizer=optimizer, **config, epoch_length=steps_per_epoch)
    config.setdefault('end', epochs * steps_per_epoch)
    return kind(optimizer=optimizer, by_epoch=False, **config)


def train_model(model: nn.Module, split: LoadedSplit, settings: Mapping, learning_rate: float, seed: int) -> Training:
    """Train a classifier; the last iterate counts, nothing is selected on the way.

    Args:
        model: The classifier, with a new head; changed in place.
        split: Training images, in memory.
        settings: See `load_settings`.
        learning_rate: Highest learning rate.
        seed: Seed of the order of the batches.

    Returns:
        The outcome.

    Raises:
        ValueError: If the split is smaller than a batch, or does not lie in memory.
    """
    protocol = settings['protocol']
    batch_size, device = protocol['batch_size'], split.labels.device
    steps_per_epoch = len(split) // batch_size  # an incomplete last batch is dropped
    if steps_per_epoch == 0 or split.images is None:
        raise ValueError(f'training needs at least one batch of {batch_size} images in memory, got {len(split)} images')
    optim_wrapper, schedules = build_optimizer(model, settings, learning_rate, steps_per_epoch)
    generator = torch.Generator().manual_seed(seed)
    model.train()
    update = Updater(model, optim_wrapper, batch_size, settings['runtime']['cuda_graph'])
    steps, loss, start = 0, torch.zeros(()), now(device)
    for _ in range(protocol['epochs']):
        order = torch.randperm(len(split), generator=generator)[: steps_per_epoch * batch_size]
        order = order.to(split.images.device)  # once per epoch: a copy per step would make the host wait
        for indices in order.split(batch_size):
            loss = update(split.images[indices].to(device), split.labels[indices.to(device)])
            for schedule in schedules:
                schedule.step()
            steps += 1
        if not math.isfinite(loss.item()):  # once per epoch: asking more often would make the device wait
            print_log(f'the loss is {loss.item()} after {steps} steps with lr {learning_rate:g}', logger='current')
            break
    seconds = now(device) - start
    final_loss = loss.item()
    return Training(steps, final_loss, not math.isfinite(final_loss), seconds, steps * batch_size / max(seconds, 1e-9))


@torch.inference_mode()
def count_correct(model: nn.Module, split: LoadedSplit, batch_size: int) -> Evaluation:
    """Count the images whose highest logit is that of their label, in float32.

    Args:
        model: The classifier.
        split: Images and labels.
        batch_size: Number of images of a batch; without influence on the result.

    Returns:
        The outcome, over every image of the split.

    Raises:
        ValueError: If the number of images seen is not that of the split.
    """
    model.eval()
    device = split.labels.device
    start, seen = now(device), 0
    correct = torch.zeros((), dtype=torch.int64, device=device)
    for images, labels in split.batches(batch_size, device):
        inputs = model.data_preprocessor({'inputs': images})['inputs']
        correct += (model(inputs, mode='tensor').argmax(dim=1) == labels).sum()
        seen += len(labels)
    hits = int(correct)
    if seen != len(split):
        raise ValueError(f'evaluated {seen} of {len(split)} images')
    return Evaluation(hits, seen, now(device) - start)


def now(device: torch.device) -> float:
    """Time in seconds, after the device has finished."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _plain(value: object) -> object:
    """Turn mmengine's config types into dictionaries and lists."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return type(value)(_plain(item) for item in value) if isinstance(value, (list, tuple)) else value
