"""ViL-T+ of the first release (v1), ImageNet-1K: 800 epochs at 224 px, no further fine-tuning.

Evaluates the first release's weights and holds the recipe they were made with. Published: 78.1 % top-1.
"""

_base_ = [
    '../_base_/models/vil_cls.py',
    '../_base_/datasets/imagenet_vil_224.py',
    '../_base_/schedules/in1k_adamw.py',
    '../_base_/runtime_cls.py',
]

model = dict(
    backbone=dict(arch='tiny_plus', version='v1', out_type='bilateral_avg', drop_path_rate=0.0),
    head=dict(in_channels=192),
)
train_dataloader = dict(batch_size=256)  # x 8 GPUs = 2048
optim_wrapper = dict(optimizer=dict(lr=2e-3))  # 1e-3 * 2048 / 1024
train_cfg = dict(max_epochs=800)
