"""Layer-wise learning-rate decay for any model that holds a backbone with `get_layer_depth`."""

import math
from collections import defaultdict
from collections.abc import Callable

import torch
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.optim import DefaultOptimWrapperConstructor
from torch import nn

from ..registry import OPTIM_WRAPPER_CONSTRUCTORS

__all__ = ['LayerDecayOptimWrapperConstructor', 'find_backbones']

OPTIONS = {
    'layer_decay_rate',
    'custom_keys',
    'bias_lr_mult',
    'bias_decay_mult',
    'norm_decay_mult',
    'flat_decay_mult',
    'dwconv_decay_mult',
    'dcn_offset_lr_mult',
    'bypass_duplicate',
}


def find_backbones(model: nn.Module) -> dict[str, nn.Module]:
    """Find the backbones of a model that know the depth of their parameters.

    A backbone is a submodule called `backbone`, as in every OpenMMLab classifier, detector and segmentor, however deep
    and in whatever wrapper; a model without such a submodule is its own backbone.

    Args:
        model: Any module.

    Returns:
        Name prefix, with the final dot ('' for the model itself), to the backbone.

    Raises:
        ValueError: If there is no backbone or one of them has no `get_layer_depth`; the message names its class.
    """
    named = [(name, module) for name, module in model.named_modules() if name.rpartition('.')[2] == 'backbone']
    found: dict[str, nn.Module] = {}
    for name, module in named or [('', model)]:
        if any(name.startswith(prefix) for prefix in found):
            continue  # part of a backbone that was found already
        inner_name, inner = _unwrap(name, module)
        if callable(getattr(inner, 'get_layer_depth', None)):
            found[inner_name + '.' if inner_name else ''] = inner
        elif not any(other.startswith(name + '.') for other, _ in named):
            kind = 'backbone' if named else 'model, which has no submodule called `backbone`,'
            raise ValueError(
                f'layer-wise learning-rate decay needs get_layer_depth(param_name, prefix), but the {kind} '
                f'{type(inner).__name__} has no such method; set layer_decay_rate=1 to train it without'
            )
    return found


