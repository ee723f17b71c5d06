"""The public mLSTM operator: argument checks and choice of the backend."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from . import custom_op
from .chunkwise import mlstm_chunkwise
from .reference import mlstm_parallel, mlstm_recurrent
from .triton_launch import (
    MAX_HEAD_DIM,
    choose_form,
    constant_when_compiled,
    interpreting,
    why_not_dtype,
    why_not_on_device,
)

__all__ = ['AUTOCAST_DEVICES', 'autocast_is_on', 'available_backends', 'mlstm', 'why_not_triton']

TORCH_BACKENDS: dict[str, Callable[..., Tensor]] = {
    'recurrent': mlstm_recurrent,
    'parallel': mlstm_parallel,
    'chunkwise': mlstm_chunkwise,
}
BACKENDS = (*TORCH_BACKENDS, 'triton')

# In plain torch one S x S product is faster than chunks up to a length that grows with their DH x DH states. Timed in
# float32 on two CPU cores, DH 96, 192 and 384: the forward passes meet at about 130, 300 and beyond 400 tokens.
PARALLEL_MAX_TOKENS, PARALLEL_MAX_RATIO = 128, 1.5

# Asked once, since torch.compile cannot trace the question in every torch (seen with 2.11).
AUTOCAST_DEVICES = frozenset(
    name for name in ('cpu', 'cuda', 'hpu', 'mps', 'mtia', 'xla', 'xpu') if torch.amp.is_autocast_available(name)
)
"""Types of devices that have autocast."""


def available_backends() -> dict[str, str | None]:
    """Tell which backends of `mlstm` can be used here.

    Returns:
        Backend name -> None if it is usable, else the reason why it is not.
    """
    reason = why_not_on_device('cpu' if interpreting() else 'cuda', None)
    return {**dict.fromkeys(TORCH_BACKENDS), 'triton': reason}


def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    igate: Tensor,
    fgate: Tensor,
    *,
    reverse: bool = False,
    eps: float = 1e-6,
    backend: str = 'auto',
) -> Tensor:
    """Apply the mLSTM cell with exponential gating to a batch of sequences.

    Args:
        q: Queries, (B, NH, S, DH), S and DH at least 1, any strides; float32, float64, bfloat16 or float16.
        k: Keys, same shape, dtype and device as q. The scale 1 / sqrt(DH) is applied inside.
        v: Values, same shape, dtype and device as q.
        igate: Input gate pre-activations, (B, NH, S), any floating dtype.
        fgate: Forget gate pre-activations, (B, NH, S), any floating dtype; the gate is their sigmoid.
        reverse: Read the sequence from its end: equal to flipping it, running and flipping back.
        eps: Added to the denominator.
        backend: 'recurrent' (the definition), 'parallel' (quadratic), 'chunkwise' (linear memory), 'triton' (GPU
            kernels, DH up to 512, no float64) or 'auto', which picks by device, dtype, DH and S: the kernels on a CUDA
            device that can run them, else plain torch.

    Returns:
        h, (B, NH, S, DH), in q's dtype. All five inputs get exact gradients.

    Raises:
        TypeError: An argument is no floating-point tensor, or q, k and v differ in dtype.
        ValueError: Shapes or devices do not match, or the backend is unknown or not usable here.

    Source: xLSTM (arXiv 2405.04517) appendix A.3; Vision-LSTM (arXiv 2406.04303) section 3.

    Example:
        >>> import torch
        >>> q, k, v = torch.randn(3, 1, 4, 10, 16).unbind()
        >>> mlstm(q, k, v, torch.zeros(1, 4, 10), torch.full((1, 4, 10), 3.0)).shape
        torch.Size([1, 4, 10, 16])
    """
    if isinstance(q, Tensor) and autocast_is_on(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        with torch.autocast(q.device.type, enabled=False):
            q, k, v = (x.to(dtype) if _is_narrowable(x) else x for x in (q, k, v))
            return mlstm(q, k, v, igate, fgate, reverse=reverse, eps=eps, backend=backend)
    _check_arguments(q, k, v, igate, fgate, eps)
    if custom_op.counted_form is not None:
        return torch.ops.mmvil.mlstm_counted(q, k, v, igate, fgate, custom_op.counted_form)
    backend = _choose_backend(backend, q)
    if backend == 'triton':
        trains = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, igate, fgate))
        form = choose_form(q.shape[-2], q.shape[-1], trains, q.dtype, q.device)
        return custom_op.mlstm_triton(q, k, v, igate, fgate, bool(reverse), float(eps), form)
    # The step-by-step definition loses digits in float32 where the normaliser cancels, so it is given more of them.
    double = q.dtype == torch.float64 or (backend == 'recurrent' and q.device.type != 'mps')
    compute_dtype = torch.float64 if double else torch.float32
    inputs = [x.to(compute_dtype) for x in (q, k, v, igate, fgate)]
    return TORCH_BACKENDS[backend](*inputs, bool(reverse), eps).to(q.dtype)


def autocast_is_on(device_type: str) -> bool:
    """Whether autocast is on; asking torch is an error for devices that have none, such as meta."""
    return device_type in AUTOCAST_DEVICES and torch.is_autocast_enabled(device_type)


def _is_narrowable(x: object) -> bool:
    """Whether autocast may change the dtype of x: it leaves float64 alone."""
    return isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64


def _choose_backend(backend: str, q: Tensor) -> str:
    """Resolve 'auto' and refuse what cannot be used."""
    if backend == 'auto':
        if q.is_cuda and q.shape[-1] <= MAX_HEAD_DIM and _auto_takes_triton(q.dtype, q.device.index):
            return 'triton'
        limit = max(PARALLEL_MAX_TOKENS, PARALLEL_MAX_RATIO * q.shape[-1])
        return 'parallel' if q.shape[-2] <= limit else 'chunkwise'
    if backend not in BACKENDS:
        raise ValueError(f"backend must be 'auto' or one of {list(BACKENDS)}, got {backend!r}")
    if backend == 'triton':
        reason = why_not_triton(q.device.type, q.device.index, q.dtype)
        if reason is None and q.shape[-1] > MAX_HEAD_DIM:
            reason = f'DH must be at most {MAX_HEAD_DIM}, got {q.shape[-1]}'
        if reason is not None:
            raise ValueError(
                f"backend 'triton' cannot be used here: {reason}. Usable here: {[*TORCH_BACKENDS]} and 'auto'"
            )
    return backend


# Asked while torch.compile traces: the answers hold for a process, so they become constants of the graph.
@constant_when_compiled
def why_not_triton(device_type: str, index: int | None, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run these tensors, or None."""
    return why_not_on_device(device_type, index) or why_not_dtype(dtype, device_type, index)


