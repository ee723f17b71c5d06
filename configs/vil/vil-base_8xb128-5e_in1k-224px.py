"""ViL-B, ImageNet-1K fine-tuning: 5 epochs at 224 px after 400 epochs at 192 px.

Starts from the last checkpoint of the pre-training config, `load_from`; the position table is resampled from 12 x 12 to
14 x 14 as it is loaded, the head is kept, the optimizer starts anew. Another start: `--cfg-options load_from=FILE`.
The released training log ends at 82.41 % top-1.
"""

_base_ = [
    '../_base_/models/vil_cls.py',
    '../_base_/datasets/imagenet_vil_224.py',
    '../_base_/schedules/in1k_adamw.py',
    '../_base_/runtime_cls.py',
]

load_from = 'work_dirs/vil-base_8xb256-400e_in1k-192px/epoch_400.pth'
model = dict(
    backbone=dict(arch='base', drop_path_rate=0.2),
    head=dict(in_channels=2 * 768),
)
train_dataloader = dict(batch_size=128)  # x 8 GPUs = 1024
optim_wrapper = dict(optimizer=dict(lr=1e-5), clip_grad=None)
param_scheduler = dict(warmup=1)
train_cfg = dict(max_epochs=5)
auto_scale_lr = dict(base_batch_size=1024)
