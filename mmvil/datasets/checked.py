"""Classification data sets that find a wrong path or annotation before training starts."""

import os.path
from collections.abc import Sequence

from mmengine.fileio import LocalBackend, get_file_backend, list_from_file
from mmpretrain.datasets import CustomDataset as UpstreamCustomDataset
from mmpretrain.datasets import ImageNet as UpstreamImageNet

from ..registry import DATASETS

__all__ = ['CustomDataset', 'ImageNet', 'read_annotations']

NUM_PROBES = 16  # files looked for at the start; looking for all of ImageNet's takes minutes on a network disk
NUM_SHOWN = 5


def read_annotations(path: str, num_classes: int | None) -> list[tuple[str, int]]:
    """Read a list of `file label` lines.

    Args:
        path: The list; blank lines are skipped, a file name may hold spaces.
        num_classes: Number of classes, or None to accept every label that is not negative.

    Returns:
        (file, label) for every line.

    Raises:
        FileNotFoundError: If the list does not exist.
        ValueError: If it is empty or a line is not of that form; the message shows line numbers and lines.
    """
    try:
        lines = list_from_file(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f'annotation list {path} does not exist') from error
    samples, bad = [], []
    for number, line in enumerate(lines, 1):
        file, _, label = line.strip().rpartition(' ')
        if not line.strip():
            continue
        if not file or not label.isdecimal() or (num_classes is not None and int(label) >= num_classes):
            bad.append(f'line {number}: {line[:120]!r}')
        else:
            samples.append((file, int(label)))
    if bad:
        labels = 'a label' if num_classes is None else f'a label from 0 to {num_classes - 1}'
        shown = '; '.join(bad[:NUM_SHOWN]) + ('; ...' if len(bad) > NUM_SHOWN else '')
        raise ValueError(f'{path} has {len(bad)} bad lines, expected a file name, a space and {labels}: {shown}')
    if not samples:
        raise ValueError(f'annotation list {path} is empty')
    return samples


class _CheckedPaths:
    """Check folder, annotation list and some of the files of mmpretrain's folder-or-list data sets."""

    def load_data_list(self) -> list[dict]:
        """Collect image paths and labels.

        Returns:
            One dict with `img_path` and, with labels, `gt_label` per image.

        Raises:
            FileNotFoundError: If the image folder, the annotation list or one of a few probed images does not exist.
            ValueError: If the annotation list has a bad line, or the number of class folders is wrong.
        """
        name, folder = type(self).__name__, self.img_prefix
        backend = get_file_backend(folder)
        is_local = isinstance(backend, LocalBackend)
        if is_local and not os.path.isdir(folder):
            raise FileNotFoundError(
                f'{name}: image folder {folder} does not exist; put the data there or change data_root '
                f'({self.data_root!r}) in the config'
            )
        if self.ann_file and self.with_label:
            classes = self.CLASSES
            samples = read_annotations(self.ann_file, None if classes is None else len(classes))
            data_list = [{'img_path': backend.join_path(folder, file), 'gt_label': label} for file, label in samples]
        else:
            try:
                data_list = super().load_data_list()
            except AssertionError as error:  # upstream's check of the number of class folders
                raise ValueError(f'{name}: {folder}: {error}') from error
        if is_local:
            self._probe([entry['img_path'] for entry in data_list])
        return data_list

    def _probe(self, paths: Sequence[str]) -> None:
        """Look for a few files, spread over the list."""
        step = max(len(paths) // NUM_PROBES, 1)
        missing = [path for path in paths[::step] if not os.path.isfile(path)]
        if missing:
            raise FileNotFoundError(
                f'{type(self).__name__}: {len(missing)} of {len(paths[::step])} probed images do not exist, '
                f'for example {missing[0]}'
            )


@DATASETS.register_module()
class ImageNet(_CheckedPaths, UpstreamImageNet):
    """mmpretrain's `ImageNet` with clear errors for missing folders and bad annotation lines.

    Arguments and folder layout are those of mmpretrain's class.
    """


@DATASETS.register_module()
class CustomDataset(_CheckedPaths, UpstreamCustomDataset):
    """mmpretrain's `CustomDataset` with clear errors for missing folders and bad annotation lines.

    Arguments and folder layout are those of mmpretrain's class.
    """
