import math

import pytest

from mmvil.datasets.vtab_labels import (
    clevr_count_label,
    clevr_distance_label,
    dsprites_location_label,
    dsprites_orientation_label,
    kitti_distance_label,
)

JUST_ABOVE = [math.nextafter(edge, math.inf) for edge in (8.0, 8.5, 9.0, 9.5, 10.0)]


@pytest.mark.parametrize(
    ('depth', 'label'),
    [
        (math.nextafter(0.0, 1.0), 0),
        *zip((8.0, 8.5, 9.0, 9.5, 10.0, 100.0), range(6), strict=True),  # an edge belongs to the bin below
        *zip(JUST_ABOVE, range(1, 6), strict=True),
    ],
)
def test_clevr_distance_at_every_edge(depth, label):
    assert clevr_distance_label([depth]) == label
    assert clevr_distance_label([99.0, depth, 100.0]) == label  # only the closest object counts


@pytest.mark.parametrize('depths', [[], [0.0], [-1.0], [math.nan], [math.nextafter(100.0, 200.0)]])
def test_clevr_distance_refuses(depths):
    with pytest.raises(ValueError, match=r'must be|at least one'):
        clevr_distance_label(depths)


def test_clevr_count():
    assert [clevr_count_label(count) for count in range(3, 11)] == list(range(8))
    for count in (2, 11):
        with pytest.raises(ValueError, match='3 to 10 objects'):
            clevr_count_label(count)


@pytest.mark.parametrize(
    ('distance', 'label'),
    [
        (math.nextafter(-100.0, 0.0), 0),
        (-3.0, 0),
        (8.0, 0),
        (math.nextafter(8.0, 9.0), 1),
        (20.0, 1),
        (math.nextafter(20.0, 21.0), 2),
        (999.0, 2),
        (math.nextafter(999.0, 1000.0), 3),
    ],
)
def test_kitti_distance_at_every_edge(distance, label):
    assert kitti_distance_label([1], [distance]) == label


def test_kitti_counts_vehicles_only():
    assert kitti_distance_label([], []) == 3
    assert kitti_distance_label([3, 4, 7], [1.0, 2.0, 3.0]) == 3  # pedestrian, sitting person, miscellaneous
    assert [kitti_distance_label([kind, 3], [30.0, 1.0]) for kind in (0, 1, 2)] == [2, 2, 2]
    assert kitti_distance_label([0, 2, 1], [30.0, 12.0, 5.0]) == 0
    with pytest.raises(ValueError, match='2 object types but 1'):
        kitti_distance_label([0, 1], [1.0])
    with pytest.raises(ValueError, match='above -100'):
        kitti_distance_label([0], [-100.0])


def test_dsprites_location():
    assert [dsprites_location_label(x) for x in range(32)] == [label for label in range(16) for _ in range(2)]
    for position in (-1, 32):
        with pytest.raises(ValueError, match='from 0 to 31'):
            dsprites_location_label(position)


def test_dsprites_orientation_bins_hold_three_and_two_in_turn():
    labels = [dsprites_orientation_label(orientation) for orientation in range(40)]
    assert labels == [math.floor(orientation / 2.5) for orientation in range(40)]
    assert [labels.count(label) for label in range(16)] == [3, 2] * 8
    for orientation in (-1, 40):
        with pytest.raises(ValueError, match='from 0 to 39'):
            dsprites_orientation_label(orientation)
