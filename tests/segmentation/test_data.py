"""Masks and folders that are wrong, label conventions, and figures worked out by hand."""

import numpy as np
import pytest
import torch
from mmengine.dataset import Compose
from mmengine.structures import PixelData
from mmseg.evaluation import IoUMetric
from PIL import Image

from mmvil.segmentation import ADE20KDataset, CentredPad, LoadSegAnnotations, SegDataset

from .helpers import write_ade

CLASSES = ('sky', 'tree', 'road')
# 0 is "no class" in the files; 255 is ignored in any convention.
MASKS = [
    np.array([[1, 1, 2, 2], [1, 1, 2, 0], [3, 3, 3, 255]], np.uint8),
    np.array([[2, 2, 2, 2, 2], [0, 0, 3, 3, 3]], np.uint8),
]


def dataset(root, **kwargs):
    pipeline = [
        dict(type='mmvil.LoadCheckedImage'),
        dict(type='mmvil.LoadSegAnnotations', num_classes=3),
        dict(type='PackSegInputs'),
    ]
    options = dict(
        data_root=str(root),
        data_prefix=dict(img_path='images/validation', seg_map_path='annotations/validation'),
        metainfo=dict(classes=CLASSES),
        reduce_zero_label=True,
        test_mode=True,
        pipeline=pipeline,
    )
    return SegDataset(**{**options, **kwargs})


def labels_of(sample):
    return sample['data_samples'].gt_sem_seg.data[0].tolist()


def mask_path(root, number=1):
    return root / 'annotations' / 'validation' / f'ADE_val_{number:08d}.png'


def test_zero_label_is_ignored_and_the_others_count_from_zero(tmp_path):
    write_ade(tmp_path, MASKS)
    data = dataset(tmp_path)
    assert labels_of(data[0]) == [[0, 0, 1, 1], [0, 0, 1, 255], [2, 2, 2, 255]]
    assert labels_of(data[1]) == [[1, 1, 1, 1, 1], [255, 255, 2, 2, 2]]


def test_without_zero_label_nothing_is_shifted(tmp_path):
    write_ade(tmp_path, [np.array([[0, 1], [2, 255]], np.uint8)])
    assert labels_of(dataset(tmp_path, reduce_zero_label=False)[0]) == [[0, 1], [2, 255]]


def test_same_labels_as_mmseg(tmp_path):
    rng = np.random.default_rng(0)
    mask = rng.integers(0, 151, (30, 40)).astype(np.uint8)
    mask[0, :5] = 255
    write_ade(tmp_path, [mask])
    prefix = dict(img_path='images/validation', seg_map_path='annotations/validation')
    load = dict(type='mmvil.LoadSegAnnotations', num_classes=150)
    for reduce_zero_label in (True, False):
        found = []
        for loader in (load, dict(type='LoadAnnotations')):
            if not reduce_zero_label and loader is load:
                loader = dict(load, num_classes=151)
            pipeline = [dict(type='LoadImageFromFile'), loader, dict(type='PackSegInputs')]
            options = dict(data_root=str(tmp_path), data_prefix=prefix, test_mode=True, pipeline=pipeline)
            found.append(labels_of(ADE20KDataset(reduce_zero_label=reduce_zero_label, **options)[0]))
        assert found[0] == found[1]


def test_some_of_the_classes(tmp_path):
    write_ade(tmp_path, MASKS[:1])

    class Named(SegDataset):
        METAINFO = dict(classes=CLASSES, palette=[[0, 0, 255], [0, 255, 0], [128, 128, 128]])

    prefix = dict(img_path='images/validation', seg_map_path='annotations/validation')
    pipeline = [
        dict(type='mmvil.LoadCheckedImage'),
        dict(type='mmvil.LoadSegAnnotations', num_classes=3),
        dict(type='PackSegInputs'),
    ]
    data = Named(
        data_root=str(tmp_path),
        data_prefix=prefix,
        metainfo=dict(classes=('road', 'sky')),
        reduce_zero_label=True,
        pipeline=pipeline,
    )
    assert labels_of(data[0]) == [[1, 1, 255, 255], [1, 1, 255, 255], [0, 0, 0, 255]]


def test_mean_iou_of_two_images_by_hand(tmp_path):
    write_ade(tmp_path, MASKS)
    data = dataset(tmp_path)
    predictions = [
        [[0, 0, 1, 1], [0, 1, 2, 0], [2, 2, 2, 0]],
        [[1, 1, 1, 1, 1], [2, 0, 0, 2, 2]],
    ]
    metric = IoUMetric(iou_metrics=['mIoU'], ignore_index=255)
    metric.dataset_meta = data.metainfo
    for index, prediction in enumerate(predictions):
        sample = data[index]['data_samples']
        sample.pred_sem_seg = PixelData(data=torch.tensor([prediction]))
        metric.process({}, [sample.to_dict()])
    result = metric.evaluate(size=2)
    # sky: hits 3, labelled 4, predicted 3 + 1        -> 3 / 5
    # tree: hits 2 + 5, labelled 3 + 5, predicted 3 + 5 -> 7 / 9
    # road: hits 3 + 2, labelled 3 + 3, predicted 4 + 2 -> 5 / 7
    assert result['mIoU'] == pytest.approx(100 * (3 / 5 + 7 / 9 + 5 / 7) / 3, abs=5e-3)
    assert result['aAcc'] == pytest.approx(100 * 15 / 18, abs=5e-3)
    assert result['mAcc'] == pytest.approx(100 * (3 / 4 + 7 / 8 + 5 / 6) / 3, abs=5e-3)


