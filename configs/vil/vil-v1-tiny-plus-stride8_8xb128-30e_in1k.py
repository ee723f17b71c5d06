"""ViL-T+ (v1) on long sequences: fine-tuning with patches of 16 px every 8 px, 729 tokens at 224 px.

Starts from the last checkpoint of the 224 px config, `load_from`. The position table stays a 14 x 14 parameter and is
resampled to 27 x 27 in each forward. After the warm-up the learning rate is constant. Published: 78.1 -> 80.0 % top-1.
"""

_base_ = [
    '../_base_/models/vil_cls.py',
    '../_base_/datasets/imagenet_vil_224.py',
    '../_base_/schedules/in1k_adamw.py',
    '../_base_/runtime_cls.py',
]

load_from = 'work_dirs/vil-v1-tiny-plus_8xb256-800e_in1k/epoch_800.pth'
model = dict(
    backbone=dict(
        arch='tiny_plus', version='v1', patch_stride=8, pos_grid=14, out_type='bilateral_avg', drop_path_rate=0.0
    ),
    head=dict(in_channels=192),
)
train_dataloader = dict(batch_size=128)  # x 8 GPUs = 1024
optim_wrapper = dict(optimizer=dict(lr=1e-5, weight_decay=1e-8), clip_grad=None)
param_scheduler = dict(eta_min=1e-5)
train_cfg = dict(max_epochs=30)
auto_scale_lr = dict(base_batch_size=1024)
