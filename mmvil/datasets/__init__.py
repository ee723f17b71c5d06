"""Data sets and transforms. Needs mmpretrain and mmcv."""

from .checked import CustomDataset, ImageNet
from .digits import Digits
from .transforms import LoadCheckedImage
from .vtab import VTAB1K

__all__ = ['VTAB1K', 'CustomDataset', 'Digits', 'ImageNet', 'LoadCheckedImage']
