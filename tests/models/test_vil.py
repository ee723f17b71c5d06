"""The backbone: sizes, images of any size, outputs, and what it refuses."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from mmvil.models import VisionLSTM
from mmvil.models.layers import resample_positions

from .explicit import explicit_norm, explicit_tokens, randomise, small_backbone

VERSIONS = pytest.mark.parametrize('version', ['v1', 'v2'])
OUT_TYPES = ['featmap', 'raw', 'bilateral_concat', 'bilateral_avg', 'avg']


def random_backbone(**options: object) -> VisionLSTM:
    model = small_backbone(**options).double().eval()
    randomise(model, 0.3)
    return model


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


PARAMETERS = [
    ('v2', 'tiny', 224, 6_391_528),
    ('v2', 'small', 224, 23_398_696),
    ('v2', 'base', 224, 89_263_528),
    ('v2', 'tiny', 192, 6_381_544),
    ('v2', 'small', 192, 23_378_728),
    ('v2', 'base', 192, 89_223_592),
    ('v1', 'tiny', 224, 6_088_360),
    ('v1', 'small', 224, 22_792_360),
    ('v1', 'base', 224, 88_050_856),
    ('v1', 'tiny_plus', 224, 7_277_840),
    ('v1', 'small_plus', 224, 24_628_664),
]


@pytest.mark.parametrize(('version', 'arch', 'img_size', 'count'), PARAMETERS)
def test_parameter_counts_of_the_published_classifiers(version: str, arch: str, img_size: int, count: int) -> None:
    out_type = 'bilateral_concat' if version == 'v2' else 'bilateral_avg'
    with torch.device('meta'):
        model = VisionLSTM(arch, version, img_size, out_type=out_type)
        head = nn.Linear(model.out_channels, 1000)
    assert sum(p.numel() for module in (model, head) for p in module.parameters()) == count
    assert model.num_layers == {'tiny_plus': 29, 'small_plus': 26}.get(arch, 24)


def test_defaults_are_the_tiny_second_generation() -> None:
    with torch.device('meta'):
        model = VisionLSTM()
        (features,) = model(torch.empty(2, 3, 224, 224))
    assert features.shape == (2, 192, 14, 14)
    assert (model.version, model.patch_size, model.patch_stride, len(model.blocks)) == ('v2', 16, 16, 24)


@VERSIONS
@pytest.mark.parametrize('size', [(32, 32), (16, 40)], ids=str)
def test_backbone_equals_the_explicit_one(version: str, size: tuple[int, int]) -> None:
    model = random_backbone(version=version, img_size=size, out_indices=(0, 1, 2, 3), out_type='raw')
    x = images(2, 3, *size)
    expected = explicit_tokens(model, x, model.pos_embed, 8)
    eps = {'v1': 1e-5, 'v2': 1e-6}[version]
    expected[-1] = explicit_norm(expected[-1], 1 + model.norm.weight, model.norm.bias, eps)
    assert (model.norm.bias is None) == (version == 'v1')
    for output, truth in zip(model(x), expected, strict=True):
        assert (output - truth).abs().max() <= 1e-10 * truth.abs().max()


@pytest.mark.parametrize(('stride', 'grid'), [(4, (5, 9)), (3, (6, 11))])
def test_overlapping_patches(stride: int, grid: tuple[int, int]) -> None:
    model = random_backbone(patch_stride=stride, img_size=(20, 37), out_indices=2, out_type='raw')
    assert model.pos_embed.shape == (1, *grid, 16)
    x = torch.zeros(1, 3, 24, 40, dtype=torch.float64)
    x[..., :20, :37] = images(1, 3, 20, 37)
    expected = explicit_tokens(model, x, model.pos_embed, stride)[2]
    assert torch.allclose(model(x[..., :20, :37])[0], expected)


@VERSIONS
@pytest.mark.parametrize('size', [(31, 32), (25, 9), (8, 8), (9, 50), (64, 8)], ids=str)
def test_images_of_any_size_are_padded_at_the_bottom_and_right(version: str, size: tuple[int, int]) -> None:
    model = random_backbone(version=version)
    x = images(1, 3, *size)
    padded = nn.functional.pad(x, (0, -size[1] % 8, 0, -size[0] % 8))
    (features,) = model(x)
    assert features.shape == (1, 16, -(-size[0] // 8), -(-size[1] // 8))
    assert torch.equal(features, model(padded)[0])


def test_too_small_or_wrong_images_are_refused() -> None:
    model = small_backbone()
    cases = [
        (torch.zeros(1, 3, 7, 32), ValueError, r'at least one patch \(8 x 8\) large, got 7 x 32'),
        (torch.zeros(1, 3, 32, 0), ValueError, r'at least one patch \(8 x 8\) large, got 32 x 0'),
        (torch.zeros(3, 32, 32), ValueError, r'shape \(B, 3, H, W\), got shape \(3, 32, 32\)'),
        (torch.zeros(1, 1, 32, 32), ValueError, r'shape \(B, 3, H, W\), got shape \(1, 1, 32, 32\)'),
        (torch.zeros(1, 3, 32, 32, device='meta'), ValueError, r'device of the weights \(cpu\), got meta'),
        (torch.zeros(1, 3, 32, 32).byte(), TypeError, 'floating-point dtype, got torch.uint8'),
        (torch.zeros(1, 3, 32, 32).double(), TypeError, r'dtype of the weights \(torch.float32\), got torch.float64'),
        ([torch.zeros(3, 32, 32)], TypeError, r'one tensor \(B, 3, H, W\), got list'),
    ]
    for x, kind, message in cases:
        with pytest.raises(kind, match=message):
            model(x)


def test_channels_of_the_image() -> None:
    assert small_backbone(in_channels=5)(torch.randn(1, 5, 32, 32))[0].shape == (1, 16, 4, 4)


@pytest.mark.parametrize('mode', ['bicubic', 'bilinear', 'nearest'])
def test_positions_are_resampled_in_forward(mode: str) -> None:
    model = random_backbone(interpolate_mode=mode, img_size=(32, 24))
    resized = random_backbone(img_size=(16, 56))
    weights = {**model.state_dict(), 'pos_embed': resample_positions(model.pos_embed.detach(), (2, 7), mode)}
    resized.load_state_dict(weights)
    x = images(1, 3, 16, 56)
    assert torch.allclose(model(x)[0], resized(x)[0], rtol=0, atol=1e-12)
    assert model.pos_embed.shape == (1, 4, 3, 16), 'the parameter stays'


def test_transposed_image_does_not_reuse_the_table_of_as_many_tokens() -> None:
    model = random_backbone(img_size=(32, 16), out_type='raw', out_indices=0)
    x = images(1, 3, 16, 32)
    expected = explicit_tokens(model, x, resample_positions(model.pos_embed, (2, 4)), 8)[0]
    assert torch.allclose(model(x)[0], expected)


@pytest.mark.parametrize('mode', ['bicubic', 'nearest'])
@pytest.mark.parametrize('size', [(64, 64), (16, 8), (24, 40)], ids=str)
def test_positions_are_resampled_at_loading(size: tuple[int, int], mode: str) -> None:
    source, target = random_backbone(img_size=(32, 24)), random_backbone(img_size=size, interpolate_mode=mode)
    state_dict = source.state_dict()
    wrapped = nn.ModuleDict({'backbone': target})
    wrapped.load_state_dict({f'backbone.{key}': value for key, value in state_dict.items()})
    grid = (size[0] // 8, size[1] // 8)
    assert torch.equal(target.pos_embed, resample_positions(source.pos_embed, grid, mode))
    assert state_dict['pos_embed'].shape == (1, 4, 3, 16), "the caller's dictionary stays"


def test_positions_are_resampled_by_the_loader_of_mmengine() -> None:
    from mmengine.runner.checkpoint import load_state_dict

    source, target = random_backbone(img_size=(32, 24)), random_backbone(img_size=16)
    state_dict = source.state_dict()
    load_state_dict(target, state_dict, strict=True)
    assert torch.equal(target.pos_embed, resample_positions(source.pos_embed, (2, 2)))
    assert state_dict['pos_embed'].shape == (1, 4, 3, 16)


def test_table_of_the_stride_free_grid_fits_a_model_with_stride() -> None:
    source = random_backbone()
    target = random_backbone(patch_stride=4)
    target.load_state_dict(source.state_dict())
    x = images(1, 3, 32, 32)
    source.patch_embed.proj.stride = (4, 4)  # resamples in every forward, as the published models do
    assert torch.allclose(target(x)[0], source(x)[0], rtol=0, atol=1e-12)


def test_sizes_leave_no_trace() -> None:
    model = random_backbone()
    small, large = images(1, 3, 32, 32), images(2, 3, 40, 24)
    first = model(small)[0]
    assert torch.equal(model(large)[0], copy.deepcopy(model)(large)[0])
    assert torch.equal(model(small)[0], first)


@pytest.mark.parametrize('out_type', OUT_TYPES)
def test_out_types_are_functions_of_the_tokens(out_type: str) -> None:
    model = random_backbone(out_type=out_type, pool_norm=False, out_indices=(1, 3))
    raw = random_backbone(out_type='raw', out_indices=(1, 3))
    raw.load_state_dict(model.state_dict())
    x = images(2, 3, 24, 40)
    for output, tokens in zip(model(x), raw(x), strict=True):
        assert tokens.shape == (2, 15, 16)
        expected = {
            'featmap': tokens.reshape(2, 3, 5, 16).permute(0, 3, 1, 2),
            'raw': tokens,
            'bilateral_concat': torch.cat([tokens[:, 0], tokens[:, 14]], 1),
            'bilateral_avg': tokens[:, 0] / 2 + tokens[:, 14] / 2,
            'avg': sum(tokens[:, t] for t in range(15)) / 15,
        }[out_type]
        assert output.shape == expected.shape
        assert torch.allclose(output, expected, rtol=0, atol=1e-13)
    assert model.out_channels == output.shape[2 if out_type == 'raw' else 1]


@pytest.mark.parametrize('out_type', ['bilateral_concat', 'bilateral_avg', 'avg'])
def test_a_single_token_is_the_first_and_the_last(out_type: str) -> None:
    model, raw = random_backbone(out_type=out_type, pool_norm=False), random_backbone(out_type='raw')
    raw.load_state_dict(model.state_dict())
    x = images(2, 3, 8, 8)
    expected = raw(x)[0].repeat(1, 1, 2 if out_type == 'bilateral_concat' else 1)
    assert torch.allclose(model(x)[0], expected.flatten(1), rtol=0, atol=1e-13)


@VERSIONS
@pytest.mark.parametrize('out_type', ['bilateral_concat', 'bilateral_avg', 'avg'])
def test_pool_norm(version: str, out_type: str) -> None:
    model = random_backbone(version=version, out_type=out_type, out_indices=(0, 3))
    plain = random_backbone(version=version, out_type=out_type, out_indices=(0, 3), pool_norm=False)
    plain.load_pretrained(model.state_dict())
    x = images(2, 3, 32, 32)
    eps = {'v1': 1e-6, 'v2': 1e-5}[version]
    for normed, pooled in zip(model(x), plain(x), strict=True):
        expected = explicit_norm(pooled, model.pool_norm.weight, model.pool_norm.bias, eps)
        assert torch.allclose(normed, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize('out_type', ['featmap', 'raw'])
def test_tokens_get_no_pool_norm(out_type: str) -> None:
    assert small_backbone(out_type=out_type).pool_norm is None


def test_final_norm_is_for_the_last_sub_block_only() -> None:
    model = random_backbone(out_type='raw', out_indices=(1, 3))
    without = random_backbone(out_type='raw', out_indices=(1, 3), final_norm=False)
    without.load_pretrained(model.state_dict())
    x = images(1, 3, 32, 32)
    (early, late), (early_plain, late_plain) = model(x), without(x)
    assert torch.equal(early, early_plain)
    assert torch.equal(late, model.norm(late_plain))
    assert not torch.equal(late, late_plain)
    assert small_backbone(out_indices=(0, 2)).norm is None, 'a norm that no output uses is not built'


@pytest.mark.parametrize(
    ('out_indices', 'resolved'), [(-1, [3]), (2, [2]), ((-4, -1), [0, 3]), ([3, 0, 2], [3, 0, 2]), ((1, -2), [1, 2])]
)
def test_out_indices(out_indices: int | list[int] | tuple[int, ...], resolved: list[int]) -> None:
    every = random_backbone(out_type='raw', out_indices=range(4))
    given = copy.copy(out_indices)
    model = random_backbone(out_type='raw', out_indices=out_indices)
    assert out_indices == given, "the caller's list is left alone"
    assert len(model.blocks) == max(resolved) + 1, 'later sub-blocks are not built'
    model.load_pretrained(every.state_dict())
    x = images(1, 3, 32, 32)
    outputs, expected = model(x), every(x)
    assert isinstance(outputs, tuple)
    assert len(outputs) == len(resolved)
    assert all(torch.equal(output, expected[index]) for output, index in zip(outputs, resolved, strict=True))


BAD_OPTIONS = [
    ({'out_indices': 4}, ValueError, 'out_indices must be from -4 to 3, got 4'),
    ({'out_indices': (0, -5)}, ValueError, r'out_indices must be from -4 to 3, got \(0, -5\)'),
    ({'out_indices': [1, 1]}, ValueError, r'out_indices must be distinct, got \[1, 1\]'),
    ({'out_indices': [3, -1]}, ValueError, r'out_indices must be distinct, got \[3, -1\]'),
    ({'out_indices': []}, TypeError, r'out_indices must be an int or a non-empty sequence of ints, got \[\]'),
    ({'out_indices': None}, TypeError, 'out_indices must be an int or a non-empty sequence of ints, got None'),
    ({'out_indices': 1.0}, TypeError, 'out_indices must be an int or a non-empty sequence of ints, got 1.0'),
    ({'out_indices': '3'}, TypeError, "out_indices must be an int or a non-empty sequence of ints, got '3'"),
    ({'out_indices': True}, TypeError, 'out_indices must be an int or a non-empty sequence of ints, got True'),
    ({'out_type': 'map'}, ValueError, r"out_type must be one of \['featmap', 'raw', .*'avg'\], got 'map'"),
    ({'version': 'v3'}, ValueError, r"version must be one of \['v1', 'v2'\], got 'v3'"),
    ({'version': 2}, ValueError, r"version must be one of \['v1', 'v2'\], got 2"),
    ({'arch': 'large'}, ValueError, r"arch must be .* one of \['tiny', 'small', 'base'\], got 'large'"),
    ({'arch': 'tiny_plus'}, ValueError, r"for version 'v2', one of \['tiny', 'small', 'base'\], got 'tiny_plus'"),
    ({'arch': 'b', 'version': 'v1'}, ValueError, r"'tiny_plus', 'small_plus'\], got 'b'"),
    ({'arch': 192}, TypeError, 'arch must be a name or a dict, got int'),
    (
        {'arch': {'embed_dims': 16}},
        ValueError,
        r"needs \['embed_dims', 'num_layers'\] and may have .*got \['embed_dims'\]",
    ),
    ({'arch': {'embed_dims': 16, 'num_layers': 2, 'depth': 3}}, ValueError, "may have .*'num_heads'.*got .*'depth'"),
    ({'arch': {'embed_dims': -16, 'num_layers': 2}}, ValueError, 'embed_dims must be a positive int, got -16'),
    ({'arch': {'embed_dims': 16.0, 'num_layers': 2}}, ValueError, r'embed_dims must be a positive int, got 16.0'),
    ({'arch': {'embed_dims': 16, 'num_layers': 0}}, ValueError, 'num_layers must be a positive int, got 0'),
    ({'arch': {'embed_dims': 16, 'num_layers': 3}}, ValueError, 'num_layers must be even, got 3'),
    ({'arch': {'embed_dims': 16, 'num_layers': 2, 'num_heads': 5}}, ValueError, 'must be a multiple of num_heads = 5'),
    ({'img_size': 7}, ValueError, r'at least one patch \(8 x 8\) large, got \(7, 7\)'),
    ({'img_size': -32}, ValueError, 'img_size must be positive, got -32'),
    ({'img_size': (32, 32, 3)}, TypeError, 'img_size must be an int or a'),
    ({'patch_size': 0}, ValueError, 'patch_size must be a positive int, got 0'),
    ({'patch_size': (8, 8)}, ValueError, r'patch_size must be a positive int, got \(8, 8\)'),
    ({'patch_stride': -8}, ValueError, 'patch_stride must be a positive int, got -8'),
    ({'in_channels': True}, ValueError, 'in_channels must be a positive int, got True'),
    ({'frozen_stages': 5}, ValueError, 'frozen_stages must be an int from -1 to 4, got 5'),
    ({'frozen_stages': -2}, ValueError, 'frozen_stages must be an int from -1 to 4, got -2'),
    ({'frozen_stages': None}, ValueError, 'frozen_stages must be an int from -1 to 4, got None'),
    ({'drop_path_rate': 1.0}, ValueError, r'drop_path_rate must be in \[0, 1\), got 1.0'),
    ({'drop_path_rate': '0.1'}, TypeError, "drop_path_rate must be a number, got '0.1'"),
    ({'interpolate_mode': 'area'}, ValueError, r"interpolate_mode must be one of \['bicubic', .*\], got 'area'"),
    ({'mlstm_backend': 'cuda'}, ValueError, r"mlstm_backend must be one of \['auto', .*\], got 'cuda'"),
    ({'conv': 'conv3d'}, ValueError, r"conv must be one of \['conv2d', .*\], got 'conv3d'"),
    ({'conv_kernel_size': 4}, ValueError, "conv_kernel_size must be odd for conv='conv2d', got 4"),
    ({'init_mode': 'xavier'}, ValueError, r"init_mode must be one of \['original', 'original-fixed'\], got 'xavier'"),
]


@pytest.mark.parametrize(('options', 'kind', 'message'), BAD_OPTIONS, ids=lambda value: str(value)[:50])
def test_bad_options_are_refused(options: dict, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        small_backbone(**options)


def test_unknown_options_are_refused() -> None:
    with pytest.raises(TypeError, match='drop_rate'):
        small_backbone(drop_rate=0.1)


LAYER_OPTIONS = [
    ('v2', {}, {'conv': 'DepthwiseConv2d', 'kernel': (3, 3), 'proj_bias': True, 'norm_bias': True}),
    ('v1', {}, {'conv': 'CausalConv1d', 'kernel': (4,), 'proj_bias': False, 'norm_bias': False}),
    ('v2', {'conv': 'causal_conv1d'}, {'conv': 'CausalConv1d', 'kernel': (4,)}),
    ('v1', {'conv': 'conv2d'}, {'conv': 'DepthwiseConv2d', 'kernel': (3, 3)}),
    ('v2', {'conv_kernel_size': 5}, {'conv': 'DepthwiseConv2d', 'kernel': (5, 5)}),
    ('v1', {'conv_kernel_size': 2}, {'conv': 'CausalConv1d', 'kernel': (2,)}),
    ('v2', {'conv': None}, {'conv': 'NoneType'}),
    ('v2', {'proj_bias': False}, {'proj_bias': False, 'norm_bias': True}),
    ('v1', {'proj_bias': True}, {'proj_bias': True, 'norm_bias': False}),
    ('v2', {'norm_bias': False}, {'proj_bias': True, 'norm_bias': False}),
    ('v1', {'norm_bias': True}, {'proj_bias': False, 'norm_bias': True}),
]


@pytest.mark.parametrize(('version', 'options', 'facts'), LAYER_OPTIONS, ids=str)
def test_version_sets_defaults_that_options_override(version: str, options: dict, facts: dict) -> None:
    model = small_backbone(version=version, **options)
    for block in model.blocks:
        layer = block.layer
        found = {
            'conv': type(layer.conv).__name__,
            'kernel': None if layer.conv is None else layer.conv.kernel_size,
            'proj_bias': layer.proj_up.bias is not None,
            'norm_bias': layer.head_norm.bias is not None,
        }
        assert {**found, **facts} == found
        assert (block.norm.bias is not None) == found['norm_bias'] == (model.norm.bias is not None)
    assert model.eval()(torch.randn(1, 3, 24, 40))[0].shape == (1, 16, 3, 5)


def test_arch_dict_reaches_the_layers() -> None:
    arch = {'embed_dims': 24, 'num_layers': 2, 'expand_ratio': 3, 'num_heads': 6, 'qkv_block_size': 8}
    given = dict(arch)
    model = small_backbone(arch=arch, mlstm_backend='recurrent')
    assert arch == given, "the caller's dictionary is left alone"
    for block in model.blocks:
        assert (block.layer.inner_dims, block.layer.num_heads) == (72, 6)
        assert block.layer.q_proj.weight.shape == (9, 8, 8)
        assert block.layer.mlstm_backend == 'recurrent'


def test_first_generation_may_have_an_odd_number_of_sub_blocks() -> None:
    model = small_backbone(version='v1', arch={'embed_dims': 16, 'num_layers': 3})
    assert [block.layer.reverse for block in model.blocks] == [False, True, False]


def test_batches_do_not_matter() -> None:
    model = small_backbone().eval()
    x = torch.randn(5, 3, 40, 24)
    batch = model(x)[0]
    alone = torch.cat([model(image[None])[0] for image in x])
    assert torch.allclose(batch, alone, rtol=0, atol=2e-6)
    assert model(x[:0])[0].shape == (0, 16, 5, 3)


def test_copies_and_pickles_work_alone() -> None:
    model = random_backbone()
    x = images(1, 3, 32, 32)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x)[0], model(x)[0])
        twin.pos_embed = nn.Parameter(torch.zeros(1, 2, 3, 16, dtype=torch.float64))
        twin.load_state_dict(model.state_dict())
        assert torch.equal(twin.pos_embed, resample_positions(model.pos_embed, (2, 3))), "the copy's grid counts"


@pytest.mark.parametrize('how', ['bfloat16', 'autocast'])
def test_bfloat16_stays_close(how: str) -> None:
    model = small_backbone().eval()
    x = torch.randn(2, 3, 32, 32)
    expected = model(x)[0]
    if how == 'bfloat16':
        output = copy.deepcopy(model).bfloat16()(x.bfloat16())[0]
        assert output.dtype == torch.bfloat16
    else:
        with torch.autocast('cpu', dtype=torch.bfloat16):
            output = model(x)[0]
        assert output.dtype == torch.float32, 'the residual stream keeps its digits'
    error = (output.float() - expected).norm() / expected.norm()
    assert 1e-4 < error < 2e-2


def test_nan_images_pass_without_a_look_at_the_values() -> None:
    x = torch.randn(2, 3, 32, 32)
    x[0, 0, 5, 5] = torch.nan
    output = small_backbone().eval()(x)[0]
    assert torch.isnan(output[0]).any()
    assert torch.isfinite(output[1]).all()
    with torch.device('meta'):  # where looking at a value is an error
        assert small_backbone()(torch.empty(2, 3, 32, 32))[0].shape == (2, 16, 4, 4)


@VERSIONS
def test_exported_equals_eager(version: str) -> None:
    model = small_backbone(version=version, arch={'embed_dims': 16, 'num_layers': 2}).eval()
    x, more = torch.randn(2, 3, 40, 24), torch.randn(3, 3, 40, 24)
    exported = torch.export.export(model, (x,), dynamic_shapes=[{0: torch.export.Dim('batch')}])
    for batch in (x, more):
        assert torch.allclose(exported.module()(batch)[0], model(batch)[0], rtol=0, atol=1e-6)


def test_compiled_equals_eager() -> None:
    torch.compiler.reset()
    model = small_backbone(out_indices=0).double()
    x, upstream = images(2, 3, 40, 24), images(2, 16, 5, 3)
    model(x)[0].backward(upstream)
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    compiled(x)[0].backward(upstream)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert (parameter.grad - gradient).abs().max() <= 1e-10 * gradient.abs().max()
