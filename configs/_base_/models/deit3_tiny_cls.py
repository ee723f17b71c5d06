"""DeiT-III-T as the baseline of the ViL paper: ViT-T/16 with class token, learnable positions and layer scale 1e-4.

The backbone is mmpretrain's `VisionTransformer`, not its `DeiT3`: that one has a fixed layer scale of 1e-5 and uses
the first norm of a block twice. Differences from the paper's baseline: the class token has its own position (their
sum is one free vector all the same), and mmpretrain initialises the MLPs with Xavier-uniform weights.
"""

model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='VisionTransformer',
        arch='deit-tiny',
        img_size=224,
        patch_size=16,
        layer_scale_init_value=1e-4,
        drop_path_rate=0.0,
        init_cfg=dict(type='TruncNormal', layer=['Linear', 'Conv2d'], std=0.02),
    ),
    neck=None,
    head=dict(
        type='LinearClsHead',
        num_classes=1000,
        in_channels=192,
        topk=(1, 5),
        loss=dict(type='CrossEntropyLoss', use_soft=True),
        init_cfg=dict(type='TruncNormal', layer='Linear', std=2e-5),
    ),
    train_cfg=dict(augments=[dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0)]),
)
