"""The public operator: all backends against the definition, and what it accepts and refuses."""

import pytest
import torch
from torch import Tensor, nn

from mmvil.ops import available_backends, mlstm
from mmvil.ops.mlstm import _choose_backend

from .definition import NAMES, assert_all_close, mlstm_by_definition, output_and_gradients, random_inputs

TORCH_BACKENDS = ('recurrent', 'parallel', 'chunkwise')
DIRECTIONS = pytest.mark.parametrize('reverse', [False, True], ids=['forward', 'reverse'])
BACKENDS = pytest.mark.parametrize('backend', [*TORCH_BACKENDS, 'auto'])


@DIRECTIONS
@pytest.mark.parametrize('dim', [5, 16, 96])
@pytest.mark.parametrize('length', [1, 15, 63, 100, 197])
def test_backends_follow_the_definition(length: int, dim: int, reverse: bool) -> None:
    inputs = random_inputs(length, dim)
    upstream = torch.randn_like(inputs[0])
    truth = mlstm_by_definition(*inputs, reverse=reverse)
    recurrent = output_and_gradients(inputs, upstream, reverse=reverse, backend='recurrent')
    assert (recurrent[0] - truth).abs().max() <= 1e-11 * truth.abs().max()
    for backend in ('parallel', 'chunkwise', 'auto'):
        assert_all_close(output_and_gradients(inputs, upstream, reverse=reverse, backend=backend), recurrent, 1e-9)


@DIRECTIONS
@pytest.mark.parametrize('backend', TORCH_BACKENDS)
def test_gradients_equal_finite_differences(backend: str, reverse: bool) -> None:
    inputs = random_inputs(5, 3, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *x: mlstm(*x, reverse=reverse, backend=backend), inputs)


@BACKENDS
def test_reverse_equals_flip_run_flip(backend: str) -> None:
    inputs = random_inputs(130, 8)
    upstream = torch.randn_like(inputs[0])
    flipped = [x.flip(2) for x in inputs]
    expected = [x.flip(2) for x in output_and_gradients(flipped, upstream.flip(2), backend=backend)]
    assert_all_close(output_and_gradients(inputs, upstream, reverse=True, backend=backend), expected, 1e-10)


@BACKENDS
def test_outputs_depend_on_the_past_only(backend: str) -> None:
    inputs = random_inputs(70, 8)
    changed = [x.clone() for x in inputs]
    for x in changed:
        x[:, :, 40:] += 1.0
    h, h_changed = (mlstm(*x, backend=backend) for x in (inputs, changed))
    assert torch.allclose(h[:, :, :40], h_changed[:, :, :40], rtol=0, atol=1e-12)
    assert (h[:, :, 40:] - h_changed[:, :, 40:]).abs().amax((0, 1, 3)).min() > 1e-3


@BACKENDS
def test_eps_is_added_to_the_denominator(backend: str) -> None:
    inputs = random_inputs(9, 4)
    h = mlstm(*inputs, eps=0.5, backend=backend)
    assert torch.allclose(h, mlstm_by_definition(*inputs, eps=0.5), rtol=0, atol=1e-12)
    assert (h - mlstm(*inputs, backend=backend)).abs().max() > 0.01


@DIRECTIONS
@BACKENDS
def test_transposed_views_are_accepted(backend: str, reverse: bool) -> None:
    inputs = random_inputs(33, 6, batch=2, heads=3)
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs]
    assert not any(x.is_contiguous() for x in views)
    upstream = torch.randn_like(inputs[0])
    expected = output_and_gradients(inputs, upstream, reverse=reverse, backend=backend)
    assert_all_close(output_and_gradients(views, upstream, reverse=reverse, backend=backend), expected, 1e-12)


