"""Layers and models of the reference implementation on the fused kernels, with the plain modules' tolerances."""

from collections import Counter

import pytest
import torch

from ..golden import committed_names, golden_arrays, golden_json, golden_names
from ..test_golden import check_layer, check_model

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
pytestmark = pytest.mark.usefixtures('nan_filled_empty')
model_names = golden_names if torch.cuda.is_available() else committed_names  # ten seconds each in the interpreter


@pytest.fixture(autouse=True)
def float32_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patches that overlap are embedded by cuDNN, which would take TF32."""
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)


@pytest.mark.parametrize('name', golden_names('vil_layer'))
def test_layer(name: str, fused_anywhere: Counter) -> None:
    check_layer(name, torch.float32, DEVICE)
    covered = golden_json('manifest')[name]['conv'] in ('2d k=3', 'causal1d k=4')
    assert fused_anywhere['ViLLayer'] == covered


@pytest.mark.slow
@pytest.mark.parametrize('name', model_names('vil_model') + model_names('vil_rawckpt'))
def test_model(name: str, fused_anywhere: Counter) -> None:
    check_model(name, torch.float32, DEVICE)
    weights = {key: x for key, x in golden_arrays(name).items() if key.startswith(('sd.', 'raw.'))}
    kernels = [x for key, x in weights.items() if 'conv' in key and key.endswith('.weight')]
    covered = [x for x in kernels if (x.dim(), x.shape[-1]) in ((4, 3), (3, 4))]
    assert len(kernels) == sum(key.endswith('.learnable_skip') for key in weights) > 0
    assert fused_anywhere == ({'ViLBlock': 2 * len(covered)} if covered else {})  # with gradients and without
