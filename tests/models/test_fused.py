"""The fused block against the plain modules in float64: every output and gradient."""

import copy
from collections import Counter

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mmvil.models import ViLBlock, ViLLayer, VisionLSTM
from mmvil.models.block import _try_fused
from mmvil.models.fused import fused_weights, give_up_fused, run_fused, why_not_fused
from mmvil.ops import block_op
from mmvil.ops.flops import count_as

from .fused_cases import DEVICE, FULL_WIDTH, V1, at_full_width, on_kernels, relative, trained_like


def gradients(block: ViLBlock | ViLLayer, out: Tensor, x: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    """Output, and gradients of input and parameters."""
    x.grad = None
    block.zero_grad()
    out.backward(upstream.to(out.dtype))
    found = {'output': out, 'x': x.grad, **{name: p.grad for name, p in block.named_parameters()}}
    return {name: value.detach().clone() for name, value in found.items()}


def compare(
    block: ViLBlock, grid: tuple[int, int], dtype: torch.dtype, batch: int = 2, plain: bool = False
) -> dict[str, float]:
    """Relative error of output and gradients of the fused path, or the plain one, against float64 on the plain one."""
    x = torch.randn(batch, grid[0] * grid[1], block.layer.embed_dims, device=DEVICE, requires_grad=True)
    upstream = torch.randn_like(x)
    block = copy.deepcopy(block).to(DEVICE)
    block.layer.fused = not plain
    with torch.autocast(DEVICE, dtype=dtype, enabled=dtype != torch.float32):
        out = block(x, grid) if plain else run_fused(block, x, grid)
    found = gradients(block, out, x, upstream)
    exact = x.detach().double().requires_grad_()
    expected = gradients(block.double(), block(exact, grid), exact, upstream)
    return {name: relative(found[name], value) for name, value in expected.items()}


def mean_errors(block: ViLBlock, grid: tuple[int, int], dtype: torch.dtype, plain: bool) -> dict[str, float]:
    """Root mean square of the errors of `compare` over four draws of the input."""
    draws = []
    for seed in range(4):
        torch.manual_seed(seed)
        draws.append(compare(block, grid, dtype, plain=plain))
    return {name: (sum(draw[name] ** 2 for draw in draws) / len(draws)) ** 0.5 for name in draws[0]}


@on_kernels
@pytest.mark.parametrize(
    ('dims', 'grid', 'reverse', 'options'),
    [
        (16, (3, 5), False, {}),
        (16, (5, 3), True, {}),
        (24, (2, 18), True, {'proj_bias': False}),
        (24, (3, 7), False, V1),
        (16, (5, 7), True, V1),
        (32, (1, 2), False, {'num_heads': 2, 'qkv_block_size': 8}),
        (40, (9, 1), True, {'qkv_block_size': 16}),
        (8, (5, 2), False, {'num_heads': 1, 'qkv_block_size': 1}),
    ],
    ids=['2d', '2d-reverse', 'wide-no-bias', 'v1', 'v1-reverse', 'two-tokens', 'one-column', 'narrow'],
)
def test_float32(dims: int, grid: tuple[int, int], reverse: bool, options: dict) -> None:
    torch.manual_seed(0)
    errors = compare(trained_like(ViLBlock(dims, reverse, **options)), grid, torch.float32)
    assert all(error < 2e-4 for error in errors.values()), errors


@on_kernels
@pytest.mark.parametrize('options', [{}, V1], ids=['2d', 'v1'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16], ids=['fp32', 'fp16'])
def test_layer_on_its_own(options: dict, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer, grid = trained_like(ViLBlock(16, True, **options)).layer.to(DEVICE), (3, 5)
    x = torch.randn(2, 15, 16, device=DEVICE, requires_grad=True)
    upstream = torch.randn_like(x)
    assert why_not_fused(layer, x) is None
    with torch.autocast(DEVICE, dtype=dtype, enabled=dtype != torch.float32):
        out = run_fused(layer, x, grid)
    assert out.dtype == dtype
    found = gradients(layer, out, x, upstream)
    exact = x.detach().double().requires_grad_()
    expected = gradients(layer.double(), layer(exact, grid), exact, upstream)
    errors = {name: relative(found[name], value) for name, value in expected.items() if name != 'igate.bias'}
    assert all(error < (2e-4 if dtype == torch.float32 else 1e-2) for error in errors.values()), errors


@on_kernels
@pytest.mark.parametrize('options', [{}, V1], ids=['2d', 'v1'])
def test_float16(options: dict) -> None:
    torch.manual_seed(0)
    errors = compare(trained_like(ViLBlock(36, **options)), (3, 6), torch.float16)
    del errors['layer.igate.bias']  # its terms nearly cancel
    assert errors.pop('output') < 2e-3
    assert all(error < 1e-2 for error in errors.values()), errors


@on_kernels
@pytest.mark.parametrize('options', [{}, V1], ids=['2d', 'v1'])
def test_backward_programs_that_take_many_tiles(monkeypatch: pytest.MonkeyPatch, options: dict) -> None:
    from mmvil.ops import block_backward, block_op

    torch.manual_seed(0)
    monkeypatch.setattr(block_op, 'repeated', lambda function: lambda tensors, *settings: function(tensors, *settings))
    for table in ('ROW_TILES', 'FLAT_TILES', 'FLOAT_TILES'):
        fewest = {name: (*tile[:-1], 0) for name, tile in getattr(block_backward, table).items()}
        monkeypatch.setattr(block_backward, table, fewest)
    monkeypatch.setattr(block_backward, 'CONV_TILE', (*block_backward.CONV_TILE[:-1], 0))
    errors = compare(trained_like(ViLBlock(16, **options)), (3, 17), torch.float32, batch=3)
    assert all(error < 2e-4 for error in errors.values()), errors


@on_kernels
@pytest.mark.parametrize(('rows', 'columns'), [(14, 5), (9, 3), (1, 4)])
@pytest.mark.parametrize('trains', [False, True])
def test_strips_of_one_row_and_of_several(
    monkeypatch: pytest.MonkeyPatch, rows: int, columns: int, trains: bool
) -> None:
    from mmvil.ops import block

    torch.manual_seed(0)
    monkeypatch.setattr(block_op, 'repeated', lambda function: lambda tensors, *settings: function(tensors, *settings))
    sub_block = trained_like(ViLBlock(16)).to(DEVICE)
    x = torch.randn(2, rows * columns, 16, device=DEVICE)
    outputs = []
    for programs in (0, 10**6):  # a multiprocessor should have: at most six rows a strip, one
        monkeypatch.setattr(block, 'MIX_PROGRAMS', programs)
        with torch.set_grad_enabled(trains):
            outputs.append(run_fused(sub_block, x, (rows, columns)))
    with torch.no_grad():
        expected = sub_block.double()(x.double(), (rows, columns))
    assert torch.equal(*outputs)
    assert relative(outputs[0], expected) < 2e-5


@on_kernels
@pytest.mark.parametrize(
    ('rows', 'beside', 'height'),
    [(14, 10**4, 5), (24, 10**4, 6), (32, 10**4, 4), (1, 10**4, 4), (14, 176, 5), (14, 80, 2), (14, 12, 1)],
)
def test_rows_of_a_strip(rows: int, beside: int, height: int) -> None:
    from mmvil.ops.block import _strip_height

    assert _strip_height(rows, beside, processors=132) == height


@on_kernels
def test_planes_of_a_chunk() -> None:
    """There are as many as the kernels' order of the gates' columns needs, each for one column at most."""
    from mmvil.ops.block import share_planes
    from mmvil.ops.block_gate_kernels import _plane

    for gates in range(1, 49):
        planes = {_plane.fn(column) for column in range(gates)}
        assert len(planes) == gates
        assert share_planes(gates) == max(planes) + 1


@on_kernels
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16], ids=['fp32', 'fp16'])
def test_drop_path_scales_whole_images(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    block = trained_like(ViLBlock(16, drop_path_rate=0.5)).to(DEVICE).train()
    x = torch.randn(8, 6, 16, device=DEVICE)
    with torch.autocast(DEVICE, dtype=dtype, enabled=dtype != torch.float32):
        torch.manual_seed(3)
        fused = run_fused(block, x, (2, 3))
        torch.manual_seed(3)
        factors = block.drop_path.factors(x)
        block.drop_path.rate = 0.0
        expected = x + factors.view(-1, 1, 1) * (run_fused(block, x, (2, 3)) - x)
    assert set(factors.tolist()) == {0.0, 2.0}
    torch.testing.assert_close(fused, expected, rtol=1e-5, atol=1e-5)


def test_what_is_not_covered_says_so() -> None:
    x = torch.zeros(1, 4, 16)
    cases = {
        'switched off': ViLBlock(16, fused=False),
        'parallel': ViLBlock(16, mlstm_backend='parallel', fused=True),
        '3 x 3': ViLBlock(16, conv_kernel_size=5, fused=True),
        'power of two': ViLBlock(24, qkv_block_size=6, fused=True),
    }
    for part, block in cases.items():
        assert part in why_not_fused(block, x)
    block = ViLBlock(16, fused=True)
    assert 'float64' in why_not_fused(block, x.double())
    assert 'empty' in why_not_fused(block, x[:0])
    hooked = ViLBlock(16, fused=True)
    hooked.layer.register_forward_hook(lambda *_: None)
    assert 'hook' in why_not_fused(hooked, x)
    changed = ViLBlock(16, fused=True)
    changed.layer.proj_up = torch.nn.Sequential(changed.layer.proj_up)
    assert 'Sequential has taken the place' in why_not_fused(changed, x)
    patched = ViLBlock(16, fused=True)
    patched.layer.forward = lambda x, grid: x
    assert 'forward of a ViLLayer' in why_not_fused(patched, x)
    hooked = ViLBlock(16, fused=True)
    hooked.norm.register_full_backward_hook(lambda *_: None)
    assert 'hook' in why_not_fused(hooked, x)
    parametrised = ViLBlock(16, fused=True)
    before = why_not_fused(parametrised, x)
    torch.nn.utils.parametrizations.weight_norm(parametrised.layer.proj_down)
    assert why_not_fused(parametrised, x) == before


@pytest.mark.parametrize('enabled', [False, True])
def test_autocast_is_off_for_the_kernels_alone(enabled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def fail(*_: object) -> None:
        seen.append(torch.is_autocast_enabled('cpu'))
        raise ValueError('failed')

    monkeypatch.setattr('mmvil.models.fused.fused_block', fail)
    with torch.autocast('cpu', torch.bfloat16, enabled=enabled):
        with pytest.raises(ValueError, match='failed'):
            run_fused(ViLBlock(16), torch.zeros(1, 4, 16), (2, 2))
        assert torch.is_autocast_enabled('cpu') == enabled
    assert seen == [False]


def test_what_cannot_be_built_is_given_up_and_other_errors_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.errors import OutOfResources

    monkeypatch.setattr('mmvil.models.fused._device_reasons', {('cpu', None, torch.float32): None})
    block, x = ViLBlock(16, fused=True), torch.zeros(1, 4, 16)
    assert why_not_fused(block, x) is None
    with pytest.raises(ValueError, match='another'):
        give_up_fused(x, ValueError('another'))
    assert why_not_fused(block, x) is None
    assert 'shared memory' in give_up_fused(x, OutOfResources(2, 1, 'shared memory'))
    assert 'shared memory' in why_not_fused(block, x)


@pytest.mark.gpu
@pytest.mark.usefixtures('nan_filled_empty')
@pytest.mark.parametrize('reverse', [False, True], ids=['forward', 'reverse'])
@pytest.mark.parametrize('options', [{}, V1], ids=['2d', 'v1'])
@FULL_WIDTH
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=['bf16', 'fp16'])
def test_gradients_at_full_width(
    dims: int, grid: tuple[int, int], options: dict, reverse: bool, dtype: torch.dtype
) -> None:
    block = at_full_width(dims, reverse, options)
    # Some gradients are small differences of large terms, most of all those of the gates: their error changes by a
    # factor of eight from one draw of the input to the next, hence several draws. How much the rounding of activations
    # does to them, the plain modules under the same autocast tell (seen: 0.9 to 1.7 times as much in single draws).
    fused, plain = (mean_errors(block, grid, dtype, plain=plain) for plain in (False, True))
    worse = {name: (fused[name], plain[name]) for name in fused if not fused[name] < max(1e-2, 2 * plain[name])}
    assert not worse


@pytest.mark.gpu
@pytest.mark.usefixtures('nan_filled_empty')
@pytest.mark.parametrize('reverse', [False, True], ids=['forward', 'reverse'])
@pytest.mark.parametrize('options', [{}, V1], ids=['2d', 'v1'])
@FULL_WIDTH
def test_float32_gradients_at_full_width(
    dims: int, grid: tuple[int, int], options: dict, reverse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)  # or the plain convolutions round coarsely
    block = at_full_width(dims, reverse, options)
    fused, plain = (mean_errors(block, grid, torch.float32, plain=plain) for plain in (False, True))
    worse = {name: (fused[name], plain[name]) for name in fused if not fused[name] < max(2e-4, 3 * plain[name])}
    assert not worse


@pytest.mark.gpu
def test_whole_model_eager_compiled_and_checkpointed() -> None:
    torch.manual_seed(0)
    options = {'arch': {'embed_dims': 64, 'num_layers': 4}, 'img_size': 64, 'out_type': 'bilateral_concat'}
    model = VisionLSTM(**options, fused=True).cuda()
    plain = VisionLSTM(**options)
    plain.load_state_dict(model.state_dict())
    plain.double()
    assert why_not_fused(model.blocks[0], torch.zeros(1, 1, 64, device='cuda')) is None
    compiled = torch.compile(model, fullgraph=True)
    for size in ((64, 64), (48, 80), (33, 100)):
        image = torch.randn(2, 3, *size)
        expected = plain(image.double())[0]
        for run in (model, compiled):
            assert relative(run(image.cuda())[0], expected) < 1e-4
        with torch.no_grad():  # blocks that keep nothing
            for run in (model, compiled):
                assert relative(run(image.cuda())[0], expected) < 1e-4
    model.with_cp = True
    upstream = torch.randn_like(expected)  # the gradient of a plain sum would vanish in the last norm
    model(image.cuda())[0].backward(upstream.float().cuda())
    plain(image.double())[0].backward(upstream)
    for (name, parameter), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert relative(parameter.grad, other.grad) < 1e-3, name


@on_kernels
def test_what_is_kept_for_the_backward_pass() -> None:
    """Besides the input: five tensors of E channels a token, and numbers a head."""
    dims, grid = 48, (6, 7)
    block, tokens = ViLBlock(dims).to(DEVICE), grid[0] * grid[1]
    x = torch.randn(2, tokens, dims, device=DEVICE)
    weights = {name: weight.detach() for name, weight in fused_weights(block).items()}
    sizes = (*grid, 4, False)
    _, *kept = torch.ops.mmvil.vil_block_fwd(x, list(weights.values()), ' '.join(weights), None, *sizes, x.dtype)
    wide = sorted(t.numel() for t in kept if t.numel() >= 2 * tokens * 2 * dims)
    assert wide == [2 * tokens * 2 * dims] * 3 + [2 * tokens * 4 * dims]


@pytest.mark.gpu
def test_results_do_not_change_from_run_to_run(fused_runs: Counter) -> None:
    torch.manual_seed(0)
    block = ViLBlock(192, fused=True).cuda()
    x = torch.randn(4, 196, 192, device='cuda', requires_grad=True)
    runs = []
    for _ in range(2):
        block.zero_grad()
        x.grad = None
        with torch.autocast('cuda', torch.bfloat16):
            out = block(x, (14, 14))
        out.square().sum().backward()
        runs.append([out.detach().clone(), x.grad.clone(), *(p.grad.clone() for p in block.parameters())])
    assert fused_runs == {'ViLBlock': 2}
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


@on_kernels
@pytest.mark.parametrize('options', [{}, V1], ids=['2d', 'v1'])
def test_flops_are_those_of_the_plain_modules(options: dict) -> None:
    block = ViLBlock(32, mlstm_backend='triton', **options).to(DEVICE)
    counts = []
    block.layer.fused = False
    for run in (lambda x: run_fused(block, x, (3, 4)), lambda x: block(x, (3, 4))):
        x = torch.randn(2, 12, 32, device=DEVICE, requires_grad=True)
        with FlopCounterMode(display=False) as inference, torch.no_grad():
            run(x)
        with FlopCounterMode(display=False) as forward:
            out = run(x)
        assert inference.get_total_flops() == forward.get_total_flops()
        with FlopCounterMode(display=False) as backward:
            out.sum().backward()
        counts.append([counter.get_flop_counts()['Global'] for counter in (forward, backward)])
    (fused_forward, fused_backward), (forward, backward) = counts
    assert sum(fused_forward.values()) == sum(forward.values())
    backward[torch.ops.aten.convolution_backward] = 2 * forward[torch.ops.aten.convolution]  # torch's takes it as dense
    assert sum(fused_backward.values()) == sum(backward.values())


def test_plain_modules_are_what_is_counted() -> None:
    block = ViLBlock(16)
    with count_as('quadratic'):
        assert 'counted' in why_not_fused(block, torch.zeros(1, 4, 16))


@on_kernels
def test_traced_in_one_graph_for_all_image_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ViLBlock, 'forward', lambda self, x, grid: _try_fused(self, x, grid))  # also on a CPU
    torch.compiler.reset()
    arch = {'embed_dims': 16, 'num_layers': 2}
    model = VisionLSTM(arch, img_size=32, patch_size=8, out_type='bilateral_concat').to(DEVICE)
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    for size in ((32, 32), (24, 40), (17, 50)):
        image = torch.randn(2, 3, *size, device=DEVICE)
        torch.testing.assert_close(compiled(image)[0], model(image)[0], rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(compiled(image)[0], model(image)[0], rtol=1e-4, atol=1e-4)


@on_kernels
def test_operator_contract() -> None:
    from mmvil.models.fused import fused_weights
    from mmvil.ops.block_op import vil_block_fwd, vil_block_inference

    block = trained_like(ViLBlock(16)).to(DEVICE)
    weights = {name: weight.detach().requires_grad_() for name, weight in fused_weights(block).items()}
    x = torch.randn(1, 6, 16, device=DEVICE, requires_grad=True)
    arguments = (x, list(weights.values()), ' '.join(weights), None, 2, 3, 4, True, torch.float32)
    torch.library.opcheck(
        vil_block_fwd, arguments, test_utils=('test_schema', 'test_faketensor', 'test_autograd_registration')
    )
    with torch.no_grad():
        torch.library.opcheck(vil_block_inference, arguments, test_utils=('test_schema', 'test_faketensor'))
