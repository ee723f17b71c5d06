"""Tapes against the functions they stand for: the same results, and no tape where something else has to happen.

On a CPU the kernels are interpreted, from the addresses that a tape gives.
"""

import ctypes
import functools
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mmvil.models import ViLBlock, ViLLayer
from mmvil.models.fused import fused_weights, run_fused, run_fused_blocks
from mmvil.ops import block, block_backward, block_op, launch_tape, triton_chunkwise, triton_quadratic
from mmvil.ops.fast_launch import FastKernel, FastKernels, launches_are_direct, recording
from mmvil.ops.launch_tape import MAX_TAPES, Repeated, Tape, _pack
from mmvil.ops.tape_recorder import Memory
from mmvil.ops.triton_launch import interpreting

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
needs_kernels = pytest.mark.skipif(
    not (interpreting() or launches_are_direct()), reason='needs the interpreter of Triton, or one that is known'
)
pytestmark = [needs_kernels, pytest.mark.usefixtures('direct')]
V1 = {'conv': 'causal_conv1d', 'conv_kernel_size': 4, 'proj_bias': False, 'norm_bias': False}


@triton.jit
def add_kernel(x, y, out, count, factor, BLOCK: tl.constexpr):
    """Out = x + factor * y."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    total = tl.load(x + place, mask=inside) + factor * tl.load(y + place, mask=inside)
    tl.store(out + place, total, mask=inside)


def at(address: int, dtype: torch.dtype) -> Tensor:
    """A tensor of one element in memory that belongs to others."""
    memory = (ctypes.c_char * dtype.itemsize).from_address(address)
    return torch.frombuffer(memory, dtype=dtype)


class Interpreted:
    """Stands for a `FastKernel`: its launcher interprets the kernel, given addresses."""

    def __init__(self, kernel: object) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*arguments: object, **constants: object) -> None:
            dtypes = [x.dtype if isinstance(x, Tensor) else None for x in arguments]
            run = functools.partial(self.run, dtypes, constants)
            values = [x.data_ptr() if isinstance(x, Tensor) else x for x in arguments]
            run(*grid, *(1,) * (3 - len(grid)), 7, 'function', 'metadata', None, None, None, *values, 'rest')
            if recording.recorder is not None:
                whole = (*grid, 1, 1)[:3]
                recording.recorder.note_launch(run, whole, ('function', 'metadata'), arguments, ['rest'])

        return launch

    def run(self, dtypes: Sequence, constants: dict, x: int, y: int, z: int, stream: int, *rest: object) -> None:
        assert (stream, *rest[:5], rest[-1]) == (7, 'function', 'metadata', None, None, None, 'rest')
        arguments = [
            value if dtype is None else at(value, dtype) if value else torch.empty(0, dtype=dtype)
            for dtype, value in zip(dtypes, rest[5:-1], strict=True)
        ]
        self.kernel[(x, y, z)](*arguments, **constants)


@pytest.fixture
def direct(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let kernels be launched by their launchers, with nothing recorded before and after."""
    monkeypatch.setattr(block_op, 'JOINED_FIRST_CALLS', 1)
    functions = (block_op._run_forward,), (block_op._run_backward,), (block_op._run_forwards, 1)
    forget = [block_op._repeated(*x).forget for x in functions]
    for each in forget:
        each()
    if interpreting():
        active = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda _: 7)
        monkeypatch.setattr(launch_tape, 'driver', SimpleNamespace(active=active))
        monkeypatch.setattr(launch_tape, 'launches_are_direct', lambda: True)
        for module in (block, block_backward, triton_quadratic, triton_chunkwise):
            for name, kernels in list(vars(module).items()):
                if isinstance(kernels, FastKernels):
                    monkeypatch.setattr(module, name, interpreted(kernels._module))
    yield
    for each in forget:
        each()


def interpreted(module: object) -> SimpleNamespace:
    names = [name for name in vars(module) if name.endswith('_kernel')]
    return SimpleNamespace(**{name: Interpreted(getattr(module, name)) for name in names})


@pytest.fixture
def add() -> Interpreted | FastKernel:
    return Interpreted(add_kernel) if interpreting() else FastKernel(add_kernel)


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    """Every tape, each time it is played."""
    tapes, play = [], Tape.play

    def noting(self: Tape, *arguments: object) -> object:
        tapes.append(self)
        return play(self, *arguments)

    monkeypatch.setattr(Tape, 'play', noting)
    return tapes


