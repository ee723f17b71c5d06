import math
import shutil
from itertools import pairwise

import pytest
import torch
from PIL import Image

from mmvil.evaluation import training
from mmvil.evaluation.data import LoadedSplit, load_split
from mmvil.evaluation.models import ModelFactory
from mmvil.evaluation.protocol import FINAL_SPLITS, STANDARD, TUNING_SPLITS, load_settings
from mmvil.evaluation.training import build_optimizer, count_correct, train_model
from mmvil.models.vil import VisionLSTM


@pytest.fixture(scope='module')
def factory(tiny_config, cpu):
    return ModelFactory(load_settings(tiny_config), None, cpu, from_scratch=True)


def load(settings, root, split, device, **options):
    return load_split(settings, str(root), 'eurosat', split, options.pop('open', TUNING_SPLITS), device, True)


# --- data ------------------------------------------------------------------------------------------------------------


def test_a_split_in_memory_equals_one_that_is_streamed(tiny_settings, tiny_root, cpu):
    kept = load(tiny_settings, tiny_root, 'train800', cpu)
    tiny_settings.runtime.memory_limit = 0.0
    streamed = load(tiny_settings, tiny_root, 'train800', cpu)
    assert kept.images.shape == (16, 3, 8, 8)
    assert streamed.images is None
    for batch_size in (5, 16):
        images, labels = (torch.cat(parts) for parts in zip(*streamed.batches(batch_size, cpu), strict=True))
        assert torch.equal(images, kept.images)
        assert torch.equal(labels, kept.labels)
        assert [len(part) for part, _ in kept.batches(batch_size, cpu)] == ([5, 5, 5, 1] if batch_size == 5 else [16])
    assert kept.identity['storage'] == streamed.identity['storage'] == 'zip (JPEG)'
    assert kept.identity['list_hash'] == streamed.identity['list_hash']


def test_tuning_cannot_load_the_test_split(tiny_settings, tiny_root, cpu):
    for split in FINAL_SPLITS:
        with pytest.raises(PermissionError, match='is closed here'):
            load(tiny_settings, tiny_root, split, cpu)


def test_lossy_and_lossless_images_are_not_mixed(tiny_settings, tiny_root, cpu, tmp_path):
    root = shutil.copytree(tiny_root, tmp_path / 'vtab-1k')
    path = root / 'eurosat/images/train800/000003.jpg'
    with Image.open(path) as image:
        image.save(path, format='PNG')
    with pytest.raises(ValueError, match=r"different storage are mixed in train800: \['jpeg', 'png'\]"):
        load(tiny_settings, root, 'train800', cpu)


def test_images_must_have_one_size(tiny_settings, tiny_root, cpu, monkeypatch):
    monkeypatch.setattr(
        'mmvil.evaluation.data.VTAB1K.read_with_hash', lambda *_: (torch.zeros(9, 8, 3).numpy(), b'', 'png')
    )
    with pytest.raises(ValueError, match='must end with one size'):
        load(tiny_settings, tiny_root, 'train800', cpu)


# --- optimizer -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def published_optimizer(cpu):
    """Optimizer and schedules of the published protocol for a ViL with 24 sub-blocks."""
    settings = load_settings(
        None,
        {
            'model': dict(
                backbone=dict(
                    type='mmvil.VisionLSTM',
                    arch=dict(embed_dims=16, num_layers=24, num_heads=4),
                    img_size=8,
                    patch_size=4,
                    out_type='bilateral_concat',
                )
            ),
            'cached_pipeline': [dict(type='mmpretrain.Resize', scale=(8, 8))],
        },
    )
    model = ModelFactory(settings, None, cpu, from_scratch=True).fresh(10, 0)
    return model, settings, *build_optimizer(model, settings, 5e-4, 12)


def groups_by_name(model, optimizer):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: group for group in optimizer.optimizer.param_groups for p in group['params']}


