"""Uninitialised memory is NaN in the tests of the operators; tapes are recorded and played without a GPU."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill whatever is allocated without content with NaN."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture
def device() -> torch.device:
    return torch.device('cuda' if torch.cuda.is_available() else 'cpu')


@pytest.fixture
def direct(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let kernels be launched by their launchers, with nothing recorded before and after."""
    from mmvil.ops import block, block_backward, block_chain, block_op, launch_tape, triton_chunkwise, triton_quadratic
    from mmvil.ops.fast_launch import FastKernels
    from mmvil.ops.triton_launch import interpreting

    from .tapes import interpreted

    monkeypatch.setattr(block_chain, 'FIRST_CALLS', 1)
    block_op.forget_tapes()
    if interpreting():
        active = SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda _: 7)
        monkeypatch.setattr(launch_tape, 'driver', SimpleNamespace(active=active))
        monkeypatch.setattr(launch_tape, 'launches_are_direct', lambda: True)
        for module in (block, block_backward, triton_quadratic, triton_chunkwise):
            for name, kernels in list(vars(module).items()):
                if isinstance(kernels, FastKernels):
                    monkeypatch.setattr(module, name, interpreted(kernels._module))
    yield
    block_op.forget_tapes()


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> list:
    """Every tape, each time it is played."""
    from mmvil.ops.launch_tape import Tape

    tapes, play = [], Tape.play

    def noting(self: Tape, *arguments: object) -> object:
        tapes.append(self)
        return play(self, *arguments)

    monkeypatch.setattr(Tape, 'play', noting)
    return tapes
