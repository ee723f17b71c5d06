"""Test-time augmentation as the Vision-LSTM paper's code does it."""

import torch
from mmengine.model import BaseTTAModel
from mmengine.structures import PixelData

from ..registry import MODELS

__all__ = ['LogitSumTTAModel']


@MODELS.register_module()
class LogitSumTTAModel(BaseTTAModel):
    """Sum the logits of all augmented versions of an image, without softmax, and take the largest.

    mmseg's `SegTTAModel` averages probabilities instead; the two give different figures. This one also adds up while
    it goes along, so memory does not grow with the number of versions.

    Args:
        module: The segmentor, or its config.
        data_preprocessor: Overrides the segmentor's.

    Raises:
        ValueError: If the segmentor predicts a single channel, whose logits have no class to choose from.

    Source: multi-scale evaluation of the released ViL segmentation code.
    """

    def test_step(self, data: dict) -> list:
        """Predict one batch of images in all their versions.

        Args:
            data: `inputs` and `data_samples`, each a list with one batch for every version.

        Returns:
            One data sample per image, with the summed `seg_logits` (classes, H, W) and `pred_sem_seg` (1, H, W).
        """
        if self.module.out_channels == 1:
            raise ValueError('LogitSumTTAModel needs at least two output channels, got a segmentor with one')
        merged = None
        for version in range(len(data['inputs'])):
            samples = self.module.test_step({key: values[version] for key, values in data.items()})
            merged = self.merge_preds([samples] if merged is None else [merged, samples], finish=False)
        return self._decide(merged)

    def merge_preds(self, data_samples_list: list[list], finish: bool = True) -> list:
        """Sum the logits of lists of predictions.

        Args:
            data_samples_list: One list of predicted data samples, in the order of the images, per version.
            finish: Whether to choose the class of each pixel as well. Default: True.

        Returns:
            The samples of the first version, with the sums.
        """
        merged = data_samples_list[0]
        for others in data_samples_list[1:]:
            for sample, other in zip(merged, others, strict=True):
                logits = sample.seg_logits.data
                sample.seg_logits = PixelData(data=logits + other.seg_logits.data.to(logits.device))
        return self._decide(merged) if finish else merged

    @staticmethod
    def _decide(samples: list) -> list:
        """Choose the class with the largest sum at each pixel."""
        for sample in samples:
            sample.pred_sem_seg = PixelData(data=torch.argmax(sample.seg_logits.data, dim=0, keepdim=True))
        return samples
