"""A small ViL with UperNet on handwritten digits over photographs: learns on two CPU cores in minutes, no download.

The data set is written to `data/digits_on_photos` at the first use. Pictures of the last validation are in the work
directory's `overlays/`.
"""

_base_ = ['../_base_/models/upernet_vil.py', '../_base_/runtime_seg.py']

crop_size = (96, 96)
num_classes = 11
max_iters = 500
cpu_threads = 1  # the tensors are too small to share; more threads wait for each other
norm_cfg = dict(type='BN')

model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(
        arch=dict(_delete_=True, embed_dims=64, num_layers=6),
        img_size=crop_size,
        patch_size=8,
        out_indices=(1, 2, 3, 5),  # a third, a half, two thirds and all of the depth, as in the ADE20K recipe
    ),
    neck=dict(embed_dim=64, rescales=[2, 1, 0.5, 0.25], norm_cfg=norm_cfg),  # the recipe's pyramid for patch size 8
    decode_head=dict(in_channels=[64, 64, 64, 64], channels=48, num_classes=num_classes, norm_cfg=norm_cfg),
    auxiliary_head=dict(in_channels=64, in_index=1, channels=48, num_classes=num_classes, norm_cfg=norm_cfg),
    test_cfg=dict(_delete_=True, mode='whole'),
)

load_mask = dict(type='mmvil.LoadSegAnnotations', num_classes=num_classes)
train_pipeline = [
    dict(type='mmvil.LoadCheckedImage'),
    load_mask,
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=crop_size, keep_ratio=True),
    load_mask,
    dict(type='PackSegInputs'),
]
tta_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(
        type='TestTimeAug',
        transforms=[
            [dict(type='Resize', scale=(edge, edge), keep_ratio=True) for edge in (88, 96, 104)],
            [load_mask],
            [dict(type='PackSegInputs')],
        ],
    ),
]
tta_model = dict(type='SegTTAModel')
dataset = dict(type='mmvil.DigitsOnPhotos', data_root='data/digits_on_photos')
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        data_prefix=dict(img_path='images/training', seg_map_path='annotations/training'),
        pipeline=train_pipeline,
        **dataset,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        data_prefix=dict(img_path='images/validation', seg_map_path='annotations/validation'),
        pipeline=test_pipeline,
        test_mode=True,
        **dataset,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'], ignore_index=255)
test_evaluator = val_evaluator

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=2e-3, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(bias_decay_mult=0.0, norm_decay_mult=0.0, flat_decay_mult=0.0),
    clip_grad=dict(max_norm=1.0),
)
param_scheduler = dict(type='mmvil.WarmupCosineLR', warmup=40, eta_min=1e-6, by_epoch=False)
train_cfg = dict(type='IterBasedTrainLoop', max_iters=max_iters, val_interval=max_iters // 2)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
default_hooks = dict(checkpoint=dict(interval=max_iters // 2))
custom_hooks = [
    dict(type='mmvil.RandomStateHook'),
    dict(type='mmvil.StopOnNonFiniteLossHook'),
    dict(type='mmvil.StrictLoadHook'),
    dict(type='mmvil.TrainingReportHook', metric='mIoU'),
    dict(type='mmvil.SegOverlayHook', num_images=16),
]
