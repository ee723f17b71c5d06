"""Draw the architecture picture of the README.

Run `python docs/figures/architecture.py [FILE]`; the default is architecture.svg beside this script.
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use('Agg')

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Circle, FancyBboxPatch, Rectangle

INK, MUTED, PAPER = '#1f2937', '#6b7280', '#ffffff'
FORWARD, BACKWARD = '#2563eb', '#db2777'
FILLS = {  # kind of part -> (fill, edge)
    'linear': ('#dbeafe', '#3b82f6'),
    'conv': ('#dcfce7', '#16a34a'),
    'cell': ('#ffedd5', '#ea580c'),
    'norm': ('#f3f4f6', '#6b7280'),
    'panel': ('#f8fafc', '#cbd5e1'),
    'forward': (PAPER, FORWARD),
    'backward': (PAPER, BACKWARD),
}
PATCHES = 4


def draw_box(axes: Axes, center: tuple[float, float], size: tuple[float, float], text: str, kind: str, **font) -> None:
    """Draw a rounded box with centred text."""
    fill, edge = FILLS[kind]
    corner = (center[0] - size[0] / 2, center[1] - size[1] / 2)
    style = 'round,pad=0,rounding_size=0.12'
    axes.add_patch(FancyBboxPatch(corner, *size, boxstyle=style, facecolor=fill, edgecolor=edge, linewidth=1.3))
    axes.text(*center, text, ha='center', va='center', color=INK, **{'fontsize': 10, 'linespacing': 1.35, **font})


def draw_path(axes: Axes, points: list[tuple[float, float]], color: str = INK, arrow: bool = True) -> None:
    """Draw a line through points, with an arrow head at its end."""
    axes.plot(*zip(*points, strict=True), color=color, linewidth=1.4, solid_joinstyle='round', zorder=1)
    if arrow:
        style = {'arrowstyle': '-|>,head_width=0.22,head_length=0.42', 'color': color, 'linewidth': 1.4}
        axes.annotate('', points[-1], points[-2], arrowprops={**style, 'shrinkA': 0, 'shrinkB': 0})


def draw_operator(axes: Axes, center: tuple[float, float], sign: str) -> None:
    """Draw a circle with a sign: '+' adds, '×' multiplies."""
    axes.add_patch(Circle(center, 0.2, facecolor=PAPER, edgecolor=INK, linewidth=1.3, zorder=3))
    (x, y), arm = center, 0.11
    slanted = 0.75 * arm
    directions = [(arm, 0), (0, arm)] if sign == '+' else [(slanted, slanted), (slanted, -slanted)]
    for dx, dy in directions:
        axes.plot([x - dx, x + dx], [y - dy, y + dy], color=INK, linewidth=1.4, zorder=4)


def landscape(size: int = 192) -> np.ndarray:
    """Paint a small landscape, (size, size, 3) in [0, 1]: sky, sun and two hills."""
    y, x = np.mgrid[0 : 1 : size * 1j, 0 : 1 : size * 1j]
    top, bottom = np.array([0.55, 0.76, 0.95]), np.array([0.98, 0.92, 0.80])
    picture = top + (bottom - top) * y[..., None] ** 1.2
    picture[(x - 0.74) ** 2 + (y - 0.25) ** 2 < 0.11**2] = (1.0, 0.82, 0.35)
    picture[y > 0.60 + 0.14 * np.cos(5.2 * x + 0.6)] = (0.45, 0.66, 0.60)
    picture[y > 0.80 + 0.09 * np.sin(4.6 * x - 0.5)] = (0.24, 0.48, 0.42)
    return np.clip(picture, 0, 1)


def patch_colors(picture: np.ndarray) -> list[np.ndarray]:
    """Average colour of each patch in row-major order."""
    edge = picture.shape[0] // PATCHES
    blocks = picture.reshape(PATCHES, edge, PATCHES, edge, 3).mean((1, 3))
    return list(blocks.reshape(-1, 3))


def draw_grid(axes: Axes, corner: tuple[float, float], edge: float, colors: list[np.ndarray], gap: float) -> None:
    """Draw the patches of an image as separate squares; `corner` is the lower left one's."""
    step = edge / PATCHES
    for index, color in enumerate(colors):
        row, column = divmod(index, PATCHES)
        x, y = corner[0] + column * step, corner[1] + (PATCHES - 1 - row) * step
        axes.add_patch(Rectangle((x, y), step - gap, step - gap, facecolor=color, edgecolor='none'))


