"""Image loading that names the file it fails on."""

import io

import mmcv
import numpy as np
from mmcv.transforms import BaseTransform
from mmengine import fileio
from PIL import Image

from ..registry import TRANSFORMS

__all__ = ['LoadCheckedImage', 'check_finite']

TIFF_MARKS = (b'II*\x00', b'MM\x00*')


def check_finite(image: np.ndarray, name: str) -> None:
    """Refuse an image that holds NaN or infinite values.

    Args:
        image: Any shape; integer images always pass.
        name: File name or other description for the message.

    Raises:
        ValueError: If a value is not finite.
    """
    if np.issubdtype(image.dtype, np.floating):
        bad = image.size - np.count_nonzero(np.isfinite(image))
        if bad:
            raise ValueError(f'image {name} holds {bad} NaN or infinite values among {image.size}')


@TRANSFORMS.register_module()
class LoadCheckedImage(BaseTransform):
    """Load an image from a file, or check the one that is there already.

    mmcv's `LoadImageFromFile` leaves a damaged file to its decoder, whose error, with Pillow, names no file. This
    one names it, and decodes with Pillow as torchvision does. By default it also ignores the orientation tag as
    torchvision does, which keeps validation images equal to those that published accuracies were measured on.

    Required key: `img_path`, or `img` (an array; inference tools load it themselves). Added keys: `img` (H, W, C) in
    BGR order, `img_shape`, `ori_shape`.

    Args:
        color_type: Kind of image to decode to, see `mmcv.imfrombytes`. Default 'color_ignore_orientation'.
        imdecode_backend: Decoder, see `mmcv.imfrombytes`. Default 'pillow'.
        to_float32: Turn the image into float32. Default False: uint8.
        backend_args: Arguments of the storage backend, see `mmengine.fileio.get`. Default: by the path's prefix.

    Raises:
        FileNotFoundError: If the file does not exist; the message names it.
        ValueError: If the file cannot be decoded in full or holds values that are not finite; the message names it.
    """

    def __init__(
        self,
        color_type: str = 'color_ignore_orientation',
        imdecode_backend: str = 'pillow',
        to_float32: bool = False,
        backend_args: dict | None = None,
    ) -> None:
        self.color_type, self.imdecode_backend = color_type, imdecode_backend
        self.to_float32, self.backend_args = to_float32, backend_args

    def transform(self, results: dict) -> dict:
        """Load `results['img_path']` into `results['img']`."""
        if 'img' not in results:
            results['img'] = self._load(results['img_path'])
        elif isinstance(results['img'], np.ndarray):
            check_finite(results['img'], str(results.get('img_path', '(given as an array)')))
        if self.to_float32:
            results['img'] = results['img'].astype(np.float32)
        results['img_shape'] = results['ori_shape'] = results['img'].shape[:2]
        return results

    def _load(self, path: str) -> np.ndarray:
        """Read and decode a file."""
        try:
            content = fileio.get(path, backend_args=self.backend_args)
            if self.imdecode_backend == 'pillow':
                self._refuse_float_tiff(content)
            image = mmcv.imfrombytes(content, flag=self.color_type, backend=self.imdecode_backend)
        except FileNotFoundError as error:
            raise FileNotFoundError(f'image file {path} does not exist') from error
        except Exception as error:  # decoders raise many kinds
            raise ValueError(f'cannot decode image {path}: {type(error).__name__}: {error}') from error
        if image is None:
            raise ValueError(f'cannot decode image {path}: not an image, or a damaged one')
        check_finite(image, path)
        return image

    def _refuse_float_tiff(self, content: bytes) -> None:
        """Pillow would clip floating-point images to 8 bits and turn NaN into some number, both in silence."""
        if content[:4] in TIFF_MARKS:
            with Image.open(io.BytesIO(content)) as image:
                if image.mode == 'F':
                    raise ValueError(
                        "a floating-point TIFF needs imdecode_backend='tifffile', or 'cv2' with color_type='unchanged'"
                    )

    def __repr__(self) -> str:
        return (
            f'{type(self).__name__}(color_type={self.color_type!r}, imdecode_backend={self.imdecode_backend!r}, '
            f'to_float32={self.to_float32}, backend_args={self.backend_args})'
        )
