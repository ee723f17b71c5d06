"""The shipped ADE20K configs against the published recipe."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.dataset import Compose, pseudo_collate
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import PARAM_SCHEDULERS
from mmseg.registry import DATASETS, MODELS

from mmvil.models.block import ViLBlock

from .helpers import CONFIGS, build, load_config, write_ade

NAMES = sorted(path.name for path in CONFIGS.glob('vil-*_upernet_*_ade20k-512x512.py'))
DEFAULT = 'vil-{}_upernet_1xb16-160k_ade20k-512x512.py'
SIZES = {'tiny': (192, 192, 0.0, 11), 'small': (384, 384, 0.05, 42), 'base': (768, 384, 0.1, 115)}


def test_every_size_has_its_three_configs():
    for arch in SIZES:
        for variant in ('1xb16-160k', '1xb16-fp16-160k', '1xb16-160k-paper-eval'):
            assert f'vil-{arch}_upernet_{variant}_ade20k-512x512.py' in NAMES


@pytest.mark.parametrize('arch', SIZES)
def test_model_is_the_published_one(arch):
    dims, channels, drop_path, millions = SIZES[arch]
    config = load_config(DEFAULT.format(arch))
    assert config.model.backbone.init_cfg == dict(
        type='Pretrained', checkpoint=f'checkpoints/vil-{arch}_in1k-224px.pth', prefix='backbone.'
    )
    with torch.device('meta'):
        model = MODELS.build(config.model)
    auxiliary = sum(p.numel() for p in model.auxiliary_head.parameters())
    total = sum(p.numel() for p in model.parameters())
    assert round((total - auxiliary) / 1e6) == millions  # the auxiliary head is not part of the published counts
    backbone = model.backbone
    assert backbone.embed_dims == dims
    assert backbone.out_indices == (7, 11, 15, 23)
    assert backbone.norm is None
    assert backbone.pos_embed.shape == (1, 32, 32, dims)
    rates = [block.drop_path.rate for block in backbone.blocks if isinstance(block, ViLBlock)]
    assert rates == pytest.approx([drop_path * index / 23 for index in range(24)])
    assert model.decode_head.channels == channels
    assert model.decode_head.dropout is None
    assert model.auxiliary_head.channels == channels
    assert model.auxiliary_head.in_index == 2
    assert model.auxiliary_head.dropout is None
    assert model.auxiliary_head.loss_decode.loss_weight == 0.4
    assert len(model.auxiliary_head.convs) == 1


@pytest.mark.parametrize('name', NAMES)
def test_training_settings(name):
    config = load_config(name)
    assert config.optim_wrapper.optimizer == dict(type='AdamW', lr=5e-4, betas=(0.9, 0.999), weight_decay=0.05)
    assert config.optim_wrapper.clip_grad is None
    assert config.train_cfg == dict(type='IterBasedTrainLoop', max_iters=160000, val_interval=10000)
    assert (config.train_dataloader.batch_size, config.val_dataloader.batch_size) == (16, 1)
    assert config.default_hooks.checkpoint.save_best == 'mIoU'
    assert config.optim_wrapper.dtype == ('float16' if 'fp16' in name else 'bfloat16')
    assert config.optim_wrapper.loss_scale == ('dynamic' if 'fp16' in name else 1.0)
    assert config.model.test_cfg == dict(
        mode='slide', crop_size=(512, 512), stride=(341, 341), window_batch_size=config.model.test_cfg.window_batch_size
    )
    for split in ('train', 'val', 'test'):
        dataset = config[f'{split}_dataloader'].dataset
        assert dataset.reduce_zero_label is True
        assert dataset.ignore_index == 255
    assert config.val_evaluator == dict(type='IoUMetric', iou_metrics=['mIoU'], ignore_index=255)


def narrow(config):
    """Make a config's model small without touching its depth."""
    model = copy.deepcopy(config.model)
    model.backbone.merge(dict(arch=dict(embed_dims=16, num_layers=24), init_cfg=None))
    model.neck.embed_dim = 16
    model.decode_head.merge(dict(in_channels=[16] * 4, channels=8))
    model.auxiliary_head.merge(dict(in_channels=16, channels=8))
    return model


