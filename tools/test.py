"""Evaluate a checkpoint on the test data of a config: classification, segmentation or any other task.

Example: python tools/test.py configs/vil/vil-nano_1xb64-20e_digits.py work_dirs/vil-nano_1xb64-20e_digits/epoch_20.pth
"""

import argparse

from mmengine.config import Config
from mmengine.evaluator import DumpResults

from mmvil.engine import evaluation_config, runner_config
from mmvil.engine.data_check import check_data_folders


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = argparse.ArgumentParser(description='Evaluate a checkpoint.')
    parser.add_argument('config', help='config file')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('--work-dir', help='folder for logs; default: work_dirs/<config name>')
    parser.add_argument(
        '--tta',
        action='store_true',
        help="test-time augmentation: the config's tta_model and tta_pipeline; for a classifier without them, the mean "
        'over each image and its mirror image',
    )
    parser.add_argument(
        '--out',
        metavar='FILE',
        help='write the metrics (.json), the predictions (.pkl) or, for segmentation, label maps (a folder)',
    )
    parser.add_argument('--show-dir', metavar='DIR', help='draw the predictions into this folder')
    runner_config.add_common_arguments(parser)
    return parser


def prepare(args: argparse.Namespace) -> tuple[Config, list[str]]:
    """Turn the options into a config that can be tested, and lines for the log.

    Raises:
        ValueError: for an option, a file or a folder that would make the test fail.
    """
    config = runner_config.load_config(args.config)
    messages = runner_config.merge_options(config, args.cfg_options)
    config.launcher = args.launcher
    config.load_from = runner_config.check_checkpoint(args.checkpoint)
    config.resume = False
    runner_config.set_work_dir(config, args.config, args.work_dir)
    for part in ('model', 'test_dataloader', 'test_evaluator', 'test_cfg'):
        if config.get(part) is None:
            raise ValueError(f'config {args.config!r} cannot be tested: it has no {part!r}')
    if args.tta:
        messages += evaluation_config.apply_tta(config)
    if args.show_dir is not None:
        evaluation_config.apply_show_dir(config, args.show_dir)
    evaluation_config.apply_out(config, args.out)
    messages += runner_config.adapt_to_device(config)
    runner_config.set_loader_defaults(config)
    check_data_folders(config, ('test_dataloader',))
    return config, messages


def main() -> None:
    """Run the command."""
    parser = make_parser()
    args = parser.parse_args()
    try:
        config, messages = prepare(args)
    except ValueError as error:
        parser.error(str(error))
    runner = runner_config.build_runner(config, messages)
    if args.out is not None and args.out.endswith(evaluation_config.PREDICTION_SUFFIXES):
        runner.test_evaluator.metrics.append(DumpResults(out_file_path=args.out))
    metrics = runner.test()
    if args.out is not None and args.out.endswith('.json'):
        evaluation_config.write_metrics(metrics, args.out)


if __name__ == '__main__':
    main()
