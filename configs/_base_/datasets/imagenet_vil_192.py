"""ImageNet-1K at 192 px with the augmentation of the ViL recipes.

Images are BGR arrays until the data preprocessor turns them into RGB; mmcv's Pillow backends and the conversions around
the grey-scale transform take care of that.
"""

dataset_type = 'mmvil.ImageNet'
data_root = 'data/imagenet'

data_preprocessor = dict(
    num_classes=1000,
    mean=[123.675, 116.28, 103.53],  # RGB
    std=[58.395, 57.12, 57.375],
    to_rgb=True,
)

three_augment = dict(  # DeiT III (arXiv 2204.07118): exactly one of three, always
    type='RandomChoice',
    transforms=[
        [
            dict(type='NumpyToPIL', to_rgb=True),
            dict(type='torchvision/Grayscale', num_output_channels=3),
            dict(type='PILToNumpy', to_bgr=True),
        ],
        [dict(type='Solarize', thr=128, prob=1.0)],
        # The level is uniform in 0..10 and mapped to a radius (standard deviation) uniform in 0.1..2.
        [dict(type='GaussianBlur', magnitude_range=(0.1, 2.0), magnitude_level=10, magnitude_std='inf', prob=1.0)],
    ],
)

train_pipeline = [
    dict(type='mmvil.LoadCheckedImage'),
    dict(
        type='RandomResizedCrop',
        scale=192,
        crop_ratio_range=(0.08, 1.0),
        aspect_ratio_range=(3 / 4, 4 / 3),
        backend='pillow',
        interpolation='bicubic',
    ),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    three_augment,
    dict(type='ColorJitter', brightness=0.3, contrast=0.3, saturation=0.3, hue=0.0, backend='pillow'),
    dict(type='PackInputs'),
]

test_pipeline = [
    dict(type='mmvil.LoadCheckedImage'),
    dict(type='ResizeEdge', scale=192, edge='short', backend='pillow', interpolation='bicubic'),
    dict(type='CenterCrop', crop_size=192),
    dict(type='PackInputs'),
]

train_dataloader = dict(
    batch_size=256,
    num_workers=8,
    persistent_workers=True,
    pin_memory=True,
    drop_last=True,
    collate_fn=dict(type='default_collate'),
    sampler=dict(type='DefaultSampler', shuffle=True),
    dataset=dict(type=dataset_type, data_root=data_root, split='train', pipeline=train_pipeline),
)

val_dataloader = dict(
    batch_size=128,
    num_workers=8,
    persistent_workers=True,
    pin_memory=True,
    collate_fn=dict(type='default_collate'),
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type=dataset_type, data_root=data_root, split='val', pipeline=test_pipeline),
)
val_evaluator = dict(type='Accuracy', topk=(1, 5))

test_dataloader = val_dataloader
test_evaluator = val_evaluator
