"""The mLSTM cell written down once more, in numpy, token by token: what every backend is held to."""

import math

import numpy as np
import torch
from torch import Tensor

from mmvil.ops import mlstm

NAMES = ('q', 'k', 'v', 'igate', 'fgate')


def mlstm_by_definition(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, reverse: bool = False, eps: float = 1e-6
) -> Tensor:
    """Run the recurrence of the paper in float64, one head and one token at a time."""
    queries, keys, values, inputs, forgets = (x.detach().double().numpy() for x in (q, k, v, igate, fgate))
    batch, heads, length, dim = queries.shape
    h = np.empty(queries.shape)
    for b, head in np.ndindex(batch, heads):
        cell, normaliser, maximum = np.zeros((dim, dim)), np.zeros(dim), -math.inf
        for t in reversed(range(length)) if reverse else range(length):
            log_forget = -np.logaddexp(0.0, -forgets[b, head, t])
            input_gate = inputs[b, head, t]
            previous, maximum = maximum, max(log_forget + maximum, input_gate)
            keep, write = math.exp(log_forget + previous - maximum), math.exp(input_gate - maximum)
            scaled_key = keys[b, head, t] / math.sqrt(dim)
            cell = keep * cell + write * np.outer(values[b, head, t], scaled_key)
            normaliser = keep * normaliser + write * scaled_key
            with np.errstate(over='ignore'):  # a closed input gate: the quotient is 0
                denominator = max(abs(normaliser @ queries[b, head, t]), np.exp(-maximum)) + eps
            h[b, head, t] = cell @ queries[b, head, t] / denominator
    return torch.from_numpy(h)


def random_inputs(
    length: int,
    dim: int,
    batch: int = 1,
    heads: int = 2,
    dtype: torch.dtype = torch.float64,
    requires_grad: bool = False,
) -> list[Tensor]:
    """Draw q, k, v, igate and fgate; the forget gates remember for some tokens."""
    q, k, v = torch.randn(3, batch, heads, length, dim, dtype=torch.float64).unbind()
    igate, fgate = torch.randn(2, batch, heads, length, dtype=torch.float64).unbind()
    return [x.to(dtype).contiguous().requires_grad_(requires_grad) for x in (q, k, v, igate, fgate + 2.0)]


def output_and_gradients(inputs: list[Tensor], upstream: Tensor, **options: bool | str | float) -> list[Tensor]:
    """Run `mlstm` and return h and the five gradients of (h * upstream).sum()."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    h = mlstm(*leaves, **options)
    h.backward(upstream.to(h.dtype))
    return [h.detach(), *(x.grad for x in leaves)]


def assert_all_close(actual: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    """Compare h and the five gradients; the forget gate's gradient is measured against both gates' largest."""
    names = ('h', *(f'd{name}' for name in NAMES))
    gate_scale = max(expected[4].abs().max().item(), expected[5].abs().max().item())
    for name, value, truth in zip(names, actual, expected, strict=True):
        assert value.shape == truth.shape
        assert torch.isfinite(value).all(), f'{name} is not finite'
        scale = gate_scale if name == 'dfgate' else truth.abs().max().item()
        error = (value.double() - truth.double()).abs().max().item()
        assert error <= tolerance * scale, f'{name}: off by {error:.3g} of {scale:.3g}'
