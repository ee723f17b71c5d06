"""Fixtures and rules of the whole suite."""

import os
import random
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    # Without a CUDA device the kernels run in Triton's interpreter. Triton looks when it is imported, which the package
    # puts off, but the compiler of torch does not.
    os.environ['TRITON_INTERPRET'] = '1'


def pytest_configure(config: pytest.Config) -> None:
    """Let each of several worker processes use one thread; more of them would wait for each other."""
    if hasattr(config, 'workerinput'):
        torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if 'gpu' in item.keywords:
            item.add_marker(pytest.mark.skip(reason='needs a CUDA device'))


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Start every test from the same random state, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def kernels_are_built() -> Iterator[None]:
    """Fail a test whose kernels were given up: others or plain torch took over, and what it shows is not about them.

    Tests that want this to happen put other dicts in the place of these.
    """
    yield
    given_up = []
    for module, name in (
        ('mmvil.ops.custom_op', 'compile_failures'),
        ('mmvil.ops.carried', 'failures'),
        ('mmvil.models.fused', '_device_reasons'),
    ):
        reasons = getattr(sys.modules.get(module), name, {})
        failed = [key for key, why in reasons.items() if name != '_device_reasons' or 'cannot be built' in str(why)]
        given_up += [reasons.pop(key) for key in failed]  # each test is to try for itself
    assert not given_up, f'the kernels were not built, plain torch ran: {given_up}'


@pytest.fixture
def nan_filled_empty() -> Iterator[None]:
    """Fill uninitialised memory with NaN, so that a result that reads it cannot pass by luck."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = filled
