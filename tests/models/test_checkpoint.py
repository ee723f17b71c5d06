"""Strict loading: damaged and foreign files, missing and superfluous keys, prefixes."""

import io
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from mmengine.model import PretrainedInit
from torch import Tensor, nn

from mmvil.models import VisionLSTM
from mmvil.models.checkpoint import describe_keys, load_strictly, read_checkpoint, select_prefix, unwrap_state_dict

from .explicit import randomise, small_backbone


class Harmful:
    """Creates a file when it is unpickled by a loader that runs code."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return (open, (str(self.marker), 'w'))


@pytest.fixture
def weights() -> dict[str, Tensor]:
    model = small_backbone(out_type='avg')
    randomise(model)
    return model.state_dict()


def pretrained(path: Path, prefix: str | None = None, **options: object) -> VisionLSTM:
    init_cfg = {'type': 'Pretrained', 'checkpoint': str(path), **({} if prefix is None else {'prefix': prefix})}
    return small_backbone(**{'out_type': 'avg', 'init_cfg': init_cfg, **options})


def assert_loaded(model: nn.Module, weights: dict[str, Tensor]) -> None:
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize('outer', [True, False], ids=['state_dict', 'bare'])
@pytest.mark.parametrize('prefix', [None, 'backbone.', 'backbone', 'model.backbone.'])
def test_pretrained_is_loaded(tmp_path: Path, weights: dict[str, Tensor], prefix: str | None, outer: bool) -> None:
    dotted = '' if prefix is None else f'{prefix.rstrip(".")}.'
    stored = {f'{dotted}{key}': value for key, value in weights.items()}
    if prefix:
        stored['head.fc.weight'] = torch.zeros(2, 16)  # another part of the model is none of the backbone's business
    torch.save({'state_dict': stored, 'meta': {'epoch': 3}} if outer else stored, tmp_path / 'x.pth')
    model = pretrained(tmp_path / 'x.pth', prefix)
    model.init_weights()
    assert_loaded(model, weights)
    assert model.init_cfg['type'] == 'Pretrained'
    assert model.is_init


def test_pretrained_initializer_class_is_as_strict(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    torch.save(weights, tmp_path / 'x.pth')
    init_cfg = {'type': PretrainedInit, 'checkpoint': str(tmp_path / 'x.pth')}
    model = small_backbone(out_type='avg', init_cfg=init_cfg)
    model.init_weights()
    assert_loaded(model, weights)
    del weights['blocks.2.layer.skip']
    torch.save(weights, tmp_path / 'x.pth')
    with pytest.raises(ValueError, match=r'lacks 1 of the .*blocks\.2\.layer\.skip'):
        small_backbone(out_type='avg', init_cfg=init_cfg).init_weights()


def test_other_initializers_run_before_the_pretrained_one(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    torch.save(weights, tmp_path / 'x.pth')
    constant = {'type': 'Constant', 'layer': 'Linear', 'val': 7.0}
    load = {'type': 'Pretrained', 'checkpoint': str(tmp_path / 'x.pth')}
    model = small_backbone(out_type='avg', init_cfg=[load, constant])
    model.init_weights()
    assert_loaded(model, weights)
    model = small_backbone(init_cfg=constant)
    model.init_weights()
    assert (model.blocks[0].layer.proj_up.weight == 7.0).all()


def test_pretrained_table_of_another_grid_is_resampled(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    torch.save(weights, tmp_path / 'x.pth')
    model = pretrained(tmp_path / 'x.pth', img_size=(24, 40))
    model.init_weights()
    assert model.pos_embed.shape == (1, 3, 5, 16)
    assert not torch.equal(model.pos_embed, small_backbone(img_size=(24, 40)).pos_embed)


@pytest.mark.parametrize('missing', ['pos_embed', 'patch_embed.proj.bias', 'blocks.3.layer.igate.bias', 'norm.bias'])
def test_missing_keys_are_listed(weights: dict[str, Tensor], missing: str) -> None:
    model = small_backbone(out_type='avg')
    before = {key: value.clone() for key, value in model.state_dict().items()}
    del weights[missing]
    with pytest.raises(ValueError, match=rf'lacks 1 of the {len(weights) + 1} keys of VisionLSTM: {missing};'):
        model.load_pretrained(weights)
    assert_loaded(model, before)


def test_missing_pool_norm_is_an_error_only_where_it_is_wanted(weights: dict[str, Tensor]) -> None:
    del weights['pool_norm.weight']
    small_backbone(out_type='avg', pool_norm=False).load_pretrained(weights)
    with pytest.raises(ValueError, match=r'lacks .*pool_norm\.weight'):
        small_backbone(out_type='avg').load_pretrained(weights)


ALLOWED = [
    ({'out_type': 'featmap'}, {}, ['pool_norm.weight', 'pool_norm.bias']),
    ({'out_type': 'featmap', 'final_norm': False}, {}, ['norm.weight', 'pool_norm.bias']),
    ({'out_indices': 1}, {}, ['blocks.2.', 'blocks.3.', 'norm.weight']),
    ({}, {'head.weight': 1, 'head.bias': 2}, ['head.weight', 'head.bias']),
]


@pytest.mark.parametrize(('options', 'additions', 'left_out'), ALLOWED, ids=lambda value: str(value)[:40])
def test_what_the_model_was_built_without_may_be_superfluous(
    weights: dict[str, Tensor],
    options: dict,
    additions: dict,
    left_out: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = []
    monkeypatch.setattr('mmvil.models.checkpoint.print_log', lambda text, **_: lines.append(text))
    model = small_backbone(**{'out_type': 'avg', **options})
    given = {**weights, **{key: torch.zeros(size) for key, size in additions.items()}}
    keys = list(given)
    model.load_pretrained(given)
    assert_loaded(model, weights)
    assert list(given) == keys
    assert len(lines) == 1
    assert f'left out {len(set(given) - set(model.state_dict()))} that it was built without' in lines[0]
    assert all(any(key.startswith(name) for key in set(given) - set(model.state_dict())) for name in left_out)


REFUSED = [
    'blocks.4.norm.weight',  # a deeper model
    'blocks.0.layer.conv_k.weight',  # another layer
    'norm.running_mean',  # not of the norm that the model has
    'pool_norm.scale',
    'cls_token',
    'decode_head.weight',
    'header.weight',
]


@pytest.mark.parametrize('key', REFUSED)
def test_superfluous_keys_are_refused_by_name(weights: dict[str, Tensor], key: str) -> None:
    with pytest.raises(ValueError, match=f'holds 1 keys that VisionLSTM does not know: {key}'):
        small_backbone(out_type='avg').load_pretrained({**weights, key: torch.zeros(3)})


@pytest.mark.parametrize(
    ('key', 'shape'), [('blocks.0.layer.skip', (33,)), ('pos_embed', (1, 4, 4, 8)), ('pos_embed', (1, 16, 16))]
)
def test_other_shapes_are_refused_by_name(weights: dict[str, Tensor], key: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf'does not fit VisionLSTM: (?s:.*){key}'):
        small_backbone(out_type='avg').load_pretrained({**weights, key: torch.zeros(shape)})


@pytest.mark.parametrize('wrapper', ['backbone.', 'model.backbone.'])
def test_forgotten_prefix_is_suggested(weights: dict[str, Tensor], wrapper: str) -> None:
    wrapped = {f'{wrapper}{key}': value for key, value in weights.items()}
    with pytest.raises(ValueError, match=f"under the prefix '{wrapper}': pass prefix='{wrapper}'"):
        small_backbone(out_type='avg').load_pretrained(wrapped)


def test_loading_changes_no_given_dictionary(weights: dict[str, Tensor]) -> None:
    weights['head.weight'] = torch.zeros(3)
    copies = OrderedDict((key, value.clone()) for key, value in weights.items())
    small_backbone(out_type='avg', img_size=64).load_pretrained(weights)
    assert list(weights) == list(copies)
    assert all(torch.equal(value, copies[key]) for key, value in weights.items())


def test_prefix_selects_and_refuses() -> None:
    tensors = {'a.x': torch.zeros(1), 'ab.x': torch.ones(1), 'a.y.z': torch.ones(2)}
    assert list(select_prefix(tensors, 'a')) == list(select_prefix(tensors, 'a.')) == ['x', 'y.z']
    assert list(select_prefix(tensors, '')) == list(tensors)
    with pytest.raises(
        ValueError, match=r"no key of the checkpoint starts with 'b\.'; its keys are a\.x, ab\.x, a\.y\.z"
    ):
        select_prefix(tensors, 'b')


def test_unwrapping_refuses_what_is_no_state_dict() -> None:
    with pytest.raises(TypeError, match='must be a path or a dictionary, got list'):
        unwrap_state_dict([torch.zeros(1)])
    for empty in ({}, {'state_dict': {}}, {'state_dict': 3}):
        with pytest.raises(ValueError, match='holds no state dict'):
            unwrap_state_dict(empty)
    with pytest.raises(ValueError, match=r'do not: epoch$'):
        unwrap_state_dict({'weight': torch.zeros(1), 'epoch': 3})


def test_key_lists_are_short() -> None:
    assert describe_keys('abc') == 'a, b, c'
    assert describe_keys(map(str, range(10))) == '0, 1, 2, 3, 4, 5, 6, 7 and 2 more'


def test_strict_loading_of_any_module() -> None:
    source, target = nn.Linear(2, 3), nn.Linear(2, 3)
    load_strictly(target, source.state_dict())
    assert torch.equal(target.weight, source.weight)
    with pytest.raises(ValueError, match='lacks 1 of the 2 keys of Linear: bias'):
        load_strictly(target, {'weight': source.weight})


def saved(content: object, **options: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


@pytest.mark.parametrize('zipped', [True, False])
@pytest.mark.parametrize('share', [0.0, 0.01, 0.3, 0.5, 0.9, 0.99])
def test_truncated_files_are_refused(tmp_path: Path, share: float, zipped: bool) -> None:
    content = saved({'weight': torch.randn(50, 50)}, _use_new_zipfile_serialization=zipped)
    path = tmp_path / 'cut.pth'
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r'cut\.pth (cannot be read as a checkpoint|is no checkpoint)'):
        read_checkpoint(path)


@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
@pytest.mark.parametrize('zipped', [True, False])
def test_damaged_bytes_never_raise_anything_else(tmp_path: Path, zipped: bool) -> None:
    content = saved({'a.weight': torch.randn(4, 4)}, _use_new_zipfile_serialization=zipped)
    generator, path, refused = np.random.default_rng(0), tmp_path / 'x.pth', 0
    for _ in range(200):
        damaged = bytearray(content)
        for position in generator.integers(0, len(damaged), 4):
            damaged[position] = generator.integers(256)
        path.write_bytes(damaged)
        try:
            read_checkpoint(path)
        except ValueError:
            refused += 1
    assert refused > 20


@pytest.mark.filterwarnings('ignore:Detected pickle protocol')
@pytest.mark.parametrize(
    'content',
    [b'', b'hello\n' * 50, b'PK\x03\x04' + bytes(60), pickle.dumps({'a': 1})[:-3], b'\x89PNG\r\n\x1a\n' + bytes(99)],
    ids=['empty', 'text', 'zip header', 'cut pickle', 'picture'],
)
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / 'other').write_bytes(content)
    with pytest.raises(ValueError, match=r'other (cannot be read as a checkpoint|is no checkpoint)'):
        read_checkpoint(tmp_path / 'other')


@pytest.mark.parametrize('content', [torch.zeros(3), [1, 2], 'text', None], ids=str)
def test_files_without_a_dictionary_are_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / 'x.pth')
    with pytest.raises(ValueError, match=r'x\.pth must hold a dictionary of tensors, got'):
        read_checkpoint(tmp_path / 'x.pth')


def test_absent_files_are_named(tmp_path: Path) -> None:
    for path in (tmp_path / 'none.pth', tmp_path):
        with pytest.raises(FileNotFoundError, match=f'{path.name} does not exist'):
            read_checkpoint(path)
    with pytest.raises(FileNotFoundError, match=r'none\.pth does not exist'):
        pretrained(tmp_path / 'none.pth').init_weights()


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    torch.save({'weight': torch.zeros(1), 'x': Harmful(tmp_path / 'run')}, tmp_path / 'x.pth')
    with pytest.raises(ValueError, match=r'x\.pth is no checkpoint of tensors and plain values'):
        read_checkpoint(tmp_path / 'x.pth')
    assert not (tmp_path / 'run').exists()


def test_training_checkpoint_of_mmengine_is_read(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    history = HistoryBuffer()
    history.update(0.5)
    model = nn.Linear(2, 2)
    content = {
        'meta': {'epoch': 1, 'cfg': 'a = 1', 'seed': 3, 'dataset_meta': {'classes': ('a', 'b')}},
        'state_dict': OrderedDict(weights),
        'message_hub': {'log_scalars': OrderedDict({'train/loss': history}), 'runtime_info': {'iter': np.int64(4)}},
        'optimizer': torch.optim.AdamW(model.parameters()).state_dict(),
        'random_state': {'numpy': np.random.default_rng(0).bytes(4), 'array': np.arange(3, dtype=np.uint32)},
    }
    torch.save(content, tmp_path / 'epoch_1.pth')
    loaded = read_checkpoint(tmp_path / 'epoch_1.pth')
    assert loaded['message_hub']['log_scalars']['train/loss'].current() == 0.5
    assert list(unwrap_state_dict(loaded)) == list(weights)
