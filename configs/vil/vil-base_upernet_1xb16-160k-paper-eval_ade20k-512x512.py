"""ViL-B with UperNet on ADE20K, evaluated as in the paper's code: images squashed to 512 x 512, logits summed.

Published: 48.6 % mIoU single scale, 49.6 % multi-scale. Not comparable with conventional figures. Training is that of
the config without `paper-eval`.
"""

_base_ = './vil-base_upernet_1xb16-160k_ade20k-512x512.py'

test_pipeline = _base_.paper_test_pipeline
tta_pipeline = _base_.paper_tta_pipeline
tta_model = dict(type='mmvil.LogitSumTTAModel')
model = dict(data_preprocessor=dict(test_cfg=dict(size=(512, 512))))  # pad small images at the bottom and right
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
