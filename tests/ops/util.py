"""Inputs and comparisons shared by the operator tests."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from mmvil.ops.reference import mlstm_parallel

NAMES = ('h', 'dq', 'dk', 'dv', 'digate', 'dfgate')

# Largest relative L2 error against float64 on the same rounded inputs. Products of 16-bit numbers round their weights
# to 16 bits: 2^-9 for bfloat16, 2^-12 for float16, a few of them in a row. dfgate sums differences that nearly cancel.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
GATE_FACTOR = 2.5

GRADIENTS = NAMES[1:]
BADLY_CONDITIONED = {'_wide': 2e-3, '_reset': 2e-3, '_bigq': 2e-3, 'ext_i_pos40': 5e-3}


def cell_tolerance(name: str) -> float:
    """Largest error of a float32 result over the array's largest value, from the makers of the golden data."""
    return next((value for part, value in BADLY_CONDITIONED.items() if part in name), 1e-4)


def make_inputs(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = 'cpu',
    seed: int = 0,
    token_major: bool = False,
) -> tuple[list[Tensor], Tensor]:
    """q, k, v, igate, fgate and dh, made on the CPU; q and k share a part so that the normaliser does not cancel."""
    generator = torch.Generator().manual_seed(seed)
    batch, heads, length, dim = shape

    def rows() -> Tensor:
        if token_major:
            return torch.randn(batch, length, heads, dim, generator=generator).transpose(1, 2)
        return torch.randn(shape, generator=generator)

    common = torch.ones(dim) * 2 * dim**-0.25
    q, k, v, dh = rows() + common, rows() + common, rows(), rows()
    igate = torch.randn(shape[:3], generator=generator)
    fgate = torch.randn(shape[:3], generator=generator) + 3
    if length == 1 or dim == 1:  # a normaliser above its floor would make the exact gradient of q vanish
        igate -= 6
    return [*(x.to(device, dtype) for x in (q, k, v)), igate.to(device), fgate.to(device)], dh.to(device, dtype)


def expected(inputs: list[Tensor], dh: Tensor, reverse: bool, eps: float = 1e-6) -> list[Tensor]:
    """h and all five gradients in float64."""
    leaves = [x.detach().double().requires_grad_() for x in inputs]
    h = mlstm_parallel(*leaves, reverse, eps)
    return [h.detach(), *torch.autograd.grad(h, leaves, dh.double())]


def computed(run: Callable[..., Tensor], inputs: list[Tensor], dh: Tensor) -> list[Tensor]:
    """h and all five gradients of a function of the inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    h = run(*leaves)
    return [h.detach(), *torch.autograd.grad(h, leaves, dh)]


def relative_error(actual: Tensor, reference: Tensor, scale: Tensor | None = None) -> float:
    """L2 error over the reference's L2 norm; NaN where anything is not finite."""
    norm = max((reference if scale is None else scale).double().norm().item(), 1e-30)
    return ((actual.double() - reference.double()).norm() / norm).item()


def assert_all_close(actual: list[Tensor], reference: list[Tensor], tolerance: float) -> None:
    """Hold h and each gradient to the reference; dfgate is measured on the larger of both gates' gradients."""
    gate_scale = max(reference[4:], key=lambda x: x.double().norm().item())
    for name, x, y in zip(NAMES, actual, reference, strict=True):
        limit = tolerance * (GATE_FACTOR if name in ('digate', 'dfgate') else 1)
        error = relative_error(x, y, gate_scale if name == 'dfgate' else None)
        assert error <= limit, f'{name}: relative error {error:.2e}, allowed {limit:.1e}'


@contextmanager
def tf32_allowed() -> Iterator[None]:
    """Allow TF32 in matrix products of float32 tensors."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
