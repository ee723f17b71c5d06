"""Every classification config parses, has the recipe's numbers, builds in full size and takes a training step."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from mmengine.config import Config
from mmengine.dataset import default_collate
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, PARAM_SCHEDULERS, init_default_scope
from mmengine.runner import Runner
from mmpretrain.registry import MODELS, TRANSFORMS
from PIL import Image

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / 'configs'
IMAGENET_IMAGES = 1_281_167

# Parameters of each model with 1000 classes: the released logs, or the published files' shapes.
SIZES = {
    ('tiny', 'v2', 192): 6_381_544,
    ('tiny', 'v2', 224): 6_391_528,
    ('small', 'v2', 192): 23_378_728,
    ('small', 'v2', 224): 23_398_696,
    ('base', 'v2', 192): 89_223_592,
    ('base', 'v2', 224): 89_263_528,
    ('tiny', 'v1', 224): 6_088_360,
    ('tiny_plus', 'v1', 224): 7_277_840,
    ('small', 'v1', 224): 22_792_360,
    ('small_plus', 'v1', 224): 24_628_664,
    ('base', 'v1', 224): 88_050_856,
}

# config: resolution, total batch, lr, epochs, warm-up, end of the cosine, weight decay, clipping, drop path
RECIPES = {
    'vil/vil-tiny_8xb256-800e_in1k-192px': (192, 2048, 2e-3, 800, 5, 1e-6, 0.05, 1.0, 0.0),
    'vil/vil-tiny_8xb256-400e_in1k-192px': (192, 2048, 2e-3, 400, 5, 1e-6, 0.05, 1.0, 0.0),
    'vil/vil-small_8xb256-400e_in1k-192px': (192, 2048, 2e-3, 400, 5, 1e-6, 0.05, 1.0, 0.05),
    'vil/vil-base_8xb256-400e_in1k-192px': (192, 2048, 2e-3, 400, 5, 1e-6, 0.05, 1.0, 0.2),
    'vil/vil-tiny_8xb128-20e_in1k-224px': (224, 1024, 1e-5, 20, 5, 1e-6, 0.05, None, 0.0),
    'vil/vil-tiny_400e-pre_8xb128-20e_in1k-224px': (224, 1024, 1e-5, 20, 5, 1e-6, 0.05, None, 0.0),
    'vil/vil-small_8xb128-20e_in1k-224px': (224, 1024, 1e-5, 20, 5, 1e-6, 0.05, None, 0.05),
    'vil/vil-base_8xb128-5e_in1k-224px': (224, 1024, 1e-5, 5, 1, 1e-6, 0.05, None, 0.2),
    'vil/vil-v1-tiny_8xb128-400e_in1k': (224, 1024, 1e-3, 400, 5, 1e-6, 0.05, 1.0, 0.0),
    'vil/vil-v1-tiny_8xb256-800e_in1k': (224, 2048, 2e-3, 800, 5, 1e-6, 0.05, 1.0, 0.0),
    'vil/vil-v1-tiny-plus_8xb128-400e_in1k': (224, 1024, 1e-3, 400, 5, 1e-6, 0.05, 1.0, 0.0),
    'vil/vil-v1-tiny-plus_8xb256-800e_in1k': (224, 2048, 2e-3, 800, 5, 1e-6, 0.05, 1.0, 0.0),
    'vil/vil-v1-small_8xb128-400e_in1k': (224, 1024, 1e-3, 400, 5, 1e-6, 0.05, 1.0, 0.05),
    'vil/vil-v1-small-plus_8xb128-400e_in1k': (224, 1024, 1e-3, 400, 5, 1e-6, 0.05, 1.0, 0.05),
    'vil/vil-v1-base_8xb256-400e_in1k': (224, 2048, 2e-3, 400, 5, 1e-6, 0.05, 1.0, 0.2),
    'vil/vil-v1-tiny-plus-stride8_8xb128-30e_in1k': (224, 1024, 1e-5, 30, 5, 1e-5, 1e-8, None, 0.0),
    'vil/vil-v1-small-plus-stride8_8xb128-30e_in1k': (224, 1024, 1e-5, 30, 5, 1e-5, 1e-8, None, 0.05),
    'vil/vil-v1-base-stride8_8xb128-30e_in1k': (224, 1024, 1e-5, 30, 5, 1e-5, 1e-8, None, 0.2),
    'deit3/deit3-tiny-p16_8xb128-800e_in1k-192px': (192, 1024, 1e-3, 800, 5, 1e-6, 0.05, None, 0.0),
    'deit3/deit3-tiny-p16_8xb128-400e_in1k-192px': (192, 1024, 1e-3, 400, 5, 1e-6, 0.05, None, 0.0),
    'deit3/deit3-tiny-p16_8xb128-20e_in1k-224px': (224, 1024, 1e-5, 20, 5, 1e-6, 0.05, None, 0.0),
    'deit3/deit3-tiny-p16_400e-pre_8xb128-20e_in1k-224px': (224, 1024, 1e-5, 20, 5, 1e-6, 0.05, None, 0.0),
}


def load(name: str) -> Config:
    init_default_scope('mmpretrain')
    return Config.fromfile(CONFIGS / f'{name}.py')


def classification_configs() -> list[str]:
    names = []
    for path in sorted(CONFIGS.rglob('*.py')):
        text = path.read_text(encoding='utf-8')
        if '_base_' not in path.relative_to(CONFIGS).parts and 'runtime_cls' in text:
            names.append(str(path.relative_to(CONFIGS).with_suffix('')))
    return names


def shrink(config: Config) -> Config:
    """Make the model narrow and shallow; resolution, pooling, positions, loss and mixing stay."""
    backbone = config.model.backbone
    if backbone.type == 'mmvil.VisionLSTM':
        depth = 3 if str(backbone.arch).endswith('_plus') else 2
        backbone.arch = {'embed_dims': 16, 'num_layers': depth}
        config.model.head.in_channels = 32 if backbone.out_type == 'bilateral_concat' else 16
    else:
        backbone.arch = {'embed_dims': 24, 'num_layers': 2, 'num_heads': 3, 'feedforward_channels': 48}
        config.model.head.in_channels = 24
    return config


def build_model(config: Config) -> torch.nn.Module:
    model = dict(config.model)
    model.setdefault('data_preprocessor', config.get('data_preprocessor'))
    return MODELS.build(model)


def build_optimizer(config: Config, model: torch.nn.Module):
    """Build the config's optimizer wrapper, without mixed precision where there is no GPU."""
    options = {key: value for key, value in config.optim_wrapper.items() if key not in ('dtype', 'loss_scale')}
    return build_optim_wrapper(model, {**options, 'type': 'OptimWrapper'})