def made(kind: type = ViLBlock, **options: object) -> ViLBlock:
    module = kind(8, **{'num_heads': 2, **options})
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return module.to(DEVICE)


def tokens(batch: int = 2, count: int = 6) -> Tensor:
    return torch.linspace(-2, 2, batch * count * 8, device=DEVICE).sin().view(batch, count, 8)


def inferred(module: nn.Module, x: Tensor | None = None, grid: tuple[int, int] = (2, 3)) -> Tensor:
    with torch.no_grad(), torch.autocast(DEVICE, torch.float16):
        return run_fused(module, tokens() if x is None else x, grid)


def trained(module: nn.Module, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Output and all gradients."""
    torch.manual_seed(0)  # of drop path
    x = tokens().requires_grad_()
    module.zero_grad()
    with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
        out = run_fused(module, x, (2, 3))
    out.backward(torch.linspace(-1, 1, out.numel(), device=DEVICE).view_as(out).to(out.dtype))
    return [out.detach(), x.grad, *(p.grad.clone() for p in module.parameters() if p.requires_grad)]


def as_is(function: Callable[..., object], *arguments: object) -> object:
    """What a function gives without tapes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Repeated, '__call__', lambda self, tensors, *settings: self._run(tensors, settings))
        return function(*arguments)


def assert_equal(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert one.stride() == other.stride()
        assert torch.equal(one, other)


CASES = {
    '2d': (ViLBlock, {}, torch.float32, 'quadratic'),
    '2d half': (ViLBlock, {'reverse': True}, torch.float16, 'quadratic'),
    'no biases': (ViLBlock, {'proj_bias': False, 'norm_bias': False}, torch.float16, 'quadratic'),
    'v1': (ViLBlock, {**V1, 'reverse': True}, torch.float16, 'quadratic'),
    'drop path': (ViLBlock, {'drop_path_rate': 0.5}, torch.float16, 'quadratic'),
    'layer': (ViLLayer, {}, torch.float16, 'quadratic'),
    'other blocks': (ViLBlock, {'qkv_block_size': 8}, torch.float32, 'quadratic'),
    'chunkwise': (ViLBlock, {'conv': 'causal_conv1d', 'conv_kernel_size': 4}, torch.float32, 'chunkwise'),
}
IN_THE_INTERPRETER = ('2d half', 'v1', 'drop path', 'chunkwise')
"""About fifteen seconds each; a GPU runs all."""


@pytest.mark.parametrize('case', CASES if DEVICE == 'cuda' else IN_THE_INTERPRETER)
def test_tapes_give_what_the_launchers_give(case: str, played: list[Tape], monkeypatch: pytest.MonkeyPatch) -> None:
    kind, options, dtype, form = CASES[case]
    monkeypatch.setattr(block_op, 'choose_form', lambda *_: form)
    for _ in range(2):
        trained(made(kind, **options), dtype)
    assert not played
    other = made(kind, **options)
    assert_equal(trained(other, dtype), as_is(trained, other, dtype))
    assert len(played) == 2


def test_inference_of_several_sizes(played: list[Tape]) -> None:
    module = made()
    sizes = [(tokens(2, 6), (2, 3)), (tokens(1, 6), (2, 3)), (tokens(2, 6), (3, 2)), (tokens(3, 4), (2, 2))]
    expected = [as_is(inferred, module, *size) for size in sizes]
    for _ in range(3):
        for size, values in zip(sizes, expected, strict=True):
            assert torch.equal(inferred(module, *size), values)
    assert len(set(map(id, played))) == len(played) == len(sizes)


def test_parameters_are_read_anew(played: list[Tape]) -> None:
    """Replaced, changed in place or through .data, given twice, not aligned, of another dtype, with other strides."""
    module = made()
    layer = module.layer

    def check(plays: int, calls: int = 1) -> None:
        played.clear()
        expected = as_is(inferred, module)
        for _ in range(calls):
            assert torch.equal(inferred(module), expected)
        assert len(played) == plays

    check(1, calls=3)
    layer.igate.weight = nn.Parameter(layer.igate.weight.detach() * 2)
    check(1)
    layer.proj_up.weight.data.mul_(1.5)
    check(1)
    layer.q_proj.weight.data = layer.q_proj.weight.data.clone() + 0.5
    check(1)
    layer.k_proj.weight = layer.q_proj.weight
    check(1)
    memory = torch.zeros(layer.skip.numel() + 1, device=DEVICE)
    memory[1:] = layer.skip.detach()
    layer.skip.data = memory[1:]
    check(1, calls=3)
    layer.skip.data = layer.skip.data.clone()
    check(1)
    layer.proj_down.half()
    check(1, calls=3)
    layer.proj_down.weight.data = layer.proj_down.weight.data.t().contiguous().t()
    check(1, calls=3)


def joined(modules: Sequence[nn.Module], x: Tensor | None = None, grid: tuple[int, int] = (2, 3)) -> Tensor:
    with torch.no_grad(), torch.autocast(DEVICE, torch.float16):
        return run_fused_blocks(modules, tokens() if x is None else x, grid)


def one_by_one(modules: Sequence[nn.Module], x: Tensor | None = None, grid: tuple[int, int] = (2, 3)) -> Tensor:
    for module in modules:
        x = inferred(module, x, grid)
    return x


KINDS = ({}, {'reverse': True}, {'proj_bias': False, 'norm_bias': False}, {'num_heads': 1, 'reverse': True}, V1)
"""Of blocks that follow each other."""


def test_joined_blocks_are_one_tape(played: list[Tape]) -> None:
    modules = [made(**options) for options in KINDS]
    for given in [(modules, tokens(2, 6), (2, 3)), (modules[::-1], tokens(1, 8), (4, 2))]:
        expected = as_is(one_by_one, *given)
        for _ in range(3):
            played.clear()
            assert torch.equal(joined(*given), expected)
        assert len(played) == 1


def test_joined_blocks_run_one_by_one_at_first(played: list[Tape], monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes that do not come back soon are not worth a tape of all blocks, but those of single blocks are there."""
    monkeypatch.setattr(block_op, 'JOINED_FIRST_CALLS', 2)
    block_op._repeated(block_op._run_forwards, 2).forget()
    modules = [made() for _ in range(3)]
    for plays in (1, 1 + 3, 1 + 3, 1 + 3 + 1):
        joined(modules)
        assert len(played) == plays
    assert len(set(map(id, played))) == 2


def test_parameters_of_joined_blocks_are_read_anew(played: list[Tape]) -> None:
    """Replaced, changed in place or through .data, of another dtype, with other strides, not aligned."""
    modules = [made(), made(reverse=True)]
    layer = modules[1].layer

    def check(plays: int, calls: int = 1) -> None:
        expected = as_is(one_by_one, modules)
        for _ in range(calls - 1):
            joined(modules)
        played.clear()
        assert torch.equal(joined(modules), expected)
        assert len(played) == plays

    check(1, calls=3)
    layer.igate.weight = nn.Parameter(layer.igate.weight.detach() * 2)
    check(1)
    layer.q_proj.weight.data = layer.q_proj.weight.data.clone() + 0.5
    layer.proj_up.weight.data.mul_(1.5)
    modules[0].norm.weight.data.add_(0.5)
    check(1)
    modules[0].layer.k_proj.weight = layer.q_proj.weight
    check(1)
    layer.proj_down.half()
    check(1, calls=3)
    layer.proj_down.weight.data = layer.proj_down.weight.data.t().contiguous().t()
    check(1, calls=3)
    memory = torch.zeros(layer.skip.numel() + 1, device=DEVICE)
    memory[1:] = layer.skip.detach()
    layer.skip.data = memory[1:]
    check(1, calls=3)
    modules.pop()
    check(1, calls=3)


def test_joined_blocks_drop_what_single_ones_would(played: list[Tape]) -> None:
    modules = [made(drop_path_rate=0.5, reverse=reverse) for reverse in (False, True)]
    x = tokens(8)
    for _ in range(3):
        played.clear()
        torch.manual_seed(3)
        found = joined(modules, x)
        torch.manual_seed(3)
        assert torch.equal(found, as_is(one_by_one, modules, x))
    assert len(played) == 1


def test_joined_blocks_need_no_more_memory_than_single_ones(
    played: list[Tape], monkeypatch: pytest.MonkeyPatch
) -> None:
    allocated, allocating = [], launch_tape._allocating

    def noting(buffer: object) -> object:
        allocated.append(math.prod(buffer.size) * buffer.dtype.itemsize)
        return allocating(buffer)

    monkeypatch.setattr(launch_tape, '_allocating', noting)
    modules, x = [made() for _ in range(4)], tokens(2, 80)
    for _ in range(2):
        inferred(modules[0], x, (1, 80))
    single = sum(allocated)
    allocated.clear()
    for _ in range(2):
        joined(modules, x, (1, 80))
    residual = x.numel() * x.itemsize
    assert sum(allocated) <= single + residual  # one more, while the given one is still held


def test_weights_given_twice_while_recorded_may_differ_later(played: list[Tape]) -> None:
    tied, module = made(), made()
    tied.layer.k_proj.weight = tied.layer.q_proj.weight
    for _ in range(2):
        inferred(tied)
    assert torch.equal(inferred(module), as_is(inferred, module))
    assert len(played) == 1


def test_frozen_weights_have_no_gradients(played: list[Tape]) -> None:
    module = made()
    for _ in range(2):
        trained(module)
    module.layer.proj_up.weight.requires_grad_(False)
    module.layer.proj_up.weight.grad = None
    for _ in range(3):
        found = trained(module)
    assert module.layer.proj_up.weight.grad is None
    assert_equal(found, as_is(trained, module))
    assert len(played) == 3 + 1  # the forward pass is the same, frozen or not


def test_saved_tensors_may_come_back_with_other_strides(played: list[Tape]) -> None:
    module = made()
    expected = [trained(module) for _ in range(3)][-1]
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x.contiguous(), lambda x: x):
        for _ in range(3):
            assert_equal(trained(module), expected)
    assert len(played) == 2 + 3 + 1


def test_products_of_another_dtype_are_not_for_the_same_kernels(played: list[Tape]) -> None:
    module = made()
    for _ in range(3):
        trained(module)
    x = tokens().requires_grad_()
    out = run_fused(module, x, (2, 3)).sum()
    with torch.autocast(DEVICE, torch.float16):  # around the backward pass alone
        (expected,) = as_is(lambda: torch.autograd.grad(out, x, retain_graph=True))
        (found,) = torch.autograd.grad(out, x)
    assert torch.equal(found, expected)
    assert len(played) == 2 + 2


class Watching(TorchFunctionMode):
    """Sees what is called."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def test_nothing_is_played_where_launches_or_calls_are_watched(
    played: list[Tape], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = made()
    expected = [inferred(module) for _ in range(3)][-1]
    played.clear()
    with monkeypatch.context() as patch:
        patch.setattr(triton.knobs.runtime, 'launch_enter_hook', lambda _: None)
        assert torch.equal(inferred(module), expected)
    with Watching():
        assert torch.equal(inferred(module), expected)
    assert not played
    inferred(module)
    assert len(played) == 1


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16], ids=str)
def test_results_of_operators_share_no_memory(played: list[Tape], dtype: torch.dtype) -> None:
    """As torch demands of operators; it looks at each call under torch.compile."""
    weights = fused_weights(made())
    names, tensors, sizes = ' '.join(weights), list(weights.values()), (2, 3, 2, True)
    for _ in range(3):
        with torch.no_grad():
            out, *saved = torch.ops.mmvil.vil_block_fwd(tokens(), tensors, names, None, *sizes, dtype)
            found = torch.ops.mmvil.vil_block_bwd(out, tokens(), tensors, names, None, saved, *sizes)
        for results in ([out, *saved], found):
            assert len({x.untyped_storage().data_ptr() for x in results}) == len(results)
    assert len(played) == 2


