"""Small parts of the backbone against dense, explicit or upstream counterparts."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmvil.models.layers import (
    BlockDiagonalLinear,
    CausalConv1d,
    DepthwiseConv2d,
    DropPath,
    MultiHeadNorm,
    PatchEmbed,
    ResidualLayerNorm,
    patch_grid,
    resample_positions,
    to_pair,
)


def keys_cubic(distance: float) -> float:
    """Keys' cubic kernel with a = -0.75."""
    x, a = abs(distance), -0.75
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def resampling_matrix(source: int, target: int) -> Tensor:
    """Weights of one axis: half-pixel centres, four neighbours, clamped at the border."""
    matrix = torch.zeros(target, source, dtype=torch.float64)
    for row in range(target):
        centre = (row + 0.5) * source / target - 0.5
        for neighbour in range(math.floor(centre) - 1, math.floor(centre) + 3):
            matrix[row, min(max(neighbour, 0), source - 1)] += keys_cubic(centre - neighbour)
    return matrix


@pytest.mark.parametrize(
    ('source', 'target'), [((4, 4), (7, 7)), ((5, 3), (3, 8)), ((14, 14), (6, 1)), ((1, 2), (3, 4))]
)
def test_positions_are_resampled_bicubically_without_antialias(
    source: tuple[int, int], target: tuple[int, int]
) -> None:
    table = torch.randn(1, *source, 6, dtype=torch.float64)
    rows, columns = (resampling_matrix(*sizes) for sizes in zip(source, target, strict=True))
    expected = torch.einsum('xr,yc,brcd->bxyd', rows, columns, table)
    assert torch.allclose(resample_positions(table, target), expected, rtol=0, atol=1e-12)


def test_resampling_agrees_with_torchvision() -> None:
    transforms = pytest.importorskip('torchvision.transforms.v2.functional')
    table = torch.randn(1, 9, 4, 3)
    image = transforms.resize(table.permute(0, 3, 1, 2), [5, 7], interpolation=3, antialias=False)
    assert torch.allclose(resample_positions(table, (5, 7)), image.permute(0, 2, 3, 1), rtol=0, atol=1e-6)


def test_resampling_by_hand() -> None:
    table = torch.tensor([[[[0.0], [8.0]]]])
    assert resample_positions(table, (1, 4), 'bilinear').flatten().tolist() == [0, 2, 6, 8]
    assert resample_positions(table, (2, 4), 'nearest').flatten().tolist() == [0, 0, 8, 8] * 2


def test_fitting_table_is_returned_itself() -> None:
    table = torch.randn(1, 3, 5, 2)
    assert resample_positions(table, (3, 5)) is table
    assert resample_positions(table, (5, 3)).shape == (1, 5, 3, 2), 'as many tokens, but another grid'


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=str)
def test_short_floats_are_resampled_in_float32(dtype: torch.dtype) -> None:
    table = torch.randn(1, 4, 4, 2).to(dtype)
    resampled = resample_positions(table, (6, 9))
    assert resampled.dtype == dtype
    assert torch.equal(resampled, resample_positions(table.float(), (6, 9)).to(dtype))


@pytest.mark.parametrize(
    ('size', 'patch', 'stride', 'grid'),
    [
        ((224, 224), 16, 16, (14, 14)),
        ((192, 192), 16, 16, (12, 12)),
        ((224, 224), 16, 8, (27, 27)),
        ((16, 16), 16, 16, (1, 1)),
        ((16, 16), 16, 8, (1, 1)),
        ((17, 32), 16, 16, (2, 2)),
        ((17, 16), 16, 8, (3, 1)),  # padded to 32 x 16, not to a multiple of the stride
        ((48, 80), 16, 8, (5, 9)),
        ((40, 24), 16, 12, (3, 2)),  # the last stride does not fill the image
        ((9, 9), 4, 5, (2, 2)),  # a stride that skips pixels
    ],
)
def test_patch_grid(size: tuple[int, int], patch: int, stride: int, grid: tuple[int, int]) -> None:
    assert patch_grid(size, patch, stride) == grid
    assert PatchEmbed(1, 2, patch, stride)(torch.zeros(1, 1, *size)).shape == (1, *grid, 2)


def test_patch_grid_refuses_less_than_a_patch() -> None:
    with pytest.raises(ValueError, match=r'at least one patch \(16 x 16\) large, got \(224, 15\)'):
        patch_grid((224, 15), 16, 16)


