"""The chunkwise form: any chunk, linear memory, no loop over tokens."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmvil.ops.chunkwise import CHUNK_SIZE, default_chunk_size, mlstm_chunkwise
from mmvil.ops.reference import mlstm_parallel

from .definition import assert_all_close, mlstm_by_definition, output_and_gradients, random_inputs


@pytest.mark.parametrize('reverse', [False, True], ids=['forward', 'reverse'])
@pytest.mark.parametrize('chunk_size', [1, 2, 7, 16, 22, 23, 1000])
def test_any_chunk_gives_the_same(chunk_size: int, reverse: bool) -> None:
    inputs = random_inputs(23, 5, batch=2, requires_grad=True)
    upstream = torch.randn_like(inputs[0])
    h = mlstm_chunkwise(*inputs, reverse, chunk_size=chunk_size)
    gradients = torch.autograd.grad(h, inputs, upstream)
    assert torch.allclose(h, mlstm_by_definition(*inputs, reverse=reverse), rtol=0, atol=1e-12)
    expected = output_and_gradients(inputs, upstream, reverse=reverse, backend='recurrent')
    assert_all_close([h.detach(), *gradients], expected, 1e-10)


@pytest.mark.parametrize('reverse', [False, True], ids=['forward', 'reverse'])
def test_gradients_equal_finite_differences_across_chunks(reverse: bool) -> None:
    inputs = random_inputs(5, 2, heads=1, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *x: mlstm_chunkwise(*x, reverse, chunk_size=2), inputs)


@pytest.mark.parametrize('reverse', [False, True], ids=['forward', 'reverse'])
@pytest.mark.parametrize('chunk_size', [3, 16])
def test_chunks_of_closed_gates(chunk_size: int, reverse: bool) -> None:
    inputs = random_inputs(32, 5, dtype=torch.float32)
    inputs[3][:, :, 8:] = -1000.0  # whole chunks write nothing
    inputs[4][:, :, 20:] = -1000.0  # and forget everything
    leaves = [x.requires_grad_() for x in inputs]
    h = mlstm_chunkwise(*leaves, reverse, chunk_size=chunk_size)
    h.sum().backward()
    assert torch.allclose(h.double(), mlstm_by_definition(*inputs, reverse=reverse), rtol=1e-4, atol=1e-5)
    assert all(torch.isfinite(x.grad).all() for x in leaves)


@pytest.mark.parametrize('chunk_size', [0, -3])
def test_chunks_below_one_are_refused(chunk_size: int) -> None:
    with pytest.raises(ValueError, match=f'chunk_size must be at least 1, got {chunk_size}'):
        mlstm_chunkwise(*random_inputs(4, 2), chunk_size=chunk_size)


@pytest.mark.parametrize(
    ('length', 'chunk'), [(1, 1), (15, 15), (64, 64), (65, 33), (128, 64), (196, 49), (729, 61), (1025, 61)]
)
def test_default_chunk_size(length: int, chunk: int) -> None:
    assert default_chunk_size(length) == chunk


def test_default_chunks_are_small_and_waste_little() -> None:
    for length in range(1, 2000):
        chunk = default_chunk_size(length)
        assert 1 <= chunk <= CHUNK_SIZE
        assert -length % chunk < -(-length // CHUNK_SIZE), 'less padding than one token a chunk'


def saved_bytes(form, length: int) -> int:
    """Memory that autograd keeps for the backward pass, counting each storage once."""
    storages: dict[int, int] = {}
    kept: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        kept.append(x)  # a freed address could be used again
        return x

    inputs = random_inputs(length, 16, dtype=torch.float32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        form(*inputs)
    return sum(storages.values())


def test_memory_is_linear_in_the_length() -> None:
    assert saved_bytes(mlstm_chunkwise, 1024) < 4.05 * saved_bytes(mlstm_chunkwise, 256)
    assert saved_bytes(mlstm_parallel, 1024) > 14 * saved_bytes(mlstm_parallel, 256), 'the measure sees growth'


class CountOperations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def operations(length: int, chunk_size: int) -> int:
    with CountOperations() as counter:
        mlstm_chunkwise(*random_inputs(length, 4), chunk_size=chunk_size)
    return counter.count


def test_no_loop_over_single_tokens() -> None:
    assert operations(5 * 64, 64) == operations(5 * 8, 8), 'the number of chunks alone counts'
    assert operations(320, 64) < 320
