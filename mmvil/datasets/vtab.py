"""VTAB-1K as an mmpretrain data set."""

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from mmengine.logging import print_log
from mmpretrain.datasets.base_dataset import BaseDataset
from mmpretrain.registry import TRANSFORMS
from PIL import Image

from ..registry import DATASETS
from .vtab_lists import Entry, hash_entries, parse_list
from .vtab_sources import DataRoot, RestrictedSource, TfdsSource
from .vtab_tasks import SPLITS, find_task, label_names

__all__ = ['VTAB1K', 'decode_image']

GIGABYTE = 1 << 30
MAGIC_NUMBERS = {b'\xff\xd8\xff': 'jpeg', b'\x89PNG': 'png'}


def decode_image(content: bytes, name: str) -> np.ndarray:
    """Decode an image in full.

    Grey, palette and transparent images become RGB; the orientation tag is ignored, as the published pipeline does.

    Args:
        content: The file.
        name: File name and line number for the message.

    Returns:
        uint8 of shape (H, W, 3) in BGR order, as mmcv's transforms and mmpretrain's preprocessor expect it.

    Raises:
        ValueError: If it cannot be decoded or is cut off.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            return np.asarray(image.convert('RGB'))[:, :, ::-1]
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f'{name} is unreadable or truncated: {error}') from error


def storage_format(content: bytes) -> str:
    """Tell how an image is stored: 'jpeg', 'png', or 'other'."""
    return next((name for magic, name in MAGIC_NUMBERS.items() if content.startswith(magic)), 'other')


@DATASETS.register_module()
class VTAB1K(BaseDataset):
    """One split of one of the 19 tasks of VTAB-1K, with decoded images kept in memory.

    Reads the common zip (extracted or not), one zip per task, and TFDS records (needs `tensorflow-datasets`).

    Every sample enters `pipeline` with `img` (uint8, (H, W, 3), BGR), so a pipeline starts with a resize, not with
    loading. Transforms that give the same result each time belong into `cached_pipeline`: they run once.

    Args:
        data_root: Folder or zip, see `DataRoot`.
        task: One of the 19 names or an alias, for example 'cifar'. Parts of names are not accepted.
        split: 'train800', 'val200', 'train800val200' or 'test'.
        pipeline: Transforms that run at every access.
        cached_pipeline: Transforms whose results are kept, in the order before `pipeline`. Random ones do not belong
            here. Default: none, images are kept in their own size.
        memory_limit: Gigabytes of images to keep; what does not fit is decoded at every access, which one log line
            says. Default 16.
        open_splits: Splits that may be read at all; asking for another one is a PermissionError. Default: all.
        **kwargs: Further arguments of mmpretrain's `BaseDataset`.

    Raises:
        FileNotFoundError: If the data root, the task or a list is missing.
        PermissionError: If the split is not open.
        ValueError: If task or split are unknown or the list has faults; the message holds all of them.

    Example:
        >>> train = dict(type='mmvil.VTAB1K', data_root='data/vtab-1k', task='cifar', split='train800',
        ...              cached_pipeline=[dict(type='Resize', scale=(224, 224), interpolation='bicubic',
        ...                                    backend='pillow')],
        ...              pipeline=[dict(type='PackInputs')])
    """

    def __init__(
        self,
        data_root: str | Path,
        task: str,
        split: str,
        pipeline: Sequence = (),
        cached_pipeline: Sequence = (),
        memory_limit: float = 16.0,
        open_splits: Sequence[str] = SPLITS,
        **kwargs: object,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f'split must be one of {list(SPLITS)}, got {split!r}')
        self.task, self.split = find_task(task), split
        self.memory_limit = memory_limit
        self.root = DataRoot(data_root)
        self.source = RestrictedSource(self.root.source(self.task), tuple(open_splits))
        self.source.allow(split)
        self.cached_transforms = [
            TRANSFORMS.build(step) if isinstance(step, dict) else step for step in cached_pipeline
        ]
        self.entries: list[Entry] = []
        self._kept: dict[int, np.ndarray] = {}
        self._hashes: list[bytes] = []  # of TFDS images, before the pipeline
        self._kept_bytes = 0
        metainfo = {'classes': label_names(self.task.name)}
        super().__init__(ann_file='', data_root=str(self.root.root), metainfo=metainfo, pipeline=pipeline, **kwargs)

    def load_data_list(self) -> list[dict]:
        """Read the list of the split.

        Returns:
            One dict with `img_path`, `gt_label` and `line` per image.

        Raises:
            FileNotFoundError: If the list is missing.
            ValueError: If it has faults; the message holds all of them.
        """
        if self.source.kind == 'tfds':
            self._read_tfds()
        else:
            name = f'{self.split}.txt'
            try:
                content = self.source.read(name)
            except FileNotFoundError as error:
                raise FileNotFoundError(
                    f'{self.source} has no list {name}: this is not the layout of VTAB-1K (folders of classes are not '
                    'enough, the order of the images is part of the task)'
                ) from error
            sizes = self.root.accepted_sizes(self.task, self.split)
            self.entries, faults = parse_list(name, content, self.task.num_classes, sizes)
            if faults:
                raise ValueError(f'{self.source} has {len(faults)} faults:\n  ' + '\n  '.join(faults))
        return [{'img_path': f'{self.source}/{e.path}', 'gt_label': e.label, 'line': e.line} for e in self.entries]

    @property
    def labels(self) -> np.ndarray:
        """All labels, int64, shape (N,)."""
        return np.array([entry.label for entry in self.entries], dtype=np.int64)

    @property
    def list_hash(self) -> str:
        """SHA-256 of the list's paths and labels."""
        return hash_entries(self.entries)

    def read_image(self, index: int) -> np.ndarray:
        """Decode an image and run the cached pipeline on it, without keeping the result.

        Args:
            index: Position in the list.

        Returns:
            uint8 of shape (H, W, 3) in BGR order.

        Raises:
            ValueError: If the image is missing, unreadable or cut off; the message has file name and line number.
        """
        return self._kept[index] if index in self._kept else self._decode(index)[0]

    def read_with_hash(self, index: int) -> tuple[np.ndarray, bytes, str]:
        """Decode an image like `read_image`, and identify its file.

        Args:
            index: Position in the list.

        Returns:
            The image; the SHA-256 of the file (of the decoded pixels for TFDS records); 'jpeg', 'png' or 'other'.

        Raises:
            ValueError: As `read_image`.
        """
        if self.source.kind == 'tfds':
            return self._kept[index], self._hashes[index], 'other'
        image, content = self._decode(index)
        return image, hashlib.sha256(content).digest(), storage_format(content)

    def _decode(self, index: int) -> tuple[np.ndarray, bytes]:
        """Read and decode a file and run the cached pipeline; returns the image and the file."""
        entry = self.entries[index]
        name = f'{self.source}: {entry.path} ({self.split}.txt line {entry.line})'
        try:
            content = self.source.read(entry.path)
        except FileNotFoundError as error:
            raise ValueError(f'{name} does not exist') from error
        except PermissionError:
            raise
        except OSError as error:
            raise ValueError(f'{name} is unreadable: {error}') from error
        return self._transform_once(decode_image(content, name)), content

    def _transform_once(self, image: np.ndarray) -> np.ndarray:
        """Run the cached pipeline."""
        results = {'img': image, 'img_shape': image.shape[:2], 'ori_shape': image.shape[:2]}
        for transform in self.cached_transforms:
            results = transform(results)
        return np.ascontiguousarray(results['img'])

    def get_data_info(self, idx: int) -> dict:
        """Give one sample to the pipeline.

        Args:
            idx: Position in the list.

        Returns:
            `img`, `img_shape`, `ori_shape`, `img_path`, `gt_label`, `line` and `sample_idx`.

        Raises:
            ValueError: If the image is missing, unreadable or cut off.
        """
        info = super().get_data_info(idx)
        image = self.read_image(idx)
        self._keep(idx, image)
        # The pipeline may change the image in place, the kept one must stay.
        return {**info, 'img': image.copy(), 'img_shape': image.shape[:2], 'ori_shape': image.shape[:2]}

    def _keep(self, index: int, image: np.ndarray) -> None:
        """Keep an image if it fits into the limit."""
        limit = self.memory_limit * GIGABYTE
        if index in self._kept or self._kept_bytes > limit:
            return
        if self._kept_bytes + image.nbytes > limit:
            print_log(
                f'{self.task.name} {self.split}: the images exceed memory_limit={self.memory_limit} GB; '
                f'{len(self._kept)} of {len(self.entries)} are kept, the others are decoded at every access',
                logger='current',
            )
            self._kept_bytes = int(limit) + 1
            return
        self._kept[index] = image
        self._kept_bytes += image.nbytes

    def _read_tfds(self) -> None:
        """Stream a split of TFDS once; its images cannot be looked up one by one, so all are kept."""
        from .vtab_tfds import iterate_split, record_entry

        source = self.source.source
        if not isinstance(source, TfdsSource):
            raise TypeError(f'expected TFDS records, got {type(source).__name__}')
        for index, (image, label) in enumerate(iterate_split(self.task, self.split, source.data_dir)):
            self._kept[index] = self._transform_once(np.ascontiguousarray(image[:, :, ::-1]))
            self._hashes.append(hashlib.sha256(image.tobytes()).digest())
            self.entries.append(record_entry(self.split, index, label))
        sizes = self.root.accepted_sizes(self.task, self.split)
        if len(self.entries) not in sizes:
            raise ValueError(f'{source} gave {len(self.entries)} images for {self.split}, expected {sizes}')

    def extra_repr(self) -> list[str]:
        """Lines that describe the data set."""
        return [f'Task: \t{self.task.name} ({self.split})', f'Source: \t{self.source}']
