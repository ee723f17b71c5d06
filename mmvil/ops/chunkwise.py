"""The mLSTM cell chunk by chunk in plain torch: linear memory, any length, any device, exportable.

Inside a chunk the quadratic form is used; between chunks a state (matrix, normaliser, stabiliser) is handed on.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import NEGLIGIBLE, divide_by_normaliser, larger, scan_order_mask, segment_decay

__all__ = ['default_chunk_size', 'mlstm_chunkwise']

CHUNK_SIZE = 64
"""Largest chunk picked by default, in tokens."""


def default_chunk_size(length: int) -> int:
    """Split a sequence into equal chunks of at most `CHUNK_SIZE` tokens, so that hardly any padding is needed.

    Args:
        length: Sequence length in tokens, at least 1.

    Returns:
        Chunk size in tokens.
    """
    return math.ceil(length / math.ceil(length / CHUNK_SIZE))


def mlstm_chunkwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    igate: Tensor,
    fgate: Tensor,
    reverse: bool = False,
    eps: float = 1e-6,
    chunk_size: int | None = None,
) -> Tensor:
    """Run the mLSTM with memory linear in the sequence length.

    Args:
        q: Queries, (B, NH, S, DH), float32 or float64.
        k: Keys, like q.
        v: Values, like q.
        igate: Input gate pre-activations, (B, NH, S).
        fgate: Forget gate pre-activations, (B, NH, S).
        reverse: Read the sequence from its end.
        eps: Added to the denominator.
        chunk_size: Tokens per chunk, at least 1. Default: `default_chunk_size(S)`.

    Returns:
        h, (B, NH, S, DH).

    Raises:
        ValueError: If chunk_size is below 1.

    Source: the recurrence of xLSTM appendix A.3, unrolled inside each chunk.
    """
    length = q.shape[-2]
    chunk = default_chunk_size(length) if chunk_size is None else min(chunk_size, length)
    if chunk < 1:
        raise ValueError(f'chunk_size must be at least 1, got {chunk_size}')
    q = q / math.sqrt(q.shape[-1])
    log_forget = F.logsigmoid(fgate)
    padding = -length % chunk
    if padding:  # padded positions hold nothing (zero k and v, closed input gate) and forget nothing
        q, k, v = (F.pad(x, (0, 0, 0, padding)) for x in (q, k, v))
        igate = F.pad(igate, (0, padding), value=NEGLIGIBLE)
        log_forget = F.pad(log_forget, (0, padding))
    q, k, v = (x.unflatten(2, (-1, chunk)) for x in (q, k, v))  # (B, NH, NC, L, DH)
    igate, log_forget = igate.unflatten(2, (-1, chunk)), log_forget.unflatten(2, (-1, chunk))  # (B, NH, NC, L)

    decay = segment_decay(log_forget, reverse)  # (B, NH, NC, L, L)
    first, last = (-1, 0) if reverse else (0, -1)  # the first and last position of a chunk in reading order
    decay_in = decay[..., first] + log_forget[..., first, None]  # from the state before the chunk to t, (B, NH, NC, L)
    write = decay[..., last, :] + igate  # from s to the state after the chunk, (B, NH, NC, L)
    cell, normaliser, state_maximum = _scan_states(k, v, write, decay_in[..., last], reverse)

    mask = scan_order_mask(chunk, reverse, q.device)
    weight = (decay + igate[..., None, :]).masked_fill(~mask, -math.inf)
    carried = decay_in + state_maximum[..., None]
    maximum = larger(carried, weight.max(-1).values)
    attention = q @ k.transpose(-1, -2) * torch.exp(weight - maximum[..., None])
    carry = torch.exp(carried - maximum)
    numerator = attention @ v + carry[..., None] * (q @ cell)
    denominator = attention.sum(-1) + carry * (q @ normaliser[..., None])[..., 0]
    h = divide_by_normaliser(numerator, denominator, maximum, eps).flatten(2, 3)
    return h[..., :length, :] if padding else h


def _scan_states(k: Tensor, v: Tensor, write: Tensor, forget: Tensor, reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the state that each chunk starts from.

    Args:
        k: (B, NH, NC, L, DH).
        v: (B, NH, NC, L, DH).
        write: Log weight of each position in the state after its chunk, (B, NH, NC, L).
        forget: Log decay of a state across a whole chunk, (B, NH, NC).
        reverse: Reading direction.

    Returns:
        Before each chunk: matrix (B, NH, NC, DH, DH), normaliser (B, NH, NC, DH), stabiliser (B, NH, NC).
    """
    local_maximum = write.max(-1).values.clamp(min=NEGLIGIBLE)  # input gates may be -inf: nothing is written
    weighted = k * torch.exp(write - local_maximum[..., None])[..., None]
    local_cell = weighted.transpose(-1, -2) @ v
    local_normaliser = weighted.sum(-2)

    count = k.shape[2]
    cell, normaliser = torch.zeros_like(local_cell[:, :, 0]), torch.zeros_like(local_normaliser[:, :, 0])
    maximum = torch.full_like(local_maximum[:, :, 0], NEGLIGIBLE)
    states = [(cell, normaliser, maximum)] * count
    for c in range(count - 1, -1, -1) if reverse else range(count):
        states[c] = (cell, normaliser, maximum)
        carried = forget[:, :, c] + maximum
        maximum = larger(carried, local_maximum[:, :, c])
        keep = torch.exp(carried - maximum)
        add = torch.exp(local_maximum[:, :, c] - maximum)
        cell = keep[..., None, None] * cell + add[..., None, None] * local_cell[:, :, c]
        normaliser = keep[..., None] * normaliser + add[..., None] * local_normaliser[:, :, c]
    cells, normalisers, maxima = zip(*states, strict=True)
    return torch.stack(cells, 2), torch.stack(normalisers, 2), torch.stack(maxima, 2)
