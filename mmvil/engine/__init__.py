"""Hooks, optimizer constructors and what the command line tools are made of."""

from .random_state_hook import RandomStateHook
from .stop_on_non_finite_loss_hook import StopOnNonFiniteLossHook
from .training_report_hook import TrainingReportHook

__all__ = ['RandomStateHook', 'StopOnNonFiniteLossHook', 'TrainingReportHook']