def random_batch(size: int = 2) -> dict:
    """Make a batch as the data loader would, from noise; small images, because models take any size."""
    generator = np.random.default_rng(0)
    pack = TRANSFORMS.build({'type': 'PackInputs'})
    images = generator.integers(0, 256, (size, 96, 96, 3), dtype=np.uint8)
    return default_collate([pack({'img': image, 'gt_label': 7 * index}) for index, image in enumerate(images)])


def test_no_recipe_is_untested():
    assert set(RECIPES) == {name for name in classification_configs() if 'in1k' in name}


@pytest.mark.parametrize('name', RECIPES)
def test_recipe_numbers(name):
    resolution, batch, lr, epochs, warmup, end, weight_decay, clip, drop_path = RECIPES[name]
    config = load(name)
    devices, per_device, length = map(int, re.search(r'_(\d+)xb(\d+)-(\d+)e_', name).groups())
    assert devices * per_device == batch == config.auto_scale_lr.base_batch_size
    assert per_device == config.train_dataloader.batch_size
    assert per_device % 2 == 0
    assert length == epochs == config.train_cfg.max_epochs
    optimizer = config.optim_wrapper.optimizer
    assert optimizer == {
        'type': 'AdamW',
        'lr': lr,
        'betas': (0.9, 0.999),
        'eps': 1e-8,
        'weight_decay': weight_decay,
    }
    assert config.optim_wrapper.type == 'AmpOptimWrapper'
    assert config.optim_wrapper.dtype == 'bfloat16'
    assert config.optim_wrapper.clip_grad == (None if clip is None else {'max_norm': clip})
    schedule = config.param_scheduler
    assert (schedule.type, schedule.warmup, schedule.eta_min) == ('mmvil.WarmupCosineLR', warmup, end)
    assert schedule.by_epoch
    assert schedule.convert_to_iter_based
    assert config.model.backbone.drop_path_rate == drop_path
    assert config.model.backbone.img_size == resolution
    assert config.train_pipeline[1]['scale'] == resolution
    assert config.test_pipeline[1]['scale'] == config.test_pipeline[2]['crop_size'] == resolution
    assert config.model.head.loss == {'type': 'CrossEntropyLoss', 'use_soft': True}
    assert config.custom_imports.imports == ['mmvil']
    assert config.default_scope == 'mmpretrain'
    hooks = [hook.type for hook in config.custom_hooks]
    assert hooks == ['mmvil.RandomStateHook', 'mmvil.StopOnNonFiniteLossHook', 'mmvil.StrictLoadHook']  # no EMA


