"""A small data set for segmentation that needs no download: handwritten digits laid over photographs."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from mmengine.logging import print_log
from mmseg.datasets import BaseSegDataset
from PIL import Image

from ..registry import DATASETS
from .datasets import CheckedFolders

__all__ = ['DigitsOnPhotos', 'write_digits_on_photos']

IMAGE_SIZE = 96
DIGIT_SIZE = IMAGE_SIZE // 2
COUNTS = {'training': 800, 'validation': 120}
SEED = 0
FORMAT = 1  # of the written data, to be counted up with every change; a folder of another format is refused
PHOTOGRAPH = 1  # label in the files; the digit d is d + 2, and 0 has no class
# Share of ink: below the first it is photograph, from the second on digit, and between the two nobody can say.
INK_LIMITS = (0.25, 0.5)
INK_RANGE = ((215, 0, 170), (255, 50, 240))  # RGB: magentas, which neither photograph holds
TRAIN_WIDTH, VAL_START = 0.6, 0.65  # parts of the photographs' width; the two splits share no pixel


def _load_sources() -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Read photographs and digits: photographs (H, W, 3) uint8, digits (N, 8, 8) from 0 to 1, digit classes (N,)."""
    try:
        from sklearn.datasets import load_digits, load_sample_images
    except ImportError as error:
        raise ImportError("DigitsOnPhotos needs scikit-learn: pip install 'mmvil[openmmlab]'") from error
    digits = load_digits()
    return list(load_sample_images().images), digits.images / 16, digits.target


def _split_digits(classes: np.ndarray, split: str) -> np.ndarray:
    """Choose the digits of a split: of each class every fifth is for validation."""
    rank = np.zeros(len(classes), int)
    for digit in range(10):
        of_class = np.flatnonzero(classes == digit)
        rank[of_class] = np.arange(len(of_class))
    return np.flatnonzero((rank % 5 == 4) == (split == 'validation'))


def _crop_photograph(photograph: np.ndarray, split: str, rng: np.random.Generator) -> np.ndarray:
    """Cut a random square out of the split's part of a photograph and scale it to the image's size."""
    width = photograph.shape[1]
    part = photograph[:, : int(TRAIN_WIDTH * width)] if split == 'training' else photograph[:, int(VAL_START * width) :]
    edge = int(rng.integers(IMAGE_SIZE, 2 * IMAGE_SIZE + 1))
    top, left = (int(rng.integers(0, length - edge + 1)) for length in part.shape[:2])
    square = part[top : top + edge, left : left + edge]
    if rng.random() < 0.5:
        square = square[:, ::-1]
    return np.asarray(Image.fromarray(np.ascontiguousarray(square)).resize((IMAGE_SIZE, IMAGE_SIZE), Image.BICUBIC))


def _place_digits(rng: np.random.Generator) -> list[tuple[int, int]]:
    """Choose (top, left) of three or four digits, each in its own quarter of the picture."""
    quarters = [(row * DIGIT_SIZE, column * DIGIT_SIZE) for row in (0, 1) for column in (0, 1)]
    return [quarters[index] for index in rng.permutation(4)[: int(rng.integers(3, 5))]]


