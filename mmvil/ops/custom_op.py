"""The mLSTM as torch operators `mmvil::mlstm_fwd` and `mmvil::mlstm_bwd`: fake kernels, autograd, fallback.

Kernels that fail to compile are given up with one warning; their work is done in plain torch from then on.
"""

import importlib
import warnings
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from .eager import operators_may_be_skipped
from .torch_backward import like_kernels, mlstm_with_gradients
from .triton_launch import compile_failure_reason, empty_rows_like, is_compile_failure

__all__ = ['FORMS', 'compile_failures', 'mlstm_bwd', 'mlstm_fwd', 'mlstm_triton']

FORMS = {'quadratic': 'triton_quadratic', 'chunkwise': 'triton_chunkwise'}
"""Form -> module with forward, backward and empty_saved."""

compile_failures: dict[tuple[str, torch.dtype, int], str] = {}
"""(form, dtype, DH) given up in this process, with the compiler's message."""

counted_form: str | None = None
"""Form that mLSTM calls are counted as while `flops.count_as` is active."""


def _module(form: str) -> ModuleType:
    """Import the launchers of a form; Triton is imported here and nowhere earlier."""
    if form not in FORMS:
        raise ValueError(f'form must be one of {sorted(FORMS)}, got {form!r}')
    return importlib.import_module(f'.{FORMS[form]}', __package__)


def _give_up(form: str, q: Tensor, error: Exception) -> None:
    """Remember that the kernels do not compile here for a form, dtype and head size, and say so once."""
    reason = compile_failures[form, q.dtype, q.shape[-1]] = compile_failure_reason(error)
    warnings.warn(
        f'The {form} Triton kernels of the mLSTM do not compile here for DH {q.shape[-1]} and {q.dtype} ({reason}); '
        'plain torch takes over. Run python -m mmvil.ops.selfcheck for details.',
        stacklevel=2,
    )


@torch.library.custom_op('mmvil::mlstm_fwd', mutates_args=())
def mlstm_fwd(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, reverse: bool, eps: float, form: str
) -> list[Tensor]:
    """Run the mLSTM on Triton kernels.

    Args:
        q: Queries, (B, NH, S, DH); float32, bfloat16 or float16.
        k: Keys, like q.
        v: Values, like q.
        igate: Input gate pre-activations, (B, NH, S), float32, contiguous.
        fgate: Forget gate pre-activations, like igate.
        reverse: Read the sequence from its end.
        eps: Added to the denominator.
        form: 'quadratic' or 'chunkwise'.

    Returns:
        h, (B, NH, S, DH), and after it what the backward pass of that form needs.
    """
    return _forward(q, k, v, igate, fgate, reverse, eps, form)


@mlstm_fwd.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, reverse: bool, eps: float, form: str
) -> list[Tensor]:
    return [empty_rows_like(q), *_module(form).empty_saved(q)]


@torch.library.custom_op('mmvil::mlstm_bwd', mutates_args=())
def mlstm_bwd(
    dh: Tensor, q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, h: Tensor, saved: list[Tensor],
    reverse: bool, eps: float, form: str,
) -> list[Tensor]:  # fmt: skip
    """Gradients of `mlstm_fwd`.

    Args:
        dh: Gradient of h, (B, NH, S, DH).
        q: As given to `mlstm_fwd`, like k, v, igate, fgate, reverse, eps and form.
        k: See q.
        v: See q.
        igate: See q.
        fgate: See q.
        h: First result of `mlstm_fwd`.
        saved: Its other results.
        reverse: See q.
        eps: See q.
        form: See q.

    Returns:
        dq, dk, dv in q's dtype; digate and dfgate, (B, NH, S), float32.
    """
    return _backward(dh, q, k, v, igate, fgate, h, saved, reverse, eps, form)


@mlstm_bwd.register_fake
def _(
    dh: Tensor, q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, h: Tensor, saved: list[Tensor],
    reverse: bool, eps: float, form: str,
) -> list[Tensor]:  # fmt: skip
    return [*(empty_rows_like(x) for x in (q, k, v)), torch.empty_like(igate), torch.empty_like(fgate)]