def draw_scan(axes: Axes, corner: tuple[float, float], edge: float, color: str, backward: bool) -> None:
    """Draw the reading order over a grid: row by row from the top left, or exactly the other way round."""
    step = edge / PATCHES
    points = []
    for row in range(PATCHES):
        y = corner[1] + edge - (row + 0.5) * step
        points += [(corner[0] + 0.3 * step, y), (corner[0] + edge - 0.35 * step, y)]
    points = points[::-1] if backward else points
    axes.plot(*zip(*points, strict=True), color=color, linewidth=1.5, alpha=0.95, solid_joinstyle='round', zorder=3)
    axes.add_patch(Circle(points[0], 0.07, facecolor=color, edgecolor=PAPER, linewidth=0.8, zorder=4))
    style = {'arrowstyle': '-|>,head_width=0.25,head_length=0.45', 'color': color, 'linewidth': 1.5}
    axes.annotate('', points[-1], points[-2], arrowprops={**style, 'shrinkA': 0, 'shrinkB': 0}, zorder=4)


def draw_input(axes: Axes, picture: np.ndarray) -> None:
    """Left part of the model: image, patch convolution, tokens with positions."""
    axes.imshow(picture, extent=(0.45, 2.25, 5.35, 7.15), aspect='auto', zorder=2)
    for line in np.linspace(0, 1.8, PATCHES + 1)[1:-1]:
        axes.plot([0.45 + line] * 2, [5.35, 7.15], color=PAPER, linewidth=1.2, zorder=3)
        axes.plot([0.45, 2.25], [5.35 + line] * 2, color=PAPER, linewidth=1.2, zorder=3)
    axes.text(1.35, 5.1, 'image, any H × W', ha='center', va='top', fontsize=9, color=MUTED)
    draw_path(axes, [(2.25, 6.25), (2.6, 6.25)])
    draw_box(axes, (3.2, 6.25), (1.2, 1.1), 'patch\nconvolution\n16 × 16', 'conv', fontsize=9)
    draw_path(axes, [(3.8, 6.25), (4.15, 6.25)])
    draw_operator(axes, (4.35, 6.25), '+')
    draw_path(axes, [(4.35, 5.45), (4.35, 6.05)])
    axes.text(4.35, 5.35, 'learned\npositions', ha='center', va='top', fontsize=9, color=MUTED)
    draw_path(axes, [(4.55, 6.25), (5.3, 6.25)])


def draw_pair(axes: Axes, colors: list[np.ndarray]) -> None:
    """Middle part: a pair of sub-blocks that read in opposite directions."""
    draw_box(axes, (7.4, 6.2), (4.7, 2.6), '', 'panel')
    axes.text(9.62, 7.6, '× 12 pairs', ha='right', va='bottom', fontsize=11.5, fontweight='bold', color=INK)
    for left, color, backward, title in (
        (5.3, FORWARD, False, 'from the top left'),
        (7.6, BACKWARD, True, 'from the bottom right'),
    ):
        draw_box(axes, (left + 0.95, 6.2), (1.9, 2.2), '', 'forward' if color == FORWARD else 'backward')
        axes.text(left + 0.95, 7.07, 'sub-block', ha='center', va='center', fontsize=10, color=color, fontweight='bold')
        pale = [1 - (1 - tone) * 0.55 for tone in colors]
        draw_grid(axes, (left + 0.29, 5.5), 1.35, pale, gap=0.035)
        draw_scan(axes, (left + 0.29, 5.5), 1.32, color, backward)
        axes.text(left + 0.95, 5.28, title, ha='center', va='center', fontsize=8, color=MUTED)
    draw_path(axes, [(7.2, 6.25), (7.6, 6.25)])
    draw_path(axes, [(9.5, 6.25), (10.0, 6.25)])


