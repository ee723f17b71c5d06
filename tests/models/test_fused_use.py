"""What a training loop does with a model whose blocks run fused: each setting against the plain modules."""

import copy
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from mmengine.model import ExponentialMovingAverage
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode

from mmvil.models import ViLBlock, VisionLSTM, fused, vil
from mmvil.models import block as block_module
from mmvil.ops import block_op
from mmvil.ops.eager import operators_may_be_skipped
from mmvil.ops.flops import count_as

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
LAYERS = 2
pytestmark = pytest.mark.usefixtures('nan_filled_empty')


def pair(**options: object) -> tuple[VisionLSTM, VisionLSTM]:
    """A fused and a plain model with the same weights, which all matter."""
    options = {'arch': {'embed_dims': 16, 'num_layers': LAYERS}, 'img_size': 16, 'patch_size': 8, **options}
    model, plain = VisionLSTM(**options), VisionLSTM(**options, fused=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    plain.load_state_dict(model.state_dict())
    return model.to(DEVICE).train(), plain.to(DEVICE).train()


def images(count: int = 1) -> Iterator[Tensor]:
    """Batches of two images of 2 x 3 patches."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield torch.randn(2, 3, 16, 24, generator=generator).to(DEVICE)


def loss_of(model: nn.Module, image: Tensor) -> Tensor:
    out = model(image)[0].float()
    return (out * torch.linspace(-1, 1, out.numel(), device=DEVICE).view_as(out)).sum()


def gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same(one: dict[str, Tensor | None], other: dict[str, Tensor | None], tolerance: float = 1e-3) -> None:
    """The same tensors are missing, the others agree; a gradient that is rounding alone is no part of this."""
    assert one.keys() == other.keys()
    largest = max(x.norm() for x in other.values() if x is not None)
    for name, expected in other.items():
        assert (one[name] is None) == (expected is None), name
        if expected is not None:
            error = (one[name] - expected).norm()
            assert error <= tolerance * (expected.norm() + 1e-2 * largest), (name, error, expected.norm())


@pytest.mark.parametrize('frozen', [0, 1, LAYERS])
def test_frozen_stages(frozen: int, fused_anywhere: Counter) -> None:
    models = pair(frozen_stages=frozen)
    (image,) = images()
    for model in models:
        loss_of(model, image).backward()
    assert fused_anywhere == {'ViLBlock': LAYERS}
    found, expected = (gradients(model) for model in models)
    assert_same(found, expected)
    assert {name for name, x in found.items() if x is not None} == {
        name for name, parameter in models[0].named_parameters() if parameter.requires_grad
    }


@pytest.mark.parametrize('version', ['v1', 'v2'])
def test_drop_path_in_both_passes(version: str, fused_anywhere: Counter) -> None:
    image = torch.randn(8, 3, 16, 16, device=DEVICE)
    found = []
    for model in pair(drop_path_rate=0.5, version=version):
        factors, draw = [], model.blocks[0].drop_path.factors
        model.blocks[0].drop_path.factors = lambda x, draw=draw, factors=factors: factors.append(draw(x)) or factors[-1]
        torch.manual_seed(3)
        loss_of(model, image).backward()
        assert set(factors[0].tolist()) == {0.0, 2.0}
        found.append(gradients(model))
    assert fused_anywhere == {'ViLBlock': LAYERS}
    assert_same(*found)


def test_checkpointing_changes_no_gradient(fused_anywhere: Counter) -> None:
    found = []
    (image,) = images()
    model, _ = pair(drop_path_rate=0.5)
    for model.with_cp in (False, True):
        fused_anywhere.clear()
        torch.manual_seed(3)  # the same branches are dropped, also where they are computed again
        model.zero_grad()
        loss_of(model, image).backward()
        assert fused_anywhere['ViLBlock'] == (2 if model.with_cp else 1) * LAYERS
        found.append({name: x.clone() for name, x in gradients(model).items()})
    assert all(torch.equal(found[0][name], x) for name, x in found[1].items())


@pytest.mark.slow
@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_mixed_precision_with_accumulation_and_averaged_weights(dtype: str, fused_anywhere: Counter) -> None:
    """Loss scaling, two batches a step, averaged weights: as mmengine's training loop does it."""
    if DEVICE == 'cpu' and dtype == 'bfloat16':
        pytest.skip("Triton's interpreter computes bfloat16 wrongly")
    averages, scales = [], []
    for model in pair():
        options = {'accumulative_counts': 2}
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        if DEVICE == 'cuda':
            wrapper = AmpOptimWrapper(dtype=dtype, loss_scale=32.0, optimizer=optimizer, **options)
        else:
            wrapper = OptimWrapper(optimizer, **options)
            scaler = torch.amp.GradScaler('cpu', init_scale=32.0)
            wrapper.scale_loss = lambda loss, scaler=scaler: scaler.scale(loss / 2)
            wrapper.step = lambda scaler=scaler, optimizer=optimizer: (scaler.step(optimizer), scaler.update())
        average = ExponentialMovingAverage(model, momentum=0.5)
        start = copy.deepcopy(dict(model.named_parameters()))
        for image in images(4):
            with torch.autocast(DEVICE, getattr(torch, dtype)):
                loss = loss_of(model, image)
            wrapper.update_params(loss)
            average.update_parameters(model)
        scales.append(wrapper.loss_scaler.get_scale() if DEVICE == 'cuda' else scaler.get_scale())
        (image,) = images()
        with torch.no_grad(), torch.autocast(DEVICE, getattr(torch, dtype)):
            output = average.eval()(image)[0].float()
        moved = {name: x.detach() - start[name] for name, x in model.named_parameters()}
        averages.append({**moved, 'output': output})
    assert scales == [32.0, 32.0]  # no step was left out
    assert fused_anywhere['ViLBlock'] == 5 * LAYERS
    assert_same(*averages, tolerance=3e-2 if dtype == 'float16' else 2e-1)


@pytest.mark.usefixtures('process_group')
@pytest.mark.parametrize('options', [{}, {'with_cp': True, 'frozen_stages': 1}], ids=['default', 'checkpointed'])
def test_data_parallel(options: dict, fused_anywhere: Counter) -> None:
    """No search for unused parameters; gradients are views of the buckets that are reduced."""
    model, plain = pair(**options)
    wrapped = DistributedDataParallel(model, find_unused_parameters=False, gradient_as_bucket_view=True)
    for image in images(2):
        loss_of(wrapped, image).backward()
        loss_of(plain, image).backward()
    assert fused_anywhere['ViLBlock'] >= 2 * LAYERS
    assert_same(gradients(model), gradients(plain))


def test_the_reason_is_logged_once(fused_anywhere: Counter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, '_said', set())
    block, x = ViLBlock(16, conv_kernel_size=5).to(DEVICE), torch.randn(1, 6, 16, device=DEVICE)
    lines = []
    monkeypatch.setattr(fused, 'print_log', lambda text, **_: lines.append(text))
    for _ in range(3):
        block(x, (2, 3))
    assert lines == ['ViL blocks run as plain modules: the kernels are made for 3 x 3 or causal size-4 convolutions']
    assert not fused_anywhere


@pytest.fixture
def unbuildable(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """`refuse`, which fails as kernels do that cannot be built; how often it was called, and what was logged."""
    from triton.runtime.errors import OutOfResources

    monkeypatch.setattr(fused, '_said', set())
    monkeypatch.setattr(fused, '_device_reasons', {})
    found = SimpleNamespace(tries=0, lines=[])
    monkeypatch.setattr(fused, 'print_log', lambda text, **_: found.lines.append(text))

    def refuse(*_: object) -> None:
        found.tries += 1
        raise OutOfResources(2, 1, 'shared memory')

    found.refuse = refuse
    return found


def test_kernels_that_cannot_be_built_leave_the_block_to_its_modules(
    fused_anywhere: Counter, unbuildable: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr('mmvil.models.block.run_fused', unbuildable.refuse)
    block, x = ViLBlock(16).to(DEVICE), torch.randn(1, 6, 16, device=DEVICE)
    expected = x + block.layer._forward_plain(block.norm(x), (2, 3))
    for _ in range(2):
        torch.testing.assert_close(block(x, (2, 3)), expected)
    assert unbuildable.tries == len(unbuildable.lines) == 1
    assert 'cannot be built for torch.float32' in unbuildable.lines[0]


def test_a_backward_pass_that_cannot_be_built_is_found_in_the_forward_pass(
    fused_anywhere: Counter, unbuildable: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_op, '_built', set())
    monkeypatch.setattr(block_op, 'interpreting', bool)  # where nothing is built
    block, x = ViLBlock(16).to(DEVICE), torch.randn(1, 6, 16, device=DEVICE)
    with torch.no_grad():
        inference = block(x, (2, 3))
    monkeypatch.setattr(block_op._backward_launchers(), 'block_backward', unbuildable.refuse)
    for _ in range(2):
        out = block(x, (2, 3))
        torch.testing.assert_close(out, inference, rtol=1e-4, atol=1e-4)
        gradients = torch.autograd.grad(out.square().sum(), list(block.parameters()))
        plain = x + block.layer._forward_plain(block.norm(x), (2, 3))
        expected = torch.autograd.grad(plain.square().sum(), list(block.parameters()))
        torch.testing.assert_close(gradients, expected)
    assert unbuildable.tries == len(unbuildable.lines) == 1
    assert 'cannot be built for torch.float32' in unbuildable.lines[0]


def test_the_backward_pass_is_built_once_for_each_kind_of_block(
    fused_anywhere: Counter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_op, '_built', set())
    monkeypatch.setattr(block_op, 'interpreting', bool)
    block_op.forget_tapes()  # of blocks of these sizes in other tests, which would be repeated
    launchers, runs = block_op._backward_launchers(), []
    backward = launchers.block_backward

    def counted(shape: object, *rest: object) -> object:
        runs.append(shape)
        return backward(shape, *rest)

    monkeypatch.setattr(launchers, 'block_backward', counted)
    blocks = [ViLBlock(16, reverse=reverse).to(DEVICE) for reverse in (False, True, False)]
    for grid in ((2, 3), (3, 3)):
        x = torch.randn(1, grid[0] * grid[1], 16, device=DEVICE)
        for block in blocks:
            block(x, grid)
    assert [shape.reverse for shape in runs] == [False, True]
    blocks[0](torch.randn(1, 257, 16, device=DEVICE), (1, 257))  # takes other kernels
    assert [shape.tokens for shape in runs] == [6, 6, 257]


@pytest.fixture
def joined_anywhere(fused_anywhere: Counter, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let models join blocks on a CPU too; how many were joined, each time."""
    runs, run = [], block_module.run_fused_blocks

    def counting(blocks: Sequence[ViLBlock], x: Tensor, grid: tuple[int, int]) -> Tensor | None:
        runs.append(len(blocks))
        return run(blocks, x, grid)

    def may_join(x: Tensor) -> bool:
        return operators_may_be_skipped(x) and fused._why_not_tokens(x) is None

    monkeypatch.setattr(block_module, 'run_fused_blocks', counting)
    monkeypatch.setattr(block_module, 'may_join', may_join)
    monkeypatch.setattr(block_module, 'CALLED', (ViLBlock.__call__, ViLBlock.forward))
    return runs


def four_blocks(**options: object) -> VisionLSTM:
    model, _ = pair(arch={'embed_dims': 16, 'num_layers': 4}, **options)
    return model.eval()


def with_and_without_joining(model: nn.Module, image: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    torch.manual_seed(3)
    found = model(image)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vil, 'run_joined', lambda blocks, x, grid: (x, 0))
        torch.manual_seed(3)
        return found, model(image)


@pytest.mark.parametrize(
    ('options', 'expected'),
    [
        ({}, [4]),
        ({'out_indices': (3, 0, 2)}, [2]),
        ({'out_indices': (1, 3), 'out_type': 'raw'}, [2, 2]),
        ({'with_cp': True, 'frozen_stages': 2}, [4]),
        ({'version': 'v1', 'drop_path_rate': 0.5}, [4]),
    ],
    ids=str,
)
def test_blocks_are_joined_up_to_what_is_wanted(
    options: dict, expected: list[int], joined_anywhere: list[int], fused_anywhere: Counter
) -> None:
    model = four_blocks(**options)
    for image in images(2):
        with torch.no_grad():
            found, one_by_one = with_and_without_joining(model.train(), image)
        assert all(torch.equal(*both) for both in zip(found, one_by_one, strict=True))
    assert joined_anywhere == 2 * expected
    assert fused_anywhere == {'ViLBlock': 2 * 2 * 4}


@pytest.mark.parametrize(
    ('options', 'expected'),
    [
        ({}, [3]),
        ({'out_indices': (1, 3), 'out_type': 'raw'}, [2, 2]),
        ({'frozen_stages': 2, 'drop_path_rate': 0.5}, [2, 2]),
        ({'with_cp': True}, []),
    ],
    ids=str,
)
def test_blocks_train_a_few_at_a_time(
    options: dict, expected: list[int], joined_anywhere: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_module, 'TRAINED_TOGETHER', 3)
    model, (image,) = four_blocks(**options).train(), images()
    parameters = [p for p in model.parameters() if p.requires_grad]
    results = []
    for joins in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not joins:
                patch.setattr(vil, 'run_joined', lambda blocks, x, grid: (x, 0))
            torch.manual_seed(3)
            outputs = model(image)
            results.append([*outputs, *torch.autograd.grad([x.square().sum() for x in outputs], parameters)])
    assert all(torch.equal(*both) for both in zip(*results, strict=True))
    assert joined_anywhere == expected


def replace_forward(made: ViLBlock) -> None:
    forward = made.forward
    made.forward = lambda x, grid: forward(x, grid) + 1


def replace_kind(made: ViLBlock) -> None:
    made.__class__ = type('Wrapped', (ViLBlock,), {})


def compile_call(made: ViLBlock) -> None:
    made._compiled_call_impl = lambda x, grid: made._call_impl(x, grid) + 1


SEEN = {  # what is done to the third of four blocks, and how many are joined then
    'forward hook': (lambda made: made.register_forward_hook(lambda module, given, out: out + 1), [2]),
    'pre hook': (lambda made: made.register_forward_pre_hook(lambda module, given: (given[0] + 1, given[1])), [2]),
    'backward hook': (lambda made: made.register_full_backward_hook(lambda *_: None), [2]),
    'forward': (replace_forward, [2]),
    'class': (replace_kind, [2]),
    'compiled': (compile_call, [2]),
    'hook inside': (lambda made: made.layer.proj_up.register_forward_hook(lambda module, given, out: out + 1), [2]),
    'parametrised': (lambda made: torch.nn.utils.parametrizations.weight_norm(made.layer.proj_down), [2]),
    'switched off': (lambda made: setattr(made.layer, 'fused', False), [2]),
    'backend': (lambda made: setattr(made.layer, 'mlstm_backend', 'parallel'), [2]),
    'half a block': (lambda made: made.layer.proj_down.half(), [4]),
}


@pytest.mark.parametrize('case', SEEN)
def test_blocks_that_somebody_watches_or_changes_are_called(case: str, joined_anywhere: list[int]) -> None:
    change, expected = SEEN[case]
    model = four_blocks()
    change(model.blocks[2])
    with torch.no_grad():
        for image in images():
            found, one_by_one = with_and_without_joining(model, image)
    assert torch.equal(found[0], one_by_one[0])
    assert joined_anywhere == expected


def test_hooks_of_all_modules_see_each_block(joined_anywhere: list[int]) -> None:
    model, seen = four_blocks(), []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, given, out: seen.append(module))
    try:
        with torch.no_grad():
            model(next(images()))
    finally:
        handle.remove()
    assert [module for module in seen if isinstance(module, ViLBlock)] == list(model.blocks)
    assert not joined_anywhere


def test_other_forward_functions_of_all_blocks_run(joined_anywhere: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, called = four_blocks(), []
    monkeypatch.setattr(ViLBlock, 'forward', lambda self, x, grid: called.append(self) or x)
    with torch.no_grad():
        model(next(images()))
    assert called == list(model.blocks)
    assert not joined_anywhere


def test_blocks_are_not_joined_where_each_is_watched(joined_anywhere: list[int], fused_anywhere: Counter) -> None:
    model, (image,) = four_blocks(frozen_stages=4), images()
    with torch.no_grad():
        (expected,) = model(image)
        with FlopCounterMode(display=False):
            assert torch.equal(model(image)[0], expected)
        assert fused_anywhere == {'ViLBlock': 2 * 4}
        with count_as('quadratic'):
            model(image)
    assert joined_anywhere == [4]
    for context in (torch.enable_grad, torch.inference_mode):
        with context():
            assert torch.equal(model(image)[0], expected)
    assert joined_anywhere == [4, 4, 4]


def test_weights_of_joined_blocks_may_change(joined_anywhere: list[int]) -> None:
    model, (image,) = four_blocks(), images()
    weight = model.blocks[1].layer.proj_up.weight
    changes = [
        lambda: None,
        lambda: weight.data.mul_(2),
        lambda: setattr(model.blocks[1].layer.proj_up, 'weight', nn.Parameter(weight.detach() + 0.1)),
        lambda: model.blocks[2].load_state_dict(model.blocks[0].state_dict()),
    ]
    results = []
    with torch.no_grad():
        for change in changes:
            change()
            found, one_by_one = with_and_without_joining(model, image)
            assert torch.equal(found[0], one_by_one[0])
            results.append(found[0])
    assert not any(torch.equal(*both) for both in pairwise(results))
    assert joined_anywhere == [4] * len(changes)


def test_kernels_that_cannot_be_built_leave_joined_blocks_to_their_modules(
    joined_anywhere: list[int], unbuildable: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, (image,) = four_blocks(), images()
    monkeypatch.setattr(block_module, 'run_fused_blocks', unbuildable.refuse)
    plain = copy.deepcopy(model)
    for each in plain.blocks:
        each.layer.fused = False
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(model(image)[0], plain(image)[0])
    assert unbuildable.tries == len([line for line in unbuildable.lines if 'cannot be built' in line]) == 1
