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
