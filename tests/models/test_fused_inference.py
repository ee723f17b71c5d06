"""The fused block without gradients, where projections are folded away, against the plain modules in float64."""

import copy

import pytest
import torch

from mmvil.models import ViLBlock
from mmvil.models.fused import run_fused
from mmvil.ops import block_op

from .fused_cases import DEVICE, FULL_WIDTH, V1, at_full_width, on_kernels, relative, trained_like


def inference_error(block: ViLBlock, grid: tuple[int, int], dtype: torch.dtype, plain: bool = False) -> float:
    """Relative error of a forward pass without gradients against float64."""
    x = torch.randn(2, grid[0] * grid[1], block.layer.embed_dims, device=DEVICE)
    block = copy.deepcopy(block).to(DEVICE)
    block.layer.fused = not plain
    with torch.no_grad(), torch.autocast(DEVICE, dtype=dtype, enabled=dtype != torch.float32):
        out = block(x, grid) if plain else run_fused(block, x, grid)
        return relative(out - x, block.double()(x.double(), grid) - x.double())


@on_kernels
@pytest.mark.parametrize('reverse', [False, True], ids=['forward', 'reverse'])
@pytest.mark.parametrize(
    ('dims', 'grid', 'options'),
    [
        (16, (3, 5), {}),
        (24, (5, 3), {'proj_bias': False}),
        (24, (3, 7), V1),
        (16, (13, 20), {'norm_bias': False}),  # more tokens than one scan takes
        (32, (1, 2), {'num_heads': 2}),
        (80, (2, 9), {}),  # heads in two pieces
        (16, (16, 16), {}),  # as many tokens as one scan takes
        (24, (1, 257), V1),
        (160, (2, 3), {'num_heads': 10}),  # more parts than are asked for at once, columns of two products
        (16, (4, 6), V1),
    ],
    ids=[
        '2d',
        'no-bias',
        'v1',
        'many-tokens',
        'two-tokens',
        'two-pieces',
        'full-scan',
        'just-more',
        'many-heads',
        'even-v1',
    ],
)
def test_inference_without_keys_and_values(
    dims: int, grid: tuple[int, int], options: dict, reverse: bool, nan_filled_empty: None
) -> None:
    """What is not kept for a backward pass is not made: projections are folded into the cell's ends."""
    torch.manual_seed(0)
    block = trained_like(ViLBlock(dims, reverse, **options))
    assert inference_error(block, grid, torch.float32) < 1e-5
    assert inference_error(block, grid, torch.float16) < 3e-3


@on_kernels
@pytest.mark.parametrize('reverse', [False, True], ids=['forward', 'reverse'])
@pytest.mark.parametrize('options', [{}, {'proj_bias': False}, V1], ids=['2d', 'no-bias', 'v1'])
def test_chunkwise_inference_without_values(
    options: dict, reverse: bool, monkeypatch: pytest.MonkeyPatch, nan_filled_empty: None
) -> None:
    """Long sequences have keys, but values still meet the cell's output."""
    monkeypatch.setattr(block_op, 'choose_form', lambda *_: 'chunkwise')
    torch.manual_seed(0)
    block = trained_like(ViLBlock(24, reverse, **options))
    assert inference_error(block, (15, 19), torch.float32) < 1e-5
    assert inference_error(block, (15, 19), torch.float16) < 3e-3


@on_kernels
@pytest.mark.parametrize(
    'options', [{'qkv_block_size': 8}, {'num_heads': 8}], ids=['blocks of 8', 'heads across blocks']
)
def test_inference_that_cannot_be_folded_is_the_forward_pass_of_training(options: dict) -> None:
    """It keeps nothing, and overwrites h with what is made of it."""
    torch.manual_seed(0)
    block = trained_like(ViLBlock(24, reverse=True, **options)).to(DEVICE)
    x = torch.randn(2, 70, 24, device=DEVICE)
    with torch.no_grad():
        inference = run_fused(block, x, (7, 10))
    assert torch.equal(inference, run_fused(block, x, (7, 10)))


@pytest.mark.gpu
@pytest.mark.parametrize('reverse', [False, True], ids=['forward', 'reverse'])
@pytest.mark.parametrize('options', [{}, V1], ids=['2d', 'v1'])
@FULL_WIDTH
def test_inference_at_full_width(dims: int, grid: tuple[int, int], options: dict, reverse: bool) -> None:
    block = at_full_width(dims, reverse, options)
    for dtype in (torch.bfloat16, torch.float16):
        fused, plain = (inference_error(block, grid, dtype, plain) for plain in (False, True))
        assert fused < 1.1 * plain
    assert inference_error(block, grid, torch.float32) < 1e-5