def test_layer_decay_is_that_of_the_published_runs(published_optimizer):
    model, _, optimizer, _ = published_optimizer
    groups = groups_by_name(model, optimizer)
    assert len(groups) == len(list(model.parameters()))
    rate = {name: group['lr_scale'] for name, group in groups.items()}
    assert rate['backbone.pos_embed'] == rate['backbone.patch_embed.proj.weight'] == pytest.approx(0.65**13)
    for pair in range(12):
        for sub_block in (2 * pair, 2 * pair + 1):
            assert rate[f'backbone.blocks.{sub_block}.layer.proj_up.weight'] == pytest.approx(0.65 ** (12 - pair))
    assert rate['backbone.norm.weight'] == rate['backbone.pool_norm.weight'] == rate['head.fc.weight'] == 1.0


def test_layer_decay_of_a_vit_is_that_of_the_published_runs(cpu):
    arch = dict(embed_dims=16, num_layers=12, num_heads=2, feedforward_channels=16)
    backbone = dict(type='mmpretrain.VisionTransformer', arch=arch, img_size=8, patch_size=4)
    resize = [dict(type='mmpretrain.Resize', scale=(8, 8))]
    settings = load_settings(None, {'model': dict(backbone=backbone), 'cached_pipeline': resize})
    model = ModelFactory(settings, None, cpu, from_scratch=True).fresh(10, 0)
    groups = groups_by_name(model, build_optimizer(model, settings, 5e-4, 12)[0])
    for name in ('cls_token', 'pos_embed', 'patch_embed.projection.weight'):
        assert groups[f'backbone.{name}']['lr_scale'] == pytest.approx(0.65**13)
    for block in range(12):
        assert groups[f'backbone.layers.{block}.attn.qkv.weight']['lr_scale'] == pytest.approx(0.65 ** (12 - block))
    assert groups['backbone.ln1.weight']['lr_scale'] == groups['head.fc.weight']['lr_scale'] == 1.0
    assert groups['backbone.pos_embed']['weight_decay'] == 0.05
    assert groups['backbone.ln1.weight']['weight_decay'] == groups['head.fc.bias']['weight_decay'] == 0.0


def test_weight_decay_spares_biases_and_vectors_only(published_optimizer):
    model, _, optimizer, _ = published_optimizer
    for name, group in groups_by_name(model, optimizer).items():
        parameter = model.get_parameter(name)
        expected = 0.0 if parameter.dim() <= 1 or name.endswith('.bias') else 0.05
        assert group['weight_decay'] == expected, name
    assert groups_by_name(model, optimizer)['backbone.pos_embed']['weight_decay'] == 0.05


def test_training_runs_in_bf16_unless_on_a_cpu(tiny_settings, monkeypatch):
    built = []
    monkeypatch.setattr(training, 'build_optim_wrapper', lambda model, config: built.append(config))
    tiny_settings.param_scheduler = []
    for device in ('meta', 'cpu'):  # the first stands for any other device
        build_optimizer(torch.nn.Linear(1, 1, device=device), tiny_settings, 5e-4, 1)
    elsewhere, cpu = built
    assert (elsewhere['type'], elsewhere['dtype']) == ('AmpOptimWrapper', 'bfloat16')
    assert cpu['type'] == 'OptimWrapper'
    assert elsewhere['optimizer'] == cpu['optimizer']
    assert cpu['optimizer']['lr'] == 5e-4


def test_the_schedule_warms_up_over_a_tenth_and_ends_near_zero(published_optimizer):
    model, settings, optimizer, schedules = published_optimizer
    head = groups_by_name(model, optimizer)['head.fc.weight']
    rates = []
    for _ in range(600):
        rates.append(head['lr'])
        optimizer.step()
        for schedule in schedules:
            schedule.step()
    assert max(rates) == pytest.approx(5e-4)
    assert rates.index(max(rates)) == 60
    assert all(a < b for a, b in pairwise(rates[:61]))
    assert all(a > b for a, b in pairwise(rates[60:]))
    assert rates[330] == pytest.approx(2.5e-4, rel=0.01)
    assert rates[-1] < 1e-8
    assert settings.protocol.epochs * 12 == 600