@BACKENDS
def test_broadcast_and_sliced_views_are_accepted(backend: str) -> None:
    q, k, v, igate, fgate = random_inputs(12, 4, batch=2, heads=2)
    views = [q[:1].expand(2, -1, -1, -1), *(torch.cat([x, x], -1)[..., ::2] for x in (k, v)), igate, fgate[:, :, :1]]
    views[4] = views[4].expand_as(igate)
    truth = mlstm_by_definition(*views)
    assert torch.allclose(mlstm(*views, backend=backend), truth, rtol=0, atol=1e-12)


@BACKENDS
def test_inputs_are_left_alone(backend: str) -> None:
    inputs = random_inputs(66, 4)
    copies = [x.clone() for x in inputs]
    mlstm(*inputs, backend=backend)
    assert all(torch.equal(x, copy) for x, copy in zip(inputs, copies, strict=True))


@DIRECTIONS
@BACKENDS
def test_empty_batch(backend: str, reverse: bool) -> None:
    inputs = random_inputs(70, 4, batch=0)
    h, *gradients = output_and_gradients(inputs, torch.empty(0, 2, 70, 4), reverse=reverse, backend=backend)
    assert h.shape == (0, 2, 70, 4)
    assert [x.shape for x in gradients] == [x.shape for x in inputs]


@BACKENDS
def test_samples_and_heads_are_independent(backend: str) -> None:
    inputs = random_inputs(21, 4, batch=3, heads=2)
    alone = mlstm(*(x[1:2, 1:] for x in inputs), backend=backend)
    assert torch.allclose(mlstm(*inputs, backend=backend)[1:2, 1:], alone, rtol=0, atol=1e-13)


@BACKENDS
def test_no_result_reads_uninitialised_memory(backend: str, nan_filled_empty: None) -> None:
    inputs = random_inputs(67, 5)
    for x in output_and_gradients(inputs, torch.ones_like(inputs[0]), backend=backend):
        assert torch.isfinite(x).all()


# Half a unit in the last place of the largest value, and a little for float32 in between.
ROUNDING = {torch.float32: 2e-5, torch.bfloat16: 2**-8 * 1.001, torch.float16: 2**-11 * 1.01}


@DIRECTIONS
@BACKENDS
@pytest.mark.parametrize('dtype', ROUNDING, ids=str)
def test_short_floats_lose_only_the_last_rounding(dtype: torch.dtype, backend: str, reverse: bool) -> None:
    inputs = random_inputs(140, 16, dtype=dtype)
    upstream = torch.randn_like(inputs[0])
    exact = [x.double() for x in inputs]
    expected = output_and_gradients(exact, upstream.double(), reverse=reverse, backend='recurrent')
    actual = output_and_gradients(inputs, upstream, reverse=reverse, backend=backend)
    assert all(x.dtype == dtype for x in actual)
    # The definition runs in float64 also for float32: its last rounding alone remains.
    definition = backend == 'recurrent' and dtype == torch.float32
    assert_all_close(actual, expected, 2**-24 * 1.01 if definition else ROUNDING[dtype])


@BACKENDS
@pytest.mark.parametrize('gate_dtype', [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float32], ids=str)
def test_gates_keep_their_own_dtype(dtype: torch.dtype, gate_dtype: torch.dtype, backend: str) -> None:
    q, k, v, igate, fgate = random_inputs(30, 8)
    inputs = [q.to(dtype), k.to(dtype), v.to(dtype), igate.to(gate_dtype), fgate.to(gate_dtype)]
    upstream = torch.randn_like(inputs[0])
    expected = output_and_gradients([x.double() for x in inputs], upstream.double(), backend='recurrent')
    actual = output_and_gradients(inputs, upstream, backend=backend)
    assert [x.dtype for x in actual] == [dtype, dtype, dtype, dtype, gate_dtype, gate_dtype]
    assert_all_close([*actual[:4], *expected[4:]], expected, ROUNDING[dtype])
    assert_all_close([*expected[:4], *actual[4:]], expected, ROUNDING.get(gate_dtype, ROUNDING[torch.float32]))