def test_operators_of_compiled_models_play_tapes(played: list[Tape]) -> None:
    """There torch looks for results that share memory."""
    torch.compiler.reset()
    module, expected = made(), None
    compiled = torch.compile(lambda x: run_fused(module, x, (2, 3)), backend='aot_eager', fullgraph=True)
    for _ in range(4):
        x = tokens().requires_grad_()
        out = compiled(x)
        found = [out.detach(), *torch.autograd.grad(out.square().sum(), [x, *module.parameters()])]
        expected = expected or found
        assert_equal(found, expected)
    assert len(played) == 4


def test_memory_is_freed_while_a_call_is_recorded_and_played(add: object, played: list[Tape]) -> None:
    living = []

    def product(x: Tensor, y: Tensor) -> Tensor:
        assert len(living) % 2 == 0 or living[-1]() is None  # the second one finds the first one gone
        result = x.mul(y)
        living.append(weakref.ref(result))
        return result

    def function(tensors: list[Tensor]) -> list[Tensor]:
        (x,) = tensors
        first, out = watched(x, x), torch.empty_like(x)
        add[(1,)](x, first, out, x.numel(), 2.0, BLOCK=64)
        del first
        second = watched(out, x)
        return [torch.add(second, x)]

    def watched(x: Tensor, y: Tensor) -> Tensor:
        return (
            torch.overrides.handle_torch_function(watched_product, (x, y), x, y)
            if recording.recorder
            else product(x, y)
        )

    def watched_product(x: Tensor, y: Tensor) -> Tensor:
        return product(x, y)

    repeated, x = Repeated(function), torch.linspace(0, 1, 48, device=DEVICE)
    for number in range(4):
        (result,) = repeated([x])
        torch.testing.assert_close(result, (x + 2 * x * x) * x + x)
        assert [ref() for ref in living] == [None] * 2 * (number + 1)
    assert len(played) == 2


