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


@pytest.mark.parametrize(
    ('capability', 'limit', 'dtype', 'dim'),
    [
        (86, 99 * KIB, 'bf16', 96),  # consumer cards of 8 GB and more
        pytest.param(86, 99 * KIB, 'bf16', 384, marks=pytest.mark.slow),
    ],
)
def test_kernels_fit(capability: int, limit: int, dtype: str, dim: int) -> None:
    pytest.importorskip('triton')
    command = [sys.executable, str(SCRIPT), str(capability), str(limit), dtype, str(dim)]
    environment = {**os.environ, 'TRITON_INTERPRET': '0', 'PYTHONPATH': str(ROOT)}
    child = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr[-2000:]
    used = dict(json.loads(line) for line in child.stdout.splitlines())
    assert set(used) == {'forward', 'query', 'key', 'value'}
    assert all(0 < size <= limit for size in used.values()), used
