"""The mLSTM chunk by chunk without gradients: one state, changed in place, instead of all chunks at once.

Memory is that of one chunk and one state, so it does not grow with the sequence, and what is computed lies in the
cache when it is used next.
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import NEGLIGIBLE, divide_by_normaliser, larger, scan_order_mask, segment_decay

__all__ = ['MLSTMStream', 'chunk_slices']


def chunk_slices(length: int, dim: int, reverse: bool) -> list[slice]:
    """Cut a sequence into the pieces that `MLSTMStream` is best fed with.

    Args:
        length: Tokens of the sequence.
        dim: Channels DH of a head.
        reverse: Reading direction.

    Returns:
        Slices of nearly equal length, in reading order.
    """
    # Scores cost in proportion to the piece, states to DH: about equal at L = DH. In shorter ones calls take the time.
    count = math.ceil(length / max(128, dim))
    edges = [round(length * i / count) for i in range(count + 1)]
    slices = [slice(start, stop) for start, stop in pairwise(edges)]
    return slices[::-1] if reverse else slices


class MLSTMStream:
    """Runs the mLSTM over consecutive pieces of a sequence, of any lengths; no gradients.

    Args:
        reverse: Read from the end: pieces come last first, each in the order of its positions.
        eps: Added to the denominator.

    Source: the recurrence of xLSTM appendix A.3, unrolled inside each piece.
    """

    def __init__(self, reverse: bool = False, eps: float = 1e-6) -> None:
        self.reverse, self.eps = reverse, eps
        self.cell: Tensor | None = None  # (B * NH, DH, DH)
        self.normaliser: Tensor | None = None  # (B * NH, DH, 1)
        self.maximum: Tensor | None = None  # (B * NH)

    @torch.no_grad()
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, last: bool = False) -> Tensor:
        """Read the next piece.

        Args:
            q: Queries, (B, NH, L, DH), float32 or float64.
            k: Keys, like q.
            v: Values, like q.
            igate: Input gate pre-activations, (B, NH, L).
            fgate: Forget gate pre-activations, (B, NH, L).
            last: Whether no piece follows, so that no state is needed.

        Returns:
            h, (B, NH, L, DH).
        """
        shape = q.shape
        q, k, v, igate, fgate = (x.flatten(0, 1) for x in (q, k, v, igate, fgate))  # B * NH = N
        log_forget = F.logsigmoid(fgate)
        decay = segment_decay(log_forget, self.reverse)  # (N, L, L)
        first, end = (-1, 0) if self.reverse else (0, -1)  # positions read first and last
        decay_in = decay[..., first] + log_forget[..., first, None]  # from the state before this piece to t, (N, L)
        write = decay[..., end, :] + igate  # from s to the state after this piece, (N, L)

        mask = scan_order_mask(shape[2], self.reverse, q.device)
        weight = (decay + igate[..., None, :]).masked_fill_(~mask, -math.inf)
        maximum = weight.amax(-1).clamp_(min=NEGLIGIBLE)
        if self.maximum is not None:
            carried = decay_in + self.maximum[..., None]
            maximum = larger(carried, maximum)
        weight.sub_(maximum[..., None]).exp_()
        q = q / math.sqrt(shape[-1])
        attention = torch.bmm(q, k.mT).mul_(weight)
        denominator = attention.sum(-1)
        if self.maximum is None:
            numerator = torch.bmm(attention, v)
        else:
            q = q * torch.exp(carried - maximum)[..., None]
            numerator = torch.bmm(q, self.cell).baddbmm_(attention, v)
            denominator += torch.bmm(q, self.normaliser)[..., 0]
        if not last:
            self._update(k, v, write, decay_in[..., end])
        return divide_by_normaliser(numerator, denominator, maximum, self.eps).view(shape)

    def _update(self, k: Tensor, v: Tensor, write: Tensor, forget: Tensor) -> None:
        """Carry the state over a piece."""
        maximum = write.amax(-1).clamp_(min=NEGLIGIBLE)  # input gates may be -inf: nothing is written
        if self.maximum is not None:
            carried = forget + self.maximum
            maximum = larger(carried, maximum)
        weighted = k * torch.exp(write - maximum[..., None])[..., None]
        if self.maximum is None:
            self.cell, self.normaliser = torch.bmm(weighted.mT, v), weighted.sum(-2)[..., None]
        else:
            keep = torch.exp(carried - maximum)[..., None, None]
            self.cell.mul_(keep).baddbmm_(weighted.mT, v)
            self.normaliser.mul_(keep).add_(weighted.sum(-2)[..., None])
        self.maximum = maximum
