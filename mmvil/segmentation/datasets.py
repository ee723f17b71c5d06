"""mmseg's data sets with errors that name what is wrong before training starts."""

import os

from mmengine.fileio import LocalBackend, get_file_backend
from mmseg.datasets import ADE20KDataset as UpstreamADE20KDataset
from mmseg.datasets import BaseSegDataset

from ..registry import DATASETS

__all__ = ['ADE20KDataset', 'CheckedFolders', 'SegDataset']

NUM_SHOWN = 3


class CheckedFolders:
    """Mixin for mmseg's folder data sets: look for folders, images and masks at the start; name files in errors."""

    def load_data_list(self) -> list[dict]:
        """Collect the paths of images and masks.

        Returns:
            One dict per image, as in mmseg.

        Raises:
            FileNotFoundError: If a folder, the list of images, an image of that list or a mask does not exist.
            ValueError: If the folder holds no image with the wanted suffix.
        """
        name = type(self).__name__
        folders = {key: self.data_prefix.get(key) for key in ('img_path', 'seg_map_path')}
        is_local = isinstance(get_file_backend(folders['img_path'], backend_args=self.backend_args), LocalBackend)
        for key, folder in folders.items():
            if is_local and folder is not None and not os.path.isdir(folder):
                raise FileNotFoundError(
                    f'{name}: folder {folder} (data_prefix.{key}) does not exist; put the data there or change '
                    f'data_root ({self.data_root!r}) in the config'
                )
        if self.ann_file and is_local and not os.path.isfile(self.ann_file):
            raise FileNotFoundError(f'{name}: list of images {self.ann_file} does not exist')
        data_list = super().load_data_list()
        if not data_list:
            raise ValueError(f'{name}: no image that ends in {self.img_suffix!r} in {folders["img_path"]}')
        if is_local:
            self._look_for_files(data_list, folders)
        return data_list

    def _look_for_files(self, data_list: list[dict], folders: dict[str, str | None]) -> None:
        """Compare the wanted files with the listing of their folders; one listing is cheaper than many look-ups."""
        for key, kind in (('img_path', 'image'), ('seg_map_path', 'mask')):
            if folders[key] is None:
                continue
            present = {
                os.path.normpath(os.path.join(folder, file))
                for folder, _, files in os.walk(folders[key], followlinks=True)
                for file in files
            }
            missing = [entry for entry in data_list if os.path.normpath(entry[key]) not in present]
            if missing:
                shown = ', '.join(entry[key] for entry in missing[:NUM_SHOWN])
                raise FileNotFoundError(
                    f'{type(self).__name__}: {len(missing)} of {len(data_list)} {kind} files do not exist: {shown}'
                    + (', ...' if len(missing) > NUM_SHOWN else '')
                )

    def prepare_data(self, idx: int) -> dict:
        """Run the pipeline on one image.

        Raises:
            RuntimeError: If a transform fails with an error that does not name the file; the message does.
        """
        try:
            return super().prepare_data(idx)
        except Exception as error:
            entry = self.get_data_info(idx)
            if any(str(entry.get(key)) in str(error) for key in ('img_path', 'seg_map_path')):
                raise
            raise RuntimeError(
                f'{type(self).__name__}: cannot prepare {entry["img_path"]}: {type(error).__name__}: {error}'
            ) from error


@DATASETS.register_module()
class ADE20KDataset(CheckedFolders, UpstreamADE20KDataset):
    """mmseg's `ADE20KDataset` (150 classes, label 0 ignored) with clear errors.

    Arguments and folder layout are those of mmseg's class.
    """


@DATASETS.register_module()
class SegDataset(CheckedFolders, BaseSegDataset):
    """mmseg's `BaseSegDataset` with clear errors: images and masks with equal names in two folders.

    Arguments are those of mmseg's class; `metainfo=dict(classes=..., palette=...)` names the classes.
    """
