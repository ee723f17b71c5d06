"""The two commands as a user calls them, on CPU."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.logging import MMLogger

ROOT = Path(__file__).parents[2]
DIGITS = ROOT / 'configs/vil/vil-nano_1xb64-20e_digits.py'
QUICK = [
    'train_cfg.max_epochs=2',
    'param_scheduler=None',
    'train_dataloader.dataset.indices=40',
    'val_dataloader.dataset.indices=40',
    'test_dataloader.dataset.indices=40',
    'train_dataloader.batch_size=20',
    'model.backbone.arch.embed_dims=32',
    'model.backbone.arch.num_layers=2',
    'model.head.in_channels=64',
]


def run(tool, *words):
    """Run a tool of this repository in this process."""
    MMLogger._instance_dict.clear()  # two runs of one process within a second would share a log file
    arguments = sys.argv
    sys.argv = [tool, *map(str, words)]
    try:
        runpy.run_path(str(ROOT / 'tools' / tool), run_name='__main__')
    finally:
        sys.argv = arguments


def log_of(work_dir):
    return '\n'.join(path.read_text() for path in sorted(work_dir.glob('*/*.log')))


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """A work dir after two short epochs with mixed precision asked for, in a process of its own and another folder."""
    folder = tmp_path_factory.mktemp('trained')
    command = [sys.executable, ROOT / 'tools/train.py', DIGITS, '--work-dir', 'deep/new', '--amp', '--auto-scale-lr']
    options = [*QUICK, 'optim_wrapper.type=AmpOptimWrapper']
    result = subprocess.run(
        [*command, '--cfg-options', *options],
        cwd=folder,
        env={'PYTHONPATH': str(ROOT), 'PATH': '', 'HOME': str(folder), 'CUDA_VISIBLE_DEVICES': ''},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return folder / 'deep/new'


def test_training_leaves_checkpoints_pictures_and_the_next_line(trained):
    names = {path.name for path in trained.iterdir()}
    assert {'epoch_2.pth', 'last_checkpoint', 'training_curves.png', 'confusion_matrix.png', DIGITS.name} <= names
    assert any(name.startswith('best_accuracy_top1_epoch_') for name in names)
    assert not any(name.endswith('.tmp') for name in names)
    log = log_of(trained)
    for part in ('eta:', 'accuracy/top1', 'Next: python tools/test.py', '--amp has no effect on cpu'):
        assert part in log
    assert 'AmpOptimWrapper is not available on cpu' in log
    assert 'LR is set based on batch size of 64 and the current batch size is 20' in log


def test_checkpoint_holds_plain_random_state(trained):
    from mmengine.runner.checkpoint import get_torch_safe_globals

    with torch.serialization.safe_globals(get_torch_safe_globals()):
        checkpoint = torch.load(trained / 'epoch_2.pth', weights_only=True)
    assert checkpoint['random_state']['seed'] == 0
    assert checkpoint['meta']['iter'] == 4


def test_training_resumes_from_the_work_dir(trained, tmp_path):
    work_dir = tmp_path / 'copy'
    work_dir.mkdir()
    for name in ('epoch_2.pth', 'last_checkpoint'):
        (work_dir / name).write_bytes((trained / name).read_bytes())
    options = ['train_cfg.max_epochs=3', *QUICK[1:]]
    run('train.py', DIGITS, '--work-dir', work_dir, '--resume', '--cfg-options', *options)
    assert (work_dir / 'epoch_3.pth').is_file()
    log = log_of(work_dir)
    assert 'Epoch(train) [3]' in log
    assert 'Epoch(train) [2]' not in log


def test_evaluation_writes_metrics_predictions_and_pictures(trained, tmp_path):
    checkpoint = trained / 'epoch_2.pth'
    scores = {}
    for name, words in [('plain', []), ('tta', ['--tta'])]:
        out = tmp_path / f'{name}.json'
        run('test.py', DIGITS, checkpoint, '--work-dir', tmp_path / name, '--out', out, *words, '--cfg-options', *QUICK)
        scores[name] = json.loads(out.read_text())['accuracy/top1']
    assert 0 <= scores['plain'] <= 100
    assert 'mirror image' in log_of(tmp_path / 'tta')
    assert 'mirror image' not in log_of(tmp_path / 'plain')
    out, shown = tmp_path / 'predictions.pkl', tmp_path / 'shown'
    few = [*QUICK, 'test_dataloader.dataset.indices=3']
    run('test.py', DIGITS, checkpoint, '--work-dir', tmp_path, '--out', out, '--show-dir', shown, '--cfg-options', *few)
    import pickle

    assert len(pickle.loads(out.read_bytes())) == 3
    assert len(list(shown.rglob('*.png'))) == 3


@pytest.mark.parametrize(
    ('tool', 'words', 'message'),
    [
        ('train.py', ['no.py'], "config file 'no.py' does not exist"),
        ('train.py', [DIGITS, '--cfg-options', 'novalue'], "expected KEY=VALUE, got 'novalue'"),
        ('train.py', [DIGITS, '--resume', 'no.pth'], "checkpoint 'no.pth' does not exist"),
        ('train.py', [DIGITS, '--cfg-options', 'model=None'], "it has no 'model'"),
        ('train.py', [DIGITS, '--cfg-options', 'train_dataloader.dataset.data_root=no/folder'], 'data not found'),
        ('test.py', [DIGITS, 'no.pth'], "checkpoint 'no.pth' does not exist"),
        ('test.py', [DIGITS, DIGITS], 'not a PyTorch checkpoint'),
    ],
    ids=lambda value: value if isinstance(value, str) and value.endswith('.py') else None,
)
def test_bad_input_ends_with_usage_and_one_message(tool, words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        run(tool, *words)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('name', ['dist_train', 'dist_test', 'slurm_train', 'slurm_test'])
def test_shell_scripts_parse_and_show_their_usage(name):
    result = subprocess.run(['bash', ROOT / f'tools/{name}.sh'], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert 'usage:' in result.stderr
