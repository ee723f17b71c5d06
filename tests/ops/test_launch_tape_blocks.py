"""Tapes of blocks, alone and several as one call, against the launchers that they stand for."""

import math
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import triton
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mmvil.models import ViLBlock, ViLLayer
from mmvil.models.fused import fused_weights, run_fused, run_fused_blocks
from mmvil.ops import block_chain, block_op, launch_tape
from mmvil.ops.launch_tape import Repeated, Tape

from .tapes import DEVICE, assert_equal, needs_kernels

pytestmark = [needs_kernels, pytest.mark.usefixtures('direct')]
V1 = {'conv': 'causal_conv1d', 'conv_kernel_size': 4, 'proj_bias': False, 'norm_bias': False}


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
    monkeypatch.setattr(block_chain, 'FIRST_CALLS', 2)
    modules = [made() for _ in range(5)]  # the first and the last have tapes of their own
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


def trained_together(
    run: Callable, modules: Sequence[nn.Module], x: Tensor, grid: tuple[int, int], dtype: torch.dtype = torch.float16
) -> list[Tensor]:
    """Output and all gradients, None where there is none."""
    torch.manual_seed(3)
    x = x.clone().requires_grad_()
    parameters = list(nn.ModuleList(modules).parameters())
    for parameter in parameters:
        parameter.grad = None
    with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
        out = run(modules, x, grid)
    out.backward(torch.linspace(-1, 1, out.numel(), device=DEVICE).view_as(out))
    return [out.detach(), x.grad, *(None if p.grad is None else p.grad.clone() for p in parameters)]


def trained_one_by_one(modules: Sequence[nn.Module], x: Tensor, grid: tuple[int, int]) -> Tensor:
    for module in modules:
        x = run_fused(module, x, grid)
    return x


def assert_joined_trains_alike(modules: Sequence[nn.Module], *size: object) -> None:
    found = trained_together(run_fused_blocks, modules, *size)
    expected = as_is(trained_together, trained_one_by_one, modules, *size)
    for one, other in zip(found, expected, strict=True):
        assert one is other is None or torch.equal(one, other)
    assert found[1].isfinite().all()


def test_joined_blocks_train_by_one_tape_each_way(played: list[Tape]) -> None:
    modules = [made(**options, drop_path_rate=rate) for options, rate in zip(KINDS, (0, 0.5, 0, 0, 0.5), strict=True)]
    for given in [(modules, tokens(2, 6), (2, 3)), (modules[::-1], tokens(1, 8), (4, 2))]:
        for _ in range(3):
            played.clear()
            assert_joined_trains_alike(*given)
        assert len(played) == 2


def test_joined_blocks_with_cells_of_both_forms(played: list[Tape], monkeypatch: pytest.MonkeyPatch) -> None:
    """They keep unlike numbers of tensors for the backward pass."""
    monkeypatch.setattr(block_op, 'choose_form', lambda _, dim, *__: 'chunkwise' if dim > 8 else 'quadratic')
    modules = [made(), made(num_heads=1), made(reverse=True), made(num_heads=1, reverse=True)]
    for _ in range(3):
        played.clear()
        assert_joined_trains_alike(modules, tokens(), (2, 3))
    assert len(played) == 2


def test_frozen_weights_of_joined_blocks_have_no_gradients(played: list[Tape]) -> None:
    modules = [made(), made(reverse=True), made()]
    modules[0].requires_grad_(False)
    modules[1].layer.proj_up.weight.requires_grad_(False)
    modules[2].norm.bias.requires_grad_(False)
    for _ in range(3):
        played.clear()
        assert_joined_trains_alike(modules, tokens(), (2, 3))
    assert len(played) == 2
    assert all(p.grad is None for p in modules[0].parameters())
    assert modules[1].layer.proj_up.weight.grad is modules[2].norm.bias.grad is None


@pytest.mark.parametrize('batch', [1, 2, 5])
def test_halves_side_by_side_are_the_whole(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    modules, x, calls = [made(drop_path_rate=0.3), made(reverse=True, drop_path_rate=0.3), made()], tokens(batch), []

    def one_by_one(function: Callable, parts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        calls.append([len(part[0]) for part in parts])
        return [function(part) for part in parts]

    torch.manual_seed(3)
    expected = joined(modules, x)
    monkeypatch.setattr(block_chain, 'is_captured', lambda _: True)
    monkeypatch.setattr(block_chain, 'side_by_side', one_by_one)
    for limits in (range(10**9), range(0)):
        monkeypatch.setattr(block_chain, 'BESIDE', limits)
        for _ in range(3):
            torch.manual_seed(3)
            torch.testing.assert_close(joined(modules, x), expected)
    halves = [size for size in (-(-batch // 2), batch // 2) if size]
    assert calls == [halves] * 3 + [[batch]] * 3


@pytest.mark.gpu
def test_halves_side_by_side_in_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    modules, x = [made(), made(reverse=True)], tokens(6)
    beside = block_chain.side_by_side
    sizes = []
    monkeypatch.setattr(block_chain, 'BESIDE', range(10**9))
    monkeypatch.setattr(block_chain, 'side_by_side', lambda *given: sizes.append(len(given[1])) or beside(*given))
    expected = joined(modules, x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = joined(modules, x)
    for _ in range(3):
        x.add_(0.5)
        graph.replay()
        torch.testing.assert_close(out, joined(modules, x))
    assert not torch.equal(out, expected)
    assert sizes == [1, 2, 1, 1, 1]


def test_joined_blocks_go_backward_twice_if_asked(played: list[Tape]) -> None:
    modules = [made(), made(reverse=True)]
    for _ in range(3):
        x = tokens().requires_grad_()
        loss = run_fused_blocks(modules, x, (2, 3)).square().sum()
        first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, second)
        loss.backward()
        with pytest.raises(RuntimeError, match='backward through the graph a second time'):
            loss.backward()


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
    for _ in range(2):
        allocated.clear()
        joined(modules, x, (1, 80))
    residual = x.numel() * x.itemsize
    assert sum(allocated) <= single + residual  # one more, while the given one is still held


def test_joined_blocks_hold_no_more_than_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also as long as they have no tape."""
    modules, alive, forward = [made() for _ in range(5)], [], block_chain.forward

    def noting(x: Tensor, *settings: object) -> list[Tensor]:
        results = forward(x, *settings)
        alive.append([weakref.ref(result) for result in results])
        assert sum(ref() is not None for refs in alive for ref in refs) <= len(results) + 2
        return results

    monkeypatch.setattr(block_chain, 'forward', noting)
    joined(modules)
    assert len(alive) == len(modules)


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
