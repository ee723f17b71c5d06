"""The operator on a real device: dtypes, long sequences, every tile setting, determinism, memory, capture, compile."""

import importlib
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmvil.ops import mlstm, triton_quadratic
from mmvil.ops.carried import can_carry
from mmvil.ops.chunkwise import mlstm_chunkwise
from mmvil.ops.custom_op import FORMS, mlstm_fwd, mlstm_triton
from mmvil.ops.triton_launch import device_limits

from .util import TOLERANCE, assert_all_close, computed, expected, make_inputs, relative_error, tf32_allowed

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device'),
    pytest.mark.filterwarnings('ignore:.*deterministic'),
]
EPS = 1e-6
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def check(shape: tuple, dtype: torch.dtype, reverse: bool, form: str, **options: object) -> None:
    inputs, dh = make_inputs(shape, dtype, 'cuda', seed=sum(shape), **options)
    actual = computed(lambda *x: mlstm_triton(*x, reverse, EPS, form), inputs, dh)
    if shape[2] <= 2048:
        reference = expected(inputs, dh, reverse)
    else:
        reference = computed(lambda *x: mlstm_chunkwise(*x, reverse, EPS), [x.double() for x in inputs], dh.double())
    assert_all_close(actual, reference, TOLERANCE[dtype])


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('length', [1, 15, 63, 100, 196, 197, 729, 1025])
@pytest.mark.parametrize('dim', [16, 96, 192, 384])
def test_against_float64(dim: int, length: int, dtype: torch.dtype, form: str) -> None:
    check((2, 4, length, dim), dtype, bool(length % 2), form, token_major=length % 3 == 0)


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('length', [4096, 16384])
def test_long_sequences(length: int, form: str) -> None:
    check((1, 2, length, 96), torch.bfloat16, length == 4096, form)


@pytest.mark.parametrize('dim', [1, 7, 20, 60, 100, 129, 500, 512])
def test_any_head_size(dim: int) -> None:
    check((1, 2, 130, dim), torch.bfloat16, True, 'quadratic')


@pytest.mark.parametrize('form', FORMS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 3), heads=st.integers(1, 5), length=st.integers(16, 700),
    dim=st.sampled_from([16, 40, 96, 192]), dtype=st.sampled_from(DTYPES), reverse=st.booleans(),
    token_major=st.booleans(),
)  # fmt: skip
def test_random_shapes(
    form: str, batch: int, heads: int, length: int, dim: int, dtype: torch.dtype, reverse: bool, token_major: bool
) -> None:
    """From 16 tokens: the gradient of q in a few tokens may nearly vanish, and then is all rounding error."""
    check((batch, heads, length, dim), dtype, reverse, form, token_major=token_major)


@pytest.mark.parametrize('dim', [64, 96, 128, 192, 256, 384, 512])
@pytest.mark.parametrize('kernel', ['forward', 'query', 'key', 'value'])
def test_every_tile_setting(kernel: str, dim: int) -> None:
    """Those of this card and those of a card with 64 KiB of shared memory, which has to be enough."""
    limits = device_limits(torch.device('cuda'))
    small = type(limits)(limits.capability, 64 * 1024, 1)
    for dtype in (torch.bfloat16, torch.float32):
        inputs, dh = make_inputs((1, 2, 213, dim), dtype, 'cuda')
        reference = expected(inputs, dh, True)
        size = dtype.itemsize
        chosen = triton_quadratic.tile_candidates(kernel, dim, size, limits)
        smallest = triton_quadratic.tile_candidates(kernel, dim, size, small)
        for tiles in {*chosen, *smallest}:
            h, saved = triton_quadratic.forward(*inputs, True, EPS, tiles=tiles if kernel == 'forward' else None)
            options = {'query_tiles': tiles} if kernel == 'query' else {}
            if kernel in ('key', 'value'):
                joint = kernel == 'key' and dim <= triton_quadratic.JOINT_KEY_COLUMNS
                options = {'key_tiles': tiles, 'joint': joint}
            actual = [h, *triton_quadratic.backward(dh, *inputs, h, saved, True, EPS, **options, stored=False)]
            assert_all_close(actual, reference, TOLERANCE[dtype])


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('dim', [96, 192, 384])
def test_runs_are_equal_bit_for_bit(dim: int, form: str) -> None:
    inputs, dh = make_inputs((4, 4, 197, dim), torch.bfloat16, 'cuda')
    first, *others = (computed(lambda *x: mlstm_triton(*x, False, EPS, form), inputs, dh) for _ in range(4))
    assert all(torch.equal(x, y) for other in others for x, y in zip(first, other, strict=True))


def test_float32_products_are_ieee_unless_tf32_is_allowed() -> None:
    inputs, dh = make_inputs((1, 2, 100, 96), device='cuda')
    reference = expected(inputs, dh, False)
    exact = computed(lambda *x: mlstm(*x, backend='triton'), inputs, dh)
    assert_all_close(exact, reference, 2e-5)
    with tf32_allowed():
        fast = computed(lambda *x: mlstm(*x, backend='triton'), inputs, dh)
    assert_all_close(fast, reference, 5e-3)
    if torch.cuda.get_device_capability() < (8, 0):
        return
    for x, y, truth in zip(fast[:4], exact, reference, strict=False):
        assert relative_error(x, truth) > 3 * relative_error(y, truth)  # the switch is followed


