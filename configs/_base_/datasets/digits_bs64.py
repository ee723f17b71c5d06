# The handwritten digits that come with scikit-learn, 8x8 pixels enlarged to 24x24. Small turns and shifts leave a digit
# what it is; a mirror image would not.
dataset_type = 'mmvil.Digits'
data_preprocessor = dict(num_classes=10, mean=[78.0, 78.0, 78.0], std=[96.0, 96.0, 96.0], to_rgb=True)

small_move = dict(prob=0.8, random_negative_prob=0.5, pad_val=0, interpolation='bilinear')
train_pipeline = [
    dict(type='Resize', scale=24, interpolation='bicubic'),
    dict(type='Rotate', magnitude_range=(0.0, 12.0), **small_move),
    dict(type='Translate', magnitude_range=(0.0, 0.1), direction='horizontal', **small_move),
    dict(type='Translate', magnitude_range=(0.0, 0.1), direction='vertical', **small_move),
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='Resize', scale=24, interpolation='bicubic'),
    dict(type='PackInputs'),
]

# The images are in memory and tiny: worker processes would only cost time.
train_dataloader = dict(
    batch_size=64,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(type=dataset_type, split='train', pipeline=train_pipeline),
    sampler=dict(type='DefaultSampler', shuffle=True),
)
val_dataloader = dict(
    batch_size=180,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(type=dataset_type, split='val', pipeline=test_pipeline),
    sampler=dict(type='DefaultSampler', shuffle=False),
)
val_evaluator = dict(type='Accuracy', topk=(1,))
test_dataloader = val_dataloader
test_evaluator = val_evaluator