def _setup_context(ctx: FunctionCtx, inputs: tuple, output: list[Tensor]) -> None:
    """Keep the inputs and everything the forward pass computed."""
    *tensors, ctx.reverse, ctx.eps, ctx.form = inputs
    ctx.save_for_backward(*tensors, *output)


def _operator_backward(ctx: FunctionCtx, gradients: list[Tensor]) -> tuple:
    """Backward formula; only h is ever differentiated."""
    q, k, v, igate, fgate, h, *saved = ctx.saved_tensors
    out = mlstm_bwd(gradients[0], q, k, v, igate, fgate, h, saved, ctx.reverse, ctx.eps, ctx.form)
    return (*out, None, None, None)


mlstm_fwd.register_autograd(_operator_backward, setup_context=_setup_context)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, reverse: bool, eps: float, form: str
) -> list[Tensor]:
    """Results of `mlstm_fwd`."""
    module = _module(form)
    if (form, q.dtype, q.shape[-1]) not in compile_failures:
        try:
            with torch.cuda.device_of(q):
                h, saved = module.forward(q, k, v, igate, fgate, reverse, eps)
        except Exception as error:
            if not is_compile_failure(error):
                raise
            _give_up(form, q, error)
        else:
            return [h, *saved]
    (h,) = like_kernels([q], mlstm_with_gradients(q, k, v, igate, fgate, reverse, eps))
    return [h, *(x.zero_() for x in module.empty_saved(q))]


def _backward(
    dh: Tensor, q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, h: Tensor, saved: Sequence[Tensor],
    reverse: bool, eps: float, form: str,
) -> list[Tensor]:  # fmt: skip
    """Results of `mlstm_bwd`."""
    if (form, q.dtype, q.shape[-1]) not in compile_failures:
        try:
            with torch.cuda.device_of(q):
                return list(_module(form).backward(dh, q, k, v, igate, fgate, h, tuple(saved), reverse, eps))
        except Exception as error:
            if not is_compile_failure(error):
                raise
            _give_up(form, q, error)
    inputs = [q, k, v, igate, fgate]
    return like_kernels(inputs, mlstm_with_gradients(*inputs, reverse, eps, dh))


class _EagerMlstm(torch.autograd.Function):
    """The same without torch's dispatcher, which takes longer than launching the kernels."""

    @staticmethod
    def forward(ctx: FunctionCtx, *inputs: Tensor | bool | float | str) -> Tensor:
        output = _forward(*inputs)
        _setup_context(ctx, inputs, output)
        return output[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, dh: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, igate, fgate, h, *saved = ctx.saved_tensors
        return (*_backward(dh, q, k, v, igate, fgate, h, saved, ctx.reverse, ctx.eps, ctx.form), None, None, None)


def mlstm_triton(
    q: Tensor, k: Tensor, v: Tensor, igate: Tensor, fgate: Tensor, reverse: bool, eps: float, form: str
) -> Tensor:
    """Call the operator with gates of any floating dtype and strides.

    Args:
        q: Queries, (B, NH, S, DH); float32, bfloat16 or float16.
        k: Keys, like q.
        v: Values, like q.
        igate: Input gate pre-activations, (B, NH, S).
        fgate: Forget gate pre-activations, (B, NH, S).
        reverse: Read the sequence from its end.
        eps: Added to the denominator.
        form: 'quadratic' or 'chunkwise'.

    Returns:
        h, (B, NH, S, DH), in q's dtype.
    """
    igate, fgate = igate.float().contiguous(), fgate.float().contiguous()
    if not operators_may_be_skipped(q, k, v, igate, fgate):
        return torch.ops.mmvil.mlstm_fwd(q, k, v, igate, fgate, reverse, eps, form)[0]
    if torch.is_grad_enabled():
        return _EagerMlstm.apply(q, k, v, igate, fgate, reverse, eps, form)
    return _forward(q, k, v, igate, fgate, reverse, eps, form)[0]
