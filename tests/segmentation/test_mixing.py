"""ViL under mmsegmentation's heads, alone and inside of its stock configs."""

import copy
from pathlib import Path

import mmseg
import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DefaultScope
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

from .helpers import ROOT, build

STOCK = Path(mmseg.__file__).parent / '.mim' / 'configs'
if not STOCK.is_dir():  # a source checkout keeps them beside the package
    STOCK = Path(mmseg.__file__).parents[1] / 'configs'
DIMS, CLASSES = 16, 5
NORM = dict(type='BN')


def backbone(**options):
    config = dict(
        type='mmvil.VisionLSTM',
        arch=dict(embed_dims=DIMS, num_layers=4),
        img_size=64,
        patch_size=8,
        out_indices=(0, 1, 2, 3),
        final_norm=False,
    )
    return {**config, **options}


def head(type_, **options):
    config = dict(type=type_, in_channels=DIMS, channels=8, num_classes=CLASSES, norm_cfg=NORM, align_corners=False)
    return {**config, **options}


def segmentor(decode_head, neck=None, **options):
    config = dict(
        type='EncoderDecoder',
        data_preprocessor=dict(type='SegDataPreProcessor', size=(64, 64)),
        backbone=backbone(),
        neck=neck,
        decode_head=decode_head,
        train_cfg=dict(),
        test_cfg=dict(mode='whole'),
    )
    return ConfigDict({**config, **options})


FOUR = dict(in_channels=[DIMS] * 4, in_index=[0, 1, 2, 3])
PYRAMID = dict(type='Feature2Pyramid', embed_dim=DIMS, rescales=[4, 2, 1, 0.5], norm_cfg=NORM)
HEADS = {
    'fcn': segmentor(head('FCNHead', num_convs=1)),
    'psp': segmentor(head('PSPHead', pool_scales=(1, 2))),
    'upernet': segmentor(head('UPerHead', pool_scales=(1, 2), **FOUR), PYRAMID),
    'segformer-mlp': segmentor(head('SegformerHead', **FOUR), PYRAMID),
    'fpn': segmentor(head('FPNHead', feature_strides=[2, 4, 8, 16], **FOUR), PYRAMID),
    'segmenter': segmentor(
        dict(
            type='SegmenterMaskTransformerHead',
            in_channels=DIMS,
            channels=DIMS,
            num_classes=CLASSES,
            num_layers=1,
            num_heads=2,
            embed_dims=DIMS,
            dropout_ratio=0.0,
        )
    ),
    'setr-naive': segmentor(head('SETRUPHead', num_convs=1, up_scale=4, kernel_size=1)),
    'setr-pup': segmentor(head('SETRUPHead', num_convs=2, up_scale=2, kernel_size=3)),
    'setr-mla': segmentor(
        head('SETRMLAHead', mla_channels=8, up_scale=4, **{**FOUR, 'in_channels': [8] * 4, 'channels': 32}),
        dict(type='MLANeck', in_channels=[DIMS] * 4, out_channels=8, norm_cfg=NORM, act_cfg=dict(type='ReLU')),
    ),
}


def one_step(model, size=(64, 48), num_classes=CLASSES):
    """Train one step and check that every trained weight moved."""
    model.train()
    samples = [SegDataSample(gt_sem_seg=PixelData(data=torch.randint(0, num_classes, (1, *size)))) for _ in range(2)]
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss, _ = model.parse_losses(model(torch.randn(2, 3, *size), samples, mode='loss'))
    loss.backward()
    optimizer.step()
    assert torch.isfinite(loss)
    unused = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not unused
    moved = [name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])]
    assert any(name.startswith('backbone.blocks.0') for name in moved)
    return loss.item()


@pytest.mark.parametrize('name', HEADS)
def test_trains_one_step_and_predicts_every_pixel(name):
    model = build(copy.deepcopy(HEADS[name]))
    one_step(model)
    model.eval()
    with torch.no_grad():
        (result,) = model.predict(
            torch.randn(1, 3, 48, 64), [SegDataSample(metainfo=dict(img_shape=(48, 64), ori_shape=(30, 41)))]
        )
    assert result.pred_sem_seg.shape == (30, 41)


STOCK_CONFIGS = {
    'vit/vit_vit-b16_mln_upernet_8xb2-80k_ade20k-512x512.py': 'neck',
    'segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py': 'pyramid',
    'segmenter/segmenter_vit-t_mask_8xb1-160k_ade20k-512x512.py': 'plain',
    'setr/setr_vit-l_pup_8xb2-160k_ade20k-512x512.py': 'plain',
    'fcn/fcn_r50-d8_4xb4-80k_ade20k-512x512.py': 'plain',
    'pspnet/pspnet_r50-d8_4xb4-80k_ade20k-512x512.py': 'plain',
}


