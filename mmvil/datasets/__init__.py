"""Data sets and transforms. Needs mmpretrain and mmcv."""

from .checked import CustomDataset, ImageNet
from .transforms import LoadCheckedImage

__all__ = ['CustomDataset', 'ImageNet', 'LoadCheckedImage']