def draw_output(axes: Axes, colors: list[np.ndarray]) -> None:
    """Right part: norm, then first and last token for a classifier, or the map for dense heads."""
    draw_box(axes, (10.35, 6.25), (0.7, 0.6), 'norm', 'norm', fontsize=9)
    draw_path(axes, [(10.7, 6.25), (10.95, 6.25), (10.95, 6.95), (11.2, 6.95)])
    draw_path(axes, [(10.95, 6.25), (10.95, 5.5), (11.2, 5.5)])
    tokens, step = len(colors), 0.115
    for index, color in enumerate(colors):
        chosen = index in (0, tokens - 1)
        height = 0.5 if chosen else 0.3
        tone = color if chosen else 1 - (1 - color) * 0.35
        corner = (11.27 + index * step, 6.95 - height / 2)
        edge = {'edgecolor': INK, 'linewidth': 1.0} if chosen else {'edgecolor': PAPER, 'linewidth': 0.6}
        axes.add_patch(Rectangle(corner, step, height, facecolor=tone, zorder=3 if chosen else 2, **edge))
    axes.text(12.2, 7.35, 'first and last token', ha='center', va='bottom', fontsize=9, color=MUTED)
    draw_path(axes, [(13.15, 6.95), (13.4, 6.95)])
    draw_box(axes, (13.78, 6.95), (0.76, 0.8), 'concat\nnorm\nlinear', 'linear', fontsize=8.5)
    draw_path(axes, [(14.16, 6.95), (14.42, 6.95)])
    axes.text(14.5, 6.95, 'class', ha='left', va='center', fontsize=10.5, fontweight='bold', color=INK)
    draw_grid(axes, (11.27, 5.03), 0.95, colors, gap=0.03)
    note = 'feature map (B, D, Gh, Gw)\nfor any neck and head'
    axes.text(12.38, 5.5, note, ha='left', va='center', fontsize=9, color=MUTED)


def draw_sub_block(axes: Axes) -> None:
    """Lower panel: the inside of a sub-block."""
    fill, edge = FILLS['panel']
    style = 'round,pad=0,rounding_size=0.18'
    axes.add_patch(
        FancyBboxPatch((0.35, 0.2), 14.7, 4.0, boxstyle=style, facecolor=fill, edgecolor=edge, linewidth=1.4)
    )
    axes.text(0.6, 3.95, 'inside a sub-block', ha='left', va='center', fontsize=11.5, fontweight='bold', color=INK)
    top, middle, low = 3.15, 2.2, 0.95
    draw_path(axes, [(0.5, middle), (1.15, middle)])
    axes.text(0.62, middle + 0.14, 'D', ha='center', va='bottom', fontsize=9, color=MUTED)
    draw_box(axes, (1.5, middle), (0.7, 0.6), 'norm', 'norm', fontsize=9)
    draw_path(axes, [(1.85, middle), (2.15, middle)])
    draw_box(axes, (2.7, middle), (1.1, 1.0), 'up-\nprojection\nD → 2 · 2D', 'linear', fontsize=9)
    draw_path(axes, [(3.25, 2.45), (3.75, 2.45), (3.75, top), (4.0, top)])
    draw_path(axes, [(3.25, 1.95), (3.5, 1.95), (3.5, low), (10.2, low)], arrow=False)
    axes.text(3.6, low + 0.1, 'gate z', ha='left', va='bottom', fontsize=9, color=MUTED)
    _draw_mixer(axes, top, middle)
    _draw_exit(axes, top, middle, low)
    draw_path(axes, [(0.82, middle), (0.82, 0.5), (14.3, 0.5), (14.3, middle - 0.2)])
    axes.text(7.6, 0.56, 'residual', ha='center', va='bottom', fontsize=9, color=MUTED)


