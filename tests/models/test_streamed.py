"""Inference on a CPU, some tokens at a time: the same as the plain modules, in a fraction of the memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.bench_cpu import build, peak_allocated, random_image
from mmvil.models import ViLBlock
from mmvil.models.streamed import can_stream, run_streamed

from .explicit import randomise, small_backbone

OPTIONS = {
    'v2': {},
    'v1': {'conv': 'causal_conv1d', 'conv_kernel_size': 4, 'proj_bias': False, 'norm_bias': False},
    'no convolution': {'conv': None},
    'expand_ratio 1.5': {'expand_ratio': 1.5},
    '2 heads': {'num_heads': 2},
    'blocks of 16': {'qkv_block_size': 16},
}


def plainly(block: ViLBlock, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Run the plain modules."""
    return x + block.layer(block.norm(x), grid)


@pytest.mark.parametrize('reverse', [False, True], ids=['forward', 'reverse'])
@pytest.mark.parametrize('grid', [(1, 1), (3, 5), (16, 17)], ids=['1', '15', '272 tokens'])
@pytest.mark.parametrize('options', OPTIONS.values(), ids=OPTIONS.keys())
def test_equals_the_plain_modules(options: dict, grid: tuple[int, int], reverse: bool) -> None:
    block = ViLBlock(16, reverse, **options).double().eval()
    randomise(block)
    x = torch.randn(2, grid[0] * grid[1], 16, dtype=torch.float64)
    before = x.clone()
    with torch.no_grad():
        assert can_stream(block, x)
        torch.testing.assert_close(block(x, grid), plainly(block, x, grid), rtol=1e-10, atol=1e-10)
        assert torch.equal(x, before)


def test_closed_gates() -> None:
    """Whole pieces write nothing, then everything is forgotten."""
    block = ViLBlock(16).eval()
    x = torch.randn(1, 272, 16)
    with torch.no_grad():
        for gate, closed in ((block.layer.igate, -1000.0), (block.layer.fgate, -1000.0), (block.layer.igate, -3e38)):
            gate.bias.fill_(closed)
            torch.testing.assert_close(block(x, (16, 17)), plainly(block, x, (16, 17)), rtol=1e-5, atol=1e-5)


def test_where_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    block, x = ViLBlock(16, drop_path_rate=0.5).eval(), torch.randn(1, 4, 16)
    assert not can_stream(block, x), 'gradients are wanted'
    with torch.no_grad():
        assert can_stream(block, x)
        assert not can_stream(block, x.half())
        assert not can_stream(block, x.to('meta'))
        assert not can_stream(block, x[:0])
        assert not can_stream(ViLBlock(16, mlstm_backend='parallel').eval(), x)
        assert not can_stream(block.train(), x), 'branches are dropped'
        assert can_stream(ViLBlock(16), x)
        block.eval()
        with torch.autocast('cpu', dtype=torch.bfloat16):
            assert not can_stream(block, x)
        with TorchDispatchMode():
            assert not can_stream(block, x)
        handle = block.layer.q_proj.register_forward_hook(lambda *_: None)
        assert not can_stream(block, x)
        handle.remove()
        handle = block.register_forward_hook(lambda *_: None)
        assert can_stream(block, x), 'the block itself is run as a whole'
        handle.remove()
        block.layer.conv = torch.nn.Identity()
        assert not can_stream(block, x)


def test_a_hook_sees_all_tokens() -> None:
    model, seen = small_backbone().eval(), []
    model.blocks[1].layer.head_norm.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    with torch.no_grad():
        model(torch.randn(1, 3, 32, 32))
    assert seen == [(1, 16, 32)]


def test_refuses_tokens_that_do_not_fit_the_grid() -> None:
    with torch.no_grad(), pytest.raises(ValueError, match='grid must be'):
        ViLBlock(16)(torch.randn(1, 12, 16), (3, 5))


@pytest.mark.parametrize(('first', 'second'), [(64, 128)])
def test_memory_of_a_block_is_linear(first: int, second: int) -> None:
    block = ViLBlock(32).eval()

    def peak(columns: int) -> int:
        x = torch.randn(1, 16 * columns, 32)
        with torch.no_grad():
            return peak_allocated(lambda: run_streamed(block, x, (16, columns)))

    assert peak(second) < 2.05 * peak(first)


@pytest.mark.parametrize('arch', ['tiny', 'small'])
def test_memory_at_512_pixels_is_below_a_fifth_of_the_quadratic_form(arch: str) -> None:
    image = random_image(512)
    models = [build(arch, backend, 512) for backend in ('auto', 'parallel')]
    with torch.inference_mode():
        own, quadratic = (peak_allocated(lambda model=model: model(image)) for model in models)
    assert quadratic > 4 * 4 * 1024 * 1024, 'the measure sees at least one score per head and pair of tokens'
    assert own < quadratic / 5
