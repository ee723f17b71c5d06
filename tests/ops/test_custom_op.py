"""The torch operator around the kernels: registration, layouts, checkpointing, compilation, fallback, refusals."""

import sys
import warnings
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from mmvil.ops import available_backends, custom_op, mlstm, triton_launch
from mmvil.ops.custom_op import FORMS, mlstm_bwd, mlstm_fwd, mlstm_triton
from mmvil.ops.torch_backward import mlstm_with_gradients

from .util import GATE_FACTOR, assert_all_close, computed, expected, make_inputs

EPS = 1e-6
SHAPE = (1, 2, 20, 16)


@pytest.fixture
def fresh_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(custom_op, 'compile_failures', {})


@pytest.mark.parametrize('form', FORMS)
def test_opcheck(form: str, device: torch.device) -> None:
    inputs, dh = make_inputs(SHAPE, device=device)
    torch.library.opcheck(mlstm_fwd, (*(x.requires_grad_() for x in inputs), True, EPS, form))
    inputs = [x.detach() for x in inputs]
    h, *saved = mlstm_fwd(*inputs, True, EPS, form)
    torch.library.opcheck(mlstm_bwd, (dh, *inputs, h, saved, True, EPS, form))


@pytest.mark.parametrize('token_major', [False, True])
def test_fake_kernels_promise_the_real_layout(token_major: bool, device: torch.device) -> None:
    inputs, dh = make_inputs((2, 3, 20, 16), device=device, token_major=token_major)
    real = mlstm_fwd(*inputs, False, EPS, 'quadratic')
    with torch._subclasses.FakeTensorMode() as mode:
        fake_inputs = [mode.from_tensor(x) for x in (dh, *inputs)]
        fake = mlstm_fwd(*fake_inputs[1:], False, EPS, 'quadratic')
        fake_gradients = mlstm_bwd(*fake_inputs, fake[0], fake[1:], False, EPS, 'quadratic')
    gradients = mlstm_bwd(dh, *inputs, real[0], real[1:], False, EPS, 'quadratic')
    for x, y in zip([*real, *gradients], [*fake, *fake_gradients], strict=True):
        assert (x.shape, x.stride(), x.dtype) == (y.shape, y.stride(), y.dtype)


@pytest.mark.parametrize('form', FORMS)
def test_compiled_equals_eager(form: str, device: torch.device) -> None:
    inputs, dh = make_inputs(SHAPE, device=device)

    def run(*x: torch.Tensor) -> torch.Tensor:
        return mlstm_triton(*(y + 1 for y in x), True, EPS, form).sin()

    compiled = torch.compile(run, fullgraph=True, backend='aot_eager', dynamic=False)
    for x, y in zip(computed(run, inputs, dh), computed(compiled, inputs, dh), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-6)


def test_checkpointed_gradients_are_equal(device: torch.device) -> None:
    inputs, dh = make_inputs(SHAPE, device=device)

    def run(*x: torch.Tensor) -> torch.Tensor:
        return mlstm_triton(*x, False, EPS, 'quadratic')

    plain = computed(run, inputs, dh)
    again = computed(lambda *x: checkpoint(run, *x, use_reentrant=False), inputs, dh)
    assert all(torch.equal(x, y) for x, y in zip(plain, again, strict=True))


def test_gates_of_another_dtype_and_stride(device: torch.device) -> None:
    inputs, dh = make_inputs(SHAPE, torch.float16, device)
    inputs[3:] = [x.half().transpose(1, 2).contiguous().transpose(1, 2) for x in inputs[3:]]
    actual = computed(lambda *x: mlstm(*x, backend='triton'), inputs, dh)
    assert [x.dtype for x in actual] == [torch.float16] * 6
    assert_all_close(actual, expected(inputs, dh, False), 3e-3)


def test_only_the_asked_gradients_are_needed(device: torch.device) -> None:
    inputs, dh = make_inputs(SHAPE, device=device)
    k = inputs[1].requires_grad_()
    (dk,) = torch.autograd.grad(mlstm(*inputs, backend='triton'), k, dh)
    assert_all_close([dk] * 6, [expected(inputs, dh, False)[2]] * 6, 2e-5)


@pytest.mark.parametrize('length', [1, 20, 300])
@pytest.mark.parametrize('reverse', [False, True])
def test_plain_torch_without_autograd(length: int, reverse: bool) -> None:
    inputs, dh = make_inputs((2, 2, length, 16))
    inputs = [x.double() for x in inputs]
    reference = expected(inputs, dh, reverse)
    results = mlstm_with_gradients(*inputs, reverse, EPS) + mlstm_with_gradients(*inputs, reverse, EPS, dh.double())
    for x, y in zip(results[:4], reference, strict=False):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)
    assert_all_close(
        results, reference, 1e-5 / GATE_FACTOR
    )  # gates: the stabiliser is a constant here, eps tells it apart


def break_compiler(monkeypatch: pytest.MonkeyPatch, name: str, error: Exception) -> ModuleType:
    module = custom_op._module('quadratic')

    def refuse(*args: object) -> None:
        raise error

    monkeypatch.setattr(module, name, refuse)
    return module


