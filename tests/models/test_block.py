"""The layer and the residual block against an explicit float64 version written from the architecture's description."""

import math

import pytest
import torch
import torch.nn.functional as F

from mmvil.models import ViLBlock, ViLLayer

from .explicit import explicit_layer, randomise

GRID = (3, 4)


OPTIONS = {
    'v2': {},
    'v1': {'conv': 'causal_conv1d', 'conv_kernel_size': 4, 'proj_bias': False, 'norm_bias': False},
    'expand_ratio 3': {'expand_ratio': 3},
    'expand_ratio 1.5': {'expand_ratio': 1.5},
    '2 heads': {'num_heads': 2},
    '8 heads': {'num_heads': 8},
    'blocks of 2': {'qkv_block_size': 2},
    'blocks of 16': {'qkv_block_size': 16},
    'no convolution': {'conv': None},
    'kernel 5': {'conv_kernel_size': 5},
    'kernel 1': {'conv_kernel_size': 1},
    'causal kernel 2': {'conv': 'causal_conv1d', 'conv_kernel_size': 2},
    'no projection biases': {'proj_bias': False},
    'no norm biases': {'norm_bias': False},
    'recurrent': {'mlstm_backend': 'recurrent'},
    'chunkwise': {'mlstm_backend': 'chunkwise'},
}


@pytest.mark.parametrize('reverse', [False, True], ids=['forward', 'reverse'])
@pytest.mark.parametrize('options', OPTIONS.values(), ids=OPTIONS.keys())
def test_layer_equals_the_explicit_one(options: dict, reverse: bool) -> None:
    layer = ViLLayer(16, reverse, **options).double()
    randomise(layer)
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    expected = explicit_layer(layer, x, GRID)
    assert (layer(x, GRID) - expected).abs().max() <= 1e-11 * expected.abs().max()


@pytest.mark.parametrize(
    ('options', 'shape', 'name'),
    [
        ({'expand_ratio': 3}, (96, 16), 'proj_up.weight'),
        ({'num_heads': 2}, (2, 96), 'fgate.weight'),
        ({'qkv_block_size': 2}, (16, 2, 2), 'v_proj.weight'),
        ({'conv_kernel_size': 5}, (32, 1, 5, 5), 'conv.weight'),
        ({'conv': 'causal_conv1d', 'conv_kernel_size': 4}, (32, 1, 4), 'conv.weight'),
    ],
)
def test_options_reach_the_parameters(options: dict, shape: tuple[int, ...], name: str) -> None:
    assert ViLLayer(16, **options).state_dict()[name].shape == shape


def test_options_remove_parameters() -> None:
    names = {name for name, _ in ViLLayer(16).named_parameters()}
    without_norm = {name for name, _ in ViLLayer(16, norm_bias=False).named_parameters()}
    without_projection = {name for name, _ in ViLLayer(16, proj_bias=False).named_parameters()}
    without_convolution = {name for name, _ in ViLLayer(16, conv=None).named_parameters()}
    assert names - without_norm == {'head_norm.bias'}
    projections = ('proj_up', 'q_proj', 'k_proj', 'v_proj', 'proj_down')
    assert names - without_projection == {f'{name}.bias' for name in projections}
    assert names - without_convolution == {'conv.weight', 'conv.bias'}


@pytest.mark.parametrize('options', [OPTIONS['v1'], OPTIONS['v2']], ids=['v1', 'v2'])
def test_reverse_equals_flip_run_flip(options: dict) -> None:
    forward, backward = (ViLLayer(16, reverse, **options).double() for reverse in (False, True))
    randomise(forward)
    backward.load_state_dict(forward.state_dict())
    x = torch.randn(1, 12, 16, dtype=torch.float64)
    assert torch.allclose(backward(x, GRID), forward(x.flip(1), GRID).flip(1), rtol=0, atol=1e-12)
    assert not torch.allclose(backward(x, GRID), forward(x, GRID))


