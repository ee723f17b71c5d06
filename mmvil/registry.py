"""Child registries of mmengine with the scope `mmvil`.

mmengine imports this module when it resolves a name such as `mmvil.VisionLSTM` under any default scope. Each registry
imports its `locations` at the first look-up, so the order of imports does not matter, and the default scope stays as it
is.
"""

from mmengine.registry import DATASETS as MMENGINE_DATASETS
from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS
from mmengine.registry import PARAM_SCHEDULERS as MMENGINE_PARAM_SCHEDULERS
from mmengine.registry import TRANSFORMS as MMENGINE_TRANSFORMS
from mmengine.registry import Registry

__all__ = ['DATASETS', 'HOOKS', 'MODELS', 'OPTIM_WRAPPER_CONSTRUCTORS', 'PARAM_SCHEDULERS', 'TRANSFORMS']

MODELS = Registry('model', parent=MMENGINE_MODELS, scope='mmvil', locations=['mmvil.models'])
HOOKS = Registry('hook', parent=MMENGINE_HOOKS, scope='mmvil', locations=['mmvil.engine'])
OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    'optimizer wrapper constructor',
    parent=MMENGINE_OPTIM_WRAPPER_CONSTRUCTORS,
    scope='mmvil',
    locations=['mmvil.engine'],
)
PARAM_SCHEDULERS = Registry(
    'parameter scheduler', parent=MMENGINE_PARAM_SCHEDULERS, scope='mmvil', locations=['mmvil.engine']
)
DATASETS = Registry('dataset', parent=MMENGINE_DATASETS, scope='mmvil', locations=['mmvil.datasets'])
TRANSFORMS = Registry('transform', parent=MMENGINE_TRANSFORMS, scope='mmvil', locations=['mmvil.datasets'])
