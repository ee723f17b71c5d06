"""ViL-T on VTAB-1K. Published: see docs/vtab.md. The checkpoint may be an official file or one of mmvil."""

_base_ = ['../_base_/datasets/vtab1k.py', '../_base_/schedules/vtab.py']

model = dict(
    backbone=dict(
        type='mmvil.VisionLSTM',
        arch='tiny',
        version='v2',
        img_size=224,
        patch_size=16,
        out_type='bilateral_concat',  # first and last token: the head takes 2 x 192 channels
        pool_norm=True,
    ),
)
