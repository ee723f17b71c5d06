"""The whole protocol in small, for `tools/vtab.py smoke`: its scores are no VTAB scores."""

_base_ = ['../_base_/datasets/vtab1k.py', '../_base_/schedules/vtab.py']

model = dict(
    backbone=dict(
        type='mmvil.VisionLSTM',
        arch=dict(embed_dims=32, num_layers=4, num_heads=4, expand_ratio=2, qkv_block_size=4),
        img_size=16,
        patch_size=4,
        out_type='bilateral_concat',
        pool_norm=True,
    ),
)
cached_pipeline = [
    dict(type='mmpretrain.Resize', scale=(16, 16), keep_ratio=False, interpolation='bicubic', backend='pillow'),
]
protocol = dict(learning_rates=[1e-2, 3e-3], seeds=[0, 1], epochs=6, batch_size=20)
param_scheduler = dict(warmup=1)
runtime = dict(num_threads=2)
