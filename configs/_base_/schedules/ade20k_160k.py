"""AdamW in bf16 with layer-wise decay, warm-up and cosine over 160,000 iterations, for a total batch of 16."""

optim_wrapper = dict(
    type='AmpOptimWrapper',
    dtype='bfloat16',
    loss_scale=1.0,  # bf16 has the range of float32
    optimizer=dict(type='AdamW', lr=5e-4, betas=(0.9, 0.999), weight_decay=0.05),
    constructor='mmvil.LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(
        layer_decay_rate=0.65,  # per pair of sub-blocks; neck and heads keep the full rate
        bias_decay_mult=0.0,
        norm_decay_mult=0.0,
        flat_decay_mult=0.0,
        custom_keys={'pos_embed': dict(decay_mult=0.0)},
    ),
    clip_grad=None,
)

# `eta_min` is the end of a group with the full rate; it is scaled with a group's layer-wise rate, as the whole curve.
param_scheduler = dict(type='mmvil.WarmupCosineLR', warmup=1500, eta_min=1e-6, by_epoch=False)

train_cfg = dict(type='IterBasedTrainLoop', max_iters=160000, val_interval=10000)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

# Total batch that `lr` is meant for; `tools/train.py --auto-scale-lr` scales it to another one.
auto_scale_lr = dict(base_batch_size=16)