@constant_when_compiled
def _auto_takes_triton(dtype: torch.dtype, index: int | None) -> bool:
    """Whether 'auto' uses the kernels; warns once per reason where a CUDA device cannot."""
    reason = why_not_on_device('cuda', index)
    if reason is None and dtype != torch.float64:  # float64 is for checks; nobody expects a kernel there
        reason = why_not_dtype(dtype, 'cuda', index)
    if reason is not None and reason not in _warned:
        _warned.add(reason)
        warnings.warn(f'mlstm runs in plain torch: {reason}', stacklevel=2)
    return reason is None and dtype != torch.float64


_warned: set[str] = set()


def _check_arguments(q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, eps: float) -> None:
    """Raise TypeError or ValueError with the argument's name, what came and what is accepted."""
    tensors = {'q': q, 'k': k, 'v': v, 'igate': igate, 'fgate': fgate}
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise TypeError(f'{name} must be a torch.Tensor, got {type(x).__name__}')
        if x.dtype not in (torch.float32, torch.float64, torch.bfloat16, torch.float16):
            raise TypeError(f'{name} must be float32, float64, bfloat16 or float16, got {x.dtype}')
        if x.device != q.device:
            raise ValueError(f'{name} must be on the device of q ({q.device}), got {x.device}')
    if q.dim() != 4 or q.shape[1] < 1 or q.shape[2] < 1 or q.shape[3] < 1:
        raise ValueError(f'q must have shape (B, NH, S, DH) with NH, S and DH of at least 1, got {tuple(q.shape)}')
    for name in ('k', 'v'):
        if tensors[name].shape != q.shape:
            raise ValueError(f'{name} must have the shape of q {tuple(q.shape)}, got {tuple(tensors[name].shape)}')
        if tensors[name].dtype != q.dtype:
            raise TypeError(f'{name} must have the dtype of q ({q.dtype}), got {tensors[name].dtype}')
    for name in ('igate', 'fgate'):
        if tensors[name].shape != q.shape[:3]:
            raise ValueError(
                f'{name} must have shape (B, NH, S) = {tuple(q.shape[:3])}, got {tuple(tensors[name].shape)}'
            )
    if not eps >= 0:
        raise ValueError(f'eps must not be negative, got {eps}')
