"""Cells, layers, models, checkpoints and a training run against the paper's reference implementation.

Tolerances are those that the data's makers derived from a float32 run of the reference: the largest difference of an
array over its largest value.
"""

import math

import pytest
import torch
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, layer_norm, linear

from mmvil.convert import from_official, mmvil_to_official, official_to_mmvil
from mmvil.models import ViLLayer
from mmvil.ops import mlstm

from .golden import assert_close, golden_arrays, golden_json, golden_names, with_prefix

GRADIENTS = ['dq', 'dk', 'dv', 'digate', 'dfgate']
BADLY_CONDITIONED = {'_wide': 2e-3, '_reset': 2e-3, '_bigq': 2e-3, 'ext_i_pos40': 5e-3}


def cell_tolerance(name: str, dtype: torch.dtype) -> float:
    if dtype == torch.float64:
        return 2e-7
    return next((value for part, value in BADLY_CONDITIONED.items() if part in name), 1e-4)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32], ids=['float64', 'float32'])
@pytest.mark.parametrize('backend', ['recurrent', 'parallel', 'chunkwise'])
@pytest.mark.parametrize('name', golden_names('mlstm_cell'))
def test_cell(name: str, backend: str, dtype: torch.dtype) -> None:
    data = golden_arrays(name)
    inputs = [data[key].to(dtype, copy=True).requires_grad_() for key in ('q', 'k', 'v', 'igate', 'fgate')]
    h = mlstm(*inputs, reverse=bool(data['reverse']), backend=backend)
    h.backward(data['dh'].to(dtype))
    tolerance = cell_tolerance(name, dtype)
    assert_close(h, data['h'], tolerance, 'h')
    gate_scale = max(data['dfgate'].abs().max().item(), data['digate'].abs().max().item())
    for key, tensor in zip(GRADIENTS, inputs, strict=True):
        assert_close(tensor.grad, data[key], tolerance, key, scale=gate_scale if key == 'dfgate' else None)


def layer_keys(official: dict[str, Tensor], version: str) -> dict[str, Tensor]:
    """Rename a layer's parameters by placing it in a model."""
    block = 'blocks.0.rowwise_from_top_left' if version == 'v2' else 'blocks.0'
    renamed = official_to_mmvil({f'{block}.layer.{key}': value for key, value in official.items()})
    return {key.removeprefix('blocks.0.layer.'): value for key, value in renamed.items()}


def check_layer(name: str, dtype: torch.dtype, device: str = 'cpu') -> None:
    data, facts = golden_arrays(name), golden_json('manifest')[name]
    version = f'v{facts["version"]}'
    parameters = layer_keys(with_prefix(data, 'param.'), version)
    layer = ViLLayer(
        facts['dim'] if 'dim' in facts else data['x'].shape[-1],
        reverse='bot_right' in facts['direction'],
        conv='causal_conv1d' if 'causal' in facts['conv'] else 'conv2d',
        conv_kernel_size=parameters['conv.weight'].shape[-1],
        proj_bias=facts['proj_bias'],
        norm_bias=facts['norm_bias'],
    ).to(device, dtype)
    layer.load_state_dict(parameters, strict=True)
    x = data['x'].to(device, dtype, copy=True).requires_grad_()
    y = layer(x, tuple(facts['grid']))
    y.backward(data['dy'].to(device, dtype))
    forward, backward = (2e-7, 2e-7) if dtype == torch.float64 else (2e-5, 2e-4)
    assert_close(y, data['y'], forward, 'y')
    assert_close(x.grad, data['dx'], backward, 'dx')
    gradients = layer_keys(with_prefix(data, 'grad.'), version)
    assert gradients.keys() == dict(layer.named_parameters()).keys()
    for key, parameter in layer.named_parameters():
        assert_close(parameter.grad, gradients[key], backward, f'gradient of {key}')


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32], ids=['float64', 'float32'])
@pytest.mark.parametrize('name', golden_names('vil_layer'))
def test_layer(name: str, dtype: torch.dtype) -> None:
    check_layer(name, dtype)


