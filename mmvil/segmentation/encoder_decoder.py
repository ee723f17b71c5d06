"""mmseg's EncoderDecoder with bounded memory at test time and batches of mixed sizes."""

from collections import defaultdict
from collections.abc import Sequence

import torch
from mmengine.model import initialize
from mmengine.structures import BaseDataElement
from mmseg.models import EncoderDecoder as UpstreamEncoderDecoder
from torch import Tensor

from ..registry import MODELS

__all__ = ['EncoderDecoder', 'window_boxes']

GIBIBYTE = 2**30


def window_boxes(size: Sequence[int], crop: Sequence[int], stride: Sequence[int]) -> list[tuple[int, int, int, int]]:
    """Lay windows over an image; the last ones are moved back so that they end at its edge.

    Args:
        size: Height and width of the image in pixels.
        crop: Height and width of a window. An image that is smaller makes the window smaller.
        stride: Vertical and horizontal distance of two windows.

    Returns:
        (top, left, bottom, right) of each window, row by row; together they cover the image.

    Raises:
        ValueError: If a stride is not positive or larger than the window, which would leave gaps.
    """
    if not all(0 < s <= c for s, c in zip(stride, crop, strict=True)):
        raise ValueError(f'stride must be positive and at most crop_size {tuple(crop)}, got {tuple(stride)}')
    starts = []
    for length, window, step in zip(size, crop, stride, strict=True):
        last = max(length - window, 0)
        starts.append(sorted({min(start, last) for start in range(0, last + step, step)}))
    return [
        (top, left, min(top + crop[0], size[0]), min(left + crop[1], size[1]))
        for top in starts[0]
        for left in starts[1]
    ]


@MODELS.register_module()
class EncoderDecoder(UpstreamEncoderDecoder):
    """mmseg's `EncoderDecoder` with three differences, all of them outside of the training step.

    * Sliding-window inference runs several windows at once and collects large results in host memory, so the device
      holds `window_batch_size` windows and at most `max_device_logits` bytes of logits, whatever the image's size.
      The result is that of mmseg, which runs one window after the other.
    * Images of different sizes in a validation batch are run by size, each exactly as alone. mmseg refuses them.
    * `head_init_cfg` is applied to the heads after their parts have initialised themselves. mmcv's `ConvModule` does
      that last, so a head's own `init_cfg` has no effect on most of its convolutions.

    `test_cfg` takes mmseg's entries and, for `mode='slide'`, `window_batch_size` (int, default 4) and
    `max_device_logits` (bytes, default 2 GiB).

    Args:
        *args: As for mmseg's class.
        head_init_cfg: mmengine initialisation config, or a list of them, for decode and auxiliary heads. Default: None.
        **kwargs: As for mmseg's class.

    Raises:
        ValueError: In testing, if the stride leaves gaps or `window_batch_size` is not positive.
    """

    def __init__(self, *args, head_init_cfg: dict | list | None = None, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.head_init_cfg = head_init_cfg

    def init_weights(self) -> None:
        """Initialise all parts, then the heads once more with `head_init_cfg`."""
        first_time = not self.is_init
        super().init_weights()
        if first_time and self.head_init_cfg:
            for name in ('decode_head', 'auxiliary_head'):
                if getattr(self, name, None) is not None:
                    initialize(getattr(self, name), self.head_init_cfg)

    def val_step(self, data: dict | tuple | list) -> list:
        """Predict a validation batch; images may differ in size."""
        return self._by_size(data, super().val_step)

    def test_step(self, data: dict | tuple | list) -> list:
        """Predict a test batch; images may differ in size."""
        return self._by_size(data, super().test_step)

    @staticmethod
    def _by_size(data: dict | tuple | list, step) -> list:
        """Call `step` once for each size of image and put the results back into the batch's order."""
        if not isinstance(data, dict) or not isinstance(data.get('inputs'), (list, tuple)):
            return step(data)
        groups = defaultdict(list)
        for index, image in enumerate(data['inputs']):
            groups[tuple(image.shape)].append(index)
        if len(groups) == 1:
            return step(data)
        results: list[BaseDataElement | None] = [None] * len(data['inputs'])
        for indices in groups.values():
            part = {key: [values[index] for index in indices] for key, values in data.items()}
            for index, result in zip(indices, step(part), strict=True):
                results[index] = result
        return results

    def slide_inference(self, inputs: Tensor, batch_img_metas: list[dict]) -> Tensor:
        """Average the logits of overlapping windows.

        Args:
            inputs: Normalised images, (B, C, H, W).
            batch_img_metas: Meta information of each image.

        Returns:
            Logits, (B, classes, H, W), float32; on the CPU if they take more than `max_device_logits` bytes.

        Raises:
            ValueError: If the stride leaves gaps or `window_batch_size` is not positive.
        """
        boxes = window_boxes(inputs.shape[2:], self.test_cfg.crop_size, self.test_cfg.stride)
        batch_size = self.test_cfg.get('window_batch_size', 4)
        if batch_size < 1:
            raise ValueError(f'test_cfg.window_batch_size must be at least 1, got {batch_size}')
        shape = (len(inputs), self.out_channels, *inputs.shape[2:])
        # While windows are added up, the counts and the last batch of windows are there as well.
        too_large = 4 * torch.Size(shape).numel() > self.test_cfg.get('max_device_logits', 2 * GIBIBYTE)
        device = torch.device('cpu') if too_large else inputs.device
        logits = torch.zeros(shape, device=device)
        counts = torch.zeros(shape[2:], device=device)
        for top, left, bottom, right in boxes:
            counts[top:bottom, left:right] += 1
        for index in range(len(inputs)):
            for start in range(0, len(boxes), batch_size):
                chosen = boxes[start : start + batch_size]
                windows = torch.stack([inputs[index, :, top:bottom, left:right] for top, left, bottom, right in chosen])
                meta = {**batch_img_metas[index], 'img_shape': windows.shape[2:]}
                window_logits = self.encode_decode(windows, [meta] * len(windows)).to(device)
                for (top, left, bottom, right), values in zip(chosen, window_logits, strict=True):
                    logits[index, :, top:bottom, left:right] += values
        return logits.div_(counts)