@pytest.mark.parametrize(('value', 'pair'), [(3, (3, 3)), ((2, 5), (2, 5)), ([7, 1], (7, 1))])
def test_to_pair(value: object, pair: tuple[int, int]) -> None:
    assert to_pair(value, 'img_size') == pair


@pytest.mark.parametrize('value', [(1,), (1, 2, 3), 1.0, '32', None, (2.0, 3), True, (1, True)], ids=repr)
def test_to_pair_refuses_other_types(value: object) -> None:
    with pytest.raises(TypeError, match=r'img_size must be an int or a \(height, width\) pair of ints, got'):
        to_pair(value, 'img_size')


@pytest.mark.parametrize('value', [0, -224, (224, 0)])
def test_to_pair_refuses_sizes_below_one(value: object) -> None:
    with pytest.raises(ValueError, match='img_size must be positive, got'):
        to_pair(value, 'img_size')


@pytest.mark.parametrize('stride', [4, 2, 3])
def test_patches_are_projected_row_by_row(stride: int) -> None:
    embed = PatchEmbed(2, 5, 4, stride).double()
    nn.init.normal_(embed.proj.bias)
    image = torch.randn(1, 2, 9, 6, dtype=torch.float64)
    padded = torch.zeros(1, 2, 12, 8, dtype=torch.float64)
    padded[:, :, :9, :6] = image
    tokens = embed(image)
    for row in range(tokens.shape[1]):
        for column in range(tokens.shape[2]):
            patch = padded[0, :, row * stride : row * stride + 4, column * stride : column * stride + 4]
            expected = (embed.proj.weight * patch).sum((1, 2, 3)) + embed.proj.bias
            assert torch.allclose(tokens[0, row, column], expected)


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_patches_as_a_matrix_product(dtype: torch.dtype) -> None:
    """What GPUs do instead of a convolution, here on a CPU: the same result and gradients."""
    embed = PatchEmbed(3, 5, 4, 4).to(torch.float64 if dtype == torch.float64 else torch.float32)
    nn.init.normal_(embed.proj.bias)
    image = torch.randn(2, 3, 8, 12, dtype=embed.proj.bias.dtype).to(memory_format=torch.channels_last)
    found = []
    for project in (embed, embed._as_matrix_product):
        leaves = [image.clone().requires_grad_(), *embed.parameters()]
        with torch.autocast('cpu', torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = project(leaves[0])
        upstream = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
        found.append([out, *torch.autograd.grad(out, leaves, upstream)])
    tolerance = 1e-12 if dtype == torch.float64 else 3e-2
    for actual, expected in zip(*reversed(found), strict=True):
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_patch_embedding_starts_with_xavier_over_the_patch() -> None:
    embed = PatchEmbed(3, 64, 8, 8)
    bound = math.sqrt(6 / (64 + 3 * 8 * 8))
    assert 0.99 * bound < embed.proj.weight.abs().max() <= bound
    assert torch.equal(embed.proj.bias, torch.zeros(64))


@pytest.mark.parametrize('bias', [True, False])
def test_residual_layer_norm(bias: bool) -> None:
    norm = ResidualLayerNorm(6, eps=0.1, bias=bias).double()
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    centred = x - x.mean(-1, keepdim=True)
    normalised = centred / (centred.square().mean(-1, keepdim=True) + 0.1).sqrt()
    assert torch.allclose(norm(x), normalised), 'a new norm neither scales nor shifts'
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    expected = normalised * (1 + norm.weight) + (norm.bias if bias else 0)
    assert torch.allclose(norm(x), expected)
    assert (norm.bias is not None) == bias


@pytest.mark.parametrize('bias', [True, False])
def test_multi_head_norm_is_a_group_norm_of_every_token(bias: bool) -> None:
    norm = MultiHeadNorm(12, 3, bias=bias).double()
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    heads = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    tokens = torch.cat([heads[:, head] for head in range(3)], -1).flatten(0, 1)
    expected = F.group_norm(tokens, 3, 1 + norm.weight, norm.bias, eps=1e-5).unflatten(0, (2, 5))
    assert torch.allclose(norm(heads), expected)


@pytest.mark.parametrize(('dims', 'block'), [(12, 4), (6, 1), (10, 5), (4, 4)])
@pytest.mark.parametrize('bias', [True, False])
def test_block_diagonal_linear_is_a_block_diagonal_matrix(dims: int, block: int, bias: bool) -> None:
    linear = BlockDiagonalLinear(dims, block, bias).double()
    for parameter in linear.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 3, dims, dtype=torch.float64)
    assert torch.allclose(linear(x), F.linear(x, torch.block_diag(*linear.weight), linear.bias))
    assert linear.weight.shape == (dims // block, block, block)


GRIDS = pytest.mark.parametrize('grid', [(3, 5), (5, 2), (1, 4), (1, 1)])


@GRIDS
@pytest.mark.parametrize('kernel_size', [1, 3, 5])
def test_depthwise_convolution_over_the_grid(kernel_size: int, grid: tuple[int, int]) -> None:
    conv = DepthwiseConv2d(4, kernel_size).double()
    tokens = torch.randn(2, grid[0] * grid[1], 4, dtype=torch.float64)
    expected = conv.bias.expand(2, *grid, 4).clone()
    reach = kernel_size // 2
    for row in range(grid[0]):
        for column in range(grid[1]):
            for down in range(-reach, reach + 1):
                for right in range(-reach, reach + 1):
                    if 0 <= row + down < grid[0] and 0 <= column + right < grid[1]:
                        neighbour = tokens[:, (row + down) * grid[1] + column + right]
                        expected[:, row, column] += conv.weight[:, 0, down + reach, right + reach] * neighbour
    assert torch.allclose(conv(tokens, grid), expected.flatten(1, 2))


@pytest.mark.parametrize('kernel_size', [1, 2, 4])
def test_causal_convolution_along_the_sequence(kernel_size: int) -> None:
    conv = CausalConv1d(3, kernel_size).double()
    tokens = torch.randn(2, 6, 3, dtype=torch.float64)
    expected = conv.bias.expand(2, 6, 3).clone()
    for t in range(6):
        for j in range(kernel_size):
            if t - kernel_size + 1 + j >= 0:
                expected[:, t] += conv.weight[:, 0, j] * tokens[:, t - kernel_size + 1 + j]
    assert torch.allclose(conv(tokens, (2, 3)), expected)


@GRIDS
@pytest.mark.parametrize('build', [DepthwiseConv2d, CausalConv1d])
@pytest.mark.parametrize('kernel_size', [3, 5])
def test_reversed_convolutions_equal_flip_run_flip(build: type, kernel_size: int, grid: tuple[int, int]) -> None:
    forward, backward = (build(4, kernel_size, reverse).double() for reverse in (False, True))
    backward.load_state_dict(forward.state_dict())
    tokens = torch.randn(2, grid[0] * grid[1], 4, dtype=torch.float64)
    assert torch.allclose(backward(tokens, grid), forward(tokens.flip(1), grid).flip(1))


def test_even_kernels_are_refused_over_the_grid() -> None:
    with pytest.raises(ValueError, match="conv_kernel_size must be odd for conv='conv2d', got 4"):
        DepthwiseConv2d(4, 4)


def test_drop_path_keeps_the_expectation() -> None:
    drop = DropPath(0.3)
    dropped = drop(torch.ones(20_000, 2, 3))
    values = dropped[:, 0, 0]
    assert torch.equal(dropped, values[:, None, None].expand_as(dropped)), 'a sample is dropped as a whole'
    assert torch.allclose(values.unique(), torch.tensor([0.0, 1 / 0.7]))
    assert (values == 0).float().mean() == pytest.approx(0.3, abs=0.015)  # 4.6 standard deviations
    assert values.mean() == pytest.approx(1.0, abs=0.022)


def test_drop_path_is_the_identity_in_evaluation_and_at_rate_zero() -> None:
    x = torch.randn(8, 2)
    assert DropPath(0.9).eval()(x) is x
    assert DropPath(0.0).train()(x) is x
    assert not torch.equal(DropPath(0.9).train()(x), x)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_drop_path_keeps_the_dtype(dtype: torch.dtype) -> None:
    assert DropPath(0.5)(torch.ones(64, 2, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize('rate', [-0.1, 1.0, 1, 2.5, float('nan')])
def test_drop_path_refuses_rates_outside_of_its_range(rate: float) -> None:
    with pytest.raises(ValueError, match=r'drop_path_rate must be in \[0, 1\), got'):
        DropPath(rate)


@pytest.mark.parametrize('rate', ['0.1', None, [0.1]], ids=repr)
def test_drop_path_refuses_other_types(rate: object) -> None:
    with pytest.raises(TypeError, match='drop_path_rate must be a number, got'):
        DropPath(rate)
