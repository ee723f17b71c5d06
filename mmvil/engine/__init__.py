<<<<<<< HEAD
"""Training machinery for mmengine: optimizer construction and schedules. Needs mmengine."""

from .layer_decay import LayerDecayOptimWrapperConstructor
from .schedule import WarmupCosineLR

__all__ = ['LayerDecayOptimWrapperConstructor', 'WarmupCosineLR']
=======
"""Hooks and optimizer constructors for mmengine runners."""
>>>>>>> main
