"""Stops a training whose loss is no longer a number."""

import math
from typing import Any

import torch
from mmengine.hooks import Hook

from ..registry import HOOKS

__all__ = ['StopOnNonFiniteLossHook']


@HOOKS.register_module()
class StopOnNonFiniteLossHook(Hook):
    """Raises an error at the first NaN or infinite loss, before a checkpoint of the broken weights can be written.

    Costs no extra synchronisation with the device: mmengine's `RuntimeInfoHook` has already copied the loss values to
    the host in every iteration, and this hook reads those copies, so there is no delay. In a runner without that hook
    the values are fetched every `interval` iterations, which is then the longest delay, and before each checkpoint.

    Args:
        tolerance (int): Consecutive non-finite iterations to let pass. 0 stops at the first; use a small number with
            float16 and dynamic loss scaling, which skips such steps by itself. Default: 0.
        interval (int): Iterations between two checks where the values are not on the host yet. Default: 50.

    Raises:
        FloatingPointError: in training, with the iteration, the loss entries, the learning rate and advice.
        ValueError: for a negative `tolerance` or an `interval` below 1.
    """

    # After RuntimeInfoHook (VERY_HIGH), before anything that saves.
    priority = 'HIGH'

    def __init__(self, tolerance: int = 0, interval: int = 50) -> None:
        if tolerance < 0:
            raise ValueError(f'tolerance must be 0 or a positive number of iterations, got {tolerance}')
        if interval < 1:
            raise ValueError(f'interval must be at least 1 iteration, got {interval}')
        self.tolerance = tolerance
        self.interval = interval
        self._bad_in_a_row = 0
        self._unread: dict[str, Any] = {}

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        """Check the loss values of this iteration."""
        if not outputs:
            return
        scalars = runner.message_hub.log_scalars
        on_host = {name: scalars[f'train/{name}'].current() for name in outputs if f'train/{name}' in scalars}
        if on_host:
            self._check(runner, on_host)
        elif self.every_n_train_iters(runner, self.interval):
            self._check(runner, outputs)
        else:
            self._unread = outputs

    def before_save_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        """Check values that were left unread, so that no broken weights are saved."""
        if self._unread:
            self._check(runner, self._unread)

    def _check(self, runner: Any, values: dict[str, Any]) -> None:
        self._unread = {}
        numbers = {name: float(value) for name, value in values.items() if _is_loss(name, value)}
        if all(math.isfinite(number) for number in numbers.values()):
            self._bad_in_a_row = 0
            return
        self._bad_in_a_row += 1
        if self._bad_in_a_row > self.tolerance:
            raise FloatingPointError(self._message(runner, numbers))

    def _message(self, runner: Any, numbers: dict[str, float]) -> str:
        bad = ', '.join(f'{name} = {number}' for name, number in numbers.items() if not math.isfinite(number))
        rates = sorted({rate for group in runner.optim_wrapper.get_lr().values() for rate in group})
        shown_rates = f'{rates[0]:.3g}' if len(rates) == 1 else f'{rates[0]:.3g} to {rates[-1]:.3g}'
        streak = f' for {self._bad_in_a_row} iterations in a row' if self._bad_in_a_row > 1 else ''
        return (
            f'Training stopped: the loss is not finite{streak}: {bad}; iteration {runner.iter + 1} of '
            f'{runner.max_iters}, learning rate {shown_rates}. Resume from an earlier checkpoint with a lower learning '
            'rate or a longer warm-up, clip the gradients (optim_wrapper.clip_grad=dict(max_norm=1.0)), use bfloat16 '
            'instead of float16, and look for NaN in the images and labels.'
        )


def _is_loss(name: str, value: Any) -> bool:
    # Training outputs may carry other figures, such as an accuracy; mmengine, too, sums up the entries named loss.
    return 'loss' in name and (isinstance(value, (int, float)) or (torch.is_tensor(value) and value.numel() == 1))