def test_grid_decides_who_is_a_neighbour() -> None:
    layer = ViLLayer(16).double()
    randomise(layer)
    x = torch.randn(1, 12, 16, dtype=torch.float64)
    outputs = [layer(x, grid) for grid in ((3, 4), (4, 3), (1, 12))]
    assert all((outputs[a] - outputs[b]).abs().max() > 0.01 for a, b in ((0, 1), (0, 2), (1, 2)))


def test_backend_is_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr('mmvil.models.block.mlstm', lambda q, *_, **options: seen.append(options) or q)
    ViLLayer(16, reverse=True, mlstm_backend='chunkwise')(torch.randn(1, 12, 16), GRID)
    assert seen == [{'reverse': True, 'backend': 'chunkwise'}]


@pytest.mark.parametrize('num_blocks', [1, 24])
def test_initial_parameters(num_blocks: int) -> None:
    layer = ViLLayer(256, num_heads=4, init_num_blocks=num_blocks)
    small = math.sqrt(2 / (5 * 256))
    for name, std in {'proj_up': small, 'q_proj': small, 'k_proj': small, 'v_proj': small, 'proj_down': None}.items():
        projection = layer.get_submodule(name)
        std = 2 / (num_blocks * math.sqrt(256)) if std is None else std
        # 2048 values or more: five standard errors of a standard deviation are below 8 percent.
        assert projection.weight.std().item() == pytest.approx(std, rel=0.08)
        assert abs(projection.weight.mean().item()) < 5 * std / math.sqrt(projection.weight.numel())
        assert torch.equal(projection.bias, torch.zeros_like(projection.bias))
    assert layer.fgate.bias.tolist() == [3.0, 4.0, 5.0, 6.0]
    assert not layer.fgate.weight.any()
    assert not layer.igate.weight.any()
    assert not layer.head_norm.weight.any()
    assert not layer.head_norm.bias.any()
    assert (layer.skip == 1).all()


def test_initial_input_gate_biases_are_small() -> None:
    biases = torch.cat([ViLLayer(8, num_heads=16).igate.bias for _ in range(60)])
    assert biases.std().item() == pytest.approx(0.1, rel=0.12)  # 960 values: five standard errors


@pytest.mark.parametrize(('conv', 'size', 'fan_in'), [('conv2d', 3, 9), ('causal_conv1d', 4, 4)])
def test_convolution_keeps_the_default_of_torch(conv: str, size: int, fan_in: int) -> None:
    layer = ViLLayer(128, conv=conv, conv_kernel_size=size)
    for parameter in (layer.conv.weight, layer.conv.bias):
        assert 0.95 / math.sqrt(fan_in) < parameter.abs().max() <= 1 / math.sqrt(fan_in)


def test_reset_parameters_draws_anew_and_keeps_no_old_value() -> None:
    layer = ViLLayer(16)
    kept = {name: value.clone() for name, value in layer.state_dict().items()}
    randomise(layer)
    layer.reset_parameters()
    fresh = layer.state_dict()
    for name in ('proj_up.bias', 'q_proj.bias', 'proj_down.bias', 'igate.weight', 'fgate.weight', 'fgate.bias'):
        assert torch.equal(fresh[name], kept[name])
    for name in ('proj_up.weight', 'q_proj.weight', 'proj_down.weight', 'igate.bias'):
        assert not torch.equal(fresh[name], kept[name])


@pytest.mark.parametrize('norm_bias', [True, False])
def test_block_adds_the_layer_of_the_norm(norm_bias: bool) -> None:
    block = ViLBlock(16, norm_bias=norm_bias, num_heads=2).double()
    randomise(block)
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    normalised = F.layer_norm(x, (16,), 1 + block.norm.weight, block.norm.bias, 1e-5)
    assert torch.allclose(block(x, GRID), x + explicit_layer(block.layer, normalised, GRID), rtol=0, atol=1e-10)
    assert (block.norm.bias is None, block.layer.head_norm.bias is None) == (not norm_bias, not norm_bias)
    assert block.layer.num_heads == 2


