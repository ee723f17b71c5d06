"""FLOP counts against formulas written out by hand."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mmvil.ops import mlstm
from mmvil.ops.custom_op import FORMS, mlstm_triton
from mmvil.ops.flops import block_flops, count_as, get_flops, mlstm_flops

from .util import make_inputs

SHAPE = (2, 3, 20, 16)
PAIRS = 20 * 21 // 2


def test_quadratic_by_hand() -> None:
    assert mlstm_flops(SHAPE) == 2 * 3 * (2 * 2 * 16 * PAIRS)
    assert mlstm_flops(SHAPE, backward=True) == 2 * 3 * (6 * 2 * 16 * PAIRS)


def test_chunkwise_by_hand() -> None:
    pairs = 2 * (8 * 9 // 2) + 4 * 5 // 2  # chunks of 8, 8 and 4 tokens
    assert mlstm_flops(SHAPE, 'chunkwise', chunk=8) == 2 * 3 * (2 * 2 * 16 * pairs + 2 * 2 * 20 * 16 * 16)
    assert mlstm_flops(SHAPE, 'chunkwise', 8, backward=True) == 2 * 3 * (6 * 2 * 16 * pairs + 5 * 2 * 20 * 16 * 16)
    assert mlstm_flops((1, 1, 4096, 96), 'chunkwise') * 4 == pytest.approx(mlstm_flops((1, 1, 16384, 96), 'chunkwise'))


def test_unknown_form() -> None:
    with pytest.raises(ValueError, match='linear'):
        mlstm_flops(SHAPE, 'linear')
    with pytest.raises(ValueError, match='linear'), count_as('linear'):
        pass


@pytest.mark.parametrize('form', FORMS)
def test_flop_counter_sees_the_operator(form: str, device: torch.device) -> None:
    inputs, _ = make_inputs(SHAPE, device=device)
    leaves = [x.requires_grad_() for x in inputs]
    with FlopCounterMode(display=False) as counter:
        mlstm_triton(*leaves, False, 1e-6, form).sum().backward()
    assert counter.get_total_flops() == mlstm_flops(SHAPE, form) + mlstm_flops(SHAPE, form, backward=True)


class Cell(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return mlstm(x, x, x, x[..., 0], x[..., 0]) @ x.transpose(-1, -2)


@pytest.mark.parametrize('form', ['quadratic', 'chunkwise'])
def test_get_flops(form: str) -> None:
    pytest.importorskip('mmengine')
    counts = get_flops(Cell(), torch.randn(SHAPE), form)
    product = 2 * 3 * 20 * 20 * 16
    assert counts['mlstm_macs'] * 2 == mlstm_flops(SHAPE, form)
    assert counts['macs'] == counts['mlstm_macs'] + product
    assert counts['flops'] == 2 * counts['macs']


def test_counting_leaves_nothing_behind() -> None:
    inputs, _ = make_inputs(SHAPE)
    with count_as('quadratic'):
        assert (mlstm(*inputs) == 0).all()
    assert (mlstm(*inputs) != 0).any()


def test_blocks_are_counted_in_the_form_that_runs() -> None:
    """Between the borders of the two, training takes the chunkwise form and inference the quadratic one."""
    weights = {'skip': (128,), 'wq': (32, 4, 4), 'conv_w': (128, 1, 3, 3), 'up_w': (256, 64), 'down_w': (64, 128)}
    quadratic, chunkwise = (mlstm_flops((1, 4, 1100, 32), form) for form in ('quadratic', 'chunkwise'))
    inference, training = (block_flops((1, 1100, 64), weights, 1100, 4, trains=trains) for trains in (False, True))
    assert inference - training == quadratic - chunkwise != 0
