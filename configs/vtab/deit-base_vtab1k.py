"""DeiT-B on VTAB-1K, the comparison of the ViL paper. The checkpoint is mmpretrain's `deit-base_...in1k`."""

_base_ = ['../_base_/datasets/vtab1k.py', '../_base_/schedules/vtab.py']

model = dict(
    backbone=dict(type='mmpretrain.VisionTransformer', arch='deit-base', img_size=224, patch_size=16),
)