def test_block_drops_its_branch_by_sample() -> None:
    block = ViLBlock(16, drop_path_rate=0.5).double()
    randomise(block)
    x = torch.randn(32, 12, 16, dtype=torch.float64)
    branch, dropped = block.eval()(x, GRID) - x, block.train()(x, GRID) - x
    for sample in range(32):
        if dropped[sample].abs().max() > 0:
            assert torch.allclose(dropped[sample], 2 * branch[sample])
    kept = (dropped.abs().amax((1, 2)) > 0).sum()
    assert 6 < kept < 26


def test_gradients_reach_every_parameter() -> None:
    block = ViLBlock(16, reverse=True).double()
    randomise(block)
    block(torch.randn(2, 12, 16, dtype=torch.float64), GRID).square().sum().backward()
    assert [name for name, parameter in block.named_parameters() if not parameter.grad.abs().max() > 0] == []


def test_autocast_computes_gates_in_float32() -> None:
    layer = ViLLayer(16)
    randomise(layer)
    joined = torch.randn(1, 12, 32).bfloat16()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        gates = layer.gates(joined, joined, joined)
        assert layer(torch.randn(1, 12, 16), GRID).dtype == torch.bfloat16
    wide = torch.cat([joined] * 3, -1).float()
    assert torch.equal(gates[0], layer.igate(wide).transpose(1, 2))
    assert torch.equal(gates[1], layer.fgate(wide).transpose(1, 2))


BAD_OPTIONS = [
    ({'conv': 'conv3d'}, ValueError, r"conv must be one of \['conv2d', 'causal_conv1d', None\], got 'conv3d'"),
    ({'conv_kernel_size': 2}, ValueError, "conv_kernel_size must be odd for conv='conv2d', got 2"),
    ({'conv_kernel_size': 0}, ValueError, 'conv_kernel_size must be a positive int, got 0'),
    ({'conv_kernel_size': 3.0}, ValueError, r'conv_kernel_size must be a positive int, got 3.0'),
    ({'num_heads': 5}, ValueError, r'inner width .* = 32 must be a multiple of num_heads = 5'),
    ({'num_heads': 0}, ValueError, 'num_heads must be a positive int, got 0'),
    ({'num_heads': True}, ValueError, 'num_heads must be a positive int, got True'),
    ({'qkv_block_size': 6}, ValueError, r'inner width .* = 32 must be a multiple of qkv_block_size = 6'),
    ({'qkv_block_size': -4}, ValueError, 'qkv_block_size must be a positive int, got -4'),
    ({'expand_ratio': 0}, ValueError, 'inner width .* = 0 must be a multiple'),
    ({'expand_ratio': '2'}, TypeError, "expand_ratio must be a number, got '2'"),
    ({'mlstm_backend': 'cuda'}, ValueError, r"mlstm_backend must be one of \['auto', .*\], got 'cuda'"),
]


@pytest.mark.parametrize(('options', 'kind', 'message'), BAD_OPTIONS, ids=lambda value: str(value)[:40])
def test_bad_options_are_refused(options: dict, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        ViLLayer(16, **options)


@pytest.mark.parametrize('embed_dims', [0, -16, 16.0, '16'], ids=repr)
def test_bad_width_is_refused(embed_dims: object) -> None:
    with pytest.raises(ValueError, match='embed_dims must be a positive int, got'):
        ViLLayer(embed_dims)


def test_unknown_option_of_a_block_is_refused() -> None:
    with pytest.raises(TypeError, match='conv_kind'):
        ViLBlock(16, conv_kind='2d')


@pytest.mark.parametrize(
    ('shape', 'grid', 'message'),
    [
        ((1, 12, 8), (3, 4), r'tokens of shape \(B, S, 16\), got \(1, 12, 8\)'),
        ((12, 16), (3, 4), r'tokens of shape \(B, S, 16\), got \(12, 16\)'),
        ((1, 12, 16), (3, 5), r'grid must be \(rows, columns\) with 12 tokens, got \(3, 5\)'),
        ((1, 12, 16), (3, 4, 1), r'grid must be \(rows, columns\) with 12 tokens'),
        ((1, 12, 16), 12, r'grid must be \(rows, columns\) with 12 tokens, got 12'),
    ],
)
def test_bad_tokens_are_refused(shape: tuple[int, ...], grid: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ViLBlock(16).layer(torch.randn(shape), grid)
