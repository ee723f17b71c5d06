"""The kernels that carry the state: where they run, how sequences are cut, and what they compute, on a card or not."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from mmvil.ops import carried, triton_chunkwise
from mmvil.ops.custom_op import mlstm_triton
from mmvil.ops.triton_chunkwise_tiles import Tiles, choose_tiles, tile_candidates
from mmvil.ops.triton_launch import device_limits, interpreting

from .gluon_stand_in import load_kernels
from .util import TOLERANCE, assert_all_close, computed, expected, make_inputs, relative_error

EPS = 1e-6
DIMS = [64, 80, 96]
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == carried.CAPABILITY
on_hopper = pytest.mark.skipif(not HOPPER, reason='needs a Hopper card')


def gpu_test(function: object) -> object:
    return pytest.mark.gpu(on_hopper(function))


@pytest.mark.parametrize('dim', DIMS)
def test_a_programs_tile_holds_half_a_head_and_the_normaliser(dim: int) -> None:
    assert carried.takes(dim)
    assert dim % (carried.SPLIT * carried.ALIGNMENT) == 0
    assert dim // carried.SPLIT < carried.VALUE_COLUMNS == 16 * carried.WARPS


@pytest.mark.parametrize('dim', [16, 48, 63, 100, 112, 128, 192, 256, 384])
def test_other_head_sizes_are_left_to_other_kernels(dim: int) -> None:
    assert not carried.takes(dim)


@pytest.mark.parametrize('programs', [2, 48, 192, 264, 1000])
@pytest.mark.parametrize('tiles', [1, 2, 4, 16, 63, 64, 1024])
def test_segments_cover_the_sequence(programs: int, tiles: int) -> None:
    segments, steps = carried.segments_for(programs, tiles, 132)
    assert 1 <= segments <= carried.MAX_SEGMENTS
    assert (segments - 1) * steps < tiles <= segments * steps


def test_a_full_device_does_not_cut_sequences() -> None:
    assert carried.segments_for(264, 16, 132) == (1, 16)
    assert carried.segments_for(96, 16, 132) == (1, 16)
    assert carried.segments_for(8, 64, 132)[0] > 4
    assert carried.segments_for(8, 1, 132) == (1, 1)


@pytest.mark.skipif(not interpreting(), reason='on a card the kernel runs in test_segments')
def test_scan_of_segments() -> None:
    """The recurrence of states, one segment after the other."""
    heads, left, split, size, steps, tiles = 3, 4, 2, 2 * carried.SCAN_BLOCK, 2, 9
    added = torch.randn(heads, left, split, size)
    border = torch.rand(heads, tiles + 1).double().cumsum(1)
    states = added.clone()
    carried.state_kernels.segment_scan_kernel[(heads * split * size // carried.SCAN_BLOCK,)](
        states, border, left, steps, tiles, SPLIT=split, STATE=size, BLOCK=carried.SCAN_BLOCK, STAGES=1
    )
    state = torch.zeros(heads, split, size)
    for segment in range(left):
        first, last = border[:, segment * steps], border[:, (segment + 1) * steps]
        state = state * (first - last).exp().float()[:, None, None] + added[:, segment]
        torch.testing.assert_close(states[:, segment], state)


def test_not_without_a_hopper_card() -> None:
    assert not carried.can_carry(96, torch.bfloat16, torch.device('cpu'))


@pytest.fixture
def unbuildable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that do not compile, on a card that should have them."""

    class CompilationError(Exception):
        __module__ = 'triton.compiler.errors'

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> object:
            def launch(*arguments: object, **constants: object) -> None:
                raise CompilationError('no such instruction')

            return launch

    kernels = SimpleNamespace(segment_state_kernel=Kernel(), carry_kernel=Kernel())
    monkeypatch.setattr(carried, '_kernels', lambda: kernels)
    monkeypatch.setattr(carried, 'can_carry', lambda *_: True)
    monkeypatch.setattr(carried, 'failures', {})


def carry_on_cpu(dim: int) -> bool:
    q = torch.zeros(1, 1, 70, dim, dtype=torch.bfloat16)
    saved = triton_chunkwise.empty_saved(q)
    return carried.carry(q, q, q, q, saved, [0] * 12, carried.ALIGNMENT, 4, 1.0, EPS, False, True)