def test_the_head_is_as_published(published_optimizer):
    model, *_ = published_optimizer
    assert model.head.fc.in_features == 32  # first and last token
    assert model.head.fc.weight.requires_grad
    assert model.head.fc.weight.std().item() == pytest.approx(2e-5, rel=0.15)
    assert model.head.fc.bias.abs().max() == 0
    loss = model.head.loss_module
    assert type(loss).__name__ == 'CrossEntropyLoss'
    logits, target = torch.randn(4, 10), torch.tensor([1, 2, 3, 4])
    assert loss(logits, target) == pytest.approx(torch.nn.functional.cross_entropy(logits, target).item())


def test_a_schedule_by_epoch_is_refused(tiny_settings, factory):
    tiny_settings.param_scheduler = dict(type='CosineAnnealingLR', T_max=2)
    with pytest.raises(ValueError, match='convert_to_iter_based=True'):
        build_optimizer(factory.fresh(10, 0), tiny_settings, 1e-3, 2)
    tiny_settings.param_scheduler = [
        dict(type='LinearLR', by_epoch=False, end=2),
        dict(type='ConstantLR', by_epoch=False),
    ]
    assert len(build_optimizer(factory.fresh(10, 0), tiny_settings, 1e-3, 2)[1]) == 2


# --- training --------------------------------------------------------------------------------------------------------


def test_incomplete_batches_are_dropped_and_seeds_matter(tiny_settings, tiny_root, factory, cpu):
    split = load(tiny_settings, tiny_root, 'train800', cpu)
    tiny_settings.protocol.batch_size = 7
    losses = []
    for seed in (0, 1, 0):
        done = train_model(factory.fresh(10, seed), split, tiny_settings, 1e-2, seed)
        assert done.steps == 2 * (16 // 7)
        losses.append(done.final_loss)
    assert losses[0] == losses[2] != losses[1]
    tiny_settings.protocol.batch_size = 17
    with pytest.raises(ValueError, match='at least one batch of 17 images'):
        train_model(factory.fresh(10, 0), split, tiny_settings, 1e-2, 0)


def test_training_learns_its_images(tiny_settings, tiny_root, factory, cpu):
    split = load(tiny_settings, tiny_root, 'train800', cpu)
    tiny_settings.merge_from_dict({'protocol.epochs': 40, 'param_scheduler.warmup': 4})
    model = factory.fresh(10, 0)
    before = count_correct(model, split, 5).correct
    train_model(model, split, tiny_settings, 2e-2, 0)
    after = count_correct(model, split, 5)
    assert before < 8 < 14 <= after.correct
    assert count_correct(model, split, 16).correct == after.correct  # the batch has no influence
    assert after.total == 16


def test_a_diverged_training_stops_and_says_so(tiny_settings, factory, cpu):
    images = torch.zeros(16, 3, 8, 8, dtype=torch.uint8)
    split = LoadedSplit(None, torch.zeros(16, dtype=torch.int64), images, {})
    done = train_model(factory.fresh(10, 0), split, tiny_settings, math.inf, 0)
    assert done.diverged
    assert done.steps == 2  # one epoch of two


def test_counting_is_top_1(factory, cpu):
    class Fixed(torch.nn.Module):
        def data_preprocessor(self, data):
            return data

        def forward(self, inputs, mode):
            return inputs[:, :, 0, 0].float()

    images = torch.tensor([[9, 1, 0], [1, 9, 0], [0, 1, 9], [5, 0, 1]], dtype=torch.uint8)[:, :, None, None]
    split = LoadedSplit(None, torch.tensor([0, 1, 0, 0]), images, {})
    result = count_correct(Fixed(), split, 3)
    assert (result.correct, result.total) == (3, 4)


def test_drop_path_is_off_whatever_the_config_says(factory):
    backbone = factory.fresh(10, 0).backbone
    assert isinstance(backbone, VisionLSTM)
    assert STANDARD['backbone_overrides'] == {'drop_path_rate': 0.0}
    assert [block.drop_path.rate for block in backbone.blocks] == [0.0, 0.0]
