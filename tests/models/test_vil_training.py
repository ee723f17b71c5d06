"""The backbone in training: start values, gradients, freezing, checkpointing, drop path, depths."""

import math

import pytest
import torch

from mmvil.models import VisionLSTM

from ..golden import golden_json
from .explicit import randomise, small_backbone

OUT_TYPES = ['featmap', 'raw', 'bilateral_concat', 'bilateral_avg', 'avg']


def own_key(official: str) -> str:
    """Name of the reference's parameter in the backbone."""
    renamed = {
        'pos_embed.embed': 'pos_embed',
        '.layer.learnable_skip': '.layer.skip',
        '.mlstm_cell.outnorm': '.head_norm',
        '.mlstm_cell.': '.',
        '.conv1d.conv.': '.conv.',
        '.0.rowwise_from_top_left.': '.0.',
    }
    for old, new in renamed.items():
        official = official.replace(old, new)
    return official


INITIAL = {
    'v2 {"dim": 192, "depth": 1, "legacy_norm": true}': {'num_layers': 2},
    'v1 {"dim": 192, "depth": 2, "legacy_norm": true}': {'num_layers': 2, 'version': 'v1'},
    'v2 {"dim": 192, "depth": 4, "init_weights": "original-fixed"}': {'num_layers': 8, 'init_mode': 'original-fixed'},
}


@pytest.mark.parametrize('name', INITIAL)
def test_start_values_have_the_statistics_of_the_reference(name: str) -> None:
    options = dict(INITIAL[name])
    model = VisionLSTM({'embed_dims': 192, 'num_layers': options.pop('num_layers')}, **options)
    own = model.state_dict()
    facts = {own_key(key): value for key, value in golden_json('init_statistics')[name].items()}
    compared = [key for key in facts if key in own and not key.startswith('norm.')]
    assert {key for key in own if key.startswith(('blocks.0.', 'patch_embed.', 'pos_embed'))} == set(compared)
    for key in compared:
        value, truth = own[key], facts[key]
        assert list(value.shape) == truth['shape'], key
        if key.endswith('fgate.bias') or truth['std'] == 0.0:
            assert value.min().item() == truth['min'], key
            assert value.max().item() == truth['max'], key
            continue
        # Two independent draws of n values: five standard errors of the difference of their means and deviations.
        n = value.numel()
        std = max(truth['std'], 0.1) if key.endswith('igate.bias') else truth['std']
        assert abs(value.mean().item() - truth['mean']) < 5 * std * math.sqrt(2 / n), key
        if n > 4:
            assert abs(value.std().item() - truth['std']) < 5 * std / math.sqrt(n), key


def test_fixed_start_divides_by_the_number_of_sub_blocks() -> None:
    arch = {'embed_dims': 64, 'num_layers': 24}
    original, fixed = (VisionLSTM(arch, init_mode=mode, img_size=32) for mode in ('original', 'original-fixed'))
    for model, std in ((original, 2 / math.sqrt(64)), (fixed, 2 / (24 * math.sqrt(64)))):
        weights = torch.stack([block.layer.proj_down.weight for block in model.blocks])
        assert weights.std().item() == pytest.approx(std, rel=0.01)


def test_init_weights_keeps_the_start_values() -> None:
    model = small_backbone()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.init_weights()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize('version', ['v1', 'v2'])
@pytest.mark.parametrize('out_type', OUT_TYPES)
@pytest.mark.parametrize('out_indices', [-1, 0, (0, 2), (3, 1), (0, 1, 2, 3)], ids=str)
def test_no_parameter_is_without_gradient(out_indices: int | tuple[int, ...], out_type: str, version: str) -> None:
    model = small_backbone(version=version, out_indices=out_indices, out_type=out_type).double()
    randomise(model, 0.3)
    outputs = model(torch.randn(2, 3, 24, 32, dtype=torch.float64))
    sum((output * torch.randn_like(output)).sum() for output in outputs).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []


FROZEN = [(-1, []), (0, ['pos_embed', 'patch_embed.']), (2, ['pos_embed', 'patch_embed.', 'blocks.0.', 'blocks.1.'])]


@pytest.mark.parametrize(('frozen_stages', 'prefixes'), FROZEN)
def test_frozen_stages_survive_train_and_an_optimizer(frozen_stages: int, prefixes: list[str]) -> None:
    model = small_backbone(frozen_stages=frozen_stages, drop_path_rate=0.5)
    for _ in range(2):
        model.eval()
        model.train()
    frozen = {name for name, _ in model.named_parameters() if name.startswith(tuple(prefixes))} if prefixes else set()
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == frozen
    assert [block.training for block in model.blocks] == [index >= frozen_stages for index in range(4)]
    assert model.training
    assert model.patch_embed.training == (frozen_stages < 0)

    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    output = model(torch.randn(16, 3, 32, 32))[0]
    (output * torch.randn_like(output)).sum().backward()
    optimizer.step()
    assert {name for name, p in model.named_parameters() if torch.equal(p, before[name])} == frozen


