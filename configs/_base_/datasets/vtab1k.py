"""VTAB-1K at 224 px as the published runs read it: direct bicubic resize, ImageNet mean and std, no augmentation."""

data_root = 'data/vtab-1k'

# Runs once per image; the results stay in memory for all runs of a task.
cached_pipeline = [
    dict(
        type='mmpretrain.Resize',
        scale=(224, 224),
        keep_ratio=False,  # extreme aspect ratios are squashed, not cropped
        interpolation='bicubic',
        backend='pillow',  # antialiases, which OpenCV does not
    ),
]
data_preprocessor = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)
