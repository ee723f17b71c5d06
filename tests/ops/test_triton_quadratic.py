"""The quadratic kernels: in Triton's interpreter without a GPU, compiled with one."""

import pytest
import torch

from mmvil.ops import triton_quadratic
from mmvil.ops.custom_op import mlstm_triton
from mmvil.ops.triton_launch import Tiles, device_limits, head_pieces
from tests.golden import assert_close, golden_arrays, golden_names

from .util import GRADIENTS, TOLERANCE, assert_all_close, cell_tolerance, computed, expected, make_inputs

EPS = 1e-6
CASES = [
    *((16, length, reverse) for length in (1, 15, 63, 100, 197) for reverse in (False, True)),
    *((96, length, bool(length % 2)) for length in (1, 15, 63, 100, 197)),
    (192, 15, True),
    (192, 70, False),
    (384, 15, False),
    (384, 70, True),
]


def check(shape: tuple, dtype: torch.dtype, device: torch.device, reverse: bool, **options: object) -> None:
    inputs, dh = make_inputs(shape, dtype, device, seed=sum(shape), **options)
    actual = computed(lambda *x: mlstm_triton(*x, reverse, EPS, 'quadratic'), inputs, dh)
    assert all(x.dtype == y.dtype for x, y in zip(actual[1:], inputs, strict=True))
    assert_all_close(actual, expected(inputs, dh, reverse), TOLERANCE[dtype])


@pytest.mark.parametrize(('dim', 'length', 'reverse'), CASES, ids=lambda x: str(x))
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16], ids=['float32', 'float16'])
def test_against_float64(dim: int, length: int, reverse: bool, dtype: torch.dtype, device: torch.device) -> None:
    check((1, 2, length, dim), dtype, device, reverse)


@pytest.mark.parametrize('dim', [1, 7, 20, 60, 100, 129, 512])
def test_any_head_size(dim: int, device: torch.device) -> None:
    check((2, 1, 33, dim), torch.float16, device, True)


@pytest.mark.parametrize('name', golden_names('mlstm_cell'))
def test_golden(name: str, device: torch.device) -> None:
    data = golden_arrays(name)
    inputs = [data[key].to(device) for key in ('q', 'k', 'v', 'igate', 'fgate')]
    reverse, tolerance = bool(data['reverse']), cell_tolerance(name)
    actual = computed(lambda *x: mlstm_triton(*x, reverse, EPS, 'quadratic'), inputs, data['dh'].to(device))
    gate_scale = max(data['dfgate'].abs().max().item(), data['digate'].abs().max().item())
    for key, x in zip(['h', *GRADIENTS], actual, strict=True):
        assert_close(x.cpu(), data[key], tolerance, key, scale=gate_scale if key == 'dfgate' else None)


@pytest.mark.parametrize('name', ['mlstm_cell_s17_d16', 'mlstm_cell_s17_d16_rev'])
def test_row_statistics(name: str, device: torch.device) -> None:
    data = golden_arrays(name)
    inputs = [data[key].to(device) for key in ('q', 'k', 'v', 'igate', 'fgate')]
    reverse, length = bool(data['reverse']), data['q'].shape[2]
    _, (stats,) = triton_quadratic.forward(*inputs, reverse, EPS)
    for key, plane in (('m', 4), ('n', 5)):
        x = stats[plane, :, :, :length]
        assert_close(x.flip(-1).cpu() if reverse else x.cpu(), data[key], 1e-5, key)


@pytest.mark.parametrize('stored', [False, True], ids=['anew', 'stored'])
@pytest.mark.parametrize('name', [x for x in golden_names('mlstm_cell_ext') if '_i_' not in x or 'mixed' in x])
def test_extreme_gates_in_half_precision(name: str, stored: bool, device: torch.device) -> None:
    data = golden_arrays(name)
    inputs = [data[key].to(device, torch.float16 if key in 'qkv' else torch.float32) for key in ('q', 'k', 'v')]
    inputs += [data['igate'].to(device), data['fgate'].to(device)]
    reverse, dh = bool(data['reverse']), data['dh'].to(device, torch.float16)
    h, saved = triton_quadratic.forward(*inputs, reverse, EPS)
    actual = [h, *triton_quadratic.backward(dh, *inputs, h, saved, reverse, EPS, stored=stored)]
    assert_all_close(actual, expected(inputs, dh, reverse), 5e-3)


