"""Segment a picture and write it with coloured classes and a legend."""

import argparse
import logging

import mmcv
import numpy as np
import torch
from mmengine.config import Config, DictAction
from mmseg.apis import inference_model, init_model

from mmvil.engine.random_state_hook import allow_numpy_dtypes_in_checkpoints
from mmvil.segmentation.overlay import count_classes, draw_overlay, join_with_legend, save_picture

LOGGER = logging.getLogger('segment_image')


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('image', help='picture of any size')
    parser.add_argument('config', help='segmentation config')
    parser.add_argument('checkpoint', help='trained weights')
    parser.add_argument('--out', default='segmented.png', help='picture to write (default: %(default)s)')
    parser.add_argument('--alpha', type=float, default=0.6, help='weight of the colours, 0 to 1 (default: %(default)s)')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='changes of the config, key=value')
    args = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format='%(message)s')
    config = Config.fromfile(args.config)
    config.merge_from_dict(args.cfg_options or {})
    allow_numpy_dtypes_in_checkpoints()
    image = mmcv.imread(args.image, 'color_ignore_orientation', 'rgb', 'pillow')
    model = init_model(config, args.checkpoint, device=args.device)
    labels = inference_model(model, args.image).pred_sem_seg.data.squeeze(0).cpu().numpy().astype(np.int64)
    classes, palette = model.dataset_meta['classes'], model.dataset_meta['palette']
    present = count_classes(labels, len(classes))
    overlay = draw_overlay(image, labels, palette, args.alpha)
    save_picture(join_with_legend([image, overlay], ['image', 'prediction'], present, classes, palette), args.out)
    shares = ', '.join(f'{classes[index]} {100 * share:.1f} %' for index, share in present)
    LOGGER.info('wrote %s: %s', args.out, shares)


if __name__ == '__main__':
    main()