def _unwrap(name: str, module: nn.Module) -> tuple[str, nn.Module]:
    """Step through data-parallel wrappers, which hold the model as `.module`."""
    while is_model_wrapper(module) or isinstance(module, nn.DataParallel):
        name, module = f'{name}.module' if name else 'module', module.module
    return name, module


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Build an optimizer whose learning rate shrinks from the head of the backbone to its stem.

    The learning rate of a backbone parameter is multiplied by layer_decay_rate ** (num_depths - depth - 1), where the
    backbone's `get_layer_depth(param_name, prefix)` gives (depth, num_depths). Other parameters keep theirs. For ViL
    with 24 sub-blocks num_depths is 14: patch embedding and positions have depth 0, the j-th of 12 pairs of sub-blocks
    depth j, the final norms 13.

    All options of mmengine's default constructor apply as well and are multiplied in. Parameters with equal options
    share one group, which keeps the optimizer step short; a group's total factor is its entry `lr_scale`. Parameters
    with `requires_grad=False` are left out.

    Args:
        optim_wrapper_cfg: Config of the optimizer wrapper with its `optimizer`.
        paramwise_cfg: `layer_decay_rate` (positive, default 1) and mmengine's options: `custom_keys`, `bias_lr_mult`,
            `bias_decay_mult`, `norm_decay_mult`, `flat_decay_mult`, `dwconv_decay_mult`, `dcn_offset_lr_mult`,
            `bypass_duplicate`.

    Raises:
        ValueError: If an option is unknown, the rate is not positive, the optimizer has no `lr`, or a backbone without
            `get_layer_depth` meets a rate other than 1.

    Example:
        >>> optim_wrapper = dict(
        ...     type='OptimWrapper',
        ...     optimizer=dict(type='AdamW', lr=5e-4, weight_decay=0.05),
        ...     constructor='mmvil.LayerDecayOptimWrapperConstructor',
        ...     paramwise_cfg=dict(layer_decay_rate=0.65, bias_decay_mult=0.0, flat_decay_mult=0.0))

    Source: the released ViL segmentation configurations decay by pairs of sub-blocks with 0.65.
    """

    def _validate_cfg(self) -> None:
        super()._validate_cfg()
        unknown = sorted(set(self.paramwise_cfg) - OPTIONS)
        if unknown:
            raise ValueError(f'unknown paramwise_cfg options {unknown}; accepted are {sorted(OPTIONS)}')
        rate = self.paramwise_cfg.get('layer_decay_rate', 1.0)
        if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate < math.inf:
            raise ValueError(f'layer_decay_rate must be a positive number, got {rate!r}')
        self.layer_decay_rate = rate
        if self.base_lr is None:
            raise ValueError('the optimizer config must give `lr`, which layer-wise decay multiplies')

    def add_params(
        self,
        params: list[dict],
        module: nn.Module,
        prefix: str = '',
        is_dcn_module: bool | None = None,
    ) -> None:
        """Collect the parameter groups of a module; called by mmengine with the model and then for every submodule.

        Args:
            params: Groups so far; extended in place.
            module: Module whose parameters are added.
            prefix: Name of the module, '' for the whole model.
            is_dcn_module: Whether the parent is a deformable convolution.
        """
        super().add_params(params, module, prefix, is_dcn_module)
        if prefix == '':  # the outermost call: every parameter has its group now
            self._scale_by_depth(params, module)
            params[:] = _merge_equal(params)

    def _scale_by_depth(self, params: list[dict], model: nn.Module) -> None:
        """Multiply the learning rates in place and note the total factor in every group."""
        depth_of = self._depth_lookup(model)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        summary: dict[int, list[float]] = defaultdict(list)
        for group in params:
            for option in ('lr_mult', 'decay_mult'):  # already applied
                group.pop(option, None)
            depth, num_depths = depth_of(names[id(group['params'][0])])
            group['lr'] = group.get('lr', self.base_lr) * self.layer_decay_rate ** (num_depths - depth - 1)
            group['lr_scale'] = group['lr'] / self.base_lr if self.base_lr else 1.0
            if self.base_wd is not None:
                group.setdefault('weight_decay', self.base_wd)
            summary[depth].append(group['lr'])
        if self.layer_decay_rate != 1:
            lines = [f'depth {d}: {len(v)} tensors, lr {min(v):.4g}..{max(v):.4g}' for d, v in sorted(summary.items())]
            print_log(f'layer-wise learning-rate decay {self.layer_decay_rate}: ' + '; '.join(lines), logger='current')

    def _depth_lookup(self, model: nn.Module) -> Callable[[str], tuple[int, int]]:
        """Return a function from a parameter's name to (depth, num_depths); (0, 1) outside of backbones."""
        if self.layer_decay_rate == 1:
            return lambda name: (0, 1)
        backbones = find_backbones(model)

        def depth_of(name: str) -> tuple[int, int]:
            for prefix, backbone in backbones.items():
                if name.startswith(prefix):
                    depth, num_depths = backbone.get_layer_depth(name, prefix)
                    if not 0 <= depth < num_depths:
                        raise ValueError(
                            f'{type(backbone).__name__}.get_layer_depth gave depth {depth} of {num_depths} for {name}'
                        )
                    return depth, num_depths
            return 0, 1

        return depth_of


def _merge_equal(params: list[dict]) -> list[dict]:
    """Join groups that differ in nothing but their parameters, keeping the order of first appearance."""
    merged: list[dict[str, list[torch.Tensor]]] = []
    options: list[dict] = []
    for group in params:
        wanted = {key: value for key, value in group.items() if key != 'params'}
        if wanted in options:
            merged[options.index(wanted)]['params'].extend(group['params'])
        else:
            options.append(wanted)
            merged.append({**group, 'params': list(group['params'])})
    return merged
