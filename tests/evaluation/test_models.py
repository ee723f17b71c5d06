from pathlib import Path

import pytest
import torch

from mmvil.convert import mmvil_to_official
from mmvil.evaluation.models import ModelFactory, is_official
from mmvil.evaluation.protocol import load_settings

CONFIGS = Path(__file__).parents[2] / 'configs' / 'vtab'
RESIZE = [dict(type='mmpretrain.Resize', scale=(8, 8))]
VIL = dict(
    type='mmvil.VisionLSTM',
    arch=dict(embed_dims=16, num_layers=4, num_heads=4),
    img_size=8,
    patch_size=4,
    out_type='bilateral_concat',
    pool_norm=True,
)
VIT_ARCH = dict(embed_dims=16, num_layers=2, num_heads=2, feedforward_channels=32)
VIT = dict(type='VisionTransformer', arch=VIT_ARCH, img_size=8, patch_size=4)


def settings_for(backbone, neck=None):
    return load_settings(None, {'model': dict(backbone=backbone, neck=neck), 'cached_pipeline': RESIZE})


def scratch(backbone, cpu, neck=None):
    return ModelFactory(settings_for(backbone, neck), None, cpu, from_scratch=True)


def randomize(factory):
    """Weights that no initialisation gives, as a checkpoint has them."""
    with torch.no_grad():
        for number, parameter in enumerate(factory.model.backbone.parameters()):
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)), alpha=0.1)
    return factory.model.backbone.state_dict()


def features(factory):
    model = factory.fresh(3, 0).eval()
    with torch.no_grad():
        return model.extract_feat(torch.linspace(-1, 1, 192).view(1, 3, 8, 8))[-1]


@pytest.mark.parametrize(
    ('backbone', 'neck', 'width'),
    [
        (VIL, None, 32),
        (dict(VIL, out_type='bilateral_avg'), None, 16),
        (VIT, None, 16),
        (dict(type='ResNet', depth=18), dict(type='GlobalAveragePooling'), 512),
    ],
)
def test_any_backbone_with_a_pooled_output(cpu, backbone, neck, width):
    factory = scratch(backbone, cpu, neck)
    assert factory.in_channels == width
    model = factory.fresh(7, 0)
    assert model(torch.zeros(2, 3, 8, 8), mode='tensor').shape == (2, 7)


@pytest.mark.parametrize(
    ('name', 'width', 'parameters'), [('vil-tiny', 384, 6_391_528 - 385_000), ('deit-tiny', 192, 5_524_416)]
)
def test_configs_build_in_full_size(cpu, name, width, parameters):
    factory = ModelFactory(load_settings(CONFIGS / f'{name}_vtab1k.py'), None, cpu, from_scratch=True)
    assert factory.input_size == (224, 224)
    assert factory.in_channels == width
    assert factory.num_parameters == parameters


@pytest.mark.parametrize('backbone', [dict(VIL, out_type='featmap'), dict(type='ResNet', depth=18)])
def test_a_feature_map_is_refused_with_advice(cpu, backbone):
    with pytest.raises(ValueError, match='GlobalAveragePooling'):
        scratch(backbone, cpu)


@pytest.mark.parametrize('backbone', [VIL, VIT], ids=['vil', 'vit'])
@pytest.mark.parametrize('layout', ['classifier', 'backbone'])
def test_checkpoints_of_mmpretrain_and_mmvil(cpu, tmp_path, backbone, layout):
    source = scratch(backbone, cpu)
    weights = randomize(source)
    prefix = 'backbone.' if layout == 'classifier' else ''
    stored = {prefix + key: value for key, value in weights.items()}
    stored.update({'head.layers.head.weight': torch.zeros(1)} if layout == 'classifier' else {})
    torch.save({'state_dict': stored, 'meta': {'epoch': 1}}, tmp_path / 'checkpoint.pth')
    factory = ModelFactory(settings_for(backbone), tmp_path / 'checkpoint.pth', cpu)
    loaded = factory.model.backbone.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in weights.items())


