"""The chunkwise kernels: in Triton's interpreter without a GPU, compiled with one."""

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from mmvil.ops import triton_chunkwise
from mmvil.ops.chunkwise import mlstm_chunkwise
from mmvil.ops.custom_op import mlstm_triton
from mmvil.ops.triton_chunkwise_tiles import (
    Pieces,
    ProductTiles,
    ScanTiles,
    StateTiles,
    Tiles,
    choose_tiles,
    shared_memory_needed,
    tile_candidates,
)
from mmvil.ops.triton_launch import DeviceLimits, device_limits
from tests.golden import assert_close, golden_arrays, golden_names

from .util import GRADIENTS, TOLERANCE, assert_all_close, cell_tolerance, computed, expected, make_inputs

EPS = 1e-6
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')


def forced(tile: int, chunk: int, state_rows: Pieces, columns: Pieces, block: int = 256) -> Tiles:
    """Tiles smaller than any the launcher picks, so that short sequences have many tiles, chunks and programs."""
    stream = min(tile, 32)
    product, state = ProductTiles(stream, 16, columns, 4, 1), StateTiles(stream, state_rows, columns, 4, 1)
    return Tiles(tile, chunk, product, product, state, state, ScanTiles(block, 1, 2))


SETTINGS = {
    16: [forced(16, 32, Pieces(16), Pieces(16), 64), forced(16, 16, Pieces(16), Pieces(16), 32)],
    24: [forced(32, 64, Pieces(32), Pieces(16, 0, 2)), forced(32, 32, Pieces(16, 16), Pieces(16, 16))],
    96: [
        forced(64, 128, Pieces(64, 32), Pieces(64, 0, 2), 2048),
        forced(64, 128, Pieces(64, 32), Pieces(32, 16, 2), 2048),
        forced(32, 64, Pieces(128), Pieces(64, 32), 4096),
    ],
    192: [forced(32, 64, Pieces(128, 64), Pieces(64, 32, 2), 8192)],
    384: [forced(32, 32, Pieces(128, 64, 2), Pieces(128, 0, 3), 16384)],
}
"""By DH. The first of each also runs in float16, where ptxas 12.8 miscompiles columns of 32 + 16 at DH 96."""
CASES = [
    *((16, length, reverse, i) for length in (1, 15, 63, 100) for reverse in (False, True) for i in (0, 1)),
    *((24, length, bool(length % 2), i) for length in (63, 100) for i in (0, 1)),
    (24, 197, False, 0),
    (96, 63, False, 2),
    (96, 197, True, 1),
    (96, 300, False, 1),
    (96, 100, True, 0),
    (192, 15, False, 0),
    (192, 100, True, 0),
    (384, 15, True, 0),
    (384, 40, False, 0),
]


def run(inputs: list[Tensor], dh: Tensor, reverse: bool, tiles: Tiles | None = None) -> list[Tensor]:
    """h and all five gradients, straight from the launchers."""
    h, saved = triton_chunkwise.forward(*inputs, reverse, EPS, tiles)
    return [h, *triton_chunkwise.backward(dh, *inputs, h, saved, reverse, EPS, tiles)]


@pytest.mark.parametrize(('dim', 'length', 'reverse', 'setting'), CASES, ids=str)
def test_against_float64(dim: int, length: int, reverse: bool, setting: int, device: torch.device) -> None:
    inputs, dh = make_inputs((1, 2, length, dim), device=device, seed=length + dim, token_major=reverse)
    actual = run(inputs, dh, reverse, SETTINGS[dim][setting])
    assert_all_close(actual, expected(inputs, dh, reverse), TOLERANCE[torch.float32])


