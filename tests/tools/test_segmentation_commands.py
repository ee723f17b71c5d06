"""The same two commands on a segmentation config, with the settings of a GPU recipe."""

import json
import logging

import numpy as np
import pytest
from PIL import Image

from .test_train_and_test import log_of, run

CONFIG = """
default_scope = 'mmseg'
custom_imports = dict(imports=['mmvil'], allow_failed_imports=False)
crop = (32, 32)
norm = dict(type='SyncBN')
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(type='SegDataPreProcessor', size=crop, mean=[127.0] * 3, std=[64.0] * 3, seg_pad_val=255),
    backbone=dict(
        type='mmvil.VisionLSTM', arch=dict(embed_dims=16, num_layers=2), img_size=32, patch_size=8, out_type='featmap'
    ),
    decode_head=dict(type='FCNHead', in_channels=16, in_index=0, channels=8, num_convs=1, num_classes=2, norm_cfg=norm),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'),
)
load = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')]
pack = dict(type='PackSegInputs')
loader = dict(
    batch_size=2,
    num_workers=0,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        type='BaseSegDataset',
        metainfo=dict(classes=('paper', 'ink'), palette=[[0, 0, 0], [255, 255, 255]]),
        data_root=r'DATA_ROOT',
        data_prefix=dict(img_path='images', seg_map_path='labels'),
        img_suffix='.png',
        pipeline=[*load, dict(type='RandomFlip', prob=0.5), pack],
    ),
)
train_dataloader = loader
test_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(loader['dataset'], pipeline=[*load, pack], test_mode=True),
)
val_dataloader = test_dataloader
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator
train_cfg = dict(type='IterBasedTrainLoop', max_iters=4, val_interval=2)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
tta_model = dict(type='SegTTAModel')
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='TestTimeAug',
        transforms=[
            [dict(type='RandomFlip', prob=0.0), dict(type='RandomFlip', prob=1.0)],
            [dict(type='LoadAnnotations')],
            [pack],
        ],
    ),
]
optim_wrapper = dict(type='AmpOptimWrapper', dtype='float16', optimizer=dict(type='AdamW', lr=1e-3))
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=1, log_metric_by_epoch=False),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=2, save_best='mIoU'),
    visualization=dict(type='SegVisualizationHook'),
)
custom_hooks = [
    dict(type='mmvil.RandomStateHook'),
    dict(type='mmvil.StopOnNonFiniteLossHook'),
    dict(type='mmvil.TrainingReportHook', metric='mIoU'),
]
log_processor = dict(by_epoch=False)
visualizer = dict(type='SegLocalVisualizer', vis_backends=[dict(type='LocalVisBackend')])
randomness = dict(seed=0)
"""


@pytest.fixture
def config(tmp_path):
    generator = np.random.default_rng(0)
    for folder in ('images', 'labels'):
        (tmp_path / 'data' / folder).mkdir(parents=True)
    for number in range(3):
        label = (generator.random((32, 32)) > 0.5).astype(np.uint8)
        Image.fromarray(label).save(tmp_path / 'data/labels' / f'{number}.png')
        Image.fromarray(np.repeat(label[..., None] * 255, 3, axis=2)).save(tmp_path / 'data/images' / f'{number}.png')
    path = tmp_path / 'toy_segmentation.py'
    path.write_text(CONFIG.replace('DATA_ROOT', str(tmp_path / 'data')))
    return path


def test_segmentation_trains_resumes_and_is_evaluated(config, tmp_path, capsys):
    work_dir = tmp_path / 'work'
    run('train.py', config, '--work-dir', work_dir)
    log = log_of(work_dir)
    assert 'AmpOptimWrapper is not available' in log
    assert 'SyncBN needs several processes: BN is used' in log
    assert 'mIoU' in log
    assert (work_dir / 'training_curves.png').is_file()
    assert not (work_dir / 'confusion_matrix.png').exists()

    capsys.readouterr()
    run('train.py', config, '--work-dir', tmp_path / 'resumed', '--resume', work_dir / 'iter_2.pth')
    assert (tmp_path / 'resumed/iter_4.pth').is_file()
    # The NumPy values in the log buffers stay on the safe path of torch.load.
    assert 'weights_only=False' not in capsys.readouterr().out + log_of(tmp_path / 'resumed')

    words = [config, work_dir / 'iter_4.pth', '--work-dir', tmp_path / 'test']
    run('test.py', *words, '--out', tmp_path / 'metrics.json', '--show-dir', tmp_path / 'shown', '--tta')
    assert 0 <= json.loads((tmp_path / 'metrics.json').read_text())['mIoU'] <= 100
    assert len(list((tmp_path / 'shown').rglob('*.png'))) == 3
    run('test.py', *words, '--out', tmp_path / 'maps')
    assert sorted(path.name for path in (tmp_path / 'maps').iterdir()) == ['0.png', '1.png', '2.png']
    logging.shutdown()