@pytest.mark.parametrize('with_config', [True, False])
@pytest.mark.parametrize('layout', ['module', 'published'])
def test_official_weights_directly(cpu, tmp_path, with_config, layout):
    source = scratch(VIL, cpu)
    weights = {f'backbone.{key}': value for key, value in randomize(source).items()}
    weights.update({'head.fc.weight': torch.zeros(5, 32), 'head.fc.bias': torch.zeros(5)})
    official = mmvil_to_official(weights, layout=layout)
    assert is_official(official)
    torch.save({'state_dict': official}, tmp_path / 'official.th')
    settings = settings_for(VIL) if with_config else load_settings(None, {'cached_pipeline': RESIZE})
    factory = ModelFactory(settings, tmp_path / 'official.th', cpu)
    assert factory.in_channels == 32
    source._initial = source.model.state_dict()
    assert torch.equal(features(factory), features(source))


def test_every_run_starts_from_the_same_weights(cpu):
    factory = scratch(VIL, cpu)
    first = {key: value.clone() for key, value in factory.fresh(5, 3).state_dict().items()}
    with torch.no_grad():
        for parameter in factory.model.parameters():
            parameter.add_(1.0)
    factory.fresh(9, 1)
    again = factory.fresh(5, 3).state_dict()
    assert set(again) == set(first)
    assert all(torch.equal(again[key], value) for key, value in first.items())
    assert not torch.equal(factory.fresh(5, 4).head.fc.weight, first['head.fc.weight'])


@pytest.mark.parametrize('options', [{}, {'drop_path_rate': 0.3}])
def test_drop_path_is_off_in_backbones_that_have_it_by_default(cpu, options):
    arch = dict(embed_dims=8, depths=[2, 2], num_heads=[1, 1])
    swin = dict(type='SwinTransformer', arch=arch, img_size=32, window_size=4, out_indices=(1,), **options)
    settings = settings_for(swin, dict(type='GlobalAveragePooling'))
    settings.cached_pipeline = [dict(type='mmpretrain.Resize', scale=(32, 32))]
    backbone = ModelFactory(settings, None, cpu, from_scratch=True).model.backbone
    rates = [module.drop_prob for module in backbone.modules() if type(module).__name__ == 'DropPath']
    assert set(rates) == {0.0}


def test_missing_weights_stop(cpu, tmp_path):
    weights = scratch(VIT, cpu).model.backbone.state_dict()
    weights.pop('pos_embed')
    torch.save({f'backbone.{key}': value for key, value in weights.items()}, tmp_path / 'checkpoint.pth')
    with pytest.raises(ValueError, match=r'lacks 1 of the .* keys .* pos_embed'):
        ModelFactory(settings_for(VIT), tmp_path / 'checkpoint.pth', cpu)


def test_random_weights_are_used_on_purpose_only(cpu, tmp_path):
    with pytest.raises(ValueError, match='either a checkpoint or from_scratch'):
        ModelFactory(settings_for(VIL), None, cpu)
    with pytest.raises(FileNotFoundError):
        ModelFactory(settings_for(VIL), tmp_path / 'nothing.pth', cpu)
    torch.save({'backbone.a': torch.zeros(1)}, tmp_path / 'other.pth')
    with pytest.raises(ValueError, match='without a config the checkpoint must be official'):
        ModelFactory(load_settings(None, {'cached_pipeline': RESIZE}), tmp_path / 'other.pth', cpu)
    with pytest.raises(ValueError, match="no backbone 'Nothing' is registered"):
        scratch(dict(type='Nothing'), cpu)
    with pytest.raises(ValueError, match='must be an ImageClassifier'):
        ModelFactory(load_settings(None, {'model': dict(type='TimmClassifier')}), None, cpu, from_scratch=True)
