"""Template for your own data: pictures and masks with equal names in two folders. Change the first block, then train.

    data/my_data/images/{train,val}/NAME.jpg
    data/my_data/masks/{train,val}/NAME.png     one channel, the class number of each pixel, 255 = ignored

A mask with other numbers, another size or no mask at all is an error that names the file.
"""

_base_ = [
    '../_base_/models/upernet_vil.py',
    '../_base_/schedules/ade20k_160k.py',
    '../_base_/runtime_seg.py',
]

data_root = 'data/my_data'
classes = ('background', 'crack', 'rust')
palette = [[120, 120, 120], [230, 25, 75], [245, 130, 48]]
reduce_zero_label = False  # True if 0 means "no class" in the masks and the classes count from 1
max_iters = 20000
pretrained = 'checkpoints/vil-tiny_in1k-224px.pth'

num_classes = len(classes)
model = dict(
    backbone=dict(init_cfg=dict(type='Pretrained', checkpoint=pretrained, prefix='backbone.')),
    decode_head=dict(num_classes=num_classes),
    auxiliary_head=dict(num_classes=num_classes),
)

load_mask = dict(type='mmvil.LoadSegAnnotations', num_classes=num_classes)
train_pipeline = [
    dict(type='mmvil.LoadCheckedImage'),
    load_mask,
    dict(type='RandomResize', scale=(2048, 512), ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type='RandomCrop', crop_size=(512, 512), cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(2048, 512), keep_ratio=True),
    load_mask,
    dict(type='PackSegInputs'),
]
dataset = dict(
    type='mmvil.SegDataset',
    data_root=data_root,
    metainfo=dict(classes=classes, palette=palette),
    reduce_zero_label=reduce_zero_label,
)
train_dataloader = dict(
    batch_size=16,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        data_prefix=dict(img_path='images/train', seg_map_path='masks/train'), pipeline=train_pipeline, **dataset
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        data_prefix=dict(img_path='images/val', seg_map_path='masks/val'),
        pipeline=test_pipeline,
        test_mode=True,
        **dataset,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'], ignore_index=255)
test_evaluator = val_evaluator

train_cfg = dict(max_iters=max_iters, val_interval=max_iters // 10)
default_hooks = dict(checkpoint=dict(interval=max_iters // 10))