@pytest.mark.parametrize('name', [name for name in RECIPES if name.startswith('vil/')])
def test_full_size(name):
    config = load(name)
    with torch.device('meta'):
        model = build_model(config)
    backbone = config.model.backbone
    expected = SIZES[backbone.arch, backbone.version, backbone.img_size]
    assert sum(parameter.numel() for parameter in model.parameters()) == expected
    side = 12 if backbone.img_size == 192 else 14
    assert model.backbone.pos_embed.shape[1:3] == (side, side)


def test_decayed_tensors_of_the_tiny_recipe():
    config = load('vil/vil-tiny_8xb256-800e_in1k-192px')
    with torch.device('meta'):
        model = build_model(config)
    groups = build_optimizer(config, model).optimizer.param_groups
    assert sorted((group['weight_decay'], len(group['params'])) for group in groups) == [(0.0, 319), (0.05, 194)]
    decayed = {id(parameter) for group in groups if group['weight_decay'] for parameter in group['params']}
    for name, parameter in model.named_parameters():
        assert (id(parameter) in decayed) == (parameter.ndim > 1 and name != 'backbone.pos_embed'), name
    names = [name for name, parameter in model.named_parameters() if id(parameter) in decayed]
    assert 'head.fc.weight' in names
    for part in ('conv.weight', 'igate.weight', 'q_proj.weight', 'patch_embed.proj.weight'):
        assert any(name.endswith(part) for name in names), part


@pytest.mark.parametrize('name', classification_configs())
def test_one_training_step(name):
    config = shrink(load(name))
    torch.manual_seed(0)
    np.random.seed(0)
    model = build_model(config)
    model.init_weights()
    model.train()
    with_gradient = set()
    for key, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda _, key=key: with_gradient.add(key))
    head = model.head.fc.weight.detach().clone()
    losses = model.train_step(random_batch(), build_optimizer(config, model))
    assert torch.isfinite(losses['loss'])
    if name in RECIPES:  # their heads start close to 0
        assert losses['loss'].item() == pytest.approx(np.log(1000), rel=1e-2)
    assert with_gradient == {key for key, _ in model.named_parameters()}
    assert not torch.equal(model.head.fc.weight, head)


@pytest.mark.parametrize(('batch', 'updates'), [(2048, 625), (1024, 1251)])
def test_updates_per_epoch(batch, updates):
    config = load('vil/vil-tiny_8xb256-800e_in1k-192px')
    options = {**config.train_dataloader, 'batch_size': batch, 'num_workers': 0, 'persistent_workers': False}
    loader = Runner.build_dataloader({**options, 'dataset': Numbers(IMAGENET_IMAGES)}, seed=0)
    assert len(loader) == updates
    parameter = torch.nn.Parameter(torch.zeros(1))
    schedule = PARAM_SCHEDULERS.build(
        {**config.param_scheduler, 'end': 800},
        default_args={'optimizer': torch.optim.AdamW([parameter]), 'epoch_length': len(loader)},
    )
    assert (schedule.warmup, schedule.end) == (5 * updates, 800 * updates)


