"""The kernels compile for cards that are not here and fit their shared memory. Triton's compiler needs no device."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

KIB = 1024
SCRIPT = Path(__file__).parent / 'compile_for.py'
ROOT = SCRIPT.parents[2]


def compile_for(script: Path, *arguments: object) -> list[str]:
    """Run a script outside of the interpreter and return the lines that it prints."""
    pytest.importorskip('triton')
    command = [sys.executable, str(script), *map(str, arguments)]
    environment = {**os.environ, 'TRITON_INTERPRET': '0', 'PYTHONPATH': str(ROOT)}
    child = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-2000:]
    return child.stdout.splitlines()


@pytest.mark.parametrize(
    ('capability', 'limit', 'dtype', 'dim'),
    [
        (86, 99 * KIB, 'bf16', 96),  # consumer cards of 8 GB and more
        pytest.param(86, 99 * KIB, 'bf16', 384, marks=pytest.mark.slow),
    ],
)
def test_kernels_fit(capability: int, limit: int, dtype: str, dim: int) -> None:
    used = dict(json.loads(line) for line in compile_for(SCRIPT, capability, limit, dtype, dim))
    assert set(used) == {'forward', 'query', 'key', 'value'}
    assert all(0 < size <= limit for size in used.values()), used


@pytest.mark.slow
@pytest.mark.parametrize(
    ('dtype', 'dims', 'edge', 'cell'),
    [
        ('bfloat16', 192, 14, 'matrix_gradient_kernel'),
        ('bfloat16', 192, 20, 'key_gradient_kernel'),  # more than 256
        ('bfloat16', 192, 33, 'product_kernel'),  # more than 1,024 tokens
        ('float16', 384, 14, 'matrix_gradient_kernel'),
        ('bfloat16', 768, 14, 'matrix_gradient_kernel'),
        ('float32', 192, 33, 'product_kernel'),
    ],
    ids=str,
)
def test_the_launchers_find_settings_for_a_consumer_card(dtype: str, dims: int, edge: int, cell: str) -> None:
    """A whole block, forward and backward, with the shared memory of a card of 8 GB: what does not fit is refused."""
    limit = 99 * KIB
    (line,) = compile_for(SCRIPT.with_name('compile_all_for.py'), 86, limit, dtype, dims, edge)
    used = json.loads(line)
    assert {'prepare_kernel', 'finish_kernel', cell} <= set(used)
    assert max(used.values()) <= limit, used