EXTREMES = [(gate, value) for gate in ('igate', 'fgate') for value in (40.0, -40.0, 1000.0, -1000.0)]
EXTREMES += [('both', 'mixed40'), ('both', 'mixed1000')]


@DIRECTIONS
@pytest.mark.parametrize('backend', TORCH_BACKENDS)
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(('gate', 'value'), EXTREMES)
def test_extreme_gates(gate: str, value: float | str, dtype: torch.dtype, backend: str, reverse: bool) -> None:
    inputs = random_inputs(70, 8)
    inputs[:2] = [x.abs() for x in inputs[:2]]  # a normaliser that nearly cancels would make float32 arbitrarily bad
    for name in ('igate', 'fgate') if gate == 'both' else (gate,):
        x = inputs[NAMES.index(name)]
        if isinstance(value, str):
            size = float(value.removeprefix('mixed'))
            x.copy_(torch.where(torch.rand_like(x) < 0.5, -size, size) + torch.randn_like(x))
        else:
            x.add_(value)
    inputs = [x.to(dtype) for x in inputs]
    upstream = torch.randn_like(inputs[0])
    truth = mlstm_by_definition(*inputs, reverse=reverse)
    actual = output_and_gradients(inputs, upstream, reverse=reverse, backend=backend)
    # Beside a gate of 1000, float32 has steps of 6e-5.
    tolerance = 1e-11 if dtype == torch.float64 else 1e-4 if '1000' in str(value) else 1e-5
    assert ((actual[0].double() - truth).abs().amax(-1) <= tolerance * truth.abs().amax(-1)).all(), 'each token of h'
    exact = [x.double() for x in inputs]
    expected = output_and_gradients(exact, upstream.double(), reverse=reverse, backend='recurrent')
    assert_all_close(actual, expected, tolerance)


@DIRECTIONS
@BACKENDS
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_closed_input_gates_give_exactly_zero(dtype: torch.dtype, backend: str, reverse: bool) -> None:
    inputs = [x.to(dtype) for x in random_inputs(70, 8)]
    inputs[3] = torch.full_like(inputs[3], -1000.0)
    h, *gradients = output_and_gradients(inputs, torch.randn_like(inputs[0]), reverse=reverse, backend=backend)
    assert torch.equal(h, torch.zeros_like(h))
    for x in gradients:
        assert torch.equal(x, torch.zeros_like(x))


@BACKENDS
def test_gates_of_minus_infinity_mask_tokens(backend: str) -> None:
    q, k, v, igate, fgate = random_inputs(140, 4)
    igate[:, :, 40:100] = -torch.inf  # a whole chunk and more
    igate[:, :, :3] = igate[:, :, 9] = -torch.inf
    fgate[:, :, 12] = -torch.inf
    h, *gradients = output_and_gradients([q, k, v, igate, fgate], torch.ones_like(q), backend=backend)
    assert torch.equal(h[:, :, :3], torch.zeros(1, 2, 3, 4, dtype=q.dtype)), 'nothing has been written yet'
    forgotten = mlstm_by_definition(*(x[:, :, 12:] for x in (q, k, v, igate, fgate)))
    assert torch.allclose(h[:, :, 12:], forgotten, rtol=0, atol=1e-12)
    k[:, :, 9], v[:, :, 9] = 100.0, 100.0
    assert torch.equal(mlstm(q, k, v, igate, fgate, backend=backend), h), 'a masked token is never read'
    assert all(torch.isfinite(x).all() for x in gradients)


@BACKENDS
def test_autocast_narrows_q_k_v_and_leaves_the_gates(backend: str) -> None:
    inputs = random_inputs(70, 8, dtype=torch.float32, requires_grad=True)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        h = mlstm(*inputs, backend=backend)
    h.float().sum().backward()
    assert h.dtype == torch.bfloat16
    assert all(x.grad.dtype == torch.float32 for x in inputs)
    narrow = [*(x.bfloat16() for x in inputs[:3]), *inputs[3:]]
    assert torch.equal(h, mlstm(*narrow, backend=backend))


