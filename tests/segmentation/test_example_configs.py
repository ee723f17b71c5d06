"""The example configs for other data: they read data in the documented layout and train a step."""

import numpy as np
import pytest
import torch
from mmengine.dataset import pseudo_collate
from mmseg.registry import DATASETS
from PIL import Image

from .helpers import build, load_config

CONFIGS = {
    'vil-tiny_upernet_4xb4-80k_cityscapes-512x1024.py': 19,
    'vil-tiny_upernet_1xb16-40k_voc12-512x512.py': 21,
    'vil-tiny_upernet_custom-512x512.py': 3,
}


def write_pair(image, mask, num_classes):
    rng = np.random.default_rng(0)
    for path, values in (
        (image, rng.integers(0, 256, (64, 128, 3), dtype=np.uint8)),
        (mask, np.kron(rng.integers(0, num_classes, (4, 8)), np.ones((16, 16))).astype(np.uint8)),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(values).save(path)


def write_cityscapes(root, split):
    name = 'aachen/aachen_000000_000019'
    image = root / 'leftImg8bit' / split / f'{name}_leftImg8bit.png'
    write_pair(image, root / 'gtFine' / split / f'{name}_gtFine_labelTrainIds.png', 19)


def write_voc(root, split):
    write_pair(root / 'JPEGImages' / '2007_000032.jpg', root / 'SegmentationClass' / '2007_000032.png', 21)
    lists = root / 'ImageSets' / 'Segmentation'
    lists.mkdir(parents=True, exist_ok=True)
    (lists / f'{split}.txt').write_text('2007_000032\n')


def write_custom(root, split):
    write_pair(root / 'images' / split / 'a.jpg', root / 'masks' / split / 'a.png', 3)


WRITERS = dict(zip(CONFIGS, (write_cityscapes, write_voc, write_custom), strict=True))


@pytest.mark.parametrize('name', CONFIGS)
def test_reads_data_and_trains_a_step(name, tmp_path):
    config = load_config(name)
    for split in ('train', 'val'):
        WRITERS[name](tmp_path, split)
    crop = tuple(config.model.data_preprocessor.size)
    config.model.backbone.update(arch=dict(embed_dims=16, num_layers=24), init_cfg=None)
    config.model.neck.embed_dim = 16
    config.model.decode_head.update(in_channels=[16] * 4, channels=8)
    config.model.auxiliary_head.update(in_channels=16, channels=8)
    model = build(config.model).train()
    assert model.backbone.pos_embed.shape[1:3] == (crop[0] // 16, crop[1] // 16)
    train = DATASETS.build(dict(config.train_dataloader.dataset, data_root=str(tmp_path)))
    val = DATASETS.build(dict(config.val_dataloader.dataset, data_root=str(tmp_path)))
    assert len(train) == len(val) == 1
    assert len(train.metainfo['classes']) == CONFIGS[name]
    assert val[0]['data_samples'].gt_sem_seg.shape == (64, 128)
    assert val[0]['inputs'].shape[1:] == ((1024, 2048) if 'cityscapes' in name else (512, 1024))
    data = model.data_preprocessor(pseudo_collate([train[0], train[0]]), training=True)
    assert data['inputs'].shape[2:] == crop
    for sample in data['data_samples']:  # a part is enough to see that everything fits together
        sample.gt_sem_seg = sample.gt_sem_seg[:64, :96]
    loss, _ = model.parse_losses(model(data['inputs'][..., :64, :96], data['data_samples'], mode='loss'))
    loss.backward()
    assert torch.isfinite(loss)
