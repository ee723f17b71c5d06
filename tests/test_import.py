"""Importing is cheap, and what is missing is named."""

import subprocess
import sys

import pytest

import mmvil

# One fresh process, import by import; mmengine is made to look as if it were not installed.
FRESH = """
import sys

class NoMMEngine:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in ('mmengine', 'mmcv', 'mmpretrain', 'mmseg'):
            raise ModuleNotFoundError(f'No module named {name!r}', name=name.split('.')[0])

def loaded(*names):
    return [name for name in names if name in sys.modules]

HEAVY = ('mmengine', 'mmcv', 'mmpretrain', 'mmseg', 'torchvision')
sys.meta_path.insert(0, NoMMEngine())

import mmvil
assert not loaded('torch', 'numpy', 'triton', *HEAVY), loaded('torch', 'numpy', 'triton', *HEAVY)
assert mmvil.__version__

import torch
by_torch = loaded('triton')
import mmvil.ops
assert loaded('triton') == by_torch, 'mmvil.ops imports triton'
assert not loaded(*HEAVY), loaded(*HEAVY)
q = torch.randn(1, 2, 5, 4)
assert mmvil.ops.mlstm(q, q, q, q[..., 0], q[..., 1]).shape == q.shape
assert not loaded(*HEAVY), loaded(*HEAVY)

for module in ('mmvil.models', 'mmvil.models.vil'):
    try:
        __import__(module)
    except ModuleNotFoundError as error:
        assert error.name == 'mmengine', error.name
        assert "pip install 'mmvil[openmmlab]'" in str(error), error
        assert 'mmvil.models needs mmengine' in str(error), error
    else:
        raise AssertionError(f'{module} was imported without mmengine')
print('done')
"""


def test_imports_are_cheap_and_name_what_is_missing() -> None:
    result = subprocess.run([sys.executable, '-c', FRESH], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == ['done']


def test_version_and_unknown_names() -> None:
    assert mmvil.__version__.count('.') == 2
    with pytest.raises(AttributeError, match="module 'mmvil' has no attribute 'from_offical'"):
        mmvil.from_offical  # noqa: B018


def test_public_names() -> None:
    import mmvil.models
    import mmvil.ops

    assert {'VisionLSTM', 'ViLBlock', 'ViLLayer'} <= set(mmvil.models.__all__)
    assert set(mmvil.ops.__all__) == {'available_backends', 'mlstm'}
    assert {'capture_inference', 'from_official'} <= set(mmvil.__all__)
    assert callable(mmvil.capture_inference)
