"""Logging, checkpoints, seeds and processes of classification runs."""

default_scope = 'mmpretrain'
custom_imports = dict(imports=['mmvil'], allow_failed_imports=False)

default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=100),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='CheckpointHook', interval=1, max_keep_ckpts=2),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    visualization=dict(type='VisualizationHook', enable=False),
)
custom_hooks = [
    dict(type='mmvil.RandomStateHook'),  # a resumed run equals an uninterrupted one; every device draws its own numbers
    dict(type='mmvil.StopOnNonFiniteLossHook'),
    dict(type='mmvil.StrictLoadHook'),  # a checkpoint that does not fit is an error, not a warning
]

env_cfg = dict(
    cudnn_benchmark=True,
    mp_cfg=dict(mp_start_method='fork', opencv_num_threads=0),
    dist_cfg=dict(backend='nccl'),
)

vis_backends = [dict(type='LocalVisBackend')]
visualizer = dict(type='UniversalVisualizer', vis_backends=vis_backends)

log_level = 'INFO'
load_from = None
resume = False
randomness = dict(seed=0)
