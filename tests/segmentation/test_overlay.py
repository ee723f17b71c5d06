"""Overlays and legends."""

import numpy as np
import pytest
from PIL import Image

from mmvil.segmentation.overlay import count_classes, draw_overlay, join_with_legend, save_picture

PALETTE = [[200, 0, 0], [0, 100, 0]]


def test_colours_are_blended_and_ignored_pixels_kept():
    image = np.full((1, 3, 3), 100, np.uint8)
    result = draw_overlay(image, np.array([[0, 1, 255]]), PALETTE, alpha=0.25)
    assert result.tolist() == [[[125, 75, 75], [75, 100, 75], [100, 100, 100]]]
    assert (image == 100).all()


def test_alpha_limits():
    image = np.full((1, 1, 3), 100, np.uint8)
    assert draw_overlay(image, np.array([[0]]), PALETTE, alpha=1.0).tolist() == [[[200, 0, 0]]]
    assert draw_overlay(image, np.array([[0]]), PALETTE, alpha=0.0).tolist() == [[[100, 100, 100]]]
    with pytest.raises(ValueError, match='alpha must be'):
        draw_overlay(image, np.array([[0]]), PALETTE, alpha=1.5)
    with pytest.raises(ValueError, match='same size'):
        draw_overlay(image, np.array([[0, 1]]), PALETTE)


def test_classes_are_counted_largest_first():
    labels = np.array([[1, 1, 0, 255]], np.uint8)
    assert count_classes(labels, 2) == [(1, 0.5), (0, 0.25)]


def test_legend_shows_every_colour(tmp_path):
    panel = np.full((40, 60, 3), 128, np.uint8)
    joined = join_with_legend([panel, panel], ['image', 'prediction'], [(0, 0.5), (1, 0.25)], ['sky', 'tree'], PALETTE)
    colours = {tuple(colour) for colour in joined.reshape(-1, 3).tolist()}
    assert {(200, 0, 0), (0, 100, 0), (128, 128, 128)} <= colours
    save_picture(joined, tmp_path / 'new' / 'a.png')
    assert np.array_equal(np.asarray(Image.open(tmp_path / 'new' / 'a.png')), joined)
    assert [path.name for path in (tmp_path / 'new').iterdir()] == ['a.png']
