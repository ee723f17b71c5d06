"""ViL-T with UperNet on ADE20K and mmseg's conventional augmentation instead of the paper's.

Photometric distortion instead of the plain colour jitter, bilinear instead of bicubic resizing, padding at the bottom
and right. For a comparison with other mmseg models at equal augmentation; not the published recipe.
"""

_base_ = './vil-tiny_upernet_1xb16-160k_ade20k-512x512.py'

train_pipeline = [
    dict(type='mmvil.LoadCheckedImage'),
    dict(type='mmvil.LoadSegAnnotations', num_classes=150),
    dict(type='RandomResize', scale=(2048, 512), ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type='RandomCrop', crop_size=(512, 512), cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PhotoMetricDistortion'),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
