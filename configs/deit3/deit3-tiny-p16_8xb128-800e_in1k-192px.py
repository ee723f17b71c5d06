"""DeiT-III-T baseline, ImageNet-1K pre-training: 800 epochs at 192 px in the pipeline of the ViL recipes."""

_base_ = [
    '../_base_/models/deit3_tiny_cls.py',
    '../_base_/datasets/imagenet_vil_192.py',
    '../_base_/schedules/in1k_adamw.py',
    '../_base_/runtime_cls.py',
]

model = dict(backbone=dict(img_size=192, drop_path_rate=0.0))
train_dataloader = dict(batch_size=128)  # x 8 GPUs = 1024
optim_wrapper = dict(optimizer=dict(lr=1e-3), clip_grad=None)  # 1e-3 * 1024 / 1024
train_cfg = dict(max_epochs=800)
auto_scale_lr = dict(base_batch_size=1024)