@pytest.mark.parametrize(('dim', 'length'), [(16, 63), (96, 100), (192, 70), (384, 40)])
def test_float16(dim: int, length: int, device: torch.device) -> None:
    inputs, dh = make_inputs((1, 2, length, dim), torch.float16, device)
    actual = run(inputs, dh, True, SETTINGS[dim][0])
    assert [x.dtype for x in actual] == [torch.float16] * 4 + [torch.float32] * 2
    assert_all_close(actual, expected(inputs, dh, True), TOLERANCE[torch.float16])


@pytest.mark.skipif(torch.cuda.is_available(), reason='is about the interpreter')
def test_float16_states_are_tf32_already(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensor cores cut off the digits that TF32 lacks, Triton's interpreter does not: there must be none."""
    inputs, dh = make_inputs((1, 2, 100, 16), torch.float16)
    want = run(inputs, dh, False, SETTINGS[16][0])
    product, seen = interpreter.InterpreterBuilder.create_dot, []

    def cut(data: np.ndarray) -> np.ndarray:
        return (data.view(np.uint32) & 0xFFFFE000).view(np.float32)

    def create_dot(self: object, a: object, b: object, d: object, precision: object, *rest: object) -> object:
        if str(precision).endswith('TF32'):
            seen.append(precision)
            a, b = (interpreter.TensorHandle(cut(x.data), x.dtype) for x in (a, b))
        return product(self, a, b, d, precision, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, 'create_dot', create_dot)
    assert all(torch.equal(x, y) for x, y in zip(run(inputs, dh, False, SETTINGS[16][0]), want, strict=True))
    assert seen


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16], ids=str)
def test_nan_reaches_all_that_comes_after(dtype: torch.dtype, device: torch.device) -> None:
    inputs, dh = make_inputs((1, 1, 100, 16), dtype, device)
    inputs[2][..., 3, :] = torch.nan
    h = run(inputs, dh, False, SETTINGS[16][0])[0]
    assert h[:, :, 3:].isnan().all()


@pytest.mark.parametrize('dim', [1, 7, 20, 100, 129])
def test_any_head_size(dim: int, device: torch.device) -> None:
    inputs, dh = make_inputs((2, 1, 33, dim), torch.float16, device)
    actual = computed(lambda *x: mlstm_triton(*x, True, EPS, 'chunkwise'), inputs, dh)
    assert_all_close(actual, expected(inputs, dh, True), TOLERANCE[torch.float16])


@pytest.mark.parametrize('name', golden_names('mlstm_cell'))
def test_golden(name: str, device: torch.device) -> None:
    data = golden_arrays(name)
    inputs = [data[key].to(device) for key in ('q', 'k', 'v', 'igate', 'fgate')]
    reverse, tolerance, dim = bool(data['reverse']), cell_tolerance(name), data['q'].shape[-1]
    actual = run(inputs, data['dh'].to(device), reverse, SETTINGS[dim][0] if dim in SETTINGS else None)
    gate_scale = max(data['dfgate'].abs().max().item(), data['digate'].abs().max().item())
    for key, x in zip(['h', *GRADIENTS], actual, strict=True):
        assert_close(x.cpu(), data[key], tolerance, key, scale=gate_scale if key == 'dfgate' else None)


@pytest.mark.parametrize('name', [x for x in golden_names('mlstm_cell_ext') if '_i_' not in x or 'mixed' in x])
def test_extreme_gates_in_half_precision(name: str, device: torch.device) -> None:
    data = golden_arrays(name)
    inputs = [data[key].to(device, torch.float16) for key in ('q', 'k', 'v')]
    inputs += [data['igate'].to(device), data['fgate'].to(device)]
    reverse, dh = bool(data['reverse']), data['dh'].to(device, torch.float16)
    actual = run(inputs, dh, reverse, SETTINGS[16][0])
    assert_all_close(actual, expected(inputs, dh, reverse), 5e-3)


