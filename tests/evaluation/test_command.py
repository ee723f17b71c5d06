import hashlib
import io
import json
import zipfile

import pytest
import torch
from PIL import Image

from mmvil.convert import mmvil_to_official
from mmvil.datasets.vtab_tasks import SPLITS
from mmvil.evaluation.command import main
from mmvil.evaluation.miniature import write_miniature
from mmvil.evaluation.models import ModelFactory
from mmvil.evaluation.protocol import load_settings

SIZES = {'train800': 8, 'val200': 4, 'train800val200': 12, 'test': 6}


@pytest.fixture
def root(tmp_path):
    return write_miniature(tmp_path / 'vtab-1k', ['cifar', 'kitti'], SIZES)


def test_check_exit_codes(root, capsys, tmp_path):
    assert main(['check', str(root), '--tasks', 'cifar', 'kitti']) == 0
    assert '2/2 tasks without fault, 0 faults' in capsys.readouterr().out
    assert main(['check', str(root), '--lists-only', '--json', str(tmp_path / 'report.json')]) == 1
    assert '2/19 tasks without fault, 17 faults' in capsys.readouterr().out
    report = json.loads((tmp_path / 'report.json').read_text())
    assert report['tasks'][1]['lists']['test']['count'] == 6
    assert main(['check', str(root / 'nowhere')]) == 2
    assert 'nowhere does not exist' in capsys.readouterr().err
    assert main(['check', str(root), '--tasks', 'cif']) == 2


def test_run_and_summarize(tiny_config, tiny_root, tmp_path, capsys):
    work_dir = str(tmp_path / 'work')
    run = ['run', '--config', str(tiny_config), '--from-scratch', '--data-root', str(tiny_root), '--work-dir', work_dir]
    options = ['--tasks', 'kitti', '--device', 'cpu', '--cfg-options', 'protocol.seeds=[3]', 'protocol.epochs=2']
    assert main([*run, *options]) == 0
    assert 'SMOKE [3/3] kitti final' in capsys.readouterr().out
    assert main(['summarize', work_dir]) == 0
    printed = capsys.readouterr().out
    assert '# Smoke run (not VTAB-1K)' in printed
    assert '1/19' in printed
    assert (tmp_path / 'work/smoke_summary.png').is_file()
    assert main([*run[:3], '--data-root', str(tiny_root), '--work-dir', work_dir]) == 2  # neither weights nor consent
    assert main(['run', '--data-root', str(tiny_root), '--tasks', 'kitti', '--from-scratch']) == 2
    assert 'without a config' in capsys.readouterr().err


def test_official_weights_and_the_zip_as_they_were_downloaded(tmp_path, capsys):
    """Neither a config nor an extracted file; the sizes of the lists are those of VTAB-1K."""
    backbone = dict(
        type='mmvil.VisionLSTM',
        arch=dict(embed_dims=16, num_layers=2, num_heads=4),
        img_size=8,
        patch_size=4,
        out_type='bilateral_concat',
        pool_norm=True,
    )
    resize = [dict(type='mmpretrain.Resize', scale=(8, 8))]
    settings = load_settings(None, {'model': dict(backbone=backbone), 'cached_pipeline': resize})
    model = ModelFactory(settings, None, torch.device('cpu'), from_scratch=True).fresh(5, 0)
    checkpoint, archive, work_dir = tmp_path / 'official.th', tmp_path / 'vtab-1k.zip', tmp_path / 'work'
    torch.save({'state_dict': mmvil_to_official(model.state_dict(), layout='published')}, checkpoint)
    with zipfile.ZipFile(archive, 'w') as opened:
        for split, count in zip(SPLITS, (800, 200, 1000, 711), strict=True):
            lines = []
            for index in range(count):
                path, label, image = f'images/{split}/{index:06d}.jpg', index % 4, io.BytesIO()
                Image.new('RGB', (8, 8), (60 * label, index % 256, 9)).save(image, format='JPEG')
                opened.writestr(f'vtab-1k/kitti/{path}', image.getvalue())
                lines.append(f'{path} {label}\n')
            opened.writestr(f'vtab-1k/kitti/{split}.txt', ''.join(lines))
    values = [
        'protocol.learning_rates=[0.001]',
        'protocol.seeds=[0]',
        'protocol.epochs=1',
        'param_scheduler.warmup=0.1',
    ]
    run = ['run', '--checkpoint', str(checkpoint), '--data-root', str(archive), '--work-dir', str(work_dir)]
    options = ['--tasks', 'kitti', '--device', 'cpu', '--cfg-options', 'cached_pipeline.0.scale=(8,8)', *values]
    assert main([*run, *options]) == 0
    header = json.loads((work_dir / 'campaign.json').read_text())
    assert header['kind'] == 'modified'
    assert header['checkpoint_sha256'] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    record = json.loads((work_dir / 'runs/kitti/final-lr0.001-seed0.json').read_text())
    assert (record['total'], record['training']['steps']) == (711, 15)
    assert {identity['storage'] for identity in record['data'].values()} == {'zip (JPEG)'}
    capsys.readouterr()
    assert main(['summarize', str(work_dir)]) == 0
    printed = capsys.readouterr().out
    assert 'Not the published protocol: ' in printed
    assert 'protocol.epochs: 1 instead of 50' in printed
    assert '1/19' in printed


def test_smoke_writes_its_own_data(tiny_config, tmp_path, capsys):
    assert main(['smoke', '--work-dir', str(tmp_path), '--config', str(tiny_config), '--tasks', 'kitti']) == 0
    printed = capsys.readouterr().out
    assert 'it says nothing about VTAB-1K' in printed
    assert 'SMOKE RUN on the miniature' in printed
    assert sorted(path.name for path in (tmp_path / 'data').iterdir()) == ['kitti', 'smoke.json']
    assert main(['smoke', '--work-dir', str(tmp_path), '--config', str(tmp_path / 'no.py')]) == 2


def test_help_shows_every_option(capsys):
    with pytest.raises(SystemExit):
        main(['--help'])
    printed = capsys.readouterr().out
    assert all(
        option in printed for option in ('--lists-only', '--tfds-dir', '--cfg-options', '--out', '--from-scratch')
    )
