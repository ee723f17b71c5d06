"""Example: ViL-T with UperNet on Cityscapes, crops of 512 x 1024 pixels. Untested on the data; not a published recipe.

Layout as in mmsegmentation: data/cityscapes/{leftImg8bit,gtFine}/{train,val}.
"""

_base_ = [
    '../_base_/models/upernet_vil.py',
    '../_base_/schedules/ade20k_160k.py',
    '../_base_/runtime_seg.py',
]

crop_size = (512, 1024)
num_classes = 19
pretrained = 'checkpoints/vil-tiny_in1k-224px.pth'

model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(
        img_size=crop_size,
        init_cfg=dict(type='Pretrained', checkpoint=pretrained, prefix='backbone.'),
    ),
    decode_head=dict(num_classes=num_classes),
    auxiliary_head=dict(num_classes=num_classes),
    test_cfg=dict(crop_size=crop_size, stride=(341, 683)),
)

load_mask = dict(type='mmvil.LoadSegAnnotations', num_classes=num_classes)
train_pipeline = [
    dict(type='mmvil.LoadCheckedImage'),
    load_mask,
    dict(type='RandomResize', scale=(2048, 1024), ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type='RandomCrop', crop_size=crop_size, cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(2048, 1024), keep_ratio=True),
    load_mask,
    dict(type='PackSegInputs'),
]
dataset = dict(type='CityscapesDataset', data_root='data/cityscapes')
train_dataloader = dict(
    batch_size=4,  # x 4 GPUs = 16
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        data_prefix=dict(img_path='leftImg8bit/train', seg_map_path='gtFine/train'), pipeline=train_pipeline, **dataset
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        data_prefix=dict(img_path='leftImg8bit/val', seg_map_path='gtFine/val'),
        pipeline=test_pipeline,
        test_mode=True,
        **dataset,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'], ignore_index=255)
test_evaluator = val_evaluator

train_cfg = dict(max_iters=80000, val_interval=8000)
default_hooks = dict(checkpoint=dict(interval=8000))
