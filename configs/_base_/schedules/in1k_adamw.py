"""AdamW in bf16, warm-up and cosine: the optimisation of the ViL recipes, for a total batch of 2048."""

optim_wrapper = dict(
    type='AmpOptimWrapper',
    dtype='bfloat16',
    loss_scale=1.0,  # bf16 has the range of float32
    optimizer=dict(type='AdamW', lr=2e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05),
    # Without its own decay rate this constructor differs from mmengine's in one way: it joins parameters with equal
    # options into one group, so that AdamW handles them together instead of one by one.
    constructor='mmvil.LayerDecayOptimWrapperConstructor',
    # No decay for biases, one-dimensional parameters (norms, skips) and positions; everything else decays.
    paramwise_cfg=dict(
        bias_decay_mult=0.0,
        norm_decay_mult=0.0,
        flat_decay_mult=0.0,
        custom_keys={'pos_embed': dict(decay_mult=0.0), 'cls_token': dict(decay_mult=0.0)},
    ),
    clip_grad=dict(max_norm=1.0),
)

# Lengths in epochs, values by iteration; `end` is the number of epochs.
param_scheduler = dict(type='mmvil.WarmupCosineLR', warmup=5, eta_min=1e-6, by_epoch=True, convert_to_iter_based=True)

train_cfg = dict(by_epoch=True, max_epochs=400, val_interval=1)
val_cfg = dict()
test_cfg = dict()

# Total batch that `lr` is meant for; `tools/train.py --auto-scale-lr` scales it to another one.
auto_scale_lr = dict(base_batch_size=2048)
