"""The definition's parts, on numbers worked out by hand."""

import math

import pytest
import torch

from mmvil.ops.reference import (
    divide_by_normaliser,
    larger,
    mlstm_parallel,
    mlstm_recurrent,
    scan_order_mask,
    segment_decay,
)

from .definition import mlstm_by_definition, random_inputs

FORMS = pytest.mark.parametrize('form', [mlstm_recurrent, mlstm_parallel], ids=['recurrent', 'parallel'])


@FORMS
@pytest.mark.parametrize('reverse', [False, True], ids=['forward', 'reverse'])
@pytest.mark.parametrize('length', [1, 2, 17])
def test_forms_follow_the_definition(form, length: int, reverse: bool) -> None:
    inputs = random_inputs(length, 7, batch=2)
    assert torch.allclose(form(*inputs, reverse), mlstm_by_definition(*inputs, reverse=reverse), rtol=0, atol=1e-12)


@FORMS
def test_two_tokens_by_hand(form) -> None:
    # One channel: token 0 writes 2 * 3 with weight e^1; token 1 writes 5 * 7 with e^0 and forgets half of token 0.
    q, k, v = (torch.tensor(x, dtype=torch.float64).reshape(1, 1, 2, 1) for x in ([1.0, 10.0], [2.0, 5.0], [3.0, 7.0]))
    gates = torch.tensor([[[1.0, 0.0]], [[0.0, 0.0]]], dtype=torch.float64)
    h = form(q, k, v, gates[:1], gates[1:], eps=0.0).flatten()
    first, second = math.e * 2, math.e * 2 * 0.5
    assert h[0] == pytest.approx(3.0)
    assert h[1] == pytest.approx((second * 3 + 5 * 7) / (second + 5))
    assert first > 1.0


@FORMS
def test_small_sums_are_divided_by_one(form) -> None:
    # |n . q| = 0.02 e^i is below max(., 1): the output is not normalised up.
    q = k = torch.full((1, 1, 1, 2), 0.1, dtype=torch.float64)
    v = torch.tensor([[[[4.0, -8.0]]]], dtype=torch.float64)
    igate, fgate = torch.zeros(2, 1, 1, 1, dtype=torch.float64).unbind()
    h = form(q, k, v, igate, fgate, eps=0.0)
    assert torch.allclose(h, v * 0.02 / math.sqrt(2))


@FORMS
def test_first_forget_gate_has_no_effect(form) -> None:
    inputs = random_inputs(4, 3, requires_grad=True)
    form(*inputs).sum().backward()
    assert torch.equal(inputs[4].grad[:, :, 0], torch.zeros(1, 2, dtype=torch.float64))
    assert inputs[4].grad[:, :, 1:].abs().min() > 0


@FORMS
def test_equal_gates_have_finite_gradients(form) -> None:
    inputs = random_inputs(6, 3)
    inputs[3:] = [torch.zeros_like(inputs[3]), torch.full_like(inputs[4], 1e4)]  # every row maximum is a tie
    leaves = [x.requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(lambda *x: form(*x, eps=0.0), [*leaves[:3], *(x.detach() for x in leaves[3:])])


@FORMS
@pytest.mark.parametrize('reverse', [False, True], ids=['forward', 'reverse'])
def test_closed_forget_gates_cost_no_digits_of_what_follows(form, reverse: bool) -> None:
    inputs = random_inputs(128, 8, dtype=torch.float32)
    inputs[:2] = [x.abs() for x in inputs[:2]]
    inputs[4][..., ::2] = -1000.0  # every running sum over the sequence reaches -64000
    truth = mlstm_by_definition(*inputs, reverse=reverse)
    assert (form(*inputs, reverse) - truth).abs().max() <= 5e-6 * truth.abs().max()


def test_segment_decay_sums_the_gates_between_two_tokens() -> None:
    log_forget = torch.tensor([-1.0, -2.0, -4.0])
    # [t, s]: gates s+1 .. t when read forwards, t .. s-1 when read backwards.
    assert segment_decay(log_forget, False).tolist() == [[0, 0, 0], [-2, 0, 0], [-6, -4, 0]]
    assert segment_decay(log_forget, True).tolist() == [[0, -1, -3], [0, 0, -2], [0, 0, 0]]


def test_scan_order() -> None:
    device = torch.device('cpu')
    assert scan_order_mask(3, False, device).int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert scan_order_mask(3, True, device).int().tolist() == [[1, 1, 1], [0, 1, 1], [0, 0, 1]]


def test_larger_sends_the_gradient_of_a_tie_to_the_first() -> None:
    first, second = (torch.tensor([1.0, 2.0, 3.0]).requires_grad_(), torch.tensor([2.0, 2.0, 2.0]).requires_grad_())
    result = larger(first, second)
    result.sum().backward()
    assert result.tolist() == [2, 2, 3]
    assert (first.grad.tolist(), second.grad.tolist()) == ([0, 1, 1], [1, 0, 0])


@pytest.mark.parametrize(
    ('numerator', 'normaliser', 'maximum', 'expected'),
    [
        (6.0, -3.0, 0.0, 2.0),  # the sum's absolute value divides
        (6.0, 0.5, 0.0, 6.0),  # but at least exp(-0)
        (6.0, 0.0, -2.0, 6.0 * math.exp(-2.0)),
        (6.0, 0.0, -80.0, 6.0 * math.exp(-80.0)),  # within the range of float32
        (6.0, 0.0, -89.0, 0.0),  # exp(89) is outside
        (6.0, 3.0, 1000.0, 2.0),
    ],
)
def test_divide_by_normaliser(numerator: float, normaliser: float, maximum: float, expected: float) -> None:
    x = torch.tensor([numerator], requires_grad=True)
    n, m = (torch.tensor(value, requires_grad=True) for value in (normaliser, maximum))
    quotient = divide_by_normaliser(x, n, m, 0.0)
    quotient.backward(torch.ones(1))
    assert quotient.item() == pytest.approx(expected, rel=1e-5, abs=0.0)
    assert all(torch.isfinite(value.grad).all() for value in (x, n, m))