class Numbers(torch.utils.data.Dataset):
    """As many items as ImageNet has images."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> int:
        return index


@pytest.mark.parametrize(
    ('start', 'name'),
    [
        ('vil/vil-tiny_8xb256-800e_in1k-192px', 'vil/vil-tiny_8xb128-20e_in1k-224px'),
        ('vil/vil-v1-tiny-plus_8xb256-800e_in1k', 'vil/vil-v1-tiny-plus-stride8_8xb128-30e_in1k'),
        ('deit3/deit3-tiny-p16_8xb128-800e_in1k-192px', 'deit3/deit3-tiny-p16_8xb128-20e_in1k-224px'),
    ],
)
def test_fine_tuning_takes_the_pretrained_weights(start, name):
    config = load(name)
    epochs = load(start).train_cfg.max_epochs
    assert config.load_from == f'work_dirs/{Path(start).name}/epoch_{epochs}.pth'  # where tools/train.py leaves it
    trained, model = build_model(shrink(load(start))), build_model(shrink(config))
    model.load_state_dict({key: value.clone() for key, value in trained.state_dict().items()}, strict=True)
    positions = {'pos_embed', 'backbone.pos_embed'}
    for (key, value), other in zip(trained.state_dict().items(), model.state_dict().values(), strict=True):
        if key not in positions:
            assert torch.equal(value, other), key


@pytest.mark.parametrize('name', ['vil/vil-v1-tiny-plus-stride8_8xb128-30e_in1k'])
def test_stride_8_keeps_the_table(name):
    model = build_model(shrink(load(name))).backbone
    assert model.pos_embed.shape[1:3] == (14, 14)
    assert model.patch_embed(torch.zeros(1, 3, 224, 224)).shape[1:3] == (27, 27)


def test_runner_follows_the_loader(tmp_path):
    """Files on disk, the real pipeline and runner: 3 epochs of 2 updates each, warm-up 1 epoch."""
    generator = np.random.default_rng(0)
    for index in range(9):
        Image.fromarray(generator.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(tmp_path / f'{index}.png')
    (tmp_path / 'list.txt').write_text(''.join(f'{index}.png {index}\n' for index in range(9)))
    config = shrink(load('vil/vil-tiny_8xb256-800e_in1k-192px'))
    config.work_dir = str(tmp_path / 'work')
    for loader in (config.train_dataloader, config.val_dataloader):
        loader.update(batch_size=4, num_workers=0, persistent_workers=False, pin_memory=False)
        loader.dataset.update(data_root=str(tmp_path), data_prefix='.', ann_file='list.txt', split='')
    config.merge_from_dict({'train_cfg.max_epochs': 3, 'param_scheduler.warmup': 1})
    wrapper = {key: value for key, value in config.optim_wrapper.items() if key not in ('dtype', 'loss_scale')}
    config.optim_wrapper = {**wrapper, 'type': 'OptimWrapper'}
    config.test_dataloader = config.test_cfg = config.test_evaluator = None
    config.log_level = 'WARNING'
    config.experiment_name = 'recipes'

    runner = Runner.from_cfg(config)
    seen = []
    original = runner.call_hook

    def record(stage: str, **kwargs: object) -> None:
        if stage == 'before_train_iter':
            seen.append(runner.optim_wrapper.optimizer.param_groups[0]['lr'])
        original(stage, **kwargs)

    runner.call_hook = record
    runner.train()
    cosine = [1e-6 + (2e-3 - 1e-6) * (1 + np.cos(np.pi * step / 3)) / 2 for step in range(4)]
    assert seen == pytest.approx([2e-3 / 3, 2e-3 * 2 / 3, *cosine], rel=1e-9)
    assert (tmp_path / 'work/epoch_3.pth').is_file()


def test_missing_imagenet_stops_the_build(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = load('vil/vil-tiny_8xb256-800e_in1k-192px')
    with pytest.raises(FileNotFoundError, match=r"image folder data/imagenet/train does not exist.*'data/imagenet'"):
        DATASETS.build(config.train_dataloader.dataset)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('name', list(RECIPES)[::4])
def test_one_step_in_bf16(name):
    """The first step of the recipe in full size: its loss is that of float32 but for the rounding to 8 bits.

    Without `init_weights` the head is not close to 0, so that a wrong feature changes the loss. Rounding leaves
    features and logits an error of 2 ** -8 to 2 ** -7 of their spread; it reaches the loss through a few targets.
    """
    config = load(name)
    torch.manual_seed(0)
    model = build_model(config).cuda().train()
    optimizer = build_optim_wrapper(model, config.optim_wrapper)
    before = model.head.fc.weight.detach().clone()
    with torch.no_grad():
        data = seeded(lambda: model.data_preprocessor(random_batch(), True))
        logits = seeded(lambda: model.head.fc(model.head.pre_logits(model.extract_feat(data['inputs']))))
        expected = seeded(lambda: model(**model.data_preprocessor(random_batch(), True), mode='loss'))['loss'].item()
    loss = seeded(lambda: model.train_step(random_batch(), optimizer))['loss'].item()
    assert loss == pytest.approx(expected, abs=5 * 2**-7 * logits.std().item())
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert not torch.equal(model.head.fc.weight, before)


def seeded(work: Callable[[], object]) -> object:
    """Do something that draws mixed images and dropped branches, the same ones each time."""
    np.random.seed(0)
    torch.manual_seed(0)
    return work()


def test_metafile_tells_the_truth():
    index = yaml.safe_load((ROOT / 'model-index.yml').read_text(encoding='utf-8'))
    models = [
        model
        for path in index['Import']
        for model in yaml.safe_load((ROOT / path).read_text(encoding='utf-8'))['Models']
    ]
    ours = [model for model in models if 'in1k' in model['Config']]
    assert len(ours) == 13
    assert len({model['Name'] for model in models}) == len(models)
    for model in ours:
        name = str(Path(model['Config']).relative_to('configs').with_suffix(''))
        backbone = load(name).model.backbone
        assert model['Metadata']['Parameters'] == SIZES[backbone.arch, backbone.version, backbone.img_size]
        assert 'Weights' not in model  # nothing is hosted here; the authors' file stands under Converted From


def test_readme_lists_every_recipe():
    text = (CONFIGS / 'vil/README.md').read_text(encoding='utf-8')
    linked = re.findall(r'\]\(([^)]+\.py)\)', text)
    assert all((CONFIGS / 'vil' / link).is_file() for link in linked)
    assert {(CONFIGS / 'vil' / link).resolve() for link in linked} >= {CONFIGS / f'{name}.py' for name in RECIPES}
