"""Sliding windows, bounded memory and batches of mixed sizes."""

import pytest
import torch
from mmseg.models import EncoderDecoder as UpstreamEncoderDecoder
from mmseg.structures import SegDataSample

from mmvil.segmentation.encoder_decoder import window_boxes

from .helpers import build, randomize_norms, small_model_config


@pytest.fixture(scope='module')
def model():
    torch.manual_seed(0)
    model = build(small_model_config())
    randomize_norms(model, torch.Generator().manual_seed(1))
    return model


def metas(images):
    shape = tuple(images.shape[2:])
    return [dict(ori_shape=shape, img_shape=shape, pad_shape=shape) for _ in images]


def with_test_cfg(model, **entries):
    """Change test_cfg for one call."""
    model.test_cfg = type(model.test_cfg)({**model.test_cfg, **entries})
    return model


@pytest.mark.parametrize(('size', 'expected'), [((4, 4), 1), ((3, 9), 3), ((10, 4), 3), ((11, 8), 12), ((4, 5), 2)])
def test_windows_cover_the_image(size, expected):
    boxes = window_boxes(size, (4, 4), (3, 3))
    assert len(boxes) == expected
    covered = torch.zeros(size)
    for top, left, bottom, right in boxes:
        assert bottom <= size[0]
        assert right <= size[1]
        assert (bottom - top, right - left) == (min(4, size[0]), min(4, size[1]))
        covered[top:bottom, left:right] += 1
    assert covered.min() >= 1


@pytest.mark.parametrize('stride', [(0, 3), (3, 5), (-1, 3)])
def test_stride_that_leaves_gaps_is_refused(stride):
    with pytest.raises(ValueError, match='stride must be positive'):
        window_boxes((10, 10), (4, 4), stride)


@pytest.mark.parametrize('window_batch_size', [1, 3])
@pytest.mark.parametrize('size', [(32, 32), (50, 71), (20, 60)])
def test_slide_equals_upstream(model, size, window_batch_size):
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(2))
    with_test_cfg(model, window_batch_size=window_batch_size)
    with torch.no_grad():
        ours = model.slide_inference(images, metas(images))
        theirs = UpstreamEncoderDecoder.slide_inference(model, images, metas(images))
    assert ours.shape == (2, 3, *size)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6 * theirs.abs().max().item())


def test_slide_equals_whole_on_an_image_of_the_crops_size(model):
    images = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        slide = model.slide_inference(images, metas(images))
        whole = model.whole_inference(images, metas(images))
    assert torch.equal(slide, whole)


def test_windows_are_batched_and_never_more_than_allowed(model, monkeypatch):
    seen = []
    original = model.encode_decode
    monkeypatch.setattr(model, 'encode_decode', lambda x, m: seen.append(len(x)) or original(x, m))
    images = torch.randn(1, 3, 64, 75)
    with torch.no_grad():
        with_test_cfg(model, window_batch_size=5).slide_inference(images, metas(images))
    assert sum(seen) == len(window_boxes((64, 75), (32, 32), (21, 21)))
    assert max(seen) == 5


def test_small_batch_size_is_refused(model):
    with pytest.raises(ValueError, match='window_batch_size'):
        with_test_cfg(model, window_batch_size=0).slide_inference(torch.randn(1, 3, 40, 40), [{}])
    with_test_cfg(model, window_batch_size=4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('limit', [0, 2**31])
def test_large_logits_stay_off_the_gpu(limit):
    torch.manual_seed(0)
    model = build(small_model_config()).cuda()
    with_test_cfg(model, max_device_logits=limit)
    images = torch.randn(1, 3, 300, 400, device='cuda')
    # cuDNN would round the inputs of float32 convolutions to TF32, differently for batches of other sizes.
    with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):
        logits = model.slide_inference(images, metas(images))
        expected = UpstreamEncoderDecoder.slide_inference(model, images, metas(images))
    assert logits.device.type == ('cpu' if limit == 0 else 'cuda')
    torch.testing.assert_close(logits.cuda(), expected, rtol=0, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize('mode', ['slide', 'whole'])
@pytest.mark.parametrize('step', ['val_step', 'test_step'])
def test_batch_of_mixed_sizes_equals_batches_of_one(model, mode, step):
    generator = torch.Generator().manual_seed(4)
    sizes = [(40, 60), (32, 32), (40, 60), (25, 33)]
    images = [torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8) for size in sizes]

    def sample(index):
        shape = tuple(images[index].shape[1:])
        original = (shape[0] + 3 * index, shape[1] + index)
        return SegDataSample(metainfo=dict(img_shape=shape, ori_shape=original, name=index))

    with_test_cfg(model, mode=mode)
    with torch.no_grad():
        together = getattr(model, step)(dict(inputs=images, data_samples=[sample(index) for index in range(4)]))
        alone = [getattr(model, step)(dict(inputs=[images[i]], data_samples=[sample(i)]))[0] for i in range(4)]
    with_test_cfg(model, mode='slide')
    assert [result.name for result in together] == [0, 1, 2, 3]
    for index, (one, other) in enumerate(zip(together, alone, strict=True)):
        assert one.pred_sem_seg.shape == (sizes[index][0] + 3 * index, sizes[index][1] + index)
        scale = other.seg_logits.data.abs().max().item()
        torch.testing.assert_close(one.seg_logits.data, other.seg_logits.data, rtol=0, atol=2e-6 * scale)