def model_overrides(facts: dict) -> dict:
    """What a checkpoint cannot tell: input size, stride and kind of output."""
    constructor, overrides = facts['ctor'], {}
    if constructor.get('stride'):
        overrides['patch_stride'] = constructor['stride']
    if 'input_shape' in facts.get('stored_state_dict_ctor_overrides', {}):
        overrides['img_size'] = tuple(constructor['input_shape'][1:])
    if constructor.get('pooling', '') is None:
        overrides['out_type'] = 'raw'
    elif constructor.get('pooling') == 'to_image':
        overrides['out_type'] = 'featmap'
    return overrides


def finish_tokens(output: Tensor, facts: dict, state_dict: dict[str, Tensor]) -> Tensor:
    """What the reference does to unpooled tokens after the backbone, where mmvil leaves them to the head."""
    constructor, width = facts['ctor'], output.shape[1] if output.dim() == 4 else output.shape[2]
    classifies = constructor.get('output_shape') and constructor.get('mode') != 'features'
    if constructor.get('mode') == 'features' and constructor['legacy_norm']:
        # The reference drops the trained norm here and applies a fresh one.
        channels_last = output.movedim(1, -1) if output.dim() == 4 else output
        normalised = layer_norm(channels_last, (width,), eps=1e-5)
        return normalised.movedim(-1, 1) if output.dim() == 4 else normalised
    if facts['version'] == 1:
        return layer_norm(output, (width,), state_dict['norm.weight'], state_dict['norm.bias'], 1e-6)
    if constructor['legacy_norm'] and classifies:
        weight, bias = state_dict['legacy_norm.weight'], state_dict['legacy_norm.bias']
        output = layer_norm(output, (width,), weight, bias, 1e-5)
    return linear(output, state_dict['head.weight'], state_dict['head.bias']) if classifies else output


def check_model(name: str, dtype: torch.dtype, device: str = 'cpu') -> None:
    data, facts = golden_arrays(name), golden_json('manifest')[name]
    state_dict = with_prefix(data, 'raw.' if 'rawckpt' in name else 'sd.')
    overrides = model_overrides(facts)
    model = from_official(state_dict, **overrides).to(device, dtype)
    image = data['image'].to(device, dtype, copy=True).requires_grad_()

    def run() -> Tensor:
        if overrides.get('out_type') in ('raw', 'featmap'):
            typed = {key: value.to(device, dtype) for key, value in state_dict.items()}
            return finish_tokens(model(image)[-1], facts, typed)
        return model(image, mode='tensor')

    tolerance = 2e-7 if dtype == torch.float64 else 1e-4
    with torch.no_grad():
        assert_close(run(), data['output'], tolerance, 'output without gradients')
    output = run()
    assert_close(output, data['output'], tolerance, 'output')
    if 'doutput' in data:
        output.backward(data['doutput'].to(device, dtype))
        tolerance = 2e-7 if dtype == torch.float64 else 2e-4
        assert_close(image.grad, data['dimage'], tolerance, 'gradient of the image')
        gradients = official_to_mmvil(with_prefix(data, 'grad.'))
        for key, parameter in model.named_parameters():
            assert_close(parameter.grad, gradients[key], tolerance, f'gradient of {key}')


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32], ids=['float64', 'float32'])
@pytest.mark.parametrize('name', golden_names('vil_model') + golden_names('vil_rawckpt'))
def test_model(name: str, dtype: torch.dtype) -> None:
    check_model(name, dtype)


@pytest.mark.parametrize('name', [name for name in golden_names('vil_model') if 'hidden.0' in golden_arrays(name)])
def test_hidden_states(name: str) -> None:
    data = golden_arrays(name)
    hidden = with_prefix(data, 'hidden.')
    model = from_official(
        with_prefix(data, 'sd.'), out_type='raw', out_indices=[int(i) for i in hidden], final_norm=False
    )
    outputs = model.double()(data['image'].double())
    for (index, expected), output in zip(hidden.items(), outputs, strict=True):
        assert_close(output, expected, 2e-7, f'sub-block {index}')