def test_all_sub_blocks_frozen_leaves_the_norms() -> None:
    model = small_backbone(frozen_stages=4, out_type='avg').train()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {'norm.weight', 'norm.bias', 'pool_norm.weight', 'pool_norm.bias'}
    model(torch.randn(1, 3, 32, 32))[0].sum().backward()


def test_frozen_stages_may_exceed_what_is_built() -> None:
    model = small_backbone(frozen_stages=3, out_indices=1)
    assert not any(p.requires_grad for p in model.parameters())


def test_evaluation_mode_reaches_everything() -> None:
    model = small_backbone(frozen_stages=1).train().eval()
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize('frozen_stages', [-1, 2])
def test_checkpointing_changes_no_gradient(frozen_stages: int) -> None:
    x = torch.randn(4, 3, 32, 24, dtype=torch.float64)
    upstream, results = torch.randn(4, 16, 4, 3, dtype=torch.float64), []
    for with_cp in (False, True):
        model = small_backbone(with_cp=with_cp, drop_path_rate=0.4, frozen_stages=frozen_stages).double().train()
        torch.manual_seed(1)
        randomise(model, 0.3)
        calls = []
        model.blocks[3].layer.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(2)
        output = model(x)[0]
        output.backward(upstream)
        results.append((output.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}))
        assert len(calls) == (2 if with_cp else 1), 'recomputed in the backward pass'
        with torch.no_grad():
            model(x)
        assert len(calls) == (3 if with_cp else 2), 'not without gradients'
    (output, gradients), (output_cp, gradients_cp) = results
    assert torch.equal(output, output_cp)
    assert gradients.keys() == gradients_cp.keys()
    assert all(torch.allclose(gradients[name], gradients_cp[name], rtol=0, atol=1e-12) for name in gradients)


@pytest.mark.parametrize(
    ('rate', 'decay', 'rates'),
    [(0.0, False, [0, 0, 0, 0]), (0.3, False, [0.3, 0.3, 0.3, 0.3]), (0.3, True, [0, 0.1, 0.2, 0.3])],
)
def test_drop_path_rates(rate: float, decay: bool, rates: list[float]) -> None:
    model = small_backbone(drop_path_rate=rate, drop_path_decay=decay)
    assert [block.drop_path.rate for block in model.blocks] == pytest.approx(rates)
    shorter = small_backbone(drop_path_rate=rate, drop_path_decay=decay, out_indices=1)
    assert [block.drop_path.rate for block in shorter.blocks] == pytest.approx(rates[:2]), 'as in the whole model'


def test_drop_path_acts_in_training_only() -> None:
    model, plain = small_backbone(drop_path_rate=0.5), small_backbone()
    plain.load_state_dict(model.state_dict())
    x = torch.randn(8, 3, 32, 32)
    assert not torch.equal(model.train()(x)[0], plain.train()(x)[0])
    assert torch.equal(model.eval()(x)[0], plain(x)[0])


DEPTHS = {
    'backbone.pos_embed': 0,
    'backbone.patch_embed.proj.weight': 0,
    'backbone.patch_embed.proj.bias': 0,
    'backbone.blocks.0.norm.weight': 1,
    'backbone.blocks.1.layer.skip': 1,
    'backbone.blocks.2.layer.fgate.bias': 2,
    'backbone.blocks.9.layer.conv.weight': 5,
    'backbone.blocks.10.norm.bias': 6,
    'backbone.blocks.23.layer.proj_down.weight': 12,
    'backbone.norm.weight': 13,
    'backbone.pool_norm.bias': 13,
    'head.fc.weight': 13,
    'decode_head.blocks.0.weight': 13,
    'neck.patch_embed.weight': 13,
}


def test_layer_depth_counts_pairs_of_sub_blocks() -> None:
    with torch.device('meta'):
        model = VisionLSTM('tiny', img_size=32, out_indices=(3, 23))
        plus = VisionLSTM('tiny_plus', 'v1', img_size=32)
    for name, depth in DEPTHS.items():
        assert model.get_layer_depth(name, 'backbone.') == (depth, 14), name
    assert model.get_layer_depth('blocks.5.norm.weight') == (3, 14)
    assert plus.get_layer_depth('blocks.28.norm.weight') == (15, 17), 'an odd last sub-block makes a pair of its own'
    assert {model.get_layer_depth(name)[0] for name, _ in model.named_parameters()} == set(range(14))


def test_layer_depth_does_not_depend_on_the_outputs() -> None:
    assert small_backbone(out_indices=0).get_layer_depth('blocks.0.norm.weight') == (1, 4)
    assert small_backbone().get_layer_depth('blocks.0.norm.weight') == (1, 4)
