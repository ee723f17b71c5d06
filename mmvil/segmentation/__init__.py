"""Semantic segmentation with mmsegmentation: what its own parts lack. Needs mmseg.

Classification must not import mmseg, so nothing imports this package by itself: segmentation configs name it in
`custom_imports = dict(imports=['mmvil.segmentation'])`.
"""

from .datasets import ADE20KDataset, SegDataset
from .digits_on_photos import DigitsOnPhotos
from .encoder_decoder import EncoderDecoder
from .overlay import SegOverlayHook
from .transforms import CentredPad, LoadSegAnnotations
from .tta import LogitSumTTAModel

__all__ = [
    'ADE20KDataset',
    'CentredPad',
    'DigitsOnPhotos',
    'EncoderDecoder',
    'LoadSegAnnotations',
    'LogitSumTTAModel',
    'SegDataset',
    'SegOverlayHook',
]
