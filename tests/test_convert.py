"""Conversion of official weights: both layouts, both directions, strict loading, and what may differ."""

import copy

import pytest
import torch
from mmengine.registry import DefaultScope
from torch import Tensor

from mmvil import from_official
from mmvil.convert import mmvil_to_official, official_to_mmvil
from mmvil.models import VisionLSTM

from .golden import golden_arrays, with_prefix


def published(version: str) -> dict[str, Tensor]:
    return with_prefix(golden_arrays(f'vil_rawckpt_{version}'), 'raw.')


@pytest.mark.parametrize('version', ['v1', 'v2'])
def test_input_is_left_alone_and_outer_entry_is_accepted(version: str) -> None:
    source = published(version)
    before = copy.deepcopy(source)
    converted = official_to_mmvil({'state_dict': source, 'epoch': 3})
    from_official(source, img_size=(32, 16))
    assert list(source) == list(before)
    assert all(torch.equal(source[key], before[key]) for key in before)
    assert converted.keys() == official_to_mmvil(source).keys()


@pytest.mark.parametrize('layout', ['module', 'published'])
@pytest.mark.parametrize('version', ['v1', 'v2'])
def test_backbone_without_head_round_trip(version: str, layout: str) -> None:
    backbone = VisionLSTM({'embed_dims': 16, 'num_layers': 24}, version, img_size=32)
    official = mmvil_to_official(backbone.state_dict(), layout=layout)
    rebuilt = from_official(official)
    assert isinstance(rebuilt, VisionLSTM)
    image = torch.randn(1, 3, 32, 32)
    assert torch.equal(rebuilt(image)[-1], backbone.eval()(image)[-1])


def test_reading_of_shapes() -> None:
    arch = {'embed_dims': 24, 'num_layers': 4, 'expand_ratio': 3.0, 'num_heads': 3, 'qkv_block_size': 6}
    backbone = VisionLSTM(arch, img_size=(24, 40), patch_size=8, in_channels=1, conv_kernel_size=5, final_norm=False)
    rebuilt = from_official(mmvil_to_official(backbone.state_dict()))
    assert rebuilt.state_dict().keys() == backbone.state_dict().keys()
    assert rebuilt.norm is None
    image = torch.randn(2, 1, 24, 40)
    assert torch.equal(rebuilt(image)[-1], backbone.eval()(image)[-1])


@pytest.mark.parametrize('scope', ['mmengine', 'mmseg'])
def test_any_default_scope_will_do(scope: str) -> None:
    with DefaultScope.overwrite_default_scope(scope):
        model = from_official(published('v2'))
        assert DefaultScope.get_current_instance().scope_name == scope
    assert type(model.head.loss_module).__module__.startswith('mmpretrain.')


def test_other_class_count_starts_a_new_head(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = []
    monkeypatch.setattr('mmvil.models.checkpoint.print_log', lambda line, **_: lines.append(line))
    model = from_official(published('v2'), num_classes=5)
    logits = model(torch.randn(1, 3, 12, 20), mode='tensor')
    assert logits.shape == (1, 5)
    assert len(lines) == 1
    assert 'head.fc.weight' in lines[0]
    reference = from_official(published('v2'))
    assert torch.equal(model.backbone.pos_embed, reference.backbone.pos_embed)


def test_position_table_is_resampled_at_load() -> None:
    model = from_official(published('v2'), img_size=(24, 24))
    assert model.backbone.pos_embed.shape == (1, 6, 6, 16)
    assert model(torch.randn(1, 3, 24, 24), mode='tensor').shape == (1, 10)


def test_features_of_a_classifier() -> None:
    source = published('v2')
    backbone = from_official(source, out_type='featmap', out_indices=(1, -1), final_norm=False)
    assert [tuple(x.shape) for x in backbone(torch.randn(1, 3, 12, 20))] == [(1, 16, 3, 5)] * 2
    short = from_official(source, out_type='featmap', out_indices=(3,))
    assert len(short.blocks) == 4


def test_other_pooling_drops_the_norm_that_was_trained_for_the_first() -> None:
    backbone = from_official(published('v2'), out_type='avg')
    assert isinstance(backbone, VisionLSTM)
    assert backbone.pool_norm is None
    assert backbone(torch.randn(1, 3, 12, 20))[0].shape == (1, 16)


def test_missing_and_strange_keys_are_named() -> None:
    source = published('v2')
    without = {key: value for key, value in source.items() if key != 'xlstm.blocks.3.xlstm.proj_up.bias'}
    with pytest.raises(ValueError, match=r'blocks\.3\.layer\.proj_up\.bias'):
        from_official(without)
    with pytest.raises(ValueError, match='something_else'):
        from_official({**source, 'something_else': torch.zeros(1)})
    with pytest.raises(ValueError, match='proj_down'):
        from_official({**source, 'xlstm.blocks.3.xlstm.proj_down.bias': torch.zeros(3)})


@pytest.mark.parametrize(
    ('checkpoint', 'error', 'message'),
    [
        ({}, ValueError, 'no state dict'),
        ({'conv1.weight': torch.zeros(1)}, ValueError, 'conv1.weight'),
        ({'state_dict': {'epoch': 3}}, ValueError, 'epoch'),
        ({'xlstm.blocks.0.xlstm.learnable_skip': torch.zeros(8)}, ValueError, 'incomplete'),
    ],
)
def test_other_dictionaries_are_refused(checkpoint: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        from_official(checkpoint)


def test_bad_arguments() -> None:
    state_dict = official_to_mmvil(published('v2'))
    with pytest.raises(ValueError, match='layout'):
        mmvil_to_official(state_dict, layout='timm')
    with pytest.raises(ValueError, match='version'):
        mmvil_to_official(state_dict, version='v3')
    with pytest.raises(ValueError, match='no state dict of an mmvil ViL'):
        mmvil_to_official(published('v2'))
    with pytest.raises(TypeError, match='nonsense'):
        from_official(published('v2'), nonsense=1)
    with pytest.raises(TypeError, match='list'):
        official_to_mmvil([1])
    with pytest.raises(ValueError, match='num_classes'):
        from_official(published('v2'), num_classes=5, out_type='raw')


def test_file_errors(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match='absent'):
        from_official(tmp_path / 'absent.th')
    whole = tmp_path / 'whole.th'
    torch.save({'state_dict': published('v2')}, whole)
    assert from_official(whole)(torch.randn(1, 3, 12, 20), mode='tensor').shape == (1, 10)
    cut = tmp_path / 'cut.th'
    cut.write_bytes(whole.read_bytes()[:-2000])
    with pytest.raises(ValueError, match=r'cut\.th'):
        from_official(cut)
    cut.write_bytes(b'')
    with pytest.raises(ValueError, match=r'cut\.th'):
        from_official(cut)
    text = tmp_path / 'text.th'
    text.write_text('not a checkpoint')
    with pytest.raises(ValueError, match=r'text\.th'):
        from_official(text)
    code = tmp_path / 'code.th'
    torch.save({'state_dict': published('v2'), 'run': print}, code)
    with pytest.raises(ValueError, match=r'code\.th'):
        from_official(code)
