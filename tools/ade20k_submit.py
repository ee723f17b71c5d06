"""Predict the ADE20K test images and write the archive for the test server, or check an archive."""

import argparse
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config, DictAction
from mmengine.dataset import pseudo_collate
from mmengine.registry import MODELS, init_default_scope
from mmseg.apis import init_model
from PIL import Image
from torch.utils.data import DataLoader

from mmvil.engine.random_state_hook import allow_numpy_dtypes_in_checkpoints
from mmvil.segmentation import SegDataset
from mmvil.segmentation.submission import (
    NUM_CLASSES,
    NUM_TEST_IMAGES,
    check_archive,
    list_test_images,
    without_annotations,
    write_archive,
)

LOGGER = logging.getLogger('ade20k_submit')


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='command', required=True)
    predict = commands.add_parser('predict', help='predict the test images and write the archive')
    predict.add_argument('config', help='segmentation config')
    predict.add_argument('checkpoint', help='trained weights')
    predict.add_argument('--images', required=True, help='folder with ADE_test_00000001.jpg ...')
    predict.add_argument('--out', required=True, help='archive to write, *.zip')
    predict.add_argument('--tta', action='store_true', help="use the config's tta_model and tta_pipeline")
    predict.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    predict.add_argument('--num-workers', type=int, default=4, help='processes that load images')
    predict.add_argument('--cfg-options', nargs='+', action=DictAction, help='changes of the config, key=value')
    check = commands.add_parser('check', help='check an existing archive')
    check.add_argument('archive')
    check.add_argument('--images', help='folder with the test images, to compare names and sizes')
    for command in (predict, check):
        command.add_argument(
            '--count', type=int, default=NUM_TEST_IMAGES, help='number of pictures, 0 for any (default: %(default)s)'
        )
    parser.epilog = predict.format_usage() + check.format_usage()
    return parser.parse_args(arguments)


def predict_labels(args: argparse.Namespace) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the name and the class numbers of each test image."""
    config = Config.fromfile(args.config)
    config.merge_from_dict(args.cfg_options or {})
    init_default_scope(config.get('default_scope', 'mmseg'))
    allow_numpy_dtypes_in_checkpoints()
    model = init_model(config, args.checkpoint, device=args.device)
    if model.num_classes != NUM_CLASSES:
        raise ValueError(f'the server wants {NUM_CLASSES} classes, the model of {args.config} has {model.num_classes}')
    if args.tta:
        if 'tta_model' not in config or 'tta_pipeline' not in config:
            raise ValueError(f'{args.config} has no tta_model and tta_pipeline, which --tta needs')
        model = MODELS.build({**config.tta_model, 'module': model})
    dataset = SegDataset(
        data_prefix=dict(img_path=args.images),
        metainfo=dict(classes=tuple(map(str, range(NUM_CLASSES)))),
        test_mode=True,
        pipeline=without_annotations(config.tta_pipeline if args.tta else config.test_pipeline),
    )
    loader = DataLoader(dataset, batch_size=1, num_workers=args.num_workers, collate_fn=pseudo_collate)
    model.eval()
    for index, data in enumerate(loader):
        with torch.inference_mode():
            sample = model.test_step(data)[0]
        if index % 100 == 0:
            LOGGER.info('image %d of %d', index + 1, len(dataset))
        yield Path(sample.img_path).stem, sample.pred_sem_seg.data.squeeze(0).cpu().numpy()


def image_sizes(images: list[Path]) -> dict[str, tuple[int, int]]:
    """Read (height, width) of each image, without decoding it."""
    sizes = {}
    for path in images:
        with Image.open(path) as image:
            sizes[path.stem] = (image.height, image.width)
    return sizes


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    args = parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format='%(message)s')
    count = args.count or None
    sizes = image_sizes(list_test_images(args.images, count)) if args.images else None
    if args.command == 'check':
        number = check_archive(args.archive, sizes, count)
        compared = 'names and sizes compared with the images' if sizes else 'sizes not compared, no --images given'
        LOGGER.info('%s is right: %d pictures, %s', args.archive, number, compared)
    else:
        number = write_archive(predict_labels(args), args.out, sizes, count)
        LOGGER.info('wrote %s: %d pictures, checked', args.out, number)


if __name__ == '__main__':
    main()
