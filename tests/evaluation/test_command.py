import json

import pytest

from mmvil.evaluation.command import main
from mmvil.evaluation.miniature import write_miniature

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
