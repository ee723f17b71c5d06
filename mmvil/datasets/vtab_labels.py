"""Label definitions of the VTAB tasks that do not use their data set's own label. Pure functions.

All bins are open at their lower and closed at their upper edge: a value on an edge belongs to the bin below it.

Source: VTAB (arXiv 1910.04867) and the preprocessing of google-research/task_adaptation.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence

__all__ = [
    'CLEVR_DISTANCE_EDGES',
    'KITTI_DISTANCE_EDGES',
    'clevr_count_label',
    'clevr_distance_label',
    'dsprites_location_label',
    'dsprites_orientation_label',
    'kitti_distance_label',
]

CLEVR_DISTANCE_EDGES = (0.0, 8.0, 8.5, 9.0, 9.5, 10.0, 100.0)
CLEVR_MIN_OBJECTS, CLEVR_MAX_OBJECTS = 3, 10
KITTI_DISTANCE_EDGES = (-100.0, 8.0, 20.0, 999.0)
KITTI_NO_VEHICLE = 1000.0
KITTI_VEHICLE_TYPES = (0, 1, 2)  # car, van, truck
DSPRITES_POSITIONS, DSPRITES_ORIENTATIONS = 32, 40


def bin_index(value: float, edges: Sequence[float]) -> int:
    """Find the index of the largest edge strictly below a value.

    Args:
        value: Any finite number above the first edge.
        edges: Increasing numbers.

    Returns:
        The index, from 0.

    Raises:
        ValueError: If the value is not finite or not above the first edge.
    """
    if not math.isfinite(value) or value <= edges[0]:
        raise ValueError(f'the value must be finite and above {edges[0]}, got {value}')
    return bisect_left(edges, value) - 1


def clevr_count_label(num_objects: int) -> int:
    """Label of `clevr_count`: 3 to 10 objects become 0 to 7.

    Raises:
        ValueError: If there are fewer than 3 or more than 10 objects.
    """
    if not CLEVR_MIN_OBJECTS <= num_objects <= CLEVR_MAX_OBJECTS:
        raise ValueError(f'a CLEVR scene has {CLEVR_MIN_OBJECTS} to {CLEVR_MAX_OBJECTS} objects, got {num_objects}')
    return int(num_objects) - CLEVR_MIN_OBJECTS


def clevr_distance_label(depths: Sequence[float]) -> int:
    """Label of `clevr_dist`: the bin of the closest object.

    Args:
        depths: Third pixel coordinate of every object of the scene.

    Returns:
        0 to 5: up to 8, 8.5, 9, 9.5, 10 and 100.

    Raises:
        ValueError: If there is no object or the smallest depth is outside of (0, 100].
    """
    if len(depths) == 0:
        raise ValueError('a CLEVR scene has at least one object, got none')
    closest = float(min(depths))
    if closest > CLEVR_DISTANCE_EDGES[-1]:
        raise ValueError(f'a CLEVR depth must be at most {CLEVR_DISTANCE_EDGES[-1]}, got {closest}')
    return bin_index(closest, CLEVR_DISTANCE_EDGES)


def kitti_distance_label(object_types: Sequence[int], forward_distances: Sequence[float]) -> int:
    """Label of `kitti`: how far away the closest car, van or truck is.

    Args:
        object_types: Type number of every object of the frame, as in the TFDS data set.
        forward_distances: Their distance along the viewing direction, in metres.

    Returns:
        0: at most 8 m; 1: at most 20 m; 2: farther; 3: no vehicle.

    Raises:
        ValueError: If the lengths differ or the distance is -100 m or less.
    """
    if len(object_types) != len(forward_distances):
        raise ValueError(f'got {len(object_types)} object types but {len(forward_distances)} distances')
    vehicles = [
        float(distance)
        for kind, distance in zip(object_types, forward_distances, strict=True)
        if kind in KITTI_VEHICLE_TYPES
    ]
    return bin_index(min(vehicles, default=KITTI_NO_VEHICLE), KITTI_DISTANCE_EDGES)


def dsprites_location_label(x_position: int) -> int:
    """Label of `dsprites_loc`: 32 horizontal positions in 16 pairs.

    Raises:
        ValueError: If the position is not among 0 to 31.
    """
    if not 0 <= x_position < DSPRITES_POSITIONS:
        raise ValueError(f'a dSprites position must be from 0 to {DSPRITES_POSITIONS - 1}, got {x_position}')
    return int(x_position) // 2


def dsprites_orientation_label(orientation: int) -> int:
    """Label of `dsprites_ori`: 40 orientations in 16 bins that hold 3, 2, 3, 2, ... of them.

    Raises:
        ValueError: If the orientation is not among 0 to 39.
    """
    if not 0 <= orientation < DSPRITES_ORIENTATIONS:
        raise ValueError(f'a dSprites orientation must be from 0 to {DSPRITES_ORIENTATIONS - 1}, got {orientation}')
    return int(orientation * 2 // 5)  # floor division by 2.5, in whole numbers