@pytest.mark.gpu
def test_threads_share_tapes(played: list[Tape]) -> None:
    modules = [made() for _ in range(8)]
    expected = [as_is(inferred, module) for module in modules]
    for _ in range(2):
        inferred(modules[0])
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(inferred, modules * 20))
    assert all(torch.equal(x, y) for x, y in zip(found, expected * 20, strict=True))
    assert len(played) == len(found)


@pytest.mark.gpu
def test_capture_and_another_device(played: list[Tape]) -> None:
    module, x, graph = made(), tokens(), torch.cuda.CUDAGraph()
    expected = [inferred(module, x) for _ in range(3)][-1]
    torch.cuda.synchronize()
    played.clear()
    with torch.cuda.graph(graph):
        out = inferred(module, x)
    assert len(played) == 1
    graph.replay()
    assert torch.equal(out, expected)
    if torch.cuda.device_count() > 1:
        module, x = module.to('cuda:1'), x.to('cuda:1')  # not the current one
        for _ in range(3):
            assert torch.equal(inferred(module, x).to(DEVICE), expected)
        assert len(played) == 2


def test_a_function_of_its_own(add: object, played: list[Tape]) -> None:
    def function(tensors: list[Tensor], factor: float) -> list[Tensor | None]:
        x, y = tensors
        first, second = x.new_empty(2, x.numel() - 1).unbind()
        add[(1,)](x, y, first, x.numel() - 1, factor, BLOCK=64)
        add[(1,)](first, y[1:], second, x.numel() - 1, factor, BLOCK=64)
        product = second.view(2, -1) @ first.view(-1, 2)
        third = torch.empty_like(product, dtype=torch.float64)
        add[(1,)](product, product[1], third, 2, 1.0, BLOCK=16)
        out = torch.empty_like(product.t())
        add[(1,)](third, third, out, 2, factor, BLOCK=16)
        return [out[0], None, product, x]

    repeated = Repeated(function)
    for number in range(5):
        given = [torch.randn(41, device=DEVICE) for _ in range(2)]
        if number == 1:
            given[1] = given[0]
        expected = function(given, 0.5)
        expected[0] = expected[0][:1]
        out, nothing, product, x = repeated(given, 0.5)
        assert nothing is None
        assert (x is given[0]) or number == 1
        assert_equal([out[:1], product], [expected[0], expected[2]])
    assert len(played) == 3
    held = [x for x in vars(played[0])['_values'] if isinstance(x, Tensor)]
    assert not held


