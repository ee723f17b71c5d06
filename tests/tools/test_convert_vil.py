"""The command that converts official weights."""

import importlib.util
from pathlib import Path

import pytest
import torch

from mmvil.models.checkpoint import read_checkpoint

from ..golden import golden_arrays, with_prefix

ROOT = Path(__file__).parents[2]
SPEC = importlib.util.spec_from_file_location('convert_vil', ROOT / 'tools' / 'convert_vil.py')
convert_vil = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(convert_vil)


@pytest.fixture(params=['v1', 'v2'])
def source(request, tmp_path) -> Path:
    path = tmp_path / f'{request.param}.th'
    torch.save({'state_dict': with_prefix(golden_arrays(f'vil_rawckpt_{request.param}'), 'raw.')}, path)
    return path


def test_there_and_back(source: Path, tmp_path, capsys) -> None:
    there, back = tmp_path / 'new' / 'there.pth', tmp_path / 'back.th'
    assert convert_vil.main([str(source), str(there)]) == 0
    assert 'parameters' in capsys.readouterr().out
    content = torch.load(there, weights_only=True)
    assert all(key.startswith(('backbone.', 'head.fc.')) for key in content['state_dict'])
    assert convert_vil.main([str(there), str(back), '--reverse']) == 0
    first, second = read_checkpoint(source)['state_dict'], read_checkpoint(back)['state_dict']
    assert list(first) == list(second)
    assert all(torch.equal(first[key], second[key]) for key in first)
    module = tmp_path / 'module.th'
    assert convert_vil.main([str(there), str(module), '--reverse', '--layout', 'module']) == 0
    assert 'pos_embed.embed' in read_checkpoint(module)['state_dict']
    assert convert_vil.main([str(module), str(tmp_path / 'again.pth')]) == 0


def test_damaged_source_leaves_nothing_behind(source: Path, tmp_path, capsys) -> None:
    cut, destination = tmp_path / 'cut.th', tmp_path / 'out' / 'cut.pth'
    cut.write_bytes(source.read_bytes()[:-1000])
    destination.parent.mkdir()
    assert convert_vil.main([str(cut), str(destination)]) == 1
    assert 'cut.th' in capsys.readouterr().err
    assert list(destination.parent.iterdir()) == []


def test_failing_write_keeps_the_old_file(source: Path, tmp_path, monkeypatch) -> None:
    destination = tmp_path / 'out' / 'weights.pth'
    destination.parent.mkdir()
    destination.write_text('old')

    def fail(content, path):
        Path(path).write_text('half')
        raise OSError('disk full')

    monkeypatch.setattr(convert_vil.torch, 'save', fail)
    assert convert_vil.main([str(source), str(destination)]) == 1
    assert [path.name for path in destination.parent.iterdir()] == ['weights.pth']
    assert destination.read_text() == 'old'


def test_a_model_of_another_kind(tmp_path, capsys) -> None:
    source = tmp_path / 'resnet.pth'
    torch.save({'conv1.weight': torch.zeros(1), 'fc.bias': torch.zeros(2)}, source)
    assert convert_vil.main([str(source), str(tmp_path / 'out.pth')]) == 1
    assert 'conv1.weight' in capsys.readouterr().err
    assert not (tmp_path / 'out.pth').exists()
