"""Small segmentors and data in ADE20K's layout for the tests of segmentation."""

from pathlib import Path

import numpy as np
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmseg.registry import MODELS
from PIL import Image

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / 'configs' / 'vil'


def load_config(name):
    """Read a shipped config."""
    return Config.fromfile(str(CONFIGS / name))


def small_model_config(num_classes=3, crop=32, dims=16, num_layers=4, stride=None, **model):
    """The UperNet base at toy size."""
    config = Config.fromfile(
        str(ROOT / 'configs' / '_base_' / 'models' / 'upernet_vil.py'), import_custom_modules=False
    )
    config.merge_from_dict(dict(custom_imports=dict(imports=['mmvil.segmentation'])))
    import mmvil.segmentation  # noqa: F401

    out_indices = tuple(num_layers * quarter // 4 - 1 for quarter in (1, 2, 3, 4))
    config.model.merge(
        dict(
            data_preprocessor=dict(size=(crop, crop)),
            backbone=dict(
                arch=dict(embed_dims=dims, num_layers=num_layers), img_size=crop, patch_size=4, out_indices=out_indices
            ),
            neck=dict(embed_dim=dims, norm_cfg=dict(type='BN')),
            decode_head=dict(
                in_channels=[dims] * 4,
                channels=16,
                num_classes=num_classes,
                pool_scales=(1, 2),
                norm_cfg=dict(type='BN'),
            ),
            auxiliary_head=dict(in_channels=dims, channels=16, num_classes=num_classes, norm_cfg=dict(type='BN')),
            test_cfg=dict(crop_size=(crop, crop), stride=stride or (crop * 2 // 3, crop * 2 // 3)),
        )
    )
    config.model.merge(model)
    return config.model


def build(model_config):
    """Build a segmentor on the CPU."""
    model = revert_sync_batchnorm(MODELS.build(model_config))
    model.init_weights()
    return model.eval()


def randomize_norms(model, generator):
    """Give batch norms statistics that are not those of the start, so that positions and windows matter."""
    for module in model.modules():
        if hasattr(module, 'running_mean') and module.running_mean is not None:
            module.running_mean.normal_(std=0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)


def write_ade(root, masks, sizes=None, split='validation', seed=0):
    """Write pictures and the given masks in ADE20K's layout.

    Args:
        root: Folder to fill.
        masks: Masks, (H, W), any integer type.
        sizes: Sizes of the pictures. Default: those of the masks.
        split: 'training' or 'validation'.
        seed: Seed of the pictures.
    """
    rng = np.random.default_rng(seed)
    folders = [Path(root) / kind / split for kind in ('images', 'annotations')]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    for index, mask in enumerate(masks):
        height, width = (sizes or {}).get(index, mask.shape)
        picture = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        name = f'ADE_val_{index + 1:08d}'
        Image.fromarray(picture).save(folders[0] / f'{name}.jpg')
        Image.fromarray(mask).save(folders[1] / f'{name}.png')