@pytest.mark.parametrize('name', golden_names('vil_model') + golden_names('vil_rawckpt'))
def test_conversion_is_invertible(name: str) -> None:
    data = golden_arrays(name)
    layout = 'published' if 'rawckpt' in name else 'module'
    official = with_prefix(data, 'raw.' if layout == 'published' else 'sd.')
    keys = list(official)
    back = mmvil_to_official(official_to_mmvil(official), layout=layout)
    assert list(back) == keys == list(official)
    assert all(torch.equal(back[key], official[key]) for key in keys)


@pytest.mark.parametrize('name', golden_names('vil_rawckpt'))
def test_key_map_of_published_files(name: str) -> None:
    official = with_prefix(golden_arrays(name), 'raw.')
    as_module = mmvil_to_official(official_to_mmvil(official), layout='module')
    key_map = golden_json('manifest')[name]['key_map']
    assert {key: list(as_module)[place] for place, key in enumerate(official)} == key_map


@pytest.mark.parametrize('name', golden_json('state_dict_keys')['models'])
def test_published_configuration(name: str) -> None:
    facts = golden_json('state_dict_keys')['models'][name]
    constructor = facts['constructor_kwargs']
    version = 'v2' if facts['model'] == 'VisionLSTM2' else 'v1'
    sizes = {(192, 24): 'tiny', (384, 24): 'small', (768, 24): 'base', (192, 29): 'tiny_plus', (384, 26): 'small_plus'}
    out_type = 'bilateral_concat' if version == 'v2' else 'bilateral_avg'
    backbone = {
        'type': 'mmvil.VisionLSTM',
        'arch': sizes[constructor['dim'], facts['sub_blocks']],
        'version': version,
        'patch_stride': constructor.get('stride'),
        'out_type': out_type,
    }
    width = constructor['dim'] * (2 if version == 'v2' else 1)
    head = {'type': 'mmpretrain.LinearClsHead', 'num_classes': 1000, 'in_channels': width}
    with torch.device('meta'):
        model = MODELS.build({'type': 'mmpretrain.ImageClassifier', 'backbone': backbone, 'head': head})
    official = mmvil_to_official(model.state_dict())
    expected = {key: tuple(shape) for key, shape in facts['keys']}
    if constructor.get('stride'):  # the stored table has the grid without the overlap; mmvil's has the true one
        rows, columns = facts['token_grid_at_224']
        assert official['pos_embed.embed'].shape == (1, rows, columns, constructor['dim'])
        expected['pos_embed.embed'] = tuple(official['pos_embed.embed'].shape)
    else:
        assert sum(parameter.numel() for parameter in model.parameters()) == facts['parameters']
    assert {key: tuple(value.shape) for key, value in official.items()} == expected


@pytest.mark.parametrize('name', golden_names('vil_training'))
def test_training_run(name: str) -> None:
    """120 steps of AdamW through the recipes' optimizer groups, in float32."""
    data = golden_arrays(name)
    model = from_official(with_prefix(data, 'sd0.')).train()
    wrapper = build_optim_wrapper(model, recipe_optim_wrapper())
    for step, chosen in enumerate(data['order'].long()):
        rate = 2e-3 * min(1.0, (step + 1) / 11)
        if step >= 10:
            rate *= 0.5 * (1 + math.cos(math.pi * (step - 10) / 110))
        for group in wrapper.optimizer.param_groups:
            group['lr'] = rate
        loss = cross_entropy(model(data['images'][chosen], mode='tensor'), data['labels'][chosen].long())
        wrapper.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        wrapper.step()
        assert_close(loss, data['loss'][step], 1e-5, f'loss of step {step}')
        assert_close(norm, data['grad_norm'][step], 1e-4, f'gradient norm of step {step}')
    final = mmvil_to_official(model.state_dict())
    for key, expected in with_prefix(data, 'sd1.').items():
        assert_close(final[key], expected, 2e-4, key)


def recipe_optim_wrapper() -> dict:
    """The optimizer of the ImageNet recipe, in full precision and without its own clipping."""
    from mmengine.config import Config

    schedule = Config.fromfile('configs/_base_/schedules/in1k_adamw.py')
    wrapper = dict(schedule['optim_wrapper'])
    wrapper.update(type='OptimWrapper')
    for key in ('dtype', 'clip_grad', 'loss_scale'):
        wrapper.pop(key, None)
    return wrapper
