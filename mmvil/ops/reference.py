"""The mLSTM cell by definition: step by step, and as one quadratic product. The fast forms are held to these.

Shapes: q, k, v (B, NH, S, DH); igate, fgate (B, NH, S); everything here has one dtype, float32 or float64.
Source: Vision-LSTM (arXiv 2406.04303) section 3, xLSTM (arXiv 2405.04517) equations 19 to 27 and appendix A.3.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    'NEGLIGIBLE',
    'divide_by_normaliser',
    'larger',
    'mlstm_parallel',
    'mlstm_recurrent',
    'scan_order_mask',
    'segment_decay',
]

# Stands for minus infinity where subtracting two infinities would give NaN.
NEGLIGIBLE = -1e30


def larger(first: Tensor, second: Tensor) -> Tensor:
    """Return the larger of two tensors; at a tie the whole gradient goes to the first, as in a row maximum."""
    return torch.where(first >= second, first, second)


def scan_order_mask(length: int, reverse: bool, device: torch.device) -> Tensor:
    """Which position may see which.

    Args:
        length: Number of positions.
        reverse: Whether the sequence is read from its end.
        device: Where to put the mask.

    Returns:
        Bool (length, length), [t, s]: true where position t has read position s.
    """
    index = torch.arange(length, device=device)
    return index[:, None] <= index[None, :] if reverse else index[:, None] >= index[None, :]


def segment_decay(log_forget: Tensor, reverse: bool) -> Tensor:
    """Sum the log forget gates between every two positions, segment by segment.

    Differences of one running sum would be cheaper, but that sum reaches -1000 * S for closed gates, where float32 has
    lost the digits of everything that comes after.

    Args:
        log_forget: (..., L).
        reverse: Reading direction.

    Returns:
        (..., L, L), [t, s]: log decay of what was written at s until it is read at t; 0 outside of the reading order.
    """
    length = log_forget.shape[-1]
    index = torch.arange(length, device=log_forget.device)
    if reverse:
        # gates t .. s-1, summed along s
        shifted = F.pad(log_forget[..., :-1], (1, 0))
        steps = shifted[..., None, :].masked_fill(index[None, :] <= index[:, None], 0.0)
        return steps.expand(*log_forget.shape, length).cumsum(-1)
    # gates s+1 .. t, summed along t
    steps = log_forget[..., :, None].masked_fill(index[:, None] <= index[None, :], 0.0)
    return steps.expand(*log_forget.shape, length).cumsum(-2)


def divide_by_normaliser(numerator: Tensor, normaliser: Tensor, maximum: Tensor, eps: float) -> Tensor:
    """Compute `numerator / (max(|normaliser|, exp(-maximum)) + eps)`, with 0 where exp(-maximum) overflows.

    Args:
        numerator: (..., DH).
        normaliser: (...), signed sum of the weights.
        maximum: (...), the stabiliser m that numerator and normaliser have been scaled by.
        eps: Added to the denominator.

    Returns:
        Tensor of the numerator's shape.
    """
    # exp(-m) leaves the float range for closed input gates (m below about -88 in float32). The quotient is 0 there, and
    # the clamp keeps inf out of the graph, where its gradient would be 0 * inf = NaN.
    limit = math.log(torch.finfo(maximum.dtype).max) - 0.5
    floor = torch.exp(torch.clamp(-maximum, max=limit))
    denominator = torch.maximum(normaliser.abs(), floor) + eps
    quotient = numerator / denominator[..., None]
    return quotient.masked_fill((-maximum > limit)[..., None], 0.0)


def mlstm_recurrent(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, reverse: bool = False, eps: float = 1e-6
) -> Tensor:
    """Run the mLSTM step by step: the definition.

    Args:
        q: Queries, (B, NH, S, DH), float32 or float64.
        k: Keys, like q.
        v: Values, like q.
        igate: Input gate pre-activations, (B, NH, S).
        fgate: Forget gate pre-activations, (B, NH, S).
        reverse: Read the sequence from its end.
        eps: Added to the denominator.

    Returns:
        h, (B, NH, S, DH).

    Source: xLSTM appendix A.3, with the stabiliser starting at minus infinity.
    """
    batch, heads, length, dim = q.shape
    k = k / math.sqrt(dim)
    log_forget = F.logsigmoid(fgate)
    cell = q.new_zeros(batch, heads, dim, dim)
    normaliser = q.new_zeros(batch, heads, dim)
    maximum = torch.full_like(igate[..., 0], NEGLIGIBLE)
    outputs = [q.new_empty(0)] * length
    for t in range(length - 1, -1, -1) if reverse else range(length):
        carried = log_forget[..., t] + maximum
        maximum = larger(carried, igate[..., t])
        keep = torch.exp(carried - maximum)
        write = torch.exp(igate[..., t] - maximum)
        cell = keep[..., None, None] * cell + (write[..., None] * k[..., t, :])[..., None] * v[..., t, None, :]
        normaliser = keep[..., None] * normaliser + write[..., None] * k[..., t, :]
        numerator = (q[..., t, None, :] @ cell)[..., 0, :]
        outputs[t] = divide_by_normaliser(numerator, (q[..., t, :] * normaliser).sum(-1), maximum, eps)
    return torch.stack(outputs, dim=-2)


def mlstm_parallel(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, reverse: bool = False, eps: float = 1e-6
) -> Tensor:
    """Run the mLSTM as one masked S x S product: quadratic in time and memory.

    Args:
        q: Queries, (B, NH, S, DH), float32 or float64.
        k: Keys, like q.
        v: Values, like q.
        igate: Input gate pre-activations, (B, NH, S).
        fgate: Forget gate pre-activations, (B, NH, S).
        reverse: Read the sequence from its end.
        eps: Added to the denominator.

    Returns:
        h, (B, NH, S, DH).

    Source: xLSTM appendix A.3, parallel stabilised form.
    """
    length, dim = q.shape[-2:]
    decay = segment_decay(F.logsigmoid(fgate), reverse)
    mask = scan_order_mask(length, reverse, q.device)
    weight = (decay + igate[..., None, :]).masked_fill(~mask, -math.inf)
    maximum = weight.max(dim=-1).values.clamp(min=NEGLIGIBLE)  # input gates may be -inf: nothing is written
    attention = (q / math.sqrt(dim)) @ k.transpose(-1, -2) * torch.exp(weight - maximum[..., None])
    return divide_by_normaliser(attention @ v, attention.sum(-1), maximum, eps)
