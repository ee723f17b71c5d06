"""Learning-rate factors and groups of every parameter, in a classifier and in a segmentor."""

import mmpretrain.models  # noqa: F401  registers ImageClassifier
import mmseg.models  # noqa: F401  registers EncoderDecoder
import pytest
import torch
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS
from torch import nn

from mmvil.engine.layer_decay import find_backbones

RATE = 0.65
# Exponents of the 24 sub-blocks, written out: pairs 1..12, the last pair 1.
BLOCK_EXPONENTS = [12, 12, 11, 11, 10, 10, 9, 9, 8, 8, 7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1]
BACKBONE = {'type': 'mmvil.VisionLSTM', 'arch': {'embed_dims': 8, 'num_layers': 24}, 'img_size': 32}


def classifier(**backbone) -> nn.Module:
    options = {**BACKBONE, 'out_type': 'bilateral_concat', **backbone}
    head = {'type': 'mmpretrain.LinearClsHead', 'num_classes': 3, 'in_channels': 16}
    return MODELS.build({'type': 'mmpretrain.ImageClassifier', 'backbone': options, 'head': head})


def segmentor() -> nn.Module:
    options = {**BACKBONE, 'out_indices': (7, 11, 15, 23), 'final_norm': False}
    neck = {'type': 'mmseg.Feature2Pyramid', 'embed_dim': 8, 'rescales': [4, 2, 1, 0.5], 'norm_cfg': {'type': 'BN'}}
    head = {'type': 'mmseg.FCNHead', 'in_channels': 8, 'channels': 8, 'num_classes': 3, 'norm_cfg': {'type': 'BN'}}
    return MODELS.build({'type': 'mmseg.EncoderDecoder', 'backbone': options, 'neck': neck, 'decode_head': head})


def build(model: nn.Module, lr: float = 5e-4, weight_decay: float = 0.05, **paramwise) -> torch.optim.Optimizer:
    config = {
        'type': 'OptimWrapper',
        'optimizer': {'type': 'AdamW', 'lr': lr, 'weight_decay': weight_decay},
        'constructor': 'mmvil.LayerDecayOptimWrapperConstructor',
        'paramwise_cfg': {'layer_decay_rate': RATE, **paramwise},
    }
    return build_optim_wrapper(model, config).optimizer


def options_by_name(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, dict]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)]: group for group in optimizer.param_groups for parameter in group['params']}


def expected_factor(name: str) -> float:
    name = name.removeprefix('module.')
    if name.startswith(('backbone.patch_embed.', 'backbone.pos_embed')):
        return RATE**13
    if name.startswith('backbone.blocks.'):
        return RATE ** BLOCK_EXPONENTS[int(name.split('.')[2])]
    return 1.0  # final norms, necks and heads


@pytest.mark.parametrize('make', [classifier, segmentor])
def test_every_parameter_has_its_rate(make):
    model = make()
    options = options_by_name(build(model), model)
    assert set(options) == {name for name, _ in model.named_parameters()}
    for name, group in options.items():
        assert group['lr'] == pytest.approx(5e-4 * expected_factor(name), rel=1e-12), name
        assert group['lr_scale'] == pytest.approx(expected_factor(name), rel=1e-12), name
    assert {round(group['lr_scale'], 12) for group in options.values()} == {round(RATE**n, 12) for n in range(14)}


def test_published_values():
    model = classifier()
    options = options_by_name(build(model), model)
    assert options['backbone.pos_embed']['lr_scale'] == pytest.approx(0.65**13)
    assert options['backbone.blocks.0.norm.weight']['lr_scale'] == pytest.approx(0.65**12)
    assert options['backbone.blocks.1.norm.weight']['lr_scale'] == pytest.approx(0.65**12)
    assert options['backbone.blocks.23.norm.weight']['lr_scale'] == pytest.approx(0.65)
    assert options['backbone.norm.weight']['lr_scale'] == 1.0
    assert options['backbone.pool_norm.weight']['lr_scale'] == 1.0
    assert options['head.fc.weight']['lr_scale'] == 1.0


@pytest.mark.parametrize('wrap', ['outside', 'twice', 'backbone'])
def test_wrapped_models(wrap):
    model = classifier()
    if wrap == 'backbone':
        model.backbone = nn.DataParallel(model.backbone)
        options = options_by_name(build(model), model)
        options = {name.replace('backbone.module.', 'backbone.'): group for name, group in options.items()}
    else:
        wrapped = nn.DataParallel(model) if wrap == 'outside' else nn.DataParallel(nn.DataParallel(model))
        options = options_by_name(build(wrapped), model)
    assert all(group['lr_scale'] == pytest.approx(expected_factor(name)) for name, group in options.items())


