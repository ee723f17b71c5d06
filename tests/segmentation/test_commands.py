"""From a config and a checkpoint: archives, inferencers, pictures, zoo entries, and resuming."""

import hashlib
import importlib.util
import json
import zipfile
from io import BytesIO

import numpy as np
import pytest
import torch
import yaml
from mmengine.config import Config
from mmengine.runner import Runner
from mmseg.apis import MMSegInferencer, inference_model, init_model
from PIL import Image

from mmvil.segmentation import digits_on_photos
from mmvil.segmentation.zoo import collect_entry, read_scalars, table_row

from .helpers import CONFIGS, ROOT, build

SHRUNK = """
_base_ = '{base}'
model = dict(
    data_preprocessor=dict(size=(32, 32)),
    backbone=dict(
        arch=dict(_delete_=True, embed_dims=16, num_layers=4), img_size=32, patch_size=8, out_indices=(0, 1, 2, 3),
        init_cfg=None),
    neck=dict(embed_dim=16),
    decode_head=dict(in_channels=[16] * 4, channels=8, pool_scales=(1, 2)),
    auxiliary_head=dict(in_channels=16, channels=8),
    test_cfg=dict(crop_size=(32, 32), stride=(21, 21)),
)
"""
SIZES = {'ADE_test_00000001': (40, 56), 'ADE_test_00000002': (33, 30)}


