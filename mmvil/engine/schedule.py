"""Learning-rate schedule of the ViL recipes: linear warm-up, then a cosine, exact at every update."""

import math
from collections.abc import Sequence

from mmengine.optim import BaseOptimWrapper, _ParamScheduler
from torch.optim import Optimizer

from ..registry import PARAM_SCHEDULERS

__all__ = ['WarmupCosineLR', 'warmup_cosine']

NO_END = int(1e9)  # mmengine's own mark for "no end given"


def warmup_cosine(step: int, num_steps: int, warmup: int, lr: float, eta_min: float) -> float:
    """Compute the learning rate of one update.

    Args:
        step: Number of the update, from 0.
        num_steps: Number of updates of the whole schedule, more than `warmup`.
        warmup: Number of warm-up updates; the first of them runs with lr / (warmup + 1).
        lr: Highest learning rate, reached at update `warmup`.
        eta_min: Learning rate of the last update.

    Returns:
        The learning rate.

    Source: schedule of the released ViL training code, section 1.1 of its pre-training configurations.
    """
    if step < warmup:
        return lr * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(num_steps - warmup - 1, 1)
    return eta_min + (lr - eta_min) * (1 + math.cos(math.pi * progress)) / 2


@PARAM_SCHEDULERS.register_module()
class WarmupCosineLR(_ParamScheduler):
    """Linear warm-up and cosine decay of the learning rate in closed form.

    mmengine's `LinearLR` followed by `CosineAnnealingLR` gives nearly this, but with the warm-up's first factor and the
    cosine's length fixed in the config, that is, right for one data set size and batch only. Here both follow from the
    length of the data loader. Every value is computed from the initial one, so rounding does not add up and resuming is
    exact.

    With learning rates that differ by parameter group, a group's whole curve, including its end, is scaled by the
    group's entry `lr_scale` (set by `LayerDecayOptimWrapperConstructor`) or else `lr_mult` (set by mmengine's default
    constructor for `custom_keys`), as in the released training code.

    One step of the schedule is one iteration of the training loop (or one epoch, with `by_epoch=True` alone); with
    gradient accumulation an update takes several of them.

    Args:
        optimizer: Optimizer or optimizer wrapper, filled in by the runner.
        warmup: Length of the warm-up, in epochs with `by_epoch=True`, else in iterations. Default 0.
        eta_min: Learning rate of the last step of a group whose scale is 1; absolute, not a ratio. Default 0.
        begin: First step, same unit. Default 0.
        end: Step after the last one, same unit. The runner fills in the length of the training.
        last_step: Index of the last step taken, -1 for none.
        by_epoch: Unit of the arguments above. Default True.
        convert_to_iter_based: Config key read by mmengine: arguments in epochs, schedule in iterations.
        verbose: Log every value.

    Raises:
        ValueError: If a length is negative, the end is missing or not after the warm-up, or `eta_min` is above a
            group's learning rate.

    Example:
        >>> param_scheduler = dict(type='mmvil.WarmupCosineLR', warmup=5, eta_min=1e-6, convert_to_iter_based=True)
    """

    def __init__(
        self,
        optimizer: Optimizer | BaseOptimWrapper,
        warmup: int = 0,
        eta_min: float = 0.0,
        begin: int = 0,
        end: int = NO_END,
        last_step: int = -1,
        by_epoch: bool = True,
        verbose: bool = False,
    ) -> None:
        if warmup < 0 or eta_min < 0:
            raise ValueError(f'warmup and eta_min must not be negative, got warmup={warmup} and eta_min={eta_min}')
        if end >= NO_END:
            raise ValueError(
                'WarmupCosineLR needs its length: set `end`, or let a runner with max_epochs or max_iters do'
            )
        if end - begin <= warmup:
            raise ValueError(
                f'the schedule (begin={begin}, end={end}) must be longer than its warm-up of {warmup}; '
                'a short run needs a shorter `warmup`'
            )
        self.warmup, self.eta_min = warmup, eta_min
        super().__init__(optimizer, 'lr', begin, end, last_step, by_epoch, verbose)

    @classmethod
    def build_iter_from_epoch(
        cls,
        *args: Optimizer | BaseOptimWrapper,
        warmup: float = 0,
        begin: float = 0,
        end: float = NO_END,
        by_epoch: bool = True,
        epoch_length: int | None = None,
        **kwargs: float | bool | Optimizer | BaseOptimWrapper,
    ) -> 'WarmupCosineLR':
        """Build the schedule by iterations from lengths in epochs; called by mmengine for `convert_to_iter_based`.

        Args:
            *args: Positional arguments of the class.
            warmup: Warm-up in epochs.
            begin: First epoch.
            end: Epoch after the last.
            by_epoch: Must be True.
            epoch_length: Iterations of an epoch, the length of the data loader.
            **kwargs: Further arguments of the class.

        Returns:
            The schedule.

        Raises:
            ValueError: If `by_epoch` is False or `epoch_length` is missing.
        """
        if not by_epoch or not epoch_length or epoch_length < 1:
            raise ValueError(
                'converting epochs to iterations needs by_epoch=True and the number of iterations of an epoch, '
                f'got by_epoch={by_epoch} and epoch_length={epoch_length}'
            )
        warmup, begin = round(warmup * epoch_length), round(begin * epoch_length)
        if end != NO_END:
            end = round(end * epoch_length)
        return cls(*args, warmup=warmup, begin=begin, end=end, by_epoch=False, **kwargs)

    def _get_value(self) -> Sequence[float]:
        """Compute the learning rate of every parameter group at the current step."""
        values = []
        for group, lr in zip(self.optimizer.param_groups, self.base_values, strict=True):
            eta_min = self.eta_min * group.get('lr_scale', group.get('lr_mult', 1.0))
            if eta_min > lr * (1 + 1e-9):
                raise ValueError(
                    f'the end value of the schedule ({eta_min:g}) is above the learning rate it starts from ({lr:g}); '
                    'give a smaller `eta_min` along with a smaller learning rate'
                )
            values.append(warmup_cosine(self.last_step, self.end - self.begin, self.warmup, lr, eta_min))
        return values
