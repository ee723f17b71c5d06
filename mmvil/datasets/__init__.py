"""Data sets and transforms. Needs mmpretrain and mmcv."""

from .checked import CustomDataset, ImageNet
from .digits import Digits
from .transforms import LoadCheckedImage

__all__ = ['CustomDataset', 'Digits', 'ImageNet', 'LoadCheckedImage']