def test_autocast_leaves_float64_alone() -> None:
    inputs = random_inputs(10, 4)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        assert torch.equal(mlstm(*inputs), mlstm(*inputs))
        assert mlstm(*inputs).dtype == torch.float64


@pytest.mark.parametrize('backend', ['parallel', 'chunkwise', 'auto'])
def test_runs_on_meta_tensors_and_never_looks_at_values(backend: str) -> None:
    inputs = [x.to('meta') for x in random_inputs(200, 8, dtype=torch.bfloat16)]
    h = mlstm(*inputs, backend=backend)
    assert h.shape == (1, 2, 200, 8)
    assert h.dtype == torch.bfloat16


class Cell(nn.Module):
    def __init__(self, backend: str, reverse: bool) -> None:
        super().__init__()
        self.backend, self.reverse = backend, reverse

    def forward(self, q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor) -> Tensor:
        return mlstm(q, k, v, igate, fgate, backend=self.backend, reverse=self.reverse)


@DIRECTIONS
@pytest.mark.parametrize('backend', ['parallel', 'chunkwise'])
def test_exported_equals_eager(backend: str, reverse: bool) -> None:
    inputs = random_inputs(70, 4, batch=2, dtype=torch.float32)
    cell = Cell(backend, reverse)
    batch = torch.export.Dim('batch')
    exported = torch.export.export(cell, tuple(inputs), dynamic_shapes=[{0: batch}] * 5)
    more = random_inputs(70, 4, batch=5, dtype=torch.float32)
    for x in (inputs, more):
        assert torch.allclose(exported.module()(*x), cell(*x), rtol=0, atol=1e-6)


@pytest.mark.parametrize('backend', ['parallel', 'chunkwise'])
def test_compiled_equals_eager(backend: str) -> None:
    torch.compiler.reset()
    inputs = random_inputs(70, 4)
    upstream = torch.randn_like(inputs[0])
    leaves = [x.clone().requires_grad_() for x in inputs]
    h = torch.compile(Cell(backend, False), fullgraph=True, backend='aot_eager')(*leaves)
    h.backward(upstream)
    expected = output_and_gradients(inputs, upstream, backend=backend)
    assert_all_close([h.detach(), *(x.grad for x in leaves)], expected, 1e-12)


def test_available_backends_tell_the_reason() -> None:
    backends = available_backends()
    assert list(backends) == [*TORCH_BACKENDS, 'triton']
    assert all(backends[name] is None for name in TORCH_BACKENDS)
    assert backends['triton'] is None or len(backends['triton']) > 10


@pytest.mark.parametrize('name', ['cuda', '', 'Parallel', None, 3, ['parallel']], ids=repr)
def test_unknown_backend_is_refused_with_the_known_ones(name: object) -> None:
    with pytest.raises(ValueError, match=r"backend must be 'auto' or one of \[.*'chunkwise'.*'triton'.*\], got"):
        mlstm(*random_inputs(3, 2), backend=name)


@pytest.mark.skipif(available_backends()['triton'] is None, reason='Triton can be used here')
def test_unusable_backend_is_refused_with_reason_and_alternatives() -> None:
    with pytest.raises(ValueError, match='triton') as error:
        mlstm(*random_inputs(3, 2, dtype=torch.float32), backend='triton')
    assert available_backends()['triton'] in str(error.value)
    assert all(name in str(error.value) for name in TORCH_BACKENDS)


def replaced(name: str, value: object) -> list:
    inputs = random_inputs(6, 4, batch=2, dtype=torch.float32)
    inputs[NAMES.index(name)] = value
    return inputs


