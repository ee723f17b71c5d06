import pytest
import torch

from mmvil.evaluation.miniature import write_miniature
from mmvil.evaluation.protocol import load_settings

TINY_SIZES = {'train800': 16, 'val200': 8, 'train800val200': 24, 'test': 12}

TINY_CONFIG = """
model = dict(
    backbone=dict(
        type='mmvil.VisionLSTM', arch=dict(embed_dims=16, num_layers=2, num_heads=2), img_size=8, patch_size=4,
        out_type='bilateral_concat', drop_path_rate=0.3,
    ),
)
cached_pipeline = [dict(type='mmpretrain.Resize', scale=(8, 8), interpolation='bicubic', backend='pillow')]
protocol = dict(learning_rates=[1e-2, 1e-3], seeds=[0, 1], epochs=2, batch_size=8)
param_scheduler = dict(
    type='mmvil.WarmupCosineLR', warmup=1, eta_min=0.0, by_epoch=True, convert_to_iter_based=True
)
runtime = dict(num_threads=2, eval_batch_size=8)
"""


@pytest.fixture(scope='session')
def tiny_root(tmp_path_factory):
    """A miniature with two tasks; tests must not change it."""
    return write_miniature(tmp_path_factory.mktemp('tiny'), ['eurosat', 'kitti'], TINY_SIZES)


@pytest.fixture(scope='session')
def tiny_config(tmp_path_factory):
    path = tmp_path_factory.mktemp('config') / 'tiny.py'
    path.write_text(TINY_CONFIG)
    return path


@pytest.fixture
def tiny_settings(tiny_config):
    return load_settings(tiny_config)


@pytest.fixture(scope='session')
def cpu():
    return torch.device('cpu')