@pytest.mark.parametrize('igate', [-95.0, -200.0])
def test_closed_input_gates_give_zero_and_finite_gradients(igate: float, device: torch.device) -> None:
    inputs, dh = make_inputs((1, 1, 20, 16), device=device)
    inputs[3].fill_(igate)
    h, *gradients = computed(lambda *x: mlstm_triton(*x, False, EPS, 'quadratic'), inputs, dh)
    assert (h == 0).all()
    assert all(torch.isfinite(x).all() for x in gradients)


@pytest.mark.parametrize('igate', [-95.0, -200.0])
def test_closed_input_gates_with_stored_matrices(igate: float, device: torch.device) -> None:
    inputs, dh = make_inputs((1, 1, 70, 16), torch.float16, device)
    inputs[3].fill_(igate)
    h, saved = triton_quadratic.forward(*inputs, False, EPS)
    assert (h == 0).all()
    gradients = triton_quadratic.backward(dh, *inputs, h, saved, False, EPS, stored=True)
    assert all(torch.isfinite(x).all() for x in gradients)


def test_a_later_token_changes_nothing_before_it(device: torch.device) -> None:
    inputs, _ = make_inputs((1, 2, 70, 16), device=device)
    for reverse in (False, True):
        position = 40
        before = slice(position + 1, None) if reverse else slice(None, position)
        h = mlstm_triton(*inputs, reverse, EPS, 'quadratic')
        changed = [x.clone() for x in inputs]
        for x in changed:
            x[:, :, position] += 3
        assert torch.equal(h[:, :, before], mlstm_triton(*changed, reverse, EPS, 'quadratic')[:, :, before])


def test_reverse_is_a_flip(device: torch.device) -> None:
    inputs, _ = make_inputs((1, 2, 70, 24), device=device)
    flipped = mlstm_triton(*(x.flip(2) for x in inputs), False, EPS, 'quadratic').flip(2)
    torch.testing.assert_close(mlstm_triton(*inputs, True, EPS, 'quadratic'), flipped, rtol=0, atol=0)


def test_token_major_inputs_are_not_copied_and_keep_their_layout(device: torch.device) -> None:
    check((2, 3, 20, 16), torch.float32, device, True, token_major=True)
    inputs, _ = make_inputs((2, 3, 20, 16), device=device, token_major=True)
    assert mlstm_triton(*inputs, False, EPS, 'quadratic').transpose(1, 2).is_contiguous()


def test_other_strides(device: torch.device) -> None:
    inputs, dh = make_inputs((2, 2, 20, 16), device=device)
    reference = expected(inputs, dh, False)
    odd = [torch.stack([x, x], -1)[..., 0] for x in inputs]  # no dimension is contiguous
    wide = torch.cat(inputs[:3], -1).split(16, -1)  # rows of a fused projection
    for strided in (odd, [*wide, *inputs[3:]]):
        assert_all_close(computed(lambda *x: mlstm_triton(*x, False, EPS, 'quadratic'), strided, dh), reference, 2e-5)


def test_expanded_gradient(device: torch.device) -> None:
    inputs, _ = make_inputs((1, 2, 20, 16), device=device)
    dh = torch.ones(1, 1, 1, 1, device=device).expand(1, 2, 20, 16)
    actual = computed(lambda *x: mlstm_triton(*x, False, EPS, 'quadratic'), inputs, dh)
    assert_all_close(actual, expected(inputs, dh, False), 2e-5)


@pytest.mark.parametrize('dim', [96])
@pytest.mark.parametrize('kernel', ['forward', 'query', 'key', 'value'])
def test_every_tile_setting(kernel: str, dim: int, device: torch.device) -> None:
    """Whatever the launcher may pick for these head sizes, on the largest and on the smallest card."""
    inputs, dh = make_inputs((1, 1, 75, dim), torch.float16, device)
    reference = expected(inputs, dh, True)
    limits = device_limits(device)
    small = type(limits)(limits.capability, 48 * 1024, 1)
    half, full = (triton_quadratic.tile_candidates(kernel, dim, size, limits) for size in (2, 4))
    for tiles in {*half, *full, *triton_quadratic.tile_candidates(kernel, dim, 2, small)}:
        h, saved = triton_quadratic.forward(*inputs, True, EPS, tiles=tiles if kernel == 'forward' else None)
        options = {'query_tiles': tiles} if kernel == 'query' else {}
        if kernel in ('key', 'value'):
            options = {'key_tiles': tiles, 'joint': kernel == 'key'}
        actual = [h, *triton_quadratic.backward(dh, *inputs, h, saved, True, EPS, **options, stored=False)]
        assert_all_close(actual, reference, TOLERANCE[torch.float16])