@pytest.mark.parametrize('reverse', [False, True])
def test_gate_scan_over_many_tiles(reverse: bool, device: torch.device) -> None:
    """More tiles than are summed at a time, half of the gates shut: differences of 1e5 must keep their last digits."""
    length, tiles = 16 * 260 + 5, SETTINGS[16][0]
    inputs, _ = make_inputs((1, 1, length, 16), device=device)
    igate, fgate = inputs[3:]
    fgate[..., ::2] -= 40
    saved = triton_chunkwise.empty_saved(inputs[0], tiles)
    triton_chunkwise._Call(inputs[0], (inputs[0],), tiles, reverse, EPS).scan_gates(igate, fgate, saved)

    i, f = (x.double().flip(-1) if reverse else x.double() for x in (igate[0, 0], fgate[0, 0]))
    decay = torch.nn.functional.logsigmoid(f).cumsum(0)
    g = i - decay
    maximum = g.cummax(0).values
    after = saved.border[0, 1 + torch.arange(length, device=device) // tiles.tile]
    rebuilt = saved.gate.double().sum(0)[0] + after
    scale = 1e-6 * decay.abs().max()  # log gates are float32; their sum is not rounded again
    assert (rebuilt - g).abs().max() < scale
    assert ((saved.maximum.double().sum(0)[0] + after) - maximum).abs().max() < scale
    assert (saved.stabiliser[0] - (decay + maximum)).abs().max() < scale
    neighbours = rebuilt.diff() - g.diff()
    assert neighbours.abs().max() < 1e-5


def test_shut_gate_hides_everything_before(device: torch.device) -> None:
    inputs, dh = make_inputs((1, 1, 90, 16), device=device)
    inputs[4][..., 37] = -torch.inf
    whole = run(inputs, dh, False, SETTINGS[16][0])
    rest = run([x[:, :, 37:].contiguous() for x in inputs], dh[:, :, 37:], False, SETTINGS[16][0])
    for x, y in zip(whole[:5], rest[:5], strict=True):
        torch.testing.assert_close(x[:, :, 37:], y, rtol=1e-5, atol=1e-5)
    assert whole[5][0, 0, 37].abs() < 1e-5 * whole[4].abs().max()


@pytest.mark.parametrize('igate', [-95.0, -200.0])
def test_closed_input_gates_give_zero_and_finite_gradients(igate: float, device: torch.device) -> None:
    inputs, dh = make_inputs((1, 1, 40, 16), device=device)
    inputs[3].fill_(igate)
    h, *gradients = run(inputs, dh, False, SETTINGS[16][0])
    assert (h == 0).all()
    assert all(torch.isfinite(x).all() for x in gradients)


def test_layouts_and_empty_batch(device: torch.device) -> None:
    """Slices with unaligned strides and transposed channels give what dense tensors give."""
    inputs, dh = make_inputs((2, 2, 40, 16), device=device)
    tiles = SETTINGS[16][0]
    want = run(inputs, dh, True, tiles)
    wide = [torch.randn(2, 2, 43, 19, device=device) for _ in inputs[:3]]
    sliced = [y[:, :, 2:42, 1:17].copy_(x) for x, y in zip(inputs, wide, strict=False)]
    strange = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in inputs[:3]]
    for q, k, v in (sliced, strange):
        *found, digate, dfgate = run([q, k, v, *inputs[3:]], dh, True, tiles)
        assert all(torch.equal(x, y) for x, y in zip(found, want[:4], strict=True))
        # The gates' are sums over channels, which a compiled kernel adds in the order of its loads.
        tolerance = {'rtol': 0.0, 'atol': 0.0} if device.type == 'cpu' else {'rtol': 1e-6, 'atol': 1e-6}
        torch.testing.assert_close([digate, dfgate], want[4:], **tolerance)
    empty = [x[:0] for x in inputs]
    assert [x.shape[0] for x in run(empty, dh[:0], True)] == [0] * 6