def test_layer_decay_and_schedule_are_exact():
    config = load_config(DEFAULT.format('tiny'))
    model = revert_sync_batchnorm(MODELS.build(narrow(config)))
    wrapper_config = {**config.optim_wrapper, 'type': 'OptimWrapper'}
    wrapper_config.pop('dtype')
    wrapper_config.pop('loss_scale')
    wrapper = build_optim_wrapper(model, wrapper_config).optimizer
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    group_of = {names[id(p)]: group for group in wrapper.param_groups for p in group['params']}
    assert set(group_of) == set(names.values())

    def level(name):
        if name.startswith(('backbone.patch_embed', 'backbone.pos_embed')):
            return 13
        if name.startswith('backbone.blocks.'):
            return 13 - (int(name.split('.')[2]) // 2 + 1)
        return 0

    for name, group in group_of.items():
        assert group['lr'] == pytest.approx(5e-4 * 0.65 ** level(name), rel=1e-12), name
        parameter = dict(model.named_parameters())[name]
        decays = parameter.ndim > 1 and name != 'backbone.pos_embed'
        assert group['weight_decay'] == (0.05 if decays else 0.0), name
    assert {level(name) for name in group_of} == set(range(14))

    scheduler_config = dict(config.param_scheduler, end=config.train_cfg.max_iters)
    scheduler = PARAM_SCHEDULERS.build(scheduler_config, default_args=dict(optimizer=wrapper))
    scale = [group['lr_scale'] for group in wrapper.param_groups]
    expected = {
        0: 5e-4 / 1501,
        1499: 5e-4 * 1500 / 1501,
        1500: 5e-4,
        (1500 + 159999) // 2: 1e-6 + (5e-4 - 1e-6) * (1 + math.cos(math.pi * 79249 / 158499)) / 2,
        159999: 1e-6,  # times a group's rate: the floor is 2e-3 of the start everywhere
    }
    for step, rate in expected.items():
        if step > 0:  # the schedule is in closed form, so it can jump
            scheduler.last_step = step - 1
            scheduler.step()
        rates = [group['lr'] for group in wrapper.param_groups]
        assert rates == pytest.approx([rate * s for s in scale], rel=1e-9), step
    assert wrapper.param_groups[0]['lr'] == pytest.approx(2e-3 * wrapper.param_groups[0]['initial_lr'])


@pytest.fixture(scope='module')
def ade(tmp_path_factory):
    root = tmp_path_factory.mktemp('ade')
    rng = np.random.default_rng(1)
    masks = [np.kron(rng.integers(0, 151, (5, 6)), np.ones((20, 30))).astype(np.uint8) for _ in range(2)]
    write_ade(root, masks, split='training')
    write_ade(root, [*masks, masks[0].T.copy()], split='validation')
    return root


@pytest.mark.parametrize('name', [DEFAULT.format('tiny'), DEFAULT.format('tiny').replace('160k', '160k-mmseg-aug')])
def test_pipeline_feeds_one_training_step(name, ade):
    config = load_config(name)
    model = build(narrow(config)).train()
    dataset = DATASETS.build(dict(config.train_dataloader.dataset, data_root=str(ade)))
    np.random.seed(0)
    data = model.data_preprocessor(pseudo_collate([dataset[0], dataset[1]]), training=True)
    assert data['inputs'].shape == (2, 3, 512, 512)
    for sample in data['data_samples']:  # a corner is enough to see that everything fits together
        sample.gt_sem_seg = sample.gt_sem_seg[208:304, 208:304]
    losses = model(data['inputs'][..., 208:304, 208:304], data['data_samples'], mode='loss')
    loss, _ = model.parse_losses(losses)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_evaluations_feed_the_sizes_they_promise(ade):
    sizes = {}
    for variant in ('160k', '160k-paper-eval'):
        config = load_config(DEFAULT.format('tiny').replace('160k', variant))
        dataset = DATASETS.build(dict(config.val_dataloader.dataset, data_root=str(ade)))
        sizes[variant] = [tuple(dataset[index]['inputs'].shape[1:]) for index in (0, 2)]
        assert dataset[2]['data_samples'].gt_sem_seg.shape == (180, 100)
    assert sizes == {'160k': [(512, 922), (922, 512)], '160k-paper-eval': [(512, 512), (512, 512)]}


def test_paper_resize_is_bicubic_without_antialiasing(ade):
    config = load_config(DEFAULT.format('tiny').replace('160k', '160k-paper-eval'))
    pipeline = Compose([*config.test_pipeline[:2], config.test_pipeline[-1]])
    path = str(next((ade / 'images' / 'validation').glob('*.jpg')))
    resized = pipeline(dict(img_path=path))['inputs']
    loaded = Compose([config.test_pipeline[0], config.test_pipeline[-1]])(dict(img_path=path))['inputs']
    expected = F.interpolate(loaded[None].double(), size=(512, 512), mode='bicubic', align_corners=False)[0]
    assert resized.dtype == torch.float32
    # OpenCV keeps interpolation coefficients of float images in float32.
    assert (resized - expected).abs().max() < 1e-3


def test_paper_multi_scale_keeps_the_original_size_times_the_factor(ade):
    config = load_config(DEFAULT.format('tiny').replace('160k', '160k-paper-eval'))
    dataset = DATASETS.build({**config.val_dataloader.dataset, 'data_root': str(ade), 'pipeline': config.tta_pipeline})
    data = dataset[0]
    heights = [image.shape[1] for image in data['inputs']]
    assert heights == [75, 75, 100, 100, 125, 125, 150, 150, 175, 175]
    assert [sample.flip for sample in data['data_samples']] == [False, True] * 5
    model = build(narrow(config))
    padded = model.data_preprocessor(
        pseudo_collate([dict(inputs=data['inputs'][0], data_samples=data['data_samples'][0])])
    )
    assert padded['inputs'].shape == (1, 3, 512, 512)
    assert padded['inputs'][..., 75:, :].abs().max() == 0
    assert padded['data_samples'][0].img_padding_size == (0, 512 - 135, 0, 512 - 75)


def test_neck_and_heads_start_as_published():
    torch.manual_seed(0)
    config = load_config(DEFAULT.format('tiny'))
    model = narrow(config)
    model.neck.embed_dim = 64
    model.backbone.merge(dict(arch=dict(embed_dims=64, num_layers=24)))
    model.decode_head.merge(dict(in_channels=[64] * 4, channels=64))
    model.auxiliary_head.merge(dict(in_channels=64, channels=64))
    model = build(model)
    for head in (model.decode_head, model.auxiliary_head):
        for module in head.modules():
            if isinstance(module, torch.nn.Conv2d):
                assert module.weight.std().item() == pytest.approx(0.02, rel=0.1)
                assert module.bias is None or module.bias.abs().max() == 0
    for module in model.neck.modules():
        if isinstance(module, torch.nn.ConvTranspose2d):
            bound = math.sqrt(6 / (2 * 64 * 4))  # Xavier uniform, fan in and out 64 x 2 x 2
            assert bound * 0.98 < module.weight.abs().max() <= bound
            assert module.bias.abs().max() == 0