def test_bare_backbone_is_its_own_model():
    model = MODELS.build(BACKBONE)
    options = options_by_name(build(model), model)
    assert options['patch_embed.proj.weight']['lr_scale'] == pytest.approx(RATE**13)
    assert options['blocks.23.layer.skip']['lr_scale'] == pytest.approx(RATE)


def test_combines_with_mmengine_options():
    model = classifier()
    custom = {'pos_embed': {'decay_mult': 0.0}, 'head.fc': {'lr_mult': 10.0}, 'blocks.0.': {'lr_mult': 0.5}}
    optimizer = build(model, bias_decay_mult=0.0, norm_decay_mult=0.0, flat_decay_mult=0.0, custom_keys=custom)
    options = options_by_name(optimizer, model)
    assert options['backbone.pos_embed']['weight_decay'] == 0.0
    assert options['backbone.pos_embed']['lr_scale'] == pytest.approx(RATE**13)
    assert options['head.fc.weight']['lr'] == pytest.approx(5e-3)
    assert options['backbone.blocks.0.layer.proj_up.weight']['lr'] == pytest.approx(5e-4 * 0.5 * RATE**12)
    for name, parameter in model.named_parameters():
        if not any(key in name for key in custom):
            wanted = 0.0 if parameter.ndim <= 1 else 0.05
            assert options[name]['weight_decay'] == wanted, name


def test_groups_are_joined():
    optimizer = build(classifier(), bias_decay_mult=0.0, flat_decay_mult=0.0)
    assert len(optimizer.param_groups) == 2 * 14  # decayed and not, at each of 14 depths
    assert len(build(classifier(), layer_decay_rate=1.0).param_groups) == 1


def test_frozen_parameters_are_left_out():
    model = classifier(frozen_stages=2)
    options = options_by_name(build(model), model)
    left_out = {name for name, _ in model.named_parameters()} - set(options)
    assert left_out == {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert 'backbone.blocks.1.layer.skip' in left_out
    assert 'backbone.blocks.2.layer.skip' not in left_out


def test_shared_parameters_are_added_once():
    model = classifier()
    model.twin = model.head
    optimizer = build(model, bypass_duplicate=True)
    count = sum(len(group['params']) for group in optimizer.param_groups)
    assert count == len(list(model.parameters()))


def test_one_step_moves_by_the_rate():
    """Adam's first step has the length of the learning rate whatever the gradient is."""
    model = classifier().double()
    optimizer = build(model, weight_decay=0.0)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        step = (before[name] - parameter).mean().item()
        assert step == pytest.approx(5e-4 * expected_factor(name), rel=1e-7), name


class Plain(nn.Module):
    """A backbone that knows no depths."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)


class Holder(nn.Module):
    """A model around any backbone."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone


def test_backbone_without_depths():
    with pytest.raises(ValueError, match='the backbone Plain has no such method'):
        build(Holder(Plain()))
    with pytest.raises(ValueError, match='Plain has no such method'):
        build(Plain())
    assert build(Holder(Plain()), layer_decay_rate=1).param_groups[0]['lr_scale'] == 1.0


def test_backbone_inside_a_backbone():
    model = Holder(Holder(MODELS.build(BACKBONE)))
    assert list(find_backbones(model)) == ['backbone.backbone.']


class Wrong(Plain):
    """A backbone with a wrong answer."""

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        return 3, 3


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'layer_decay_rate': 0}, 'positive number, got 0'),
        ({'layer_decay_rate': '0.65'}, "positive number, got '0.65'"),
        ({'decay_rate': 0.65}, r"unknown paramwise_cfg options \['decay_rate'\]"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        build(Holder(Plain()), **options)


def test_bad_depth():
    with pytest.raises(ValueError, match=r'gave depth 3 of 3 for backbone\.layer\.weight'):
        build(Holder(Wrong()))


def test_needs_a_learning_rate():
    config = {
        'optimizer': {'type': 'AdamW'},
        'constructor': 'mmvil.LayerDecayOptimWrapperConstructor',
        'paramwise_cfg': {'layer_decay_rate': RATE},
    }
    with pytest.raises(ValueError, match=r'must give `lr`'):
        build_optim_wrapper(classifier(), config)