@pytest.mark.parametrize(
    'parts',
    [
        lambda x: [x[:8], x[10:22].view(3, 4), x[22:23], x[30:40].view(5, 1, 2)],
        lambda x: [x[30:], None, x[2:4], x[4:30]],
        lambda x: [x[4:12], x[:8], x[4:12], x[20:32].view(3, 4).t(), x[::2], x[12:12], x[12]],
        lambda x: [x[4:12]],
        lambda x: [x, x[:10], x.view(4, 10)],
        lambda x: [x.view(4, 10)[1], x.view(4, 10)[:, 2:]],
    ],
    ids=['gaps', 'no gap at the end', 'overlaps', 'one', 'whole', 'rows'],
)
@pytest.mark.parametrize('size', [(40,), (4, 10)], ids=str)
def test_results_may_be_parts_of_one_buffer(
    size: tuple[int, ...], parts: Callable, add: object, played: list[Tape]
) -> None:
    def function(tensors: list[Tensor]) -> list[Tensor | None]:
        out = tensors[0].new_empty(size)
        add[(1,)](tensors[0], tensors[0], out, out.numel(), 1.0, BLOCK=64)
        return parts(out.view(-1))

    repeated = Repeated(function)
    for _ in range(4):
        x = torch.randn(40, device=DEVICE)
        for found, expected in zip(repeated([x]), parts(x + x), strict=True):
            assert (found is None) == (expected is None)
            if found is not None:
                assert_equal([found], [expected])
    assert len(played) == 2


