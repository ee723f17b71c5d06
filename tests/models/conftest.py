"""The fast path of blocks on any device; one process as a group of its own."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from mmvil.models import ViLBlock, ViLLayer, block
from mmvil.ops.triton_launch import interpreting


@pytest.fixture
def fused_runs(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """Count by class what is run on the fused kernels."""
    runs, run_fused, run_fused_blocks = Counter(), block.run_fused, block.run_fused_blocks

    def counting(module: ViLBlock | ViLLayer, x: Tensor, grid: tuple[int, int]) -> Tensor:
        runs[type(module).__name__] += 1  # before: recomputation in a backward pass leaves as soon as it can
        return run_fused(module, x, grid)

    def counting_joined(modules: Sequence[ViLBlock], x: Tensor, grid: tuple[int, int]) -> Tensor | None:
        runs['ViLBlock'] += len(modules)
        return run_fused_blocks(modules, x, grid)

    monkeypatch.setattr(block, 'run_fused', counting)
    monkeypatch.setattr(block, 'run_fused_blocks', counting_joined)
    return runs


@pytest.fixture
def fused_anywhere(monkeypatch: pytest.MonkeyPatch, fused_runs: Counter) -> Counter:
    """Let blocks and layers that are not switched off do on a CPU, in the interpreter, what they do on a GPU."""
    if not (interpreting() or torch.cuda.is_available()):
        pytest.skip('needs a GPU or the interpreter of Triton')

    def run_layer(self: ViLLayer, x: Tensor, grid: tuple[int, int]) -> Tensor:
        fast = block._try_fused(self, x, grid) if self.fused else None
        return self._forward_plain(x, grid) if fast is None else fast

    def run_block(self: ViLBlock, x: Tensor, grid: tuple[int, int]) -> Tensor:
        fast = block._try_fused(self, x, grid) if self.layer.fused else None
        return x + self.drop_path(self.layer(self.norm(x), grid)) if fast is None else fast

    monkeypatch.setattr(ViLLayer, 'forward', run_layer)
    monkeypatch.setattr(ViLBlock, 'forward', run_block)
    return fused_runs


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """What data-parallel training needs, without a second process."""
    dist.init_process_group('gloo', init_method=f'file://{tmp_path}/group', rank=0, world_size=1)
    yield
    dist.destroy_process_group()
