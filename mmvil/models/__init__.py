"""Vision-LSTM models for OpenMMLab. They need mmengine."""

try:
    import mmengine  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != 'mmengine':
        raise
    raise ModuleNotFoundError(
        "mmvil.models needs mmengine, which is not installed: pip install 'mmvil[openmmlab]'. mmvil.ops works alone.",
        name='mmengine',
    ) from error

from .block import ViLBlock, ViLLayer
from .vil import VisionLSTM

__all__ = ['ViLBlock', 'ViLLayer', 'VisionLSTM']
