"""Loading of masks with checks, and padding on all sides."""

import mmcv
import numpy as np
from mmcv.transforms import BaseTransform
from mmengine import fileio

from ..registry import TRANSFORMS

__all__ = ['CentredPad', 'LoadSegAnnotations']

IGNORED = 255
NUM_SHOWN = 10


@TRANSFORMS.register_module()
class LoadSegAnnotations(BaseTransform):
    """Load a segmentation mask and refuse one that cannot be right.

    mmseg's `LoadAnnotations` does the same without checks: it folds labels above 255 into 0..255, and labels that are
    no class end as an illegal memory access on a GPU or as a wrong figure, without the file's name.

    Required keys, set by mmseg's data sets: `seg_map_path`, `reduce_zero_label`, `label_map`, `seg_fields`; and
    `ori_shape` from the image. Without `seg_map_path`, as for pictures given to an inferencer, nothing is loaded.
    Added key: `gt_seg_map` (H, W), uint8, classes from 0, 255 = ignored.

    Accepted labels in the file: 0 to `num_classes` - 1 and 255 (ignored); with `reduce_zero_label` of the data set 0
    (ignored), 1 to `num_classes` and 255 (ignored).

    Args:
        num_classes: Number of classes that the files hold; more than the model's if the data set chooses some of them
            with `metainfo.classes`.
        imdecode_backend: Decoder, see `mmcv.imfrombytes`. Default: 'pillow'.
        backend_args: Arguments of the storage backend. Default: by the path's prefix.

    Raises:
        FileNotFoundError: If the mask does not exist; the message names it and its image.
        ValueError: If it cannot be decoded, has another size than the image, several channels, or labels out of range.
    """

    def __init__(self, num_classes: int, imdecode_backend: str = 'pillow', backend_args: dict | None = None) -> None:
        if not 1 <= num_classes < IGNORED:
            raise ValueError(f'num_classes must be from 1 to {IGNORED - 1}, got {num_classes}')
        self.num_classes = num_classes
        self.imdecode_backend, self.backend_args = imdecode_backend, backend_args

    def transform(self, results: dict) -> dict:
        """Load `results['seg_map_path']` into `results['gt_seg_map']`."""
        path = results.get('seg_map_path')
        if path is None:
            return results
        labels = self._decode(path, results.get('img_path'))
        self._check(labels, path, results)
        labels = labels.astype(np.uint8)
        if results['reduce_zero_label']:
            labels = np.where((labels == 0) | (labels == IGNORED), IGNORED, labels - 1).astype(np.uint8)
        if results.get('label_map') is not None:
            table = np.arange(256, dtype=np.uint8)
            for old, new in results['label_map'].items():
                table[old] = new
            labels = table[labels]
        results['gt_seg_map'] = labels
        results['seg_fields'].append('gt_seg_map')
        return results

    def _decode(self, path: str, image_path: str | None) -> np.ndarray:
        """Read and decode a mask of any integer type."""
        try:
            content = fileio.get(path, backend_args=self.backend_args)
            labels = mmcv.imfrombytes(content, flag='unchanged', backend=self.imdecode_backend)
        except FileNotFoundError as error:
            raise FileNotFoundError(f'mask {path} of image {image_path} does not exist') from error
        except Exception as error:  # decoders raise many kinds
            raise ValueError(f'cannot decode mask {path}: {type(error).__name__}: {error}') from error
        if labels is None:
            raise ValueError(f'cannot decode mask {path}: not an image, or a damaged one')
        return labels[..., 0] if labels.ndim == 3 and labels.shape[2] == 1 else labels

    def _check(self, labels: np.ndarray, path: str, results: dict) -> None:
        """Compare shape and labels with what they must be."""
        if labels.ndim != 2:
            raise ValueError(
                f'mask {path} must have one channel with class numbers, got an array of shape {labels.shape}; colours '
                'have to be turned into class numbers first'
            )
        if tuple(labels.shape) != tuple(results['ori_shape']):
            raise ValueError(
                f'mask {path} has (height, width) {tuple(labels.shape)}, but its image {results.get("img_path")} has '
                f'{tuple(results["ori_shape"])}'
            )
        first, last = (0, self.num_classes) if results['reduce_zero_label'] else (0, self.num_classes - 1)
        wrong = [int(label) for label in np.unique(labels) if not first <= label <= last and label != IGNORED]
        if wrong:
            shown = ', '.join(map(str, wrong[:NUM_SHOWN])) + (', ...' if len(wrong) > NUM_SHOWN else '')
            zero = '0 is ignored' if results['reduce_zero_label'] else 'reduce_zero_label=False'
            raise ValueError(
                f'mask {path} holds the labels {shown}; accepted for {self.num_classes} classes are {first} to '
                f'{last} ({zero}) and {IGNORED} (ignored)'
            )

    def __repr__(self) -> str:
        return f'{type(self).__name__}(num_classes={self.num_classes}, imdecode_backend={self.imdecode_backend!r})'


@TRANSFORMS.register_module()
class CentredPad(BaseTransform):
    """Pad image and masks to a size on all sides equally; mmcv's `Pad` does it at the bottom and right.

    The image's border is `pad_val`; with the mean that the data preprocessor subtracts, it is 0 after normalisation.
    Such an image turns into float32, because the mean is no whole number. Larger images stay as they are.

    Required key: `img`; masks named in `seg_fields`. Modified keys: these and `img_shape`; added: `pad_shape`.

    Args:
        size: Height and width in pixels.
        pad_val: Value of the image's border, for each channel in the image's order (BGR as loaded by default).
        seg_pad_val: Value of the masks' border. Default: 255 (ignored).

    Source: data pipeline of the released ViL segmentation code.
    """

    def __init__(self, size: tuple[int, int], pad_val: tuple[float, ...], seg_pad_val: int = IGNORED) -> None:
        self.size, self.pad_val, self.seg_pad_val = tuple(size), tuple(pad_val), seg_pad_val

    def transform(self, results: dict) -> dict:
        """Pad `results['img']` and its masks."""
        height, width = results['img'].shape[:2]
        missing = [max(wanted - length, 0) for wanted, length in zip(self.size, (height, width), strict=True)]
        if any(missing):
            border = [(length // 2, length - length // 2) for length in missing]
            padded = np.empty((height + missing[0], width + missing[1], results['img'].shape[2]), np.float32)
            padded[:] = np.asarray(self.pad_val, np.float32)
            (top, _), (left, _) = border
            padded[top : top + height, left : left + width] = results['img']
            results['img'] = padded
            for key in results.get('seg_fields', []):
                results[key] = np.pad(results[key], border, constant_values=self.seg_pad_val)
        results['img_shape'] = results['pad_shape'] = results['img'].shape[:2]
        return results

    def __repr__(self) -> str:
        return f'{type(self).__name__}(size={self.size}, pad_val={self.pad_val}, seg_pad_val={self.seg_pad_val})'