@pytest.mark.parametrize('form', FORMS)
def test_capture_in_a_graph(form: str) -> None:
    inputs, dh = make_inputs((2, 4, 197, 96), torch.bfloat16, 'cuda')
    leaves = [x.requires_grad_() for x in inputs]

    def step() -> list:
        h = mlstm_triton(*leaves, False, EPS, form)
        return [h, *torch.autograd.grad(h, leaves, dh)]

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    other, _ = make_inputs((2, 4, 197, 96), torch.bfloat16, 'cuda', seed=5)
    with torch.no_grad():
        for leaf, x in zip(leaves, other, strict=True):
            leaf.copy_(x)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(x, y) for x, y in zip(results, step(), strict=True))


@pytest.mark.parametrize('length', [197, 1100])  # one for each form
def test_compiled_in_one_graph(length: int) -> None:
    torch.compiler.reset()
    inputs, dh = make_inputs((2, 4, length, 96), torch.bfloat16, 'cuda')

    def run(*x: torch.Tensor) -> torch.Tensor:
        return mlstm(*(y * 2 for y in x), reverse=True).sin()

    compiled = torch.compile(run, fullgraph=True)
    eager, fused = computed(run, inputs, dh), computed(compiled, inputs, dh)
    for x, y in zip(eager, fused, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-2, atol=2e-2 * x.float().abs().max().item())


@pytest.mark.parametrize('form', FORMS)
def test_opcheck_on_a_device(form: str) -> None:
    inputs, _ = make_inputs((1, 2, 70, 96), torch.float32, 'cuda')
    torch.library.opcheck(mlstm_fwd, (*(x.requires_grad_() for x in inputs), True, EPS, form))


def test_autocast() -> None:
    inputs, dh = make_inputs((1, 2, 70, 96), torch.float32, 'cuda')
    rounded = [*(x.bfloat16() for x in inputs[:3]), *inputs[3:]]
    for backend in ('auto', 'triton'):

        def run(*x: torch.Tensor, backend: str = backend) -> torch.Tensor:
            with torch.autocast('cuda', torch.bfloat16):
                return mlstm(*x, backend=backend)

        h, *gradients = computed(run, inputs, dh.bfloat16())
        assert h.dtype == torch.bfloat16
        assert all(x.dtype == torch.float32 for x in gradients)
        assert_all_close([h, *gradients], expected(rounded, dh.bfloat16(), False), TOLERANCE[torch.bfloat16])


KERNEL_MODULES = {
    'quadratic': [f'triton_quadratic_{part}' for part in ('kernels', 'backward_kernels', 'stored_kernels')],
    'chunkwise': ['triton_chunkwise_states', 'triton_chunkwise_products'],
}


@pytest.mark.parametrize('form', FORMS)
def test_no_compilation_for_another_batch_or_image_size(form: str) -> None:
    names = list(KERNEL_MODULES[form])
    if form == 'chunkwise' and can_carry(96, torch.bfloat16, torch.device('cuda')):
        names.append('gluon_carry_kernels')

    def compiled_kernels() -> int:
        modules = [importlib.import_module(f'mmvil.ops.{name}') for name in names]
        found = (x for module in modules for x in vars(module).values() if hasattr(x, 'device_caches'))
        return sum(len(cache[0]) for kernel in found for cache in kernel.device_caches.values())

    def step(batch: int, length: int, reverse: bool) -> None:
        inputs, dh = make_inputs((batch, 4, length, 96), torch.bfloat16, 'cuda', token_major=True)
        computed(lambda *x: mlstm_triton(*x, reverse, EPS, form), inputs, dh)

    for reverse in (False, True):  # a constant of the chunkwise kernels
        step(2, 196, reverse)
        step(2, 300, reverse)  # the quadratic form's backward pass has other kernels from some length on
        step(2, 2000, reverse)  # sequences in segments, where the state is carried
    before = compiled_kernels()
    sizes = [(1, 1), (1, 16), (2, 17), (3, 49), (16, 64), (1, 144), (5, 196), (7, 197), (2, 256), (1, 1025), (3, 729)]
    for batch, length in sizes:
        step(batch, length, bool(length % 2))
    assert before > 0
    assert compiled_kernels() == before


@pytest.mark.parametrize('dim', [16, 136])
def test_more_heads_than_a_grid_has_rows(dim: int) -> None:
    """65,535 programs are all that fit into the second and third dimension of a grid."""
    inputs, dh = make_inputs((17000, 4, 3, dim), torch.bfloat16, 'cuda')

    def run(*x: torch.Tensor) -> torch.Tensor:
        return mlstm_triton(*x, True, EPS, 'quadratic')

    last = computed(run, [x[-5:] for x in inputs], dh[-5:])
    assert all(torch.equal(x[-5:], y) for x, y in zip(computed(run, inputs, dh), last, strict=True))


def test_memory_grows_linearly() -> None:
    def peak(length: int) -> int:
        inputs, dh = make_inputs((1, 4, length, 96), torch.bfloat16, 'cuda')
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        computed(mlstm, inputs, dh)
        return torch.cuda.max_memory_allocated() - before

    peak(4096)
    assert peak(16384) <= 4.25 * peak(4096)
    assert peak(65536) <= 17 * peak(4096)


def test_auto_takes_the_kernels_and_leaves_float64_and_large_heads_to_torch() -> None:
    for shape, dtype, expected_kernels in [
        ((1, 1, 20, 16), torch.bfloat16, True),
        ((1, 1, 20, 16), torch.float64, False),
        ((1, 1, 20, 520), torch.float32, False),
    ]:
        inputs, _ = make_inputs(shape, dtype, 'cuda')
        with mock.patch.object(triton_quadratic, 'forward', wraps=triton_quadratic.forward) as kernels_run:
            mlstm(*inputs)
        assert kernels_run.called == expected_kernels
