"""UperNet on ViL for 512 x 512 crops: four sub-blocks' outputs, a deconvolution pyramid, an auxiliary FCN head."""

crop_size = (512, 512)
num_classes = 150
norm_cfg = dict(type='SyncBN', requires_grad=True)  # plain batch norm outside of distributed runs
# The mean is over the pixels that are not ignored; mmseg's default divides by the number of all pixels.
loss_decode = dict(type='CrossEntropyLoss', use_sigmoid=False, avg_non_ignore=True)

model = dict(
    type='mmvil.EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        mean=[123.675, 116.28, 103.53],  # RGB
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
        size=crop_size,
    ),
    backbone=dict(
        type='mmvil.VisionLSTM',
        arch='tiny',
        version='v2',
        img_size=crop_size,  # the position table of a 224 px checkpoint is resampled to 32 x 32 at load
        patch_size=16,
        out_indices=(7, 11, 15, 23),  # after pairs 4, 6, 8 and 12
        out_type='featmap',
        final_norm=False,
        drop_path_rate=0.0,
        drop_path_decay=True,
    ),
    neck=dict(type='Feature2Pyramid', embed_dim=192, rescales=[4, 2, 1, 0.5], norm_cfg=norm_cfg),
    decode_head=dict(
        type='UPerHead',
        in_channels=[192, 192, 192, 192],
        in_index=[0, 1, 2, 3],
        pool_scales=(1, 2, 3, 6),
        channels=192,
        dropout_ratio=0.0,
        num_classes=num_classes,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(loss_weight=1.0, **loss_decode),
    ),
    auxiliary_head=dict(
        type='FCNHead',
        in_channels=192,
        in_index=2,
        channels=192,
        num_convs=1,
        concat_input=False,
        dropout_ratio=0.0,
        num_classes=num_classes,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(loss_weight=0.4, **loss_decode),
    ),
    init_cfg=dict(type='Xavier', layer='ConvTranspose2d', distribution='uniform'),  # the neck
    head_init_cfg=dict(type='Normal', layer='Conv2d', std=0.02),
    train_cfg=dict(),
    test_cfg=dict(mode='slide', crop_size=crop_size, stride=(341, 341), window_batch_size=4),
)
