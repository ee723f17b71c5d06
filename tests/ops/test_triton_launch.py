"""What the launchers decide before a kernel runs."""

import pytest
import torch

from mmvil.ops import carried
from mmvil.ops.triton_launch import (
    CARRIED_MAX_TOKENS,
    MAX_HEAD_DIM,
    QUADRATIC_MAX_TOKENS,
    DeviceLimits,
    Tiles,
    ceil_div,
    choose_form,
    dot_precision,
    empty_rows_like,
    fitting_tiles,
    head_pieces,
    launch_first_fitting,
    next_power_of_two,
    row_alignment,
    row_strides,
    rows_contiguous,
)

from .util import tf32_allowed


@pytest.mark.parametrize(
    ('dim', 'pieces'),
    [
        (1, (16, 0)),
        (20, (32, 0)),
        (64, (64, 0)),
        (80, (64, 16)),
        (96, (64, 32)),
        (100, (128, 0)),
        (192, (128, 64)),
        (384, (256, 128)),
        (512, (512, 0)),
    ],
)
def test_head_pieces(dim: int, pieces: tuple[int, int]) -> None:
    assert head_pieces(dim) == pieces


def test_all_head_sizes_are_covered_by_powers_of_two() -> None:
    for dim in range(1, 513):
        first, second = head_pieces(dim)
        assert first + second >= dim
        assert first & (first - 1) == 0
        assert second & (second - 1) == 0


def test_whole_numbers_are_rounded_up_as_by_triton() -> None:
    import triton

    assert all(ceil_div(a, b) == triton.cdiv(a, b) for a in range(200) for b in range(1, 40))
    assert all(next_power_of_two(n) == triton.next_power_of_2(n) for n in range(1, 3000))


def test_alignment_and_strides() -> None:
    x = torch.empty(2, 3, 5, 96)
    assert row_alignment(x) == 8
    assert row_strides(8, x) == [3 * 5 * 12, 5 * 12, 12]
    assert row_alignment(x, torch.empty(2, 3, 5, 20)) == 4
    assert row_alignment(torch.empty(1, 1, 4, 7)) == 1


def test_rows_are_copied_only_if_they_have_gaps() -> None:
    x = torch.empty(2, 5, 3, 16)
    assert rows_contiguous(x.transpose(1, 2)).data_ptr() == x.data_ptr()
    assert rows_contiguous(x.transpose(2, 3)).stride(-1) == 1


def test_buffers_keep_the_order_of_heads_and_tokens() -> None:
    x = torch.empty(2, 5, 3, 16)
    assert empty_rows_like(x).is_contiguous()
    assert empty_rows_like(x.transpose(1, 2)).transpose(1, 2).is_contiguous()


def test_tiles_follow_the_shared_memory() -> None:
    candidates = [Tiles(128, 64, 8, 3), Tiles(64, 32, 4, 2), Tiles(16, 16, 4, 1)]

    def needed(tiles: Tiles) -> int:
        return tiles.rows * 1024

    for size, expected in ((200 * 1024, 3), (100 * 1024, 2), (20 * 1024, 1), (1024, 1)):
        fitting = fitting_tiles(candidates, needed, DeviceLimits((9, 0), size, 1))
        assert fitting == candidates[-expected:]


def test_a_kernel_that_needs_too_much_is_launched_smaller() -> None:
    errors = pytest.importorskip('triton.runtime.errors')
    candidates = [Tiles(128, 64, 8, 3), Tiles(64, 32, 4, 2), Tiles(16, 16, 4, 1)]
    tried = []

    def launch(tiles: Tiles) -> None:
        tried.append(tiles)
        if tiles.rows > 20:
            raise errors.OutOfResources(2, 1, 'shared memory')

    assert launch_first_fitting(candidates, launch) == candidates[-1]
    assert tried == candidates
    with pytest.raises(errors.OutOfResources):
        launch_first_fitting(candidates[:1], launch)


def test_float32_products_follow_the_tf32_switch() -> None:
    assert dot_precision(torch.float32) == 'ieee'
    with tf32_allowed():
        assert dot_precision(torch.float32) == 'tf32'
        assert dot_precision(torch.bfloat16) == 'ieee'


@pytest.mark.parametrize('trains', [False, True])
@pytest.mark.parametrize('dim', [1, 96, 128, 129, 192, 256, 384, 512])
def test_form_changes_where_the_table_says(dim: int, trains: bool) -> None:
    limits = next(limits for largest, *limits in QUADRATIC_MAX_TOKENS if dim <= largest)
    limit = limits[0] if trains else limits[1]
    assert [choose_form(length, dim, trains) for length in (1, 196, limit)] == ['quadratic'] * 3
    assert [choose_form(length, dim, trains) for length in (limit + 1, 65536)] == ['chunkwise'] * 2


@pytest.mark.parametrize('trains', [False, True])
def test_carried_states_are_taken_earlier(trains: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(carried, 'can_carry', lambda dim, dtype, device: (dim, dtype, device) == (96, *card))
    limit, card = CARRIED_MAX_TOKENS[0 if trains else 1], (torch.bfloat16, torch.device('cuda:1'))
    assert choose_form(limit, 96, trains, *card) == 'quadratic'
    assert choose_form(limit + 1, 96, trains, *card) == 'chunkwise'
    assert choose_form(limit + 1, 64, trains, *card) == 'quadratic'
    assert choose_form(limit + 1, 96, trains, torch.bfloat16, torch.device('cpu')) == 'quadratic'
    assert choose_form(limit + 1, 96, trains) == 'quadratic'


def test_table_of_forms_covers_all_head_sizes() -> None:
    dims, *columns = zip(*QUADRATIC_MAX_TOKENS, strict=True)
    assert dims[-1] == MAX_HEAD_DIM
    assert list(dims) == sorted(dims)
    for limits in columns:
        assert list(limits) == sorted(limits)  # a larger state pays off later
    assert all(training <= inference for _, training, inference in QUADRATIC_MAX_TOKENS)
    assert columns[1][0] >= 1024  # images of 512 px
