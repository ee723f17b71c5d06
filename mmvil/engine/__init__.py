"""Training machinery for mmengine: optimizer construction, schedules and hooks. Needs mmengine."""

from .layer_decay import LayerDecayOptimWrapperConstructor
from .random_state_hook import RandomStateHook
from .schedule import WarmupCosineLR
from .stop_on_non_finite_loss_hook import StopOnNonFiniteLossHook

__all__ = ['LayerDecayOptimWrapperConstructor', 'RandomStateHook', 'StopOnNonFiniteLossHook', 'WarmupCosineLR']
