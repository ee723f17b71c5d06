"""Tapes against the functions they stand for: the same results, and no tape where something else has to happen.

On a CPU the kernels are interpreted, from the addresses that a tape gives.
"""

import weakref
from collections.abc import Callable

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from mmvil.ops.fast_launch import FastKernel, recording
from mmvil.ops.launch_tape import MAX_TAPES, Repeated, Tape, _pack
from mmvil.ops.tape_recorder import Memory
from mmvil.ops.triton_launch import interpreting

from .tapes import DEVICE, Interpreted, assert_equal, needs_kernels

pytestmark = [needs_kernels, pytest.mark.usefixtures('direct')]


@triton.jit
def add_kernel(x, y, out, count, factor, BLOCK: tl.constexpr):
    """Out = x + factor * y."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    total = tl.load(x + place, mask=inside) + factor * tl.load(y + place, mask=inside)
    tl.store(out + place, total, mask=inside)


@pytest.fixture
def add() -> Interpreted | FastKernel:
    return Interpreted(add_kernel) if interpreting() else FastKernel(add_kernel)


def test_memory_is_freed_while_a_call_is_recorded_and_played(add: object, played: list[Tape]) -> None:
    living = []

    def product(x: Tensor, y: Tensor) -> Tensor:
        assert len(living) % 2 == 0 or living[-1]() is None  # the second one finds the first one gone
        result = x.mul(y)
        living.append(weakref.ref(result))
        return result

    def function(tensors: list[Tensor]) -> list[Tensor]:
        (x,) = tensors
        first, out = watched(x, x), torch.empty_like(x)
        add[(1,)](x, first, out, x.numel(), 2.0, BLOCK=64)
        del first
        second = watched(out, x)
        return [torch.add(second, x)]

    def watched(x: Tensor, y: Tensor) -> Tensor:
        return (
            torch.overrides.handle_torch_function(watched_product, (x, y), x, y)
            if recording.recorder
            else product(x, y)
        )

    def watched_product(x: Tensor, y: Tensor) -> Tensor:
        return product(x, y)

    repeated, x = Repeated(function), torch.linspace(0, 1, 48, device=DEVICE)
    for number in range(4):
        (result,) = repeated([x])
        torch.testing.assert_close(result, (x + 2 * x * x) * x + x)
        assert [ref() for ref in living] == [None] * 2 * (number + 1)
    assert len(played) == 2


def test_a_function_of_its_own(add: object, played: list[Tape]) -> None:
    def function(tensors: list[Tensor], factor: float) -> list[Tensor | None]:
        x, y = tensors
        first, second = x.new_empty(2, x.numel() - 1).unbind()
        add[(1,)](x, y, first, x.numel() - 1, factor, BLOCK=64)
        add[(1,)](first, y[1:], second, x.numel() - 1, factor, BLOCK=64)
        product = second.view(2, -1) @ first.view(-1, 2)
        third = torch.empty_like(product, dtype=torch.float64)
        add[(1,)](product, product[1], third, 2, 1.0, BLOCK=16)
        out = torch.empty_like(product.t())
        add[(1,)](third, third, out, 2, factor, BLOCK=16)
        return [out[0], None, product, x]

    repeated = Repeated(function)
    for number in range(5):
        given = [torch.randn(41, device=DEVICE) for _ in range(2)]
        if number == 1:
            given[1] = given[0]
        expected = function(given, 0.5)
        expected[0] = expected[0][:1]
        out, nothing, product, x = repeated(given, 0.5)
        assert nothing is None
        assert (x is given[0]) or number == 1
        assert_equal([out[:1], product], [expected[0], expected[2]])
    assert len(played) == 3
    held = [x for x in vars(played[0])['_values'] if isinstance(x, Tensor)]
    assert not held


@pytest.mark.parametrize(
    'parts',
    [
        lambda x: [x[:8], x[10:22].view(3, 4), x[22:23], x[30:40].view(5, 1, 2)],
        lambda x: [x[30:], None, x[2:4], x[4:30]],
        lambda x: [x[4:12], x[:8], x[4:12], x[20:32].view(3, 4).t(), x[::2], x[12:12], x[12]],
        lambda x: [x[4:12]],
        lambda x: [x, x[:10], x.view(4, 10)],
        lambda x: [x.view(4, 10)[1], x.view(4, 10)[:, 2:]],
    ],
    ids=['gaps', 'no gap at the end', 'overlaps', 'one', 'whole', 'rows'],
)
@pytest.mark.parametrize('size', [(40,), (4, 10)], ids=str)
def test_results_may_be_parts_of_one_buffer(
    size: tuple[int, ...], parts: Callable, add: object, played: list[Tape]
) -> None:
    def function(tensors: list[Tensor]) -> list[Tensor | None]:
        out = tensors[0].new_empty(size)
        add[(1,)](tensors[0], tensors[0], out, out.numel(), 1.0, BLOCK=64)
        return parts(out.view(-1))

    repeated = Repeated(function)
    for _ in range(4):
        x = torch.randn(40, device=DEVICE)
        for found, expected in zip(repeated([x]), parts(x + x), strict=True):
            assert (found is None) == (expected is None)
            if found is not None:
                assert_equal([found], [expected])
    assert len(played) == 2


@pytest.mark.parametrize(
    'change',
    [
        lambda x, new: new.zero_(),
        lambda x, new: new.__setitem__(0, 1.0),
        lambda x, new: torch.add(x, x, out=new),
        lambda x, new: new.copy_(torch.cat([x[:1], x[1:]])),
        lambda x, new: new.copy_(torch.sort(x)[0]),
    ],
    ids=['in place', 'item', 'out', 'list', 'tuple'],
)
def test_what_cannot_be_recorded_runs_as_it_is(change: Callable, played: list[Tape]) -> None:
    def function(tensors: list[Tensor]) -> list[Tensor]:
        new = torch.empty_like(tensors[0])
        change(tensors[0], new)
        return [new]

    repeated = Repeated(function)
    for _ in range(4):
        x = torch.randn(8, device=DEVICE)
        assert torch.equal(repeated([x])[0][:1], function([x])[0][:1])
    assert not played


def test_views_of_another_dtype_are_not_recorded(played: list[Tape]) -> None:
    repeated, x = Repeated(lambda tensors: [(tensors[0] + 1).view(torch.int32)]), torch.zeros(4, device=DEVICE)
    for _ in range(4):
        assert torch.equal(repeated([x])[0], (x + 1).view(torch.int32))
    assert not played


def test_errors_leave_no_recording_behind(played: list[Tape]) -> None:
    def function(tensors: list[Tensor], bad: list[bool]) -> list[Tensor]:
        if bad:
            raise ValueError('bad')
        return [tensors[0] + 1]

    repeated, x = Repeated(lambda tensors, key: function(tensors, bad)), torch.zeros(4, device=DEVICE)
    bad: list[bool] = []
    repeated([x], 0)
    bad.append(True)
    with pytest.raises(ValueError, match='bad'):
        repeated([x], 0)
    assert recording.recorder is None
    bad.clear()
    for _ in range(2):
        assert repeated([x], 0)[0].eq(1).all()
    assert len(played) == 1


def test_the_number_of_tapes_is_bounded() -> None:
    repeated, x = Repeated(lambda tensors, number: [tensors[0] + number]), torch.zeros(4, device=DEVICE)
    for number in range(2 * MAX_TAPES + 3):
        assert repeated([x], number)[0].eq(number).all()
        assert len(repeated._tapes) <= MAX_TAPES


def test_parts_that_are_used_at_the_same_time_do_not_overlap() -> None:
    generator = torch.Generator().manual_seed(0)
    memories = []
    for _ in range(60):
        size, first, length = torch.randint(1, 3000, (3,), generator=generator).tolist()
        memory = Memory(torch.empty(size))
        memory.first, memory.last = first, first + length // 4
        memories.append(memory)
    starts, total = _pack(memories)
    ends = {memory: starts[memory] + memory.bytes for memory in memories}
    assert max(ends.values()) <= total < sum(-(-memory.bytes // 512) * 512 for memory in memories)
    for one in memories:
        assert starts[one] % 512 == 0
        for other in memories:
            if one is not other and one.first <= other.last and other.first <= one.last:
                assert ends[one] <= starts[other] or ends[other] <= starts[one]
