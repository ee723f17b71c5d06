"""The handwritten digits that scikit-learn ships: real images without a download."""

from collections.abc import Sequence

import numpy as np
from mmpretrain.datasets import BaseDataset

from ..registry import DATASETS

__all__ = ['Digits']


@DATASETS.register_module()
class Digits(BaseDataset):
    """1797 handwritten digits, 8 x 8 pixels, ten classes, split 80 : 20 with equal shares of each class.

    A sample is a dict with `img` ((8, 8, 3), uint8, the grey value repeated so that pipelines and inferencers for
    pictures work unchanged; 0 is paper, 255 is ink) and `gt_label` (int, 0..9). The images are kept in memory.

    Args:
        split (str): 'train' (1437 images) or 'val' (360 images).
        split_seed (int): Seed of the split. Default: 0.
        pipeline (Sequence): Transforms, as in mmpretrain. Default: ().
        test_mode (bool): As in mmpretrain. Default: True for 'val', False for 'train'.
        **kwargs: Other arguments of `mmpretrain.datasets.BaseDataset`, such as `indices`.

    Raises:
        ValueError: for another `split`.
        ImportError: without scikit-learn.

    Source: scikit-learn's `load_digits`, a part of E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten
    Digits, UCI Machine Learning Repository, 1998.
    """

    METAINFO = {'classes': tuple('0123456789')}

    def __init__(
        self,
        split: str,
        split_seed: int = 0,
        pipeline: Sequence = (),
        test_mode: bool | None = None,
        **kwargs,
    ) -> None:
        if split not in ('train', 'val'):
            raise ValueError(f"split must be 'train' or 'val', got {split!r}")
        self.split = split
        self.split_seed = split_seed
        test_mode = split == 'val' if test_mode is None else test_mode
        super().__init__(ann_file='', pipeline=pipeline, test_mode=test_mode, **kwargs)

    def load_data_list(self) -> list[dict]:
        """Return the images and labels of the split."""
        try:
            from sklearn.datasets import load_digits
            from sklearn.model_selection import train_test_split
        except ImportError as error:
            raise ImportError("mmvil.Digits needs scikit-learn: pip install 'mmvil[openmmlab]'") from error
        digits = load_digits()
        # 17 levels (0..16) to the full range of uint8.
        images = np.round(digits.images * (255 / 16)).astype(np.uint8)
        train, val = train_test_split(
            np.arange(len(images)), test_size=0.2, stratify=digits.target, random_state=self.split_seed
        )
        chosen = train if self.split == 'train' else val
        colour = np.repeat(images[..., None], 3, axis=3)
        return [dict(img=colour[i], gt_label=int(digits.target[i])) for i in sorted(chosen)]

    def extra_repr(self) -> list[str]:
        """Lines that `print` adds."""
        return [f'Split: \t{self.split} (seed {self.split_seed})']
