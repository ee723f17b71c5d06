"""Leaving the dispatcher out changes nothing, and is not done where anybody watches operators."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mmvil.models import ViLBlock
from mmvil.models.fused import run_fused
from mmvil.ops import block_chain
from mmvil.ops.eager import operators_may_be_skipped
from mmvil.ops.triton_launch import interpreting

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
on_kernels = pytest.mark.skipif(
    not (interpreting() or torch.cuda.is_available()), reason='needs a GPU or the interpreter of Triton'
)


class Names(TorchDispatchMode):
    """Note every operator that is called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))


def block(**options: object) -> ViLBlock:
    made = ViLBlock(16, **options)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.2)
    return made.to(DEVICE)


def gradients(made: ViLBlock, run: object = run_fused) -> list[Tensor]:
    """Output and every gradient."""
    x = torch.linspace(-1, 1, 2 * 6 * 16, device=DEVICE).view(2, 6, 16).requires_grad_()
    made.zero_grad()
    out = run(made, x, (2, 3))
    out.square().sum().backward()
    return [out.detach().clone(), x.grad, *(p.grad.clone() for p in made.parameters() if p.requires_grad)]


class Wrapped(Tensor):
    """A tensor of another class."""


def test_when_operators_may_be_skipped() -> None:
    x, weight = torch.zeros(2), nn.Parameter(torch.zeros(2))
    assert operators_may_be_skipped(x, weight)
    assert not operators_may_be_skipped(x, x.as_subclass(Wrapped))
    with Names():
        assert not operators_may_be_skipped(x)
    with FakeTensorMode() as mode:
        assert not operators_may_be_skipped(x)
    assert not operators_may_be_skipped(mode.from_tensor(x))
    answers = []

    def ask(value: Tensor) -> Tensor:
        answers.append(operators_may_be_skipped(x))
        return value.sum()

    torch.func.grad(ask)(x)
    torch.jit.trace(ask, (x,), check_trace=False)
    assert answers == [False, False]
    assert operators_may_be_skipped(x)

    @torch.compile(backend='eager', fullgraph=True)
    def compiled(value: Tensor) -> Tensor:
        return value + 1 if operators_may_be_skipped(value) else value - 1

    assert torch.equal(compiled(x), x - 1)


@on_kernels
@pytest.mark.parametrize('options', [{}, {'proj_bias': False, 'norm_bias': False}], ids=['biases', 'none'])
def test_both_ways_give_the_same(options: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    made = block(**options)
    made.layer.proj_up.weight.requires_grad_(False)
    direct = gradients(made)
    monkeypatch.setattr(block_chain, 'operators_may_be_skipped', lambda *_: False)
    for one, other in zip(direct, gradients(made), strict=True):
        assert torch.equal(one, other)
    assert made.layer.proj_up.weight.grad is None


@on_kernels
def test_a_mode_sees_the_operator() -> None:
    made, x = block(), torch.zeros(1, 6, 16, device=DEVICE)
    for grad, name in ((True, 'vil_block_fwd'), (False, 'vil_block_inference')):
        with Names() as mode, torch.set_grad_enabled(grad):
            run_fused(made, x, (2, 3))
        assert mode.seen.count(f'mmvil.{name}.default') == 1


@on_kernels
def test_gradients_accumulate_and_own_their_values() -> None:
    made = block()
    once = gradients(made)[2:]
    x = torch.linspace(-1, 1, 2 * 6 * 16, device=DEVICE).view(2, 6, 16)
    run_fused(made, x, (2, 3)).square().sum().backward()
    for parameter, value in zip(made.parameters(), once, strict=True):
        torch.testing.assert_close(parameter.grad, 2 * value)
    for parameter in made.parameters():  # gradients may share memory, but no elements
        parameter.grad.zero_().add_(1)
    assert all(bool((parameter.grad == 1).all()) for parameter in made.parameters())


@on_kernels
def test_a_second_derivative_is_refused() -> None:
    x = torch.randn(1, 6, 16, device=DEVICE, requires_grad=True)
    out = run_fused(block(), x, (2, 3))
    (grad,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='once_differentiable'):
        grad.sum().backward()


@on_kernels
def test_weights_are_read_anew_each_time() -> None:
    made = block()
    x = torch.randn(1, 6, 16, device=DEVICE)
    with torch.no_grad():
        before = run_fused(made, x, (2, 3))
        other = copy.deepcopy(made)
        for parameter in made.parameters():
            parameter.data.mul_(1.5)  # leaves no trace in the version counter
        changed = run_fused(made, x, (2, 3))
        other.load_state_dict(made.state_dict())
        assert not torch.equal(before, changed)
        assert torch.equal(run_fused(other, x, (2, 3)), changed)
        made.layer.proj_up = copy.deepcopy(made.layer.proj_up)
        made.layer.igate.weight = nn.Parameter(made.layer.igate.weight * 2)
        other.layer.igate.weight.mul_(2)
        assert torch.equal(run_fused(other, x, (2, 3)), run_fused(made, x, (2, 3)))
        nn.utils.parametrizations.weight_norm(made.layer.proj_up)
        torch.testing.assert_close(run_fused(other, x, (2, 3)), run_fused(made, x, (2, 3)))


@on_kernels
def test_compiled_and_eager_agree() -> None:
    made = block()
    compiled = torch.compile(run_fused, backend='aot_eager', fullgraph=True)
    for one, other in zip(gradients(made), gradients(made, compiled), strict=True):
        assert torch.equal(one, other)
