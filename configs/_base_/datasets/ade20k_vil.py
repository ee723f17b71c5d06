"""ADE20K with the augmentation of the ViL recipe and mmseg's conventional evaluation.

Layout: data/ade/ADEChallengeData2016/{images,annotations}/{training,validation}; label 0 is ignored, 1..150 are the
classes.
"""

dataset_type = 'mmvil.ADE20KDataset'
data_root = 'data/ade/ADEChallengeData2016'
# The orientation tag is ignored: the masks were drawn on the pixels as they are stored.
load_image = dict(type='LoadImageFromFile', color_type='color_ignore_orientation', imdecode_backend='pillow')
load_mask = dict(type='mmvil.LoadSegAnnotations', num_classes=150)

train_pipeline = [
    dict(type='mmvil.LoadCheckedImage'),
    load_mask,
    dict(
        type='RandomResize',
        scale=(2048, 512),
        ratio_range=(0.5, 2.0),
        keep_ratio=True,
        backend='pillow',
        interpolation='bicubic',
    ),
    dict(type='RandomCrop', crop_size=(512, 512), cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='mmpretrain.ColorJitter', brightness=0.5, contrast=0.5, saturation=0.5, hue=0.25, backend='pillow'),
    dict(type='mmvil.CentredPad', size=(512, 512), pad_val=(103.53, 116.28, 123.675)),  # the mean in BGR
    dict(type='PackSegInputs'),
]
# Conventional evaluation: shorter side 512, aspect ratio kept, then the sliding window of the model's test_cfg.
test_pipeline = [
    load_image,
    dict(type='Resize', scale=(2048, 512), keep_ratio=True),
    load_mask,  # after Resize: figures are measured at the original size
    dict(type='PackSegInputs'),
]
# Conventional multi-scale and flip: the original image times each factor, probabilities averaged.
tta_pipeline = [
    load_image,
    dict(
        type='TestTimeAug',
        transforms=[
            [dict(type='Resize', scale_factor=factor, keep_ratio=True) for factor in (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)],
            [dict(type='RandomFlip', prob=prob, direction='horizontal') for prob in (0.0, 1.0)],
            [load_mask],
            [dict(type='PackSegInputs')],
        ],
    ),
]
tta_model = dict(type='SegTTAModel')

# The evaluation of the paper's code, chosen by the `paper-eval` configs. Single scale: squashed to 512 x 512, so that
# exactly one window is run; bicubic without antialiasing on float values, as torch's interpolation does it.
paper_load_image = dict(to_float32=True, **load_image)
paper_test_pipeline = [
    paper_load_image,
    dict(type='Resize', scale=(512, 512), keep_ratio=False, interpolation='bicubic'),
    load_mask,
    dict(type='PackSegInputs'),
]
# Multi-scale: the original image times each factor, small ones padded with zeros to a window, logits summed.
paper_tta_pipeline = [
    paper_load_image,
    dict(
        type='TestTimeAug',
        transforms=[
            [
                dict(type='Resize', scale_factor=factor, keep_ratio=True, interpolation='bicubic')
                for factor in (0.75, 1.0, 1.25, 1.5, 1.75)
            ],
            [dict(type='RandomFlip', prob=prob, direction='horizontal') for prob in (0.0, 1.0)],
            [load_mask],
            [dict(type='PackSegInputs')],
        ],
    ),
]

train_dataloader = dict(
    batch_size=16,
    num_workers=8,
    persistent_workers=True,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        data_prefix=dict(img_path='images/training', seg_map_path='annotations/training'),
        reduce_zero_label=True,
        ignore_index=255,
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        data_prefix=dict(img_path='images/validation', seg_map_path='annotations/validation'),
        reduce_zero_label=True,
        ignore_index=255,
        test_mode=True,
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader

val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'], ignore_index=255)
test_evaluator = val_evaluator
