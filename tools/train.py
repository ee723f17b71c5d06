"""Train a model from a config: classification, segmentation or any other task of an OpenMMLab package.

Example: python tools/train.py configs/vil/vil-nano_1xb64-20e_digits.py
"""

import argparse

from mmengine.config import Config

from mmvil.engine import runner_config
from mmvil.engine.data_check import check_data_folders


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = argparse.ArgumentParser(description='Train a model from a config.')
    parser.add_argument('config', help='config file')
    parser.add_argument('--work-dir', help='folder for logs and checkpoints; default: work_dirs/<config name>')
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CKPT',
        help='continue exactly from a checkpoint; without CKPT: from the latest one in the work dir, if there is one',
    )
    parser.add_argument('--amp', action='store_true', help='mixed precision (bfloat16 or float16); no effect on a CPU')
    parser.add_argument(
        '--auto-scale-lr', action='store_true', help='scale the learning rate with the total batch size of this run'
    )
    parser.add_argument('--no-validate', action='store_true', help='leave out the validation during the training')
    runner_config.add_common_arguments(parser)
    return parser


def prepare(args: argparse.Namespace) -> tuple[Config, list[str]]:
    """Turn the options into a config that can be trained, and lines for the log.

    Raises:
        ValueError: for an option, a file or a folder that would make the training fail.
    """
    config = runner_config.load_config(args.config)
    messages = runner_config.merge_options(config, args.cfg_options)
    config.launcher = args.launcher
    runner_config.set_work_dir(config, args.config, args.work_dir)
    for part in ('model', 'train_dataloader', 'train_cfg', 'optim_wrapper'):
        if config.get(part) is None:
            raise ValueError(f'config {args.config!r} cannot be trained: it has no {part!r}')
    if args.no_validate:
        config.val_cfg = config.val_dataloader = config.val_evaluator = None
    if args.amp:
        messages += runner_config.apply_amp(config)
    if args.auto_scale_lr:
        runner_config.apply_auto_scale_lr(config)
    messages += runner_config.resolve_resume(config, args.resume)
    messages += runner_config.adapt_to_device(config)
    runner_config.set_loader_defaults(config)
    check_data_folders(config, ('train_dataloader', 'val_dataloader'))
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
    runner.train()


if __name__ == '__main__':
    main()