def _draw_mixer(axes: Axes, top: float, middle: float) -> None:
    """From the up-projection to the head norm: convolution, projections, gates, cell."""
    draw_box(axes, (4.65, top), (1.3, 0.85), 'convolution\n3 × 3 depthwise\nSiLU', 'conv', fontsize=9)
    draw_path(axes, [(5.3, top), (6.0, top)])
    draw_box(axes, (6.3, top), (0.6, 0.66), 'Q, K', 'linear')
    draw_path(axes, [(3.75, 2.45), (3.75, middle), (6.0, middle)])
    draw_box(axes, (6.3, middle), (0.6, 0.66), 'V', 'linear')
    draw_path(axes, [(6.6, top), (8.05, top)])
    draw_path(axes, [(6.6, middle), (8.05, middle)])
    draw_path(axes, [(6.85, top), (6.85, 2.68), (7.05, 2.68)], color=MUTED)
    draw_path(axes, [(6.85, middle), (6.85, 2.68)], color=MUTED, arrow=False)
    draw_box(axes, (7.37, 2.68), (0.64, 0.5), 'gates\ni, f', 'linear', fontsize=8.5)
    draw_path(axes, [(7.69, 2.68), (8.05, 2.68)], color=MUTED)
    draw_box(axes, (9.1, 2.68), (2.1, 1.65), '', 'cell')
    axes.text(9.1, 3.2, 'mLSTM, 4 heads', ha='center', va='center', fontsize=10.5, fontweight='bold', color=INK)
    for y, formula in (
        (2.82, r'$C_t = f_t\,C_{t-1} + i_t\,v_t k_t^{\top}$'),
        (2.49, r'$n_t = f_t\,n_{t-1} + i_t\,k_t$'),
        (2.16, r'$h_t = C_t q_t \,/\, \max(|n_t^{\top} q_t|,\,1)$'),
    ):
        axes.text(9.1, y, formula, ha='center', va='center', fontsize=9.5, color=INK)
    note = "convolution and cell follow the sub-block's reading direction"
    axes.text(6.75, 1.45, note, ha='center', va='center', fontsize=9, color=MUTED, fontstyle='italic')


def _draw_exit(axes: Axes, top: float, middle: float, low: float) -> None:
    """From the cell to the residual sum: head norm, learnable skip, gate, down-projection, drop path."""
    draw_path(axes, [(10.15, 2.68), (10.4, 2.68)])
    draw_box(axes, (10.75, 2.68), (0.7, 0.66), 'head\nnorm', 'norm', fontsize=9)
    draw_path(axes, [(11.1, 2.68), (11.35, 2.68)])
    draw_operator(axes, (11.55, 2.68), '+')
    draw_path(axes, [(5.62, top), (5.62, 3.8), (11.55, 3.8), (11.55, 2.88)])
    axes.text(10.3, 3.84, 'learnable skip', ha='center', va='bottom', fontsize=9, color=MUTED)
    draw_path(axes, [(11.75, 2.68), (12.1, 2.68)])
    draw_operator(axes, (12.3, 2.68), '×')
    draw_box(axes, (10.6, low), (0.8, 0.5), 'SiLU', 'conv', fontsize=9)
    draw_path(axes, [(11.0, low), (12.3, low), (12.3, 2.48)])
    draw_path(axes, [(12.5, 2.68), (12.75, 2.68)])
    draw_box(axes, (13.25, 2.68), (1.0, 0.9), 'down-\nprojection\n2D → D', 'linear', fontsize=9)
    draw_path(axes, [(13.75, 2.68), (14.3, 2.68), (14.3, middle + 0.2)])
    axes.text(14.05, 2.76, 'drop path', ha='left', va='bottom', fontsize=8.5, color=MUTED)
    draw_operator(axes, (14.3, middle), '+')
    draw_path(axes, [(14.5, middle), (14.95, middle)])


def draw(target: Path) -> None:
    """Draw the picture and write it to `target`; the suffix sets the format."""
    plt.rcParams.update({'svg.hashsalt': 'mmvil', 'font.family': 'DejaVu Sans', 'mathtext.fontset': 'dejavusans'})
    figure, axes = plt.subplots(figsize=(14, 7.35))
    picture = landscape()
    colors = patch_colors(picture)
    draw_input(axes, picture)
    draw_pair(axes, colors)
    draw_output(axes, colors)
    draw_sub_block(axes)
    axes.set(xlim=(0.2, 15.2), ylim=(0.05, 7.95))
    axes.set_aspect('equal')
    axes.axis('off')
    figure.subplots_adjust(0, 0, 1, 1)
    figure.patch.set_facecolor(PAPER)
    metadata = {'Date': None} if target.suffix == '.svg' else None
    figure.savefig(target, metadata=metadata, dpi=110)
    plt.close(figure)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('file', nargs='?', type=Path, default=Path(__file__).with_suffix('.svg'))
    draw(parser.parse_args().file)