@pytest.mark.parametrize('reverse', [False, True])
def test_sums_of_weights(reverse: bool, device: torch.device) -> None:
    """They are what the mLSTM makes of values that are all one."""
    inputs, _ = make_inputs((2, 2, 100, 16), device=device)
    inputs[2].fill_(1)
    h, saved = triton_quadratic.forward(*inputs, reverse, EPS, sums=True)
    sums = triton_quadratic.row_sums(saved)[:, :, :100]
    torch.testing.assert_close(sums.flip(2) if reverse else sums, h[..., 7], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(('length', 'dim'), [(1, 16), (64, 40), (65, 96), (75, 384), (200, 13), (260, 32), (330, 8)])
def test_both_ways_through_the_backward_pass(length: int, dim: int, device: torch.device) -> None:
    """With matrices in memory and without; one to six blocks of tokens, several pieces of channels, none whole."""
    inputs, dh = make_inputs((1, 2, length, dim), torch.float16, device, token_major=dim == 96)
    reference = expected(inputs, dh, True)
    h, saved = triton_quadratic.forward(*inputs, True, EPS)
    for stored in (False, True):
        actual = [h, *triton_quadratic.backward(dh, *inputs, h, saved, True, EPS, stored=stored)]
        assert_all_close(actual, reference, TOLERANCE[torch.float16])


def test_matrices_are_stored_where_that_is_faster() -> None:
    def stores(length: int, dim: int, dtype: torch.dtype, products: bool) -> bool:
        q = torch.empty(0, 4, length, dim, dtype=dtype)
        return triton_quadratic._stores_matrices(q, torch.empty(0) if products else None)

    assert stores(196, 96, torch.bfloat16, True)
    assert not stores(196, 96, torch.bfloat16, False)  # dh.h would need a kernel of its own
    assert not stores(257, 96, torch.bfloat16, True)
    assert [stores(length, 192, torch.float16, False) for length in (196, 1024, 1025)] == [True, True, False]
    assert stores(2304, 384, torch.bfloat16, False)
    assert not stores(196, 192, torch.float32, True)


def test_every_setting_of_stored_matrices(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    inputs, dh = make_inputs((1, 1, 75, 40), torch.float16, device)
    reference = expected(inputs, dh, False)
    h, saved = triton_quadratic.forward(*inputs, False, EPS)
    for kernel, settings in triton_quadratic.STORED_TILES.items():
        for tiles in settings:
            monkeypatch.setitem(triton_quadratic.STORED_TILES, kernel, (tiles,))
            actual = [h, *triton_quadratic.backward(dh, *inputs, h, saved, False, EPS, stored=True)]
            assert_all_close(actual, reference, TOLERANCE[torch.float16])


@pytest.mark.parametrize('stored', [False, True])
def test_rounding_of_the_gates_gradients_does_not_add_up(stored: bool, device: torch.device) -> None:
    """Sums over all tokens, as a bias gets them: q.dq and k.dk, which cancel, must be rounded alike."""
    inputs, dh = make_inputs((1, 2, 256, 32), torch.float16, device)
    reference = expected(inputs, dh, False)[5]
    h, saved = triton_quadratic.forward(*inputs, False, EPS)
    *_, dfgate = triton_quadratic.backward(dh, *inputs, h, saved, False, EPS, stored=stored)
    errors = (dfgate.double() - reference).sum(2) / reference.norm(dim=2)
    assert errors.abs().max() < 5e-3  # 2e-2 if they are not


def test_settings_that_cannot_work_are_absent() -> None:
    """A streamed tile that is larger than a factor block would read the wrong reference."""
    tables = [*triton_quadratic.HALF_TILES.values(), triton_quadratic.FLOAT_TILES]
    for tiles in (tiles for table in tables for row in table.values() for tiles in row):
        assert tiles.columns <= triton_quadratic.BLOCK
        assert isinstance(tiles, Tiles)
    assert all(sum(head_pieces(limit)) <= limit for limit in (128, 256, 512))


def test_empty_batch(device: torch.device) -> None:
    inputs, dh = make_inputs((0, 2, 20, 16), device=device)
    actual = computed(lambda *x: mlstm_triton(*x, False, EPS, 'quadratic'), inputs, dh)
    assert [x.shape for x in actual] == [dh.shape, *(x.shape for x in inputs)]