@pytest.mark.parametrize('name', ['forward', 'backward'])
@pytest.mark.parametrize('compiled', [False, True], ids=['eager', 'compiled'])
@pytest.mark.usefixtures('fresh_failures')
def test_failing_compile_warns_once_and_falls_back(
    name: str, compiled: bool, monkeypatch: pytest.MonkeyPatch, device: torch.device
) -> None:
    break_compiler(monkeypatch, name, RuntimeError('PassManager::run failed'))
    inputs, dh = make_inputs(SHAPE, device=device)

    def run(*x: torch.Tensor) -> torch.Tensor:
        return mlstm_triton(*x, True, EPS, 'quadratic')

    run = torch.compile(run, fullgraph=True, backend='aot_eager') if compiled else run
    with pytest.warns(UserWarning, match='quadratic Triton kernels .* do not compile'):
        actual = computed(run, inputs, dh)
    assert_all_close(actual, expected(inputs, dh, True), 2e-5)
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='.*do not compile.*')
        computed(run, inputs, dh)


@pytest.mark.parametrize('error', [ValueError('wrong shape'), torch.cuda.OutOfMemoryError('full')])
@pytest.mark.usefixtures('fresh_failures')
def test_other_errors_are_not_hidden(error: Exception, monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    break_compiler(monkeypatch, 'forward', error)
    inputs, _ = make_inputs(SHAPE, device=device)
    with pytest.raises(type(error)):
        mlstm_triton(*inputs, True, EPS, 'quadratic')


def test_unknown_form() -> None:
    inputs, _ = make_inputs(SHAPE)
    with pytest.raises(ValueError, match='linear'):
        mlstm_triton(*inputs, False, EPS, 'linear')


@pytest.mark.parametrize(('dtype', 'dim', 'message'), [(torch.float64, 16, 'float64'), (torch.float32, 513, '512')])
def test_triton_refuses_what_it_cannot_do(dtype: torch.dtype, dim: int, message: str, device: torch.device) -> None:
    inputs, _ = make_inputs((1, 1, 5, dim), dtype, device)
    with pytest.raises(ValueError, match=message):
        mlstm(*inputs, backend='triton')
    assert mlstm(*inputs).dtype == dtype


def test_refusal_without_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('TRITON_INTERPRET', '0')
    inputs, _ = make_inputs(SHAPE)
    with pytest.raises(ValueError, match='CUDA device'):
        mlstm(*inputs, backend='triton')
    if not torch.cuda.is_available():
        assert 'CUDA' in available_backends()['triton']


@pytest.mark.parametrize(
    ('capability', 'variable', 'reason'),
    [
        ((9, 0), None, None),
        ((8, 6), None, None),
        ((13, 0), None, 'unknown'),
        ((6, 1), None, 'unknown'),
        ((13, 0), '1', None),
    ],
)
def test_card_by_capability(
    capability: tuple[int, int], variable: str | None, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('TRITON_INTERPRET', '0')
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda index=None: capability)
    monkeypatch.delenv(triton_launch.ANY_CARD_VARIABLE, raising=False)
    if variable:
        monkeypatch.setenv(triton_launch.ANY_CARD_VARIABLE, variable)
    found = triton_launch.why_not_on_device('cuda', 0)
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize(
    ('capability', 'dtype', 'warned', 'backend'),
    [
        ((9, 0), torch.bfloat16, None, 'triton'),
        ((7, 5), torch.float16, None, 'triton'),
        ((7, 5), torch.bfloat16, 'no bfloat16', 'parallel'),
        ((13, 0), torch.float32, 'capability 13.0 is unknown', 'parallel'),
        ((9, 0), torch.float64, None, 'parallel'),  # for checks: nobody expects kernels
    ],
    ids=str,
)
def test_auto_on_a_card_warns_once_and_takes_plain_torch(
    capability: tuple[int, int], dtype: torch.dtype, warned: str | None, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv('TRITON_INTERPRET', '0')
    monkeypatch.delenv(triton_launch.ANY_CARD_VARIABLE, raising=False)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda index=None: capability)
    module = sys.modules['mmvil.ops.mlstm']
    monkeypatch.setattr(module, '_warned', set())
    q = SimpleNamespace(is_cuda=True, dtype=dtype, shape=(1, 4, 100, 96), device=torch.device('cuda', 0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        found = [module._choose_backend('auto', q) for _ in range(3)]
    assert found == [backend] * 3
    assert len(caught) == bool(warned)
    assert all(warned in str(x.message) for x in caught)
    if warned:
        with pytest.raises(ValueError, match=f"backend 'triton' cannot be used here: .*{warned}.*'chunkwise'"):
            module._choose_backend('triton', q)


def test_compiled_once_for_all_batch_and_image_sizes(device: torch.device) -> None:
    """A second size makes both dynamic; after it nothing is traced again."""
    torch.compiler.reset()
    counter = CompileCounterWithBackend('aot_eager')
    compiled = torch.compile(lambda *x: mlstm(*x, backend='triton') + 1, fullgraph=True, backend=counter)
    sizes = [(2, 20), (3, 30), (2, 16), (5, 33), (4, 21), (3, 48), (2, 32), (7, 19), (3, 36), (6, 25), (2, 40)]
    for number, (batch, length) in enumerate(sizes):
        inputs, _ = make_inputs((batch, 2, length, 16), device=device)
        torch.testing.assert_close(compiled(*inputs), mlstm(*inputs, backend='triton') + 1, rtol=1e-6, atol=1e-6)
        assert counter.frame_count == min(number + 1, 2)


def test_bfloat16_needs_a_card_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('TRITON_INTERPRET', '0')
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda index=None: (7, 5))
    assert 'float16' in triton_launch.why_not_dtype(torch.bfloat16, 'cuda', 0)
    assert triton_launch.why_not_dtype(torch.float16, 'cuda', 0) is None
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda index=None: (8, 6))
    assert triton_launch.why_not_dtype(torch.bfloat16, 'cuda', 0) is None
