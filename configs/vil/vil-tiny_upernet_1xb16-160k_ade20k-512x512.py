"""ViL-T with UperNet on ADE20K, 160,000 iterations of batch 16 on one GPU, conventional evaluation.

Published with the paper's own evaluation (see the `paper-eval` config): 41.2 % mIoU single scale, 43.1 % multi-scale.
The start is the classifier fine-tuned at 224 px: convert the official file with tools/convert_vil.py.
"""

_base_ = [
    '../_base_/models/upernet_vil.py',
    '../_base_/datasets/ade20k_vil.py',
    '../_base_/schedules/ade20k_160k.py',
    '../_base_/runtime_seg.py',
]

pretrained = 'checkpoints/vil-tiny_in1k-224px.pth'

model = dict(
    backbone=dict(
        arch='tiny',
        drop_path_rate=0.0,
        init_cfg=dict(type='Pretrained', checkpoint=pretrained, prefix='backbone.'),
    ),
    neck=dict(embed_dim=192),
    decode_head=dict(in_channels=[192, 192, 192, 192], channels=192),
    auxiliary_head=dict(in_channels=192, channels=192),
)
train_dataloader = dict(batch_size=16)  # on one GPU
optim_wrapper = dict(optimizer=dict(lr=5e-4), paramwise_cfg=dict(layer_decay_rate=0.65))
train_cfg = dict(max_iters=160000)
