"""When an operator's work may be done without going through torch's dispatcher."""

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

__all__ = ['operators_may_be_skipped']

PLAIN_TENSORS = {Tensor, nn.Parameter}


def operators_may_be_skipped(*tensors: Tensor) -> bool:
    """Whether nothing but autograd would notice that an operator is not called.

    Compiling and tracing need the operator, and so do modes that see every operator (fake tensors, counting, selective
    recomputation), function transforms and tensors of other classes.

    Args:
        tensors: The operator's inputs.

    Returns:
        True if all of that is absent.
    """
    return not (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or _get_current_dispatch_mode() is not None
        or torch._C._are_functorch_transforms_active()
        or not PLAIN_TENSORS.issuperset(map(type, tensors))
    )
