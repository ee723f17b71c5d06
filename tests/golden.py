"""Access to the golden data: the committed part, or a whole collection named by MMVIL_GOLDEN."""

import json
import os
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

COMMITTED = Path(__file__).parent / 'data' / 'golden'
GOLDEN = Path(os.environ.get('MMVIL_GOLDEN') or COMMITTED)


def golden_names(prefix: str) -> list[str]:
    """Names of the golden files that start with a prefix."""
    return sorted(path.stem for path in GOLDEN.glob(f'{prefix}*.npz'))


def committed_names(prefix: str) -> list[str]:
    """Those that are part of the repository, for tests that would take long over a whole collection."""
    return [name for name in golden_names(prefix) if (COMMITTED / f'{name}.npz').is_file()]


@cache
def golden_json(name: str) -> dict:
    """Content of a golden JSON file."""
    return json.loads((GOLDEN / f'{name}.json').read_text(encoding='utf-8'))


@cache
def golden_arrays(name: str) -> dict[str, Tensor]:
    """Arrays of a golden file."""
    with np.load(GOLDEN / f'{name}.npz') as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def with_prefix(arrays: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Arrays whose names start with a prefix, without it."""
    return {key[len(prefix) :]: value for key, value in arrays.items() if key.startswith(prefix)}


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str, scale: float | None = None) -> None:
    """Fail unless the largest difference is within a share of the largest reference value."""
    assert actual.shape == expected.shape, f'{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}'
    assert torch.isfinite(actual).all(), f'{what} is not finite'
    actual, expected = actual.detach().double().cpu(), expected.double()
    scale = expected.abs().max().item() if scale is None else scale
    error = (actual - expected).abs().max().item()
    assert error <= tolerance * scale, f'{what}: off by {error:.3g} of {scale:.3g}, allowed {tolerance:.0e}'
