"""The mLSTM and its gradients in plain torch without autograd, some rows at a time: what runs where a kernel cannot."""

import math

import torch
from torch import Tensor

from .triton_launch import empty_rows_like

__all__ = ['like_kernels', 'mlstm_with_gradients']

ROWS = 256
"""Queries handled at a time; memory is ROWS * S per head."""


def mlstm_with_gradients(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, reverse: bool, eps: float, dh: Tensor | None = None
) -> list[Tensor]:
    """Compute h or, given its gradient, the gradients of all inputs.

    Args:
        q: Queries, (B, NH, S, DH), any floating dtype.
        k: Keys, like q.
        v: Values, like q.
        igate: Input gate pre-activations, (B, NH, S), float32.
        fgate: Forget gate pre-activations, (B, NH, S), float32.
        reverse: Read the sequence from its end.
        eps: Added to the denominator.
        dh: Gradient of h, or None.

    Returns:
        [h] in q's dtype without dh; else [dq, dk, dv, digate, dfgate], float32 for the gates.

    Source: the equations in docs/mlstm.md.
    """
    if reverse:
        inputs = [x.flip(2) for x in (q, k, v, igate, fgate)]
        results = mlstm_with_gradients(*inputs, False, eps, None if dh is None else dh.flip(2))
        return [x.flip(2) for x in results]
    length, scale = q.shape[2], 1 / math.sqrt(q.shape[3])
    wide = torch.promote_types(q.dtype, torch.float32)
    queries, keys, values = (x.to(wide) for x in (q, k, v))
    total = torch.nn.functional.logsigmoid(fgate.double()).cumsum(-1)
    g = igate.double() - total
    maximum = g.cummax(-1).values
    h = torch.empty_like(queries)
    if dh is not None:
        dq, dk, dv = (torch.zeros_like(x) for x in (queries, keys, values))
        from_query, from_key = (torch.zeros_like(g) for _ in range(2))
    for start in range(0, length, ROWS):
        rows, seen = slice(start, min(start + ROWS, length)), slice(0, min(start + ROWS, length))
        decay = torch.exp((g[..., None, seen] - maximum[..., rows, None]).tril(start)).to(wide).tril(start)
        weight = queries[:, :, rows] @ keys[:, :, seen].mT * scale * decay
        normaliser = weight.sum(-1, keepdim=True)
        floor = torch.exp(-(total + maximum)[..., rows, None]).to(wide)
        inverse = 1 / (torch.maximum(normaliser.abs(), floor) + eps)
        h[:, :, rows] = weight @ values[:, :, seen] * inverse
        if dh is None:
            continue
        upstream = dh[:, :, rows].to(wide)
        sign = normaliser.sign() * (normaliser.abs() > floor)
        through_normaliser = -(upstream * h[:, :, rows]).sum(-1, keepdim=True) * sign
        dweight = (upstream @ values[:, :, seen].mT + through_normaliser) * inverse
        dscore = dweight * decay * scale
        dq[:, :, rows] = dscore @ keys[:, :, seen]
        dk[:, :, seen] += dscore.mT @ queries[:, :, rows]
        dv[:, :, seen] += (weight * inverse).mT @ upstream
        share = (dweight * weight).double()
        from_query[..., rows] = share.sum(-1)
        from_key[..., seen] += share.sum(-2)
    if dh is None:
        return [h.to(q.dtype)]
    dforget = (from_query - from_key).flip(-1).cumsum(-1).flip(-1) * torch.sigmoid(-fgate.double())
    return [*(x.to(q.dtype) for x in (dq, dk, dv)), from_key.to(igate.dtype), dforget.to(fgate.dtype)]


def like_kernels(inputs: list[Tensor], results: list[Tensor]) -> list[Tensor]:
    """Give results the memory layout that the kernels' buffers have, as the fake kernels promise.

    Args:
        inputs: Tensors that the results belong to.
        results: (B, NH, S, DH) or (B, NH, S) tensors.

    Returns:
        Copies.
    """
    return [
        empty_rows_like(x).copy_(result) if x.dim() == 4 else result.contiguous()
        for x, result in zip(inputs, results, strict=True)
    ]
