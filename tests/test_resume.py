"""A straight run of the digits example equals an interrupted one, through the train command."""

import runpy
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
OPTIONS = [
    'train_cfg.max_epochs=4',
    'train_dataloader.dataset.indices=20',
    'val_dataloader.dataset.indices=20',
    'train_dataloader.batch_size=10',
    'model.backbone.arch.embed_dims=32',
    'model.backbone.arch.num_layers=2',
    'model.backbone.drop_path_rate=0.2',
    'model.head.in_channels=64',
    'default_hooks.checkpoint.max_keep_ckpts=-1',
]


def train(work_dir, *words):
    arguments = sys.argv
    config = ROOT / 'configs/vil/vil-nano_1xb64-20e_digits.py'
    sys.argv = ['train.py', str(config), '--work-dir', str(work_dir), *map(str, words)]
    try:
        runpy.run_path(str(ROOT / 'tools/train.py'), run_name='__main__')
    finally:
        sys.argv = arguments
    return torch.load(work_dir / 'epoch_4.pth', weights_only=False)


def differences(one, other, path=''):
    """List the places where two nested states differ in a single bit."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        return [place for key in one for place in differences(one[key], other[key], f'{path}/{key}')]
    if isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        return [place for key in range(len(one)) for place in differences(one[key], other[key], f'{path}/{key}')]
    same = torch.equal(one, other) if torch.is_tensor(one) else one == other
    return [] if same else [path]


def test_vil_training_resumes_exactly(tmp_path):
    straight = train(tmp_path / 'straight', '--cfg-options', *OPTIONS)
    source = tmp_path / 'straight/epoch_2.pth'
    resumed = train(tmp_path / 'resumed', '--resume', source, '--cfg-options', *OPTIONS)
    halfway = torch.load(source, weights_only=False)
    for part in ('state_dict', 'optimizer', 'param_schedulers', 'random_state'):
        assert differences(straight[part], resumed[part]) == []
    assert differences(straight['state_dict'], halfway['state_dict'])