def tool(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / 'tools' / f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def small_pipelines(config):
    """Keep the evaluation's steps, at sizes of a test."""
    for transform in config.test_pipeline:
        if transform.type == 'Resize':
            transform.scale = (128, 32) if transform.keep_ratio else (32, 32)
    config.test_dataloader.dataset.pipeline = config.test_pipeline
    if config.model.data_preprocessor.get('test_cfg'):
        config.model.data_preprocessor.test_cfg.size = (32, 32)
    scales = config.tta_pipeline[1].transforms
    scales[0] = scales[0][:2]
    return config


@pytest.fixture(scope='module', params=['160k', '160k-paper-eval'])
def trained(request, tmp_path_factory):
    """A config file with a checkpoint as training leaves it, and two test images."""
    root = tmp_path_factory.mktemp('trained')
    base = CONFIGS / f'vil-tiny_upernet_1xb16-{request.param}_ade20k-512x512.py'
    (root / 'shrunk.py').write_text(SHRUNK.format(base=base))
    config = small_pipelines(Config.fromfile(str(root / 'shrunk.py')))
    config.dump(str(root / 'config.py'))
    torch.manual_seed(0)
    model = build(config.model)
    from mmvil.segmentation import ADE20KDataset

    meta = dict(dataset_meta=ADE20KDataset.METAINFO, iter=200, seed=7, cfg=config.pretty_text)
    torch.save(dict(state_dict=model.state_dict(), meta=meta), root / 'model.pth')
    (root / 'images').mkdir()
    rng = np.random.default_rng(0)
    for name, size in SIZES.items():
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(root / 'images' / f'{name}.jpg')
    return root


@pytest.mark.parametrize('tta', [[], ['--tta']])
def test_test_images_become_an_archive(trained, tmp_path, tta):
    command = tool('ade20k_submit')
    out, images = str(tmp_path / 'a.zip'), str(trained / 'images')
    arguments = [str(trained / 'config.py'), str(trained / 'model.pth'), '--images', images, '--out', out]
    command.main(['predict', *arguments, '--count', '2', '--device', 'cpu', '--num-workers', '0', *tta])
    command.main(['check', out, '--images', images, '--count', '2'])
    with zipfile.ZipFile(out) as archive:
        for name, size in SIZES.items():
            values = np.asarray(Image.open(BytesIO(archive.read(f'{name}.png'))))
            assert values.shape == size
            if not tta:
                model = init_model(str(trained / 'config.py'), str(trained / 'model.pth'), device='cpu')
                result = inference_model(model, f'{images}/{name}.jpg')
                assert np.array_equal(values, result.pred_sem_seg.data[0].numpy() + 1)
    with pytest.raises(ValueError, match='expected 3352'):
        command.main(['predict', *arguments, '--device', 'cpu'])


def test_inferencer_and_inference_model_agree(trained):
    path = str(trained / 'images' / 'ADE_test_00000001.jpg')
    inferencer = MMSegInferencer(str(trained / 'config.py'), str(trained / 'model.pth'), device='cpu')
    result = inferencer(path, return_datasamples=True)
    model = init_model(str(trained / 'config.py'), str(trained / 'model.pth'), device='cpu')
    direct = inference_model(model, path)
    assert result.pred_sem_seg.shape == (40, 56)
    assert torch.equal(result.pred_sem_seg.data, direct.pred_sem_seg.data)
    array = np.asarray(Image.open(path))[..., ::-1]
    assert torch.equal(inference_model(model, np.ascontiguousarray(array)).pred_sem_seg.data, direct.pred_sem_seg.data)


def test_demo_writes_an_overlay(trained, tmp_path):
    path = trained / 'images' / 'ADE_test_00000002.jpg'
    arguments = [str(path), str(trained / 'config.py'), str(trained / 'model.pth'), '--out', str(tmp_path / 'o.png')]
    tool('segment_image').main([*arguments, '--device', 'cpu'])
    picture = np.asarray(Image.open(tmp_path / 'o.png'))
    assert picture.shape[1] > 2 * 30
    assert [file.name for file in tmp_path.iterdir()] == ['o.png']


SCALARS = [
    {'lr': 1e-3, 'loss': 2.0, 'memory': 5000, 'time': 0.5, 'iter': 50, 'step': 50},
    {'aAcc': 70.0, 'mIoU': 30.0, 'time': 0.1, 'step': 100},
    {'lr': 1e-4, 'loss': 1.0, 'memory': 6144, 'time': 0.5, 'iter': 150, 'step': 150},
    {'aAcc': 80.0, 'mIoU': 41.23, 'time': 0.08, 'step': 200},
]
ADDRESSES = dict(weights='https://example.org/model.pth', log='https://example.org/log.json', device='A100')


def test_zoo_entry_comes_from_log_and_checkpoint(trained, tmp_path, capsys):
    scalars = tmp_path / 'scalars.json'
    scalars.write_text('\n'.join(map(json.dumps, SCALARS)))
    (tmp_path / 'tta.json').write_text(json.dumps(dict(mIoU=43.1)))
    arguments = [str(trained / 'config.py'), str(trained / 'model.pth'), str(scalars)]
    for key, value in ADDRESSES.items():
        arguments += [f'--{key}', value]
    tool('segmentation_zoo_entry').main(
        [*arguments, '--multi-scale', str(tmp_path / 'tta.json'), '--out', str(tmp_path / 'm.yml')]
    )
    (model,) = yaml.safe_load((tmp_path / 'm.yml').read_text())['Models']
    assert model['Results']['Metrics'] == {'mIoU': 41.23, 'mIoU(ms+flip)': 43.1}
    assert model['Metadata']['Memory (GB)'] == 6.0
    assert model['Metadata']['Seed'] == 7
    assert model['Metadata']['SHA256'] == hashlib.sha256((trained / 'model.pth').read_bytes()).hexdigest()
    assert model['Weights'] == ADDRESSES['weights']
    row = capsys.readouterr().out.splitlines()[-1]
    assert '| 32x32 | 160000 | 6.0 | 12.5 | A100 | 41.23 | 43.10 |' in row


def test_zoo_entry_shows_what_was_not_measured_as_a_dash(trained):
    scalars = [{key: value for key, value in line.items() if key not in ('memory', 'time')} for line in SCALARS]
    entry = collect_entry(trained / 'config.py', trained / 'model.pth', scalars, **ADDRESSES)
    assert '| 160000 | - | - | A100 | 41.23 | - |' in table_row(entry)


def test_zoo_entry_refuses_what_does_not_belong_together(trained, tmp_path):
    with pytest.raises(ValueError, match=r'no validation at iteration 200 .* \[100\]'):
        collect_entry(trained / 'config.py', trained / 'model.pth', SCALARS[:2], **ADDRESSES)
    with pytest.raises(ValueError, match='multi-scale metrics have no mIoU'):
        collect_entry(trained / 'config.py', trained / 'model.pth', SCALARS, multi_scale={}, **ADDRESSES)
    other = Config.fromfile(str(trained / 'config.py'))
    other.model.decode_head.channels = 12
    other.dump(str(tmp_path / 'other.py'))
    with pytest.raises(ValueError, match=r'another model\.decode_head'):
        collect_entry(tmp_path / 'other.py', trained / 'model.pth', SCALARS, **ADDRESSES)
    (tmp_path / 'scalars.json').write_text('{"mIoU": 1}\n[1]\n')
    with pytest.raises(ValueError, match='line 2 is no JSON object'):
        read_scalars(tmp_path / 'scalars.json')


def digits_config(work_dir, data_root, iterations):
    name = 'vil-mini_upernet_1xb8-500_digits-on-photos-96x96.py'
    config = Config.fromfile(str(CONFIGS / name))
    config.merge_from_dict(
        {
            'work_dir': str(work_dir),
            'model.backbone.arch': dict(embed_dims=16, num_layers=6),
            'model.neck.embed_dim': 16,
            'model.decode_head.in_channels': [16] * 4,
            'model.decode_head.channels': 8,
            'model.auxiliary_head.in_channels': 16,
            'model.auxiliary_head.channels': 8,
            'model.backbone.drop_path_rate': 0.1,
            'model.decode_head.norm_cfg': dict(type='SyncBN'),  # becomes plain batch norm here
            'train_dataloader.batch_size': 2,
            'param_scheduler': dict(type='mmvil.WarmupCosineLR', warmup=1, eta_min=1e-6, by_epoch=False, end=4),
            'train_cfg.max_iters': iterations,
            'train_cfg.val_interval': 4,
            'default_hooks.checkpoint': dict(type='CheckpointHook', by_epoch=False, interval=2),
            'experiment_name': f'{work_dir.name}{iterations}',
        }
    )
    for split in ('train', 'val', 'test'):
        config[f'{split}_dataloader'].dataset.data_root = str(data_root)
    return config


def test_resumed_run_equals_a_straight_one(tmp_path, monkeypatch):
    monkeypatch.setattr(digits_on_photos, 'COUNTS', {'training': 6, 'validation': 2})
    data = tmp_path / 'digits'
    Runner.from_cfg(digits_config(tmp_path / 'straight', data, 4)).train()
    Runner.from_cfg(digits_config(tmp_path / 'halves', data, 2)).train()
    second = digits_config(tmp_path / 'halves', data, 4)
    second.resume = True
    Runner.from_cfg(second).train()
    weights = [torch.load(tmp_path / name / 'iter_4.pth', weights_only=False) for name in ('straight', 'halves')]
    for key, value in weights[0]['state_dict'].items():
        assert torch.equal(value, weights[1]['state_dict'][key]), key
    pictures = sorted((tmp_path / 'halves' / 'overlays').iterdir())
    assert [path.name for path in pictures] == ['digits_valid_00000001.png', 'digits_valid_00000002.png']
