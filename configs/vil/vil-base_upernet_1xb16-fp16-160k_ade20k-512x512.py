"""ViL-B with UperNet on ADE20K in fp16, the published precision.

The released code skips steps whose loss is NaN. Here the dynamic loss scale skips steps with overflowing gradients, and
a loss that stays non-finite stops the run. bf16, the default, needs neither.
"""

_base_ = './vil-base_upernet_1xb16-160k_ade20k-512x512.py'

optim_wrapper = dict(dtype='float16', loss_scale='dynamic')
custom_hooks = [
    dict(type='mmvil.RandomStateHook'),
    dict(type='mmvil.StopOnNonFiniteLossHook', tolerance=20),
    dict(type='mmvil.StrictLoadHook'),
]