@pytest.mark.parametrize(
    'change',
    [
        lambda x, new: new.zero_(),
        lambda x, new: new.__setitem__(0, 1.0),
        lambda x, new: torch.add(x, x, out=new),
        lambda x, new: new.copy_(torch.cat([x[:1], x[1:]])),
        lambda x, new: new.copy_(torch.sort(x)[0]),
    ],
    ids=['in place', 'item', 'out', 'list', 'tuple'],
)
def test_what_cannot_be_recorded_runs_as_it_is(change: Callable, played: list[Tape]) -> None:
    def function(tensors: list[Tensor]) -> list[Tensor]:
        new = torch.empty_like(tensors[0])
        change(tensors[0], new)
        return [new]

    repeated = Repeated(function)
    for _ in range(4):
        x = torch.randn(8, device=DEVICE)
        assert torch.equal(repeated([x])[0][:1], function([x])[0][:1])
    assert not played


def test_views_of_another_dtype_are_not_recorded(played: list[Tape]) -> None:
    repeated, x = Repeated(lambda tensors: [(tensors[0] + 1).view(torch.int32)]), torch.zeros(4, device=DEVICE)
    for _ in range(4):
        assert torch.equal(repeated([x])[0], (x + 1).view(torch.int32))
    assert not played


def test_errors_leave_no_recording_behind(played: list[Tape]) -> None:
    def function(tensors: list[Tensor], bad: list[bool]) -> list[Tensor]:
        if bad:
            raise ValueError('bad')
        return [tensors[0] + 1]

    repeated, x = Repeated(lambda tensors, key: function(tensors, bad)), torch.zeros(4, device=DEVICE)
    bad: list[bool] = []
    repeated([x], 0)
    bad.append(True)
    with pytest.raises(ValueError, match='bad'):
        repeated([x], 0)
    assert recording.recorder is None
    bad.clear()
    for _ in range(2):
        assert repeated([x], 0)[0].eq(1).all()
    assert len(played) == 1


def test_the_number_of_tapes_is_bounded() -> None:
    repeated, x = Repeated(lambda tensors, number: [tensors[0] + number]), torch.zeros(4, device=DEVICE)
    for number in range(2 * MAX_TAPES + 3):
        assert repeated([x], number)[0].eq(number).all()
        assert len(repeated._tapes) <= MAX_TAPES


def test_parts_that_are_used_at_the_same_time_do_not_overlap() -> None:
    generator = torch.Generator().manual_seed(0)
    memories = []
    for _ in range(60):
        size, first, length = torch.randint(1, 3000, (3,), generator=generator).tolist()
        memory = Memory(torch.empty(size))
        memory.first, memory.last = first, first + length // 4
        memories.append(memory)
    starts, total = _pack(memories)
    ends = {memory: starts[memory] + memory.bytes for memory in memories}
    assert max(ends.values()) <= total < sum(-(-memory.bytes // 512) * 512 for memory in memories)
    for one in memories:
        assert starts[one] % 512 == 0
        for other in memories:
            if one is not other and one.first <= other.last and other.first <= one.last:
                assert ends[one] <= starts[other] or ends[other] <= starts[one]
