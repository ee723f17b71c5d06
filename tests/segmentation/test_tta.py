"""Sums of logits over scales and flips."""

import pytest
import torch
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample

from mmvil.segmentation import LogitSumTTAModel

from .helpers import build, small_model_config


def prediction(logits):
    return SegDataSample(seg_logits=PixelData(data=torch.tensor(logits)))


class Fixed(torch.nn.Module):
    """A segmentor with given logits for each version, (classes, 1, 2)."""

    out_channels = 3

    def __init__(self, versions):
        super().__init__()
        self.versions = versions

    def test_step(self, data):
        return [prediction(self.versions[index]) for index in data['inputs']]


def test_logits_are_summed_not_probabilities():
    # One confident version decides the first pixel if logits are summed; with mean probabilities class 1 would win.
    versions = [[[[9.0, 0.0]], [[0.0, 1.0]], [[0.0, 0.0]]]] + [[[[0.0, 0.0]], [[3.0, 0.0]], [[0.0, 2.5]]]] * 2
    probabilities = torch.stack([torch.tensor(v).softmax(0) for v in versions]).mean(0)
    assert probabilities.argmax(0).tolist() == [[1, 2]]
    (result,) = LogitSumTTAModel(Fixed(versions)).test_step(dict(inputs=[[0], [1], [2]]))
    assert torch.equal(result.seg_logits.data, torch.tensor(versions).sum(0))
    assert result.pred_sem_seg.data.tolist() == [[[0, 2]]]


def test_images_of_a_batch_stay_apart():
    versions = [[[[1.0, 2.0]], [[0.0, 0.0]], [[0.0, 0.0]]], [[[0.0, 0.0]], [[5.0, 0.0]], [[0.0, 5.0]]]]
    first, second = LogitSumTTAModel(Fixed(versions)).test_step(dict(inputs=[[0, 1], [0, 1]]))
    assert first.pred_sem_seg.data.tolist() == [[[0, 0]]]
    assert second.pred_sem_seg.data.tolist() == [[[1, 2]]]


def test_single_channel_is_refused():
    segmentor = Fixed([])
    segmentor.out_channels = 1
    with pytest.raises(ValueError, match='two output channels'):
        LogitSumTTAModel(segmentor).test_step(dict(inputs=[[0]]))


def test_flipped_version_is_turned_back():
    torch.manual_seed(0)
    model = build(small_model_config())
    image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    meta = dict(img_shape=(32, 32), ori_shape=(40, 50))
    flipped = SegDataSample(metainfo=dict(meta, flip=True, flip_direction='horizontal'))
    samples = [[SegDataSample(metainfo=dict(meta, flip=False))], [flipped]]
    data = dict(inputs=[[image], [image.flip(-1)]], data_samples=samples)
    with torch.no_grad():
        (result,) = LogitSumTTAModel(model).test_step(data)
        plain = model.test_step(dict(inputs=[image], data_samples=[SegDataSample(metainfo=meta)]))[0].seg_logits.data
        mirrored = model.test_step(dict(inputs=[image.flip(-1)], data_samples=[SegDataSample(metainfo=meta)]))[0]
    assert result.pred_sem_seg.shape == (40, 50)
    torch.testing.assert_close(result.seg_logits.data, plain + mirrored.seg_logits.data.flip(-1))
