"""Training machinery for mmengine: optimizer construction, schedules and hooks. Needs mmengine."""

from .layer_decay import LayerDecayOptimWrapperConstructor
from .schedule import WarmupCosineLR

__all__ = ['LayerDecayOptimWrapperConstructor', 'WarmupCosineLR']
