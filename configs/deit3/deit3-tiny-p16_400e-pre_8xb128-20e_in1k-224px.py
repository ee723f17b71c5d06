"""DeiT-III-T baseline, ImageNet-1K fine-tuning: 20 epochs at 224 px after 400 epochs at 192 px.

Starts from the last checkpoint of the pre-training config, `load_from`; mmpretrain resamples its position table on
loading. Published by the ViL authors: 75.6 % top-1.
"""

_base_ = [
    '../_base_/models/deit3_tiny_cls.py',
    '../_base_/datasets/imagenet_vil_224.py',
    '../_base_/schedules/in1k_adamw.py',
    '../_base_/runtime_cls.py',
]

load_from = 'work_dirs/deit3-tiny-p16_8xb128-400e_in1k-192px/epoch_400.pth'
model = dict(backbone=dict(drop_path_rate=0.0))
train_dataloader = dict(batch_size=128)  # x 8 GPUs = 1024
optim_wrapper = dict(optimizer=dict(lr=1e-5), clip_grad=None)
train_cfg = dict(max_epochs=20)
auto_scale_lr = dict(base_batch_size=1024)
