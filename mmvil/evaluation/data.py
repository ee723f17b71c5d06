"""Splits of a task as tensors: decoded and resized once, then kept for all runs."""

import hashlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from mmengine.logging import print_log
from torch import Tensor

from ..datasets.vtab import GIGABYTE, VTAB1K, storage_format
from .check import STORAGE

__all__ = ['LoadedSplit', 'load_split']


@dataclass
class LoadedSplit:
    """Images and labels of one split.

    Args:
        dataset: Where they come from.
        labels: int64, (N,), on the device.
        images: uint8, (N, 3, H, W), BGR; None if they exceed the memory limit and are decoded at every pass.
        identity: Number of images, hashes and kind of storage, for the record of a run.
        num_threads: Threads that decode.
    """

    dataset: VTAB1K
    labels: Tensor
    images: Tensor | None
    identity: dict
    num_threads: int = 1

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, batch_size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Go through the split once, in order, the last batch being shorter.

        Args:
            batch_size: Number of images of a batch.
            device: Where the batches go.

        Yields:
            Images (uint8, (B, 3, H, W), BGR) and labels (int64, (B,)).
        """
        ranges = [range(start, min(start + batch_size, len(self))) for start in range(0, len(self), batch_size)]
        if self.images is not None:
            for indices in ranges:
                part = slice(indices.start, indices.stop)
                yield self.images[part].to(device, non_blocking=True), self.labels[part]
            return
        with ThreadPoolExecutor(self.num_threads) as pool:
            ahead: deque = deque()
            for indices in ranges:
                ahead.append((indices, [pool.submit(read_tensor, self.dataset, index) for index in indices]))
                if len(ahead) > 2:
                    yield self._finish(*ahead.popleft(), device)
            while ahead:
                yield self._finish(*ahead.popleft(), device)

    def _finish(self, indices: range, futures: list, device: torch.device) -> tuple[Tensor, Tensor]:
        """Wait for the images of a batch."""
        images = torch.stack([future.result() for future in futures])
        return images.to(device, non_blocking=True), self.labels[indices.start : indices.stop]


def read_tensor(dataset: VTAB1K, index: int) -> Tensor:
    """Decode one image as a tensor, uint8, (3, H, W), BGR."""
    return torch.from_numpy(dataset.read_image(index)).permute(2, 0, 1)


def load_split(
    settings: Mapping,
    data_root: str,
    task: str,
    split: str,
    open_splits: Sequence[str],
    device: torch.device,
    on_device: bool,
) -> LoadedSplit:
    """Decode a split.

    Args:
        settings: See `load_settings`; uses `cached_pipeline` and `runtime`.
        data_root: Folder or zip.
        task: Name of the task.
        split: Split to load.
        open_splits: Splits that this phase may read; others are a PermissionError.
        device: Device of the labels.
        on_device: Whether the images lie on the device, too; else in (page-locked) memory of the host.

    Returns:
        The split.

    Raises:
        PermissionError: If the split is not open.
        ValueError: If the list has faults, or an image is missing, unreadable or cut off; or if images have different
            sizes after the cached pipeline, or JPEG and lossless files are mixed.
    """
    runtime = settings['runtime']
    dataset = VTAB1K(data_root, task, split, cached_pipeline=list(settings['cached_pipeline']), open_splits=open_splits)
    labels = torch.from_numpy(dataset.labels)
    shape = tuple(read_tensor(dataset, 0).shape)
    size = len(labels) * shape[0] * shape[1] * shape[2] / GIGABYTE
    identity = {
        'count': len(labels),
        'list_hash': dataset.list_hash,
        'images_hash': '',
        'storage': 'TFDS' if dataset.source.kind == 'tfds' else '',
        'size': list(shape[1:]),
    }
    images = None
    if size > runtime['memory_limit']:
        print_log(
            f'{task} {split}: {size:.1f} GB of images exceed runtime.memory_limit={runtime["memory_limit"]}; they are '
            'decoded at every pass, and their hash is not taken',
            logger='current',
        )
        if not identity['storage']:
            identity['storage'] = STORAGE[storage_format(dataset.source.read(dataset.entries[0].path))]
    else:
        images = torch.empty(
            (len(labels), *shape), dtype=torch.uint8, pin_memory=device.type == 'cuda' and not on_device
        )
        _fill(images, dataset, identity, runtime['num_threads'])
        images = images.to(device) if on_device else images
    return LoadedSplit(dataset, labels.to(device), images, identity, runtime['num_threads'])


def _fill(images: Tensor, dataset: VTAB1K, identity: dict, num_threads: int) -> None:
    """Decode all images into a tensor, and note their hash and kind of storage."""

    def decode(index: int) -> tuple[bytes, str]:
        image, content_hash, kind = dataset.read_with_hash(index)
        if image.shape != (*images.shape[2:], images.shape[1]):
            raise ValueError(
                f'{dataset.entries[index].path} has the shape {image.shape} after cached_pipeline, others have '
                f'{(*images.shape[2:], images.shape[1])}; the pipeline must end with one size'
            )
        images[index] = torch.from_numpy(image).permute(2, 0, 1)
        return content_hash, kind

    digest, kinds = hashlib.sha256(), set()
    with ThreadPoolExecutor(num_threads) as pool:
        for content_hash, kind in pool.map(decode, range(len(images))):
            digest.update(content_hash)
            kinds.add(kind)
    identity['images_hash'] = digest.hexdigest()
    if len(kinds) > 1:
        raise ValueError(f'{dataset.source}: images of different storage are mixed in {dataset.split}: {sorted(kinds)}')
    if not identity['storage']:
        identity['storage'] = STORAGE[kinds.pop()]