@pytest.mark.parametrize('reverse', [False, True])
def test_sums_of_weights(reverse: bool, device: torch.device) -> None:
    """They are what the mLSTM makes of values that are all one."""
    inputs, _ = make_inputs((2, 2, 100, 16), device=device)
    inputs[2].fill_(1)
    h, saved = triton_chunkwise.forward(*inputs, reverse, EPS, SETTINGS[16][0], sums=True)
    sums = triton_chunkwise.row_sums(saved).reshape(2, 2, -1)[:, :, :100]
    torch.testing.assert_close(sums.flip(2) if reverse else sums, h[..., 7], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('reverse', [False, True])
def test_nothing_is_read_behind_the_states(reverse: bool, device: torch.device) -> None:
    """Programs hold more columns than DH: what lies behind the last state must not reach the sums over columns."""
    inputs, dh = make_inputs((1, 1, 80, 16), device=device)
    columns = Pieces(32)
    product = ProductTiles(16, 16, columns, 4, 1)
    tiles = SETTINGS[16][0]._replace(output=product, gradient=product)
    h, saved = triton_chunkwise.forward(*inputs, reverse, EPS, tiles)
    behind = torch.full((2 * saved.states.numel(),), torch.nan, device=device)
    states = behind[: saved.states.numel()].view_as(saved.states).copy_(saved.states)
    gradients = triton_chunkwise.backward(dh, *inputs, h, saved._replace(states=states), reverse, EPS, tiles)
    assert_all_close([h, *gradients], expected(inputs, dh, reverse), TOLERANCE[torch.float32])


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_smallest_tiles_fit_small_cards(dtype: torch.dtype) -> None:
    for dim in range(1, 513):
        for shared in (64 * 1024, 99 * 1024, 227 * 1024):
            tiles = choose_tiles(dim, dtype, DeviceLimits((8, 6), shared, 1))
            assert shared_memory_needed(tiles, dim, dtype) <= shared
            for kernel in (tiles.output, tiles.gradient):
                assert (kernel.pieces.wide + kernel.pieces.narrow) * kernel.pieces.split >= dim
            for kernel in (tiles.state, tiles.state_gradient):
                assert (kernel.columns.wide + kernel.columns.narrow) * kernel.columns.split >= dim
                assert (kernel.rows.wide + kernel.rows.narrow) * kernel.rows.split >= dim


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize('dim', [16, 48, 60, 64, 96, 128, 192, 256, 384, 512])
def test_every_tile_setting_on_gpu(dim: int, dtype: torch.dtype) -> None:
    for reverse in (False, True):
        inputs, dh = make_inputs((2, 2, 613, dim), dtype, 'cuda', token_major=reverse)
        reference = expected(inputs, dh, reverse)
        for tiles in tile_candidates(dim, dtype):
            if shared_memory_needed(tiles, dim, dtype) > device_limits(inputs[0].device).shared_memory:
                continue
            actual = run(inputs, dh, reverse, tiles)
            assert_all_close(actual, reference, TOLERANCE[dtype])
            again = run(inputs, dh, reverse, tiles)
            assert all(torch.equal(x, y) for x, y in zip(actual, again, strict=True))


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(('dim', 'length'), [(96, 4097), (96, 33000), (192, 16384), (60, 5000)])
def test_long_sequences_on_gpu(dim: int, length: int, dtype: torch.dtype) -> None:
    inputs, dh = make_inputs((1, 2, length, dim), dtype, 'cuda')
    reference = computed(lambda *x: mlstm_chunkwise(*x, True, EPS), [x.double() for x in inputs], dh.double())
    assert_all_close(run(inputs, dh, True), reference, TOLERANCE[dtype])


@pytest.mark.gpu
@on_gpu
def test_memory_is_linear_on_gpu() -> None:
    peaks = []
    for length in (4096, 65536):
        inputs, dh = make_inputs((1, 4, length, 96), torch.bfloat16, 'cuda')
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(inputs, dh, False)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del inputs, dh
    assert peaks[1] <= 17 * peaks[0]
