"""ViL classifier: first and last token joined, normalised, then a linear head (Vision-LSTM, arXiv 2406.04303)."""

model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='mmvil.VisionLSTM',
        arch='tiny',
        version='v2',
        img_size=224,
        patch_size=16,
        out_type='bilateral_concat',
        pool_norm=True,
        drop_path_rate=0.0,
        cuda_graphs=True,  # training is then not bound by the host
    ),
    neck=None,
    head=dict(
        type='LinearClsHead',
        num_classes=1000,
        in_channels=2 * 192,
        topk=(1, 5),
        loss=dict(type='CrossEntropyLoss', use_soft=True),
        init_cfg=dict(type='TruncNormal', layer='Linear', std=2e-5),
    ),
    # One of the two for every batch of every device, with equal chances.
    train_cfg=dict(augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)]),
)
