"""A miniature in the layout of VTAB-1K, made of small real images that an installed package brings along.

It shows that everything works before gigabytes are downloaded. Its scores say nothing about a model, and its mark keeps
them from ever being printed as VTAB scores.
"""

import io
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from ..datasets.vtab_sources import SMOKE_MARK
from ..datasets.vtab_tasks import SPLITS, Task, select_tasks

__all__ = ['MINIATURE_SIZES', 'write_miniature']

MINIATURE_SIZES = {'train800': 80, 'val200': 20, 'train800val200': 100, 'test': 100}
CROP = 64
EXPLANATION = (
    'Miniature in the layout of VTAB-1K for smoke runs. Natural and specialized tasks: 8 x 8 pixel handwritten digits '
    'of scikit-learn, label = digit modulo the number of classes. Structured tasks: 64 x 64 crops of the two photos of '
    'scikit-learn scaled to 16 x 16, label = where in the photo the crop lies, from left to right. The list names are '
    'those of VTAB-1K, the true numbers of images are given under "sizes". No score on it is a VTAB score.'
)


def write_miniature(
    root: str | Path,
    tasks: Sequence[str] | None = None,
    sizes: dict[str, int] | None = None,
    suffix: str = '.jpg',
) -> Path:
    """Write the miniature.

    Args:
        root: Folder; created, may exist.
        tasks: Names of tasks or groups. Default: all 19.
        sizes: Numbers of images of the four lists. Default: 80, 20, 100, 100.
        suffix: '.jpg' or '.png'.

    Returns:
        The folder.

    Raises:
        ImportError: If scikit-learn is not installed.
        ValueError: If the sizes do not fit together or the suffix is unknown.
    """
    sizes = dict(sizes or MINIATURE_SIZES)
    if set(sizes) != set(SPLITS) or sizes['train800'] + sizes['val200'] != sizes['train800val200']:
        raise ValueError(f'sizes must name {list(SPLITS)}, the third being the sum of the first two, got {sizes}')
    if suffix not in ('.jpg', '.png'):
        raise ValueError(f"suffix must be '.jpg' or '.png', got {suffix!r}")
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    for number, task in enumerate(select_tasks(tasks)):
        images, labels = _draw_task(task, sizes['train800val200'] + sizes['test'], seed=number)
        _write_task(root / task.name, images, labels, sizes, suffix)
    mark = {'smoke': True, 'explanation': EXPLANATION, 'sizes': sizes}
    (root / SMOKE_MARK).write_text(json.dumps(mark, indent=2) + '\n', encoding='utf-8')
    return root


def _draw_task(task: Task, count: int, seed: int) -> tuple[list[Image.Image], list[int]]:
    """Draw the images of one task; another seed gives others."""
    generator = np.random.default_rng(seed)
    if task.group != 'structured':
        digits, targets = _digits()
        if count > len(digits):
            raise ValueError(f'the miniature has at most {len(digits)} images per task, asked for {count}')
        chosen = generator.permutation(len(digits))[:count]
        images = [Image.fromarray((digits[index] * 15.9).astype(np.uint8)).convert('RGB') for index in chosen]
        return images, [int(targets[index]) % task.num_classes for index in chosen]
    photos = _photos()
    images, labels = [], []
    for _ in range(count):
        photo = photos[generator.integers(len(photos))]
        columns = photo.shape[1] - CROP
        top, left = generator.integers(photo.shape[0] - CROP), generator.integers(columns)
        images.append(Image.fromarray(photo[top : top + CROP, left : left + CROP]).resize((16, 16)))
        labels.append(int(left * task.num_classes // columns))
    return images, labels


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """Handwritten digits of scikit-learn: values 0 to 16 of shape (N, 8, 8), and labels."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    return digits.images, digits.target


@cache
def _photos() -> list[np.ndarray]:
    """The two photos of scikit-learn, uint8, (427, 640, 3)."""
    from sklearn.datasets import load_sample_images

    return load_sample_images().images


def _write_task(folder: Path, images: list[Image.Image], labels: list[int], sizes: dict[str, int], suffix: str) -> None:
    """Write lists and images; as in the common zip, `train800val200` has its own copies."""
    train, both = sizes['train800'], sizes['train800val200']
    parts = {
        'train800': range(train),
        'val200': range(train, both),
        'train800val200': range(both),
        'test': range(both, both + sizes['test']),
    }
    for split, indices in parts.items():
        (folder / 'images' / split).mkdir(parents=True, exist_ok=True)
        lines = []
        for number, index in enumerate(indices):
            path = f'images/{split}/{number:06d}{suffix}'
            content = io.BytesIO()
            images[index].save(content, format='JPEG' if suffix == '.jpg' else 'PNG')
            (folder / path).write_bytes(content.getvalue())
            lines.append(f'{path} {labels[index]}\n')
        (folder / f'{split}.txt').write_text(''.join(lines), encoding='utf-8', newline='\n')