@pytest.mark.parametrize(('label', 'dtype'), [(4, np.uint8), (254, np.uint8), (257, np.uint16), (300, np.uint16)])
def test_label_out_of_range_names_the_file(tmp_path, label, dtype):
    mask = MASKS[0].astype(dtype)
    mask[0, 0] = label
    write_ade(tmp_path, [mask])
    with pytest.raises(ValueError, match=rf'mask .*ADE_val_00000001\.png holds the labels {label}; .*0 to 3 \(0 is'):
        dataset(tmp_path)[0]


def test_label_out_of_range_without_zero_label(tmp_path):
    write_ade(tmp_path, [np.array([[3, 0]], np.uint8)])
    with pytest.raises(ValueError, match=r'labels 3; .*0 to 2 \(reduce_zero_label=False\)'):
        dataset(tmp_path, reduce_zero_label=False)[0]


def test_mask_of_another_size_names_both_files(tmp_path):
    write_ade(tmp_path, MASKS, sizes={0: (4, 3)})
    with pytest.raises(ValueError, match=r'ADE_val_00000001\.png has .*\(3, 4\).*ADE_val_00000001\.jpg has \(4, 3\)'):
        dataset(tmp_path)[0]


def test_coloured_mask_is_refused(tmp_path):
    write_ade(tmp_path, MASKS)
    Image.fromarray(np.zeros((3, 4, 3), np.uint8)).save(mask_path(tmp_path))
    with pytest.raises(ValueError, match=r'ADE_val_00000001\.png must have one channel'):
        dataset(tmp_path)[0]


@pytest.mark.parametrize('content', [b'', b'no picture', None])
def test_damaged_mask_names_the_file(tmp_path, content):
    write_ade(tmp_path, [np.kron(MASKS[0], np.ones((30, 30), np.uint8))])
    path = mask_path(tmp_path)
    path.write_bytes(path.read_bytes()[:-40] if content is None else content)
    with pytest.raises(ValueError, match=r'cannot decode mask .*ADE_val_00000001\.png'):
        dataset(tmp_path)[0]


def test_missing_mask_is_found_at_the_start(tmp_path):
    write_ade(tmp_path, MASKS)
    mask_path(tmp_path, 2).unlink()
    with pytest.raises(FileNotFoundError, match=r'1 of 2 mask files do not exist: .*ADE_val_00000002\.png'):
        dataset(tmp_path)


def test_mask_that_goes_missing_later_names_mask_and_image(tmp_path):
    write_ade(tmp_path, MASKS)
    data = dataset(tmp_path)
    mask_path(tmp_path, 2).unlink()
    with pytest.raises(FileNotFoundError, match=r'ADE_val_00000002\.png of image .*ADE_val_00000002\.jpg'):
        data[1]


def test_missing_folders_list_and_images(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'images/validation \(data_prefix.img_path\) does not exist'):
        dataset(tmp_path)
    (tmp_path / 'images' / 'validation').mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r'annotations/validation \(data_prefix.seg_map_path\)'):
        dataset(tmp_path)
    (tmp_path / 'annotations' / 'validation').mkdir(parents=True)
    with pytest.raises(ValueError, match=r"no image that ends in '\.jpg'"):
        dataset(tmp_path)
    with pytest.raises(FileNotFoundError, match='list of images'):
        dataset(tmp_path, ann_file='val.txt')
    (tmp_path / 'val.txt').write_text('ADE_val_00000001\n')
    with pytest.raises(FileNotFoundError, match=r'1 of 1 image files do not exist: .*ADE_val_00000001\.jpg'):
        dataset(tmp_path, ann_file='val.txt')
    write_ade(tmp_path, MASKS)
    assert len(dataset(tmp_path, ann_file='val.txt')) == 1


def test_any_failing_transform_names_the_image(tmp_path):
    write_ade(tmp_path, MASKS)
    pipeline = [dict(type='mmvil.LoadCheckedImage'), dict(type='Resize', scale=(0, 0), keep_ratio=False)]
    with pytest.raises(RuntimeError, match=r'cannot prepare .*ADE_val_00000001\.jpg'):
        dataset(tmp_path, pipeline=pipeline)[0]


def test_picture_without_mask_passes_the_loader():
    assert LoadSegAnnotations(num_classes=3)(dict(img_path='a.jpg')) == dict(img_path='a.jpg')


@pytest.mark.parametrize('num_classes', [0, 255, 1000])
def test_class_count_must_fit(num_classes):
    with pytest.raises(ValueError, match='num_classes must be from 1 to 254'):
        LoadSegAnnotations(num_classes=num_classes)


def test_centred_pad_is_zero_after_normalisation():
    mean = (103.53, 116.28, 123.675)
    image = np.full((5, 8, 3), 7, np.uint8)
    mask = np.ones((5, 8), np.uint8)
    results = CentredPad((8, 8), mean)(dict(img=image, gt_seg_map=mask, seg_fields=['gt_seg_map']))
    assert results['img'].shape == (8, 8, 3)
    assert results['img'].dtype == np.float32
    assert results['img_shape'] == results['pad_shape'] == (8, 8)
    border = results['gt_seg_map'] == 255
    assert np.flatnonzero(~border.all(1)).tolist() == [1, 2, 3, 4, 5]
    normalised = torch.from_numpy(results['img']) - torch.tensor(mean)
    assert normalised[torch.from_numpy(border)].abs().max() == 0
    assert (results['img'][~border] == 7).all()


def test_centred_pad_leaves_full_crops_alone():
    image = np.zeros((8, 9, 3), np.uint8)
    results = Compose([CentredPad((8, 8), (1.0, 2.0, 3.0))])(dict(img=image))
    assert results['img'] is image