def test_kernels_that_do_not_compile_are_given_up_once(unbuildable: None) -> None:
    with pytest.warns(UserWarning, match='do not compile here for DH 96.*no such instruction'):
        assert not carry_on_cpu(96)
    assert not carry_on_cpu(96)  # without a warning, which would be an error
    with pytest.warns(UserWarning, match='DH 64'):
        assert not carry_on_cpu(64)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the kernels without a GPU; the gates are scanned in Triton's interpreter."""
    if not interpreting():
        pytest.skip('on a card the kernels run there')
    (kernels,) = load_kernels('gluon_carry_kernels', warps=carried.WARPS)
    monkeypatch.setattr(carried, '_kernels', lambda: kernels)
    monkeypatch.setattr(carried, 'can_carry', lambda *_: True)


def cut_into(monkeypatch: pytest.MonkeyPatch, segments: int) -> None:
    """Have sequences cut into so many segments, or as many as there are tiles."""

    def segments_for(programs: int, tiles: int, processors: int) -> tuple[int, int]:
        steps = -(-tiles // segments)
        return -(-tiles // steps), steps

    monkeypatch.setattr(carried, 'segments_for', segments_for)


def exact_tiles(dim: int) -> Tiles:
    """Tiles of these kernels for others in float32, which the interpreter computes rightly."""
    return tile_candidates(dim, torch.float32)[0]._replace(tile=carried.TILE, chunk=256)


@pytest.mark.parametrize('segments', [1, 2, 5])
@pytest.mark.parametrize(('dim', 'length', 'reverse'), [(64, 300, False), (80, 65, True), (96, 590, True)])
def test_stand_in_output(
    dim: int, length: int, reverse: bool, segments: int, stand_in: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """h against float64; states and n against the other kernels in float32."""
    cut_into(monkeypatch, segments)
    inputs, dh = make_inputs((1, 2, length, dim), torch.bfloat16, seed=length, token_major=reverse)
    h, saved = run(inputs, reverse)
    assert relative_error(h, expected(inputs, dh, reverse)[0]) < 4e-3
    summed, sums = run(inputs, reverse, sums=True)
    assert torch.equal(h, summed)
    tiles = exact_tiles(dim)
    _, exact = triton_chunkwise.forward(*(x.float() for x in inputs), reverse, EPS, tiles)
    for name in ('states', 'state_normalisers', 'normaliser'):  # rounded up to three times
        assert relative_error(getattr(saved, name), getattr(exact, name)) < 6e-3, name
    _, exact = triton_chunkwise.forward(*(x.float() for x in inputs), reverse, EPS, tiles, sums=True)
    assert relative_error(sums.normaliser, exact.normaliser) < 4e-3


@pytest.mark.parametrize('kind', ['closed', 'open', 'steep', 'reset'])
def test_stand_in_extreme_gates(kind: str, stand_in: None, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_into(monkeypatch, 2)
    inputs, dh = make_inputs((1, 2, 200, 64), torch.bfloat16, seed=3)
    set_gates(kind, *inputs[3:])
    h, _ = run(inputs, True)
    assert torch.isfinite(h).all()
    reference = expected(inputs, dh, True)[0]
    assert relative_error(h, reference) < 4e-3 or reference.abs().max() < 1e-30


def set_gates(kind: str, igate: Tensor, fgate: Tensor) -> None:
    """Gates at the ends of what is possible."""
    if kind == 'closed':
        igate.fill_(-200.0)
    elif kind == 'open':
        fgate.fill_(100.0)
    elif kind == 'huge':
        igate.fill_(80.0)
    elif kind == 'steep':
        igate.copy_(torch.linspace(-300, 300, igate.shape[-1], device=igate.device).expand_as(igate))
    else:
        fgate[..., 100] = -torch.inf


def run(inputs: list[Tensor], reverse: bool, sums: bool = False) -> tuple[Tensor, triton_chunkwise.Saved]:
    return triton_chunkwise.forward(*inputs, reverse, EPS, sums=sums)


def runs_carried(inputs: list[Tensor], reverse: bool) -> bool:
    """Whether the forward pass took these kernels: they are the only ones that are launched."""
    names = []
    with pytest.MonkeyPatch.context() as patch:
        carry = carried.carry
        patch.setattr(carried, 'carry', lambda *x: names.append(carry(*x)) or names[-1])
        run(inputs, reverse)
    return names == [True]


@gpu_test
@pytest.mark.parametrize('reverse', [False, True])
@pytest.mark.parametrize('length', [1, 15, 63, 64, 65, 196, 257, 729, 1025])
@pytest.mark.parametrize('dim', DIMS)
def test_against_float64(dim: int, length: int, reverse: bool) -> None:
    """h and gradients, which rest on the states and n that were kept."""
    inputs, dh = make_inputs((2, 4, length, dim), torch.bfloat16, 'cuda', seed=length, token_major=reverse)
    assert runs_carried(inputs, reverse)
    actual = computed(lambda *x: mlstm_triton(*x, reverse, EPS, 'chunkwise'), inputs, dh)
    assert_all_close(actual, expected(inputs, dh, reverse), TOLERANCE[torch.bfloat16])


@gpu_test
@pytest.mark.parametrize('segments', [2, 3, 7])
@pytest.mark.parametrize('dim', [64, 96])
def test_segments(dim: int, segments: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any cut gives the same, with states between chunks that begin inside of segments."""
    cut_into(monkeypatch, segments)
    inputs, dh = make_inputs((2, 2, 64 * 17 - 23, dim), torch.bfloat16, 'cuda', seed=segments)
    actual = computed(lambda *x: mlstm_triton(*x, True, EPS, 'chunkwise'), inputs, dh)
    assert_all_close(actual, expected(inputs, dh, True), TOLERANCE[torch.bfloat16])


@gpu_test
@pytest.mark.parametrize('dim', DIMS)
def test_keeps_what_the_other_kernels_keep(dim: int) -> None:
    inputs, _ = make_inputs((2, 3, 900, dim), torch.bfloat16, 'cuda')
    h, saved = run(inputs, False)
    reference, other = triton_chunkwise.forward(
        *inputs, False, EPS, choose_tiles(dim, torch.bfloat16, device_limits(inputs[0].device))
    )
    assert relative_error(h, reference) < 5e-3
    for name in ('states', 'state_normalisers', 'normaliser'):
        assert relative_error(getattr(saved, name), getattr(other, name)) < 5e-3, name
    _, summed = run(inputs, False, sums=True)
    _, others = triton_chunkwise.forward(
        *inputs, False, EPS, choose_tiles(dim, torch.bfloat16, device_limits(inputs[0].device)), sums=True
    )
    assert relative_error(summed.normaliser, others.normaliser) < 5e-3


@gpu_test
@pytest.mark.parametrize('dim', [64, 96])
@pytest.mark.parametrize('kind', ['closed', 'open', 'huge', 'steep', 'reset'])
def test_extreme_gates(kind: str, dim: int) -> None:
    inputs, dh = make_inputs((1, 2, 400, dim), torch.bfloat16, 'cuda', seed=3)
    set_gates(kind, *inputs[3:])
    h, _ = run(inputs, True)
    assert torch.isfinite(h).all()
    reference = expected(inputs, dh, True)[0]
    assert relative_error(h, reference) < TOLERANCE[torch.bfloat16] or reference.abs().max() < 1e-30


@gpu_test
@pytest.mark.parametrize('dim', [64, 96])
def test_runs_are_equal_bit_for_bit(dim: int) -> None:
    inputs, _ = make_inputs((24, 4, 1024, dim), torch.bfloat16, 'cuda', token_major=True)
    first, *others = (run(inputs, True)[0] for _ in range(20))
    assert all(torch.equal(first, x) for x in others)


@gpu_test
def test_what_is_not_aligned_goes_to_other_kernels() -> None:
    inputs, dh = make_inputs((1, 2, 130, 96), torch.bfloat16, 'cuda')
    shifted = torch.empty(inputs[0].numel() + 4, dtype=torch.bfloat16, device='cuda')[4:].view_as(inputs[0])
    inputs[0] = shifted.copy_(inputs[0])
    assert not runs_carried(inputs, False)
    assert_all_close(
        computed(lambda *x: mlstm_triton(*x, False, EPS, 'chunkwise'), inputs, dh), expected(inputs, dh, False),
        TOLERANCE[torch.bfloat16],
    )  # fmt: skip
