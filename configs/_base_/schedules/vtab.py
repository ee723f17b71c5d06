"""The VTAB-1K protocol behind the published ViL, DeiT, DeiT-III and Vim numbers."""

protocol = dict(
    # Tuning: train800 / val200, every rate with every seed. The rate with the highest mean trains on all 1,000 again.
    learning_rates=[1e-3, 7.5e-4, 5e-4, 2.5e-4, 1e-4],
    seeds=[0, 1, 2, 3, 4],
    epochs=50,
    batch_size=64,  # incomplete last batches are dropped: 12 and 15 steps per epoch
)

backbone_overrides = dict(drop_path_rate=0.0)  # applies to backbones that have this option

# A new head for every run; number of classes and width are filled in.
task_head = dict(
    type='mmpretrain.LinearClsHead',
    loss=dict(type='mmpretrain.CrossEntropyLoss', loss_weight=1.0),
    init_cfg=dict(type='TruncNormal', layer='Linear', std=2e-5),
)

optim_wrapper = dict(
    type='AmpOptimWrapper',  # training in bf16, evaluation in float32
    dtype='bfloat16',
    loss_scale=dict(enabled=False),  # bf16 has the range of float32
    optimizer=dict(type='AdamW', lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05),
    constructor='mmvil.LayerDecayOptimWrapperConstructor',
    paramwise_cfg=dict(
        layer_decay_rate=0.65,
        # No decay of biases and of whatever has one dimension; the position embedding does decay.
        bias_decay_mult=0.0,
        norm_decay_mult=0.0,
        flat_decay_mult=0.0,
    ),
)

# 10 % warm-up, then cosine; lengths in epochs, values by iteration.
param_scheduler = dict(type='mmvil.WarmupCosineLR', warmup=5, eta_min=0.0, by_epoch=True, convert_to_iter_based=True)

# Without influence on the scores.
runtime = dict(eval_batch_size=256, num_threads=8, memory_limit=32.0, cuda_graph=True)
