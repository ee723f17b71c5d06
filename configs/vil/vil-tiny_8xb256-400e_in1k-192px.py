"""ViL-T, ImageNet-1K pre-training: 400 epochs at 192 px, before the fine-tuning at 224 px.

The released training log ends at 75.87 % top-1 (192 px).
"""

_base_ = [
    '../_base_/models/vil_cls.py',
    '../_base_/datasets/imagenet_vil_192.py',
    '../_base_/schedules/in1k_adamw.py',
    '../_base_/runtime_cls.py',
]

model = dict(
    backbone=dict(arch='tiny', img_size=192, drop_path_rate=0.0),
    head=dict(in_channels=2 * 192),
)
train_dataloader = dict(batch_size=256)  # x 8 GPUs = 2048
optim_wrapper = dict(optimizer=dict(lr=2e-3))  # 1e-3 * 2048 / 1024
train_cfg = dict(max_epochs=400)