def narrow_head(config, dims):
    """Fit a stock head to maps of `dims` channels, few of its own."""
    config = copy.deepcopy(config)
    several = isinstance(config['in_channels'], (list, tuple))
    config['in_channels'] = [dims] * len(config['in_channels']) if several else dims
    if config['type'] == 'SegmenterMaskTransformerHead':
        config.update(channels=dims, embed_dims=dims, num_layers=1, num_heads=2)
    else:
        config['channels'] = 8
    if isinstance(config.get('norm_cfg'), dict) and config['norm_cfg']['type'] == 'SyncBN':
        config['norm_cfg'] = NORM
    return config


@pytest.mark.parametrize('name', STOCK_CONFIGS)
def test_inside_of_a_stock_config(name):
    """A user's way: take an upstream config, put `mmvil.VisionLSTM` in."""
    config = Config.fromfile(str(STOCK / name), import_custom_modules=False)
    model = config.model.to_dict()
    model['pretrained'] = None
    model['data_preprocessor'].pop('size', None)
    model['backbone'] = backbone()
    if STOCK_CONFIGS[name] == 'neck':
        model['neck'].update(in_channels=[DIMS] * 4, out_channels=DIMS)
    elif STOCK_CONFIGS[name] == 'pyramid':
        model['neck'] = PYRAMID
    model['decode_head'] = narrow_head(model['decode_head'], DIMS)
    auxiliary = model.pop('auxiliary_head', None)
    if auxiliary is not None:
        heads = auxiliary if isinstance(auxiliary, list) else [auxiliary]
        model['auxiliary_head'] = [narrow_head(one, DIMS) for one in heads]
    built = revert_sync_batchnorm(MODELS.build(model))
    built.init_weights()
    one_step(built, num_classes=150)


def test_scope_of_the_classification_package_works_as_well():
    model = segmentor(head('mmseg.FCNHead', num_convs=1), type='mmseg.EncoderDecoder')
    model['data_preprocessor'] = dict(type='mmseg.SegDataPreProcessor', size=(64, 64))
    model['backbone'] = dict(
        type='mmpretrain.VisionTransformer', arch='deit-tiny', img_size=64, patch_size=16, out_type='featmap'
    )
    model['decode_head']['in_channels'] = 192
    built = MODELS.build(model)
    samples = [SegDataSample(gt_sem_seg=PixelData(data=torch.zeros(1, 64, 64, dtype=torch.long))) for _ in range(2)]
    assert torch.isfinite(built.parse_losses(built(torch.randn(2, 3, 64, 64), samples, mode='loss'))[0])


def classifier_checkpoint(path, dims=DIMS, num_layers=4, grid=64):
    """A checkpoint as a classification run leaves it."""
    from mmpretrain.registry import MODELS as CLASSIFIERS

    with DefaultScope.overwrite_default_scope('mmpretrain'):
        classifier = CLASSIFIERS.build(
            dict(
                type='mmpretrain.ImageClassifier',
                backbone=backbone(
                    arch=dict(embed_dims=dims, num_layers=num_layers),
                    img_size=grid,
                    out_indices=-1,
                    out_type='bilateral_concat',
                    final_norm=True,
                ),
                head=dict(type='mmpretrain.LinearClsHead', num_classes=7, in_channels=2 * dims),
            )
        )
    for parameter in classifier.parameters():
        torch.nn.init.normal_(parameter)
    torch.save(dict(state_dict=classifier.state_dict(), meta=dict()), path)
    return classifier


def pretrained_segmentor(path, **options):
    options = dict(img_size=96, init_cfg=dict(type='Pretrained', checkpoint=str(path), prefix='backbone.'), **options)
    return segmentor(head('FCNHead', num_convs=1), backbone=backbone(**options))


def test_classification_weights_start_a_segmentor(tmp_path):
    classifier = classifier_checkpoint(tmp_path / 'classifier.pth')
    model = build(pretrained_segmentor(tmp_path / 'classifier.pth'))
    weights = classifier.backbone.state_dict()
    for name, value in model.backbone.state_dict().items():
        if name != 'pos_embed':
            assert torch.equal(value, weights[name]), name
    assert model.backbone.pos_embed.shape == (1, 12, 12, DIMS)  # 96 / 8, resampled from 8 x 8
    table = weights['pos_embed'].permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(table, size=(12, 12), mode='bicubic', align_corners=False)
    torch.testing.assert_close(model.backbone.pos_embed.permute(0, 3, 1, 2), expected, rtol=0, atol=1e-5)


def test_weights_of_another_model_are_refused(tmp_path):
    classifier_checkpoint(tmp_path / 'deeper.pth', num_layers=6)
    with pytest.raises(ValueError, match=r'blocks\.'):
        build(pretrained_segmentor(tmp_path / 'deeper.pth'))
    classifier_checkpoint(tmp_path / 'wider.pth', dims=32)
    with pytest.raises(ValueError, match='shape'):
        build(pretrained_segmentor(tmp_path / 'wider.pth'))
    with pytest.raises(FileNotFoundError, match='does not exist'):
        build(pretrained_segmentor(tmp_path / 'none.pth'))


def test_shipped_base_names_no_stock_file():
    assert 'mmseg::' not in ''.join(path.read_text() for path in (ROOT / 'configs').rglob('*.py'))
