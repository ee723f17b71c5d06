"""Pictures of segmentations: classes as transparent colours, with a legend."""

import os
from collections.abc import Sequence
from pathlib import Path

import mmcv
import numpy as np
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.runner import Runner
from PIL import Image, ImageDraw, ImageFont

from ..registry import HOOKS

__all__ = ['SegOverlayHook', 'draw_overlay', 'join_with_legend', 'save_picture']

MARGIN = 8
SMALLEST_SIDE = 256  # smaller panels are enlarged by a whole factor, so that single pixels stay visible


def draw_overlay(image: np.ndarray, labels: np.ndarray, palette: Sequence, alpha: float = 0.5) -> np.ndarray:
    """Lay the colours of classes over an image.

    Args:
        image: (H, W, 3), uint8, RGB.
        labels: (H, W), integer class numbers; pixels of no class of the palette keep the image's colour.
        palette: RGB colour of each class, 0 to 255.
        alpha: Weight of the colour, 0 to 1. Default: 0.5.

    Returns:
        (H, W, 3), uint8, RGB.

    Raises:
        ValueError: If the sizes differ or `alpha` is not between 0 and 1.
    """
    if image.shape[:2] != labels.shape:
        raise ValueError(f'image of {image.shape[:2]} and labels of {labels.shape} must have the same size')
    if not 0 <= alpha <= 1:
        raise ValueError(f'alpha must be between 0 and 1, got {alpha}')
    colours = np.asarray(palette, np.float64)
    known = (labels >= 0) & (labels < len(colours))
    result = image.astype(np.float64)
    result[known] = (1 - alpha) * result[known] + alpha * colours[labels[known]]
    return np.round(result).astype(np.uint8)


def join_with_legend(
    panels: Sequence[np.ndarray],
    titles: Sequence[str],
    present: Sequence[tuple[int, float]],
    classes: Sequence[str],
    palette: Sequence,
) -> np.ndarray:
    """Put panels side by side, each under its title, and a legend to the right of them.

    Args:
        panels: Pictures of equal size, (H, W, 3), uint8, RGB.
        titles: One line per panel.
        present: (class number, share of the pixels from 0 to 1) for every line of the legend, in order.
        classes: Names of all classes.
        palette: RGB colour of each class.

    Returns:
        (H', W', 3), uint8, RGB.
    """
    height, width = panels[0].shape[:2]
    factor = max(1, SMALLEST_SIDE // min(height, width))
    size = max(12, min(height, width) * factor // 24)
    font = ImageFont.load_default(size)
    lines = [f'{classes[index]}  {100 * share:.1f} %' for index, share in present]
    line_height = round(1.5 * size)
    text_width = max((int(font.getlength(line)) for line in lines), default=0)
    left = len(panels) * (width * factor + MARGIN) + MARGIN
    total_height = max(height * factor, len(lines) * line_height) + line_height + MARGIN
    canvas = Image.new('RGB', (left + line_height + text_width + MARGIN, total_height), 'white')
    draw = ImageDraw.Draw(canvas)
    for index, (panel, title) in enumerate(zip(panels, titles, strict=True)):
        start = MARGIN + index * (width * factor + MARGIN)
        draw.text((start, size // 4), title, fill='black', font=font)
        canvas.paste(
            Image.fromarray(panel).resize((width * factor, height * factor), Image.NEAREST), (start, line_height)
        )
    for index, ((label, _), line) in enumerate(zip(present, lines, strict=True)):
        top = line_height + index * line_height
        draw.rectangle((left, top + 2, left + size, top + 2 + size), fill=tuple(palette[label]), outline='black')
        draw.text((left + line_height, top), line, fill='black', font=font)
    return np.asarray(canvas)


def count_classes(labels: np.ndarray, num_classes: int) -> list[tuple[int, float]]:
    """List the classes of a label map, the largest first, with their share of all pixels."""
    counts = np.bincount(labels[(labels >= 0) & (labels < num_classes)].ravel(), minlength=num_classes)
    order = np.argsort(-counts, kind='stable')
    return [(int(index), float(counts[index] / labels.size)) for index in order if counts[index]]


def save_picture(picture: np.ndarray, path: str | Path) -> None:
    """Write a picture, (H, W, 3) uint8 RGB; the file appears when it is complete."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'.{path.stem}.{os.getpid()}{path.suffix}')
    try:
        Image.fromarray(picture).save(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@HOOKS.register_module()
class SegOverlayHook(Hook):
    """Writes the first pictures of each validation or test: image, ground truth, prediction and legend.

    mmseg's own visualisation writes class names into the picture, which hides small ones.

    Args:
        num_images: Pictures per validation. Default: 8.
        folder: Folder in the work directory; pictures of an earlier validation are replaced. Default: 'overlays'.
        alpha: Weight of the colours. Default: 0.75.
    """

    def __init__(self, num_images: int = 8, folder: str = 'overlays', alpha: float = 0.75) -> None:
        self.num_images, self.folder, self.alpha = num_images, folder, alpha
        self._written = 0

    def before_val_epoch(self, runner: Runner) -> None:
        """Start again with the first picture."""
        self._written = 0

    def before_test_epoch(self, runner: Runner) -> None:
        """Start again with the first picture."""
        self._written = 0

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None, outputs=None) -> None:
        """Write pictures of validation results."""
        self._write(runner, runner.val_loop.dataloader.dataset.metainfo, outputs)

    def after_test_iter(self, runner: Runner, batch_idx: int, data_batch: dict | None = None, outputs=None) -> None:
        """Write pictures of test results."""
        self._write(runner, runner.test_loop.dataloader.dataset.metainfo, outputs)

    def _write(self, runner: Runner, metainfo: dict, samples: Sequence) -> None:
        if not is_main_process():
            return
        classes, palette = metainfo['classes'], metainfo['palette']
        for sample in samples[: max(self.num_images - self._written, 0)]:
            image = mmcv.imread(sample.img_path, 'color_ignore_orientation', 'rgb', 'pillow')
            labels = [sample.pred_sem_seg.data[0].cpu().numpy()]
            titles = ['image', 'prediction']
            if 'gt_sem_seg' in sample:
                labels.insert(0, sample.gt_sem_seg.data[0].cpu().numpy())
                titles.insert(1, 'ground truth')
            panels = [image, *(draw_overlay(image, values, palette, self.alpha) for values in labels)]
            shares = dict(count_classes(labels[-1], len(classes)))  # of the prediction; true classes it misses get 0
            for values in labels:
                for index, _ in count_classes(values, len(classes)):
                    shares.setdefault(index, 0.0)
            present = list(shares.items())
            picture = join_with_legend(panels, titles, present, classes, palette)
            save_picture(picture, Path(runner.work_dir) / self.folder / f'{Path(sample.img_path).stem}.png')
            self._written += 1