BAD_INPUTS = {
    'k no tensor': ('k', [1.0], TypeError, r'k must be a torch.Tensor, got list'),
    'q no tensor': ('q', None, TypeError, r'q must be a torch.Tensor, got NoneType'),
    'q of integers': ('q', torch.ones(2, 2, 6, 4).long(), TypeError, r'q must be float32, .*float16, got torch.int64'),
    'fgate bool': ('fgate', torch.ones(2, 2, 6).bool(), TypeError, r'fgate must be float32, .*got torch.bool'),
    'igate complex': (
        'igate',
        torch.ones(2, 2, 6).cfloat(),
        TypeError,
        r'igate must be float32, .*got torch.complex64',
    ),
    'q of 3 axes': ('q', torch.ones(2, 6, 4), ValueError, r'q must have shape \(B, NH, S, DH\).*got \(2, 6, 4\)'),
    'q of 5 axes': ('q', torch.ones(1, 2, 2, 6, 4), ValueError, r'q must have shape .*got \(1, 2, 2, 6, 4\)'),
    'no tokens': ('q', torch.ones(2, 2, 0, 4), ValueError, r'q must have shape .* of at least 1, got \(2, 2, 0, 4\)'),
    'no channels': ('q', torch.ones(2, 2, 6, 0), ValueError, r'q must have shape .* of at least 1, got'),
    'no heads': ('q', torch.ones(2, 0, 6, 4), ValueError, r'q must have shape .* of at least 1, got'),
    'k shorter': ('k', torch.ones(2, 2, 5, 4), ValueError, r'k must .* q \(2, 2, 6, 4\), got \(2, 2, 5, 4\)'),
    'v to broadcast': ('v', torch.ones(1, 2, 6, 4), ValueError, r'v must have the shape of q .*got \(1, 2, 6, 4\)'),
    'v of other dtype': (
        'v',
        torch.ones(2, 2, 6, 4).double(),
        TypeError,
        r'v must .* \(torch.float32\), got .*float64',
    ),
    'igate of 4 axes': ('igate', torch.ones(2, 2, 6, 1), ValueError, r'igate .*\(2, 2, 6\), got \(2, 2, 6, 1\)'),
    'fgate transposed': (
        'fgate',
        torch.ones(2, 6, 2),
        ValueError,
        r'fgate must have shape .*\(2, 2, 6\), got \(2, 6, 2\)',
    ),
    'k elsewhere': ('k', torch.ones(2, 2, 6, 4, device='meta'), ValueError, r'k must be on .* q \(cpu\), got meta'),
    'fgate elsewhere': ('fgate', torch.ones(2, 2, 6, device='meta'), ValueError, r'fgate must be on .*got meta'),
}


@pytest.mark.parametrize(('name', 'value', 'kind', 'message'), BAD_INPUTS.values(), ids=BAD_INPUTS.keys())
def test_bad_input_is_refused_by_name(name: str, value: object, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        mlstm(*replaced(name, value))


@pytest.mark.parametrize('eps', [-1e-6, float('nan')])
def test_bad_eps_is_refused(eps: float) -> None:
    with pytest.raises(ValueError, match='eps must not be negative, got'):
        mlstm(*random_inputs(3, 2), eps=eps)


def test_options_are_keywords() -> None:
    with pytest.raises(TypeError, match='positional'):
        mlstm(*random_inputs(3, 2), True)


def test_nan_stays_in_its_sample() -> None:
    inputs = random_inputs(10, 4, batch=2)
    inputs[0][0, 0, 5] = torch.nan
    h = mlstm(*inputs)
    assert torch.isnan(h[0, 0, 5]).all()
    assert torch.isfinite(h[1]).all()


@pytest.mark.parametrize(
    ('dim', 'length', 'expected'),
    [(16, 128, 'parallel'), (96, 196, 'chunkwise'), (384, 196, 'parallel'), (384, 1024, 'chunkwise')],
)
def test_auto_weighs_length_against_head_size_on_a_cpu(dim: int, length: int, expected: str) -> None:
    assert _choose_backend('auto', torch.zeros(1, 1, length, dim)) == expected