def _draw(split: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Draw the pictures of a split: (H, W, 3) uint8 and (H, W) uint8 labels."""
    photographs, digits, classes = _load_sources()
    rng = np.random.default_rng([SEED, list(COUNTS).index(split)])
    order: list[int] = []
    for _ in range(COUNTS[split]):
        picture = _crop_photograph(photographs[int(rng.integers(len(photographs)))], split, rng).astype(np.float64)
        labels = np.full((IMAGE_SIZE, IMAGE_SIZE), PHOTOGRAPH, np.uint8)
        for top, left in _place_digits(rng):
            order = order or rng.permutation(_split_digits(classes, split)).tolist()
            index = order.pop()
            small = Image.fromarray(digits[index].astype(np.float32))
            ink = np.clip(np.asarray(small.resize((DIGIT_SIZE, DIGIT_SIZE), Image.BICUBIC), np.float64), 0, 1)
            area = (slice(top, top + DIGIT_SIZE), slice(left, left + DIGIT_SIZE))
            ground = picture[area]
            colour = rng.uniform(*INK_RANGE)
            picture[area] = ground * (1 - ink[..., None]) + colour * ink[..., None]
            labels[area] = np.where(
                ink >= INK_LIMITS[1], classes[index] + 2, np.where(ink >= INK_LIMITS[0], 0, PHOTOGRAPH)
            )
        yield np.round(picture).astype(np.uint8), labels


def _description() -> dict:
    """What the written data is made with; kept beside it to recognise other data."""
    return {'format': FORMAT, 'image_size': IMAGE_SIZE, 'counts': COUNTS, 'seed': SEED}


def write_digits_on_photos(root: str | Path) -> Path:
    """Write the data set in ADE20K's folder layout, unless it is there already.

    The pictures are drawn into a folder beside `root` that is renamed when it is complete, so an interrupted run leaves
    nothing behind that looks like data, and processes that start together do not disturb each other.

    Args:
        root: Folder; it gets `images/` and `annotations/` with `training/` and `validation/` each.

    Returns:
        The folder.

    Raises:
        ImportError: Without scikit-learn.
        FileExistsError: If the folder holds something else.
    """
    root = Path(root)
    if _is_complete(root):
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f'.{root.name}-', dir=root.parent))
    try:
        temporary.chmod(0o755)
        for split in COUNTS:
            folders = [temporary / kind / split for kind in ('images', 'annotations')]
            for folder in folders:
                folder.mkdir(parents=True)
            for index, (picture, labels) in enumerate(_draw(split), 1):
                name = f'digits_{split[:5]}_{index:08d}'
                Image.fromarray(picture).save(folders[0] / f'{name}.jpg', quality=95)
                Image.fromarray(labels).save(folders[1] / f'{name}.png')
        (temporary / 'description.json').write_text(json.dumps(_description()), encoding='utf-8')
        try:
            os.rename(temporary, root)
        except OSError:
            if not _is_complete(root):  # otherwise another process was faster
                raise
        else:
            print_log(f'wrote the digits-on-photographs data set to {root}', logger='current')
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return root


def _is_complete(root: Path) -> bool:
    """Tell whether the folder holds the data; raise FileExistsError if it holds something else."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    try:
        found = json.loads((root / 'description.json').read_text(encoding='utf-8'))
    except (OSError, ValueError):
        found = None
    if found != _description():
        raise FileExistsError(
            f'{root} exists, but does not hold the digits-on-photographs data of this version '
            f'({_description()}); move it away or choose another data_root'
        )
    return True


@DATASETS.register_module()
class DigitsOnPhotos(CheckedFolders, BaseSegDataset):
    """Handwritten digits on photographs: 800 training and 120 validation pictures of 96 x 96 pixels, 11 classes.

    The pictures are written to `data_root` at the first use, in ADE20K's layout and with its convention: label 0 has no
    class (the faint edge of a stroke), 1 is the photograph, 2 to 11 are the digits. Training and validation share
    neither digits nor parts of the photographs.

    Args:
        data_root: Folder of the data. Default: 'data/digits_on_photos'.
        download: Write the data if it is not there; nothing is fetched from anywhere. Default: True.
        reduce_zero_label: Whether label 0 is ignored, as the files are meant. Default: True.
        **kwargs: As for mmseg's `BaseSegDataset`; `data_prefix` chooses the split.

    Raises:
        ImportError: Without scikit-learn.
        FileExistsError: If `data_root` holds something else.

    Source: scikit-learn's `load_digits` (E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI
    Machine Learning Repository, 1998) and `load_sample_images` (china.jpg by danielbuechele and flower.jpg by
    vultilion, both CC BY 2.0).
    """

    METAINFO = {
        'classes': ('photograph', *'0123456789'),
        'palette': [
            [90, 90, 90],
            [230, 25, 75],
            [60, 180, 75],
            [255, 225, 25],
            [0, 130, 200],
            [245, 130, 48],
            [145, 30, 180],
            [70, 240, 240],
            [240, 50, 230],
            [170, 110, 40],
            [250, 190, 212],
        ],
    }

    def __init__(
        self,
        data_root: str = 'data/digits_on_photos',
        download: bool = True,
        reduce_zero_label: bool = True,
        **kwargs,
    ) -> None:
        if download:
            write_digits_on_photos(data_root)
        super().__init__(data_root=data_root, reduce_zero_label=reduce_zero_label, **kwargs)
