"""What the tests of fused blocks share: where they run, sizes, blocks whose parameters all matter."""

import pytest
import torch
from torch import Tensor

from mmvil.models import ViLBlock
from mmvil.ops.triton_launch import interpreting

on_kernels = pytest.mark.skipif(
    not (interpreting() or torch.cuda.is_available()), reason='needs a GPU or the interpreter of Triton'
)
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
FULL_WIDTH = pytest.mark.parametrize(
    ('dims', 'grid'),
    [
        pytest.param(192, (14, 14), id='T'),
        pytest.param(384, (12, 17), id='S'),
        pytest.param(768, (7, 9), id='B'),
        pytest.param(192, (32, 32), id='T-512px'),
        pytest.param(384, (19, 23), id='S-long'),
        pytest.param(768, (20, 24), id='B-long'),
        pytest.param(192, (34, 38), id='T-chunkwise'),
    ],
)
V1 = {'conv': 'causal_conv1d', 'conv_kernel_size': 4, 'proj_bias': False, 'norm_bias': False}


def trained_like(block: ViLBlock) -> ViLBlock:
    """Parameters that all matter."""
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    with torch.no_grad():
        block.layer.fgate.bias.add_(3.0)
    return block


def relative(actual: Tensor, expected: Tensor) -> float:
    expected = expected.double().cpu()
    return ((actual.double().cpu() - expected).norm() / expected.norm()).item()


def at_full_width(dims: int, reverse: bool, options: dict) -> ViLBlock:
    """Parameters moved off their start values, where gates and biases would be zero."""
    torch.manual_seed(0)
    block = ViLBlock(dims, reverse, **options)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return block
