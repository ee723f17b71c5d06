"""Training machinery for mmengine: optimizer construction, schedules, hooks and the commands' parts. Needs mmengine."""

from .layer_decay import LayerDecayOptimWrapperConstructor
from .random_state_hook import RandomStateHook
from .schedule import WarmupCosineLR
from .stop_on_non_finite_loss_hook import StopOnNonFiniteLossHook
from .strict_load_hook import StrictLoadHook
from .training_report_hook import TrainingReportHook

__all__ = [
    'LayerDecayOptimWrapperConstructor',
    'RandomStateHook',
    'StopOnNonFiniteLossHook',
    'StrictLoadHook',
    'TrainingReportHook',
    'WarmupCosineLR',
]
