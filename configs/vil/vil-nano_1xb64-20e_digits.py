# The embedded default: a very small ViL on 1437 real images, a minute or two on two CPU cores, no download.
_base_ = ['../_base_/datasets/digits_bs64.py', '../_base_/runtime_cls.py']

model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='mmvil.VisionLSTM',
        arch=dict(embed_dims=64, num_layers=4),
        img_size=24,
        patch_size=4,
        out_type='bilateral_concat',
    ),
    head=dict(
        type='LinearClsHead',
        num_classes=10,
        in_channels=128,
        topk=(1,),
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
    ),
)

train_cfg = dict(by_epoch=True, max_epochs=20, val_interval=1)
val_cfg = dict()
test_cfg = dict()
optim_wrapper = dict(
    optimizer=dict(type='AdamW', lr=2e-3, weight_decay=0.05),
    clip_grad=dict(max_norm=1.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=True, begin=0, end=3, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=1e-6, by_epoch=True, begin=3, end=20, convert_to_iter_based=True),
]
# The operations are too small to share out: on a busy machine a second thread makes each of them wait.
cpu_threads = 1
auto_scale_lr = dict(base_batch_size=64)

default_hooks = dict(
    checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=1, save_best='accuracy/top1', rule='greater'),
    visualization=dict(type='VisualizationHook', enable=False, resize=192),
)
custom_hooks = [*_base_.custom_hooks, dict(type='mmvil.TrainingReportHook')]
