"""Make the metafile entry and the table row of a segmentation model from its log and checkpoint."""

import argparse
import json
import sys
from pathlib import Path

import yaml

from mmvil.segmentation.zoo import TABLE_HEAD, collect_entry, metafile_entry, read_scalars, table_row


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='training config')
    parser.add_argument('checkpoint', help='checkpoint to publish; its iteration must have been validated')
    parser.add_argument('scalars', help="the run's vis_data/scalars.json")
    parser.add_argument('--weights', required=True, help='address that the checkpoint will have')
    parser.add_argument('--log', required=True, help='address that the log will have')
    parser.add_argument('--device', required=True, help='GPU of the run, for example A100')
    parser.add_argument('--multi-scale', help='JSON file with the metrics of a test with --tta')
    parser.add_argument('--out', help='YAML file to write; default: standard output')
    args = parser.parse_args(arguments)
    multi_scale = json.loads(Path(args.multi_scale).read_text(encoding='utf-8')) if args.multi_scale else None
    entry = collect_entry(
        args.config,
        args.checkpoint,
        read_scalars(args.scalars),
        weights=args.weights,
        log=args.log,
        device=args.device,
        multi_scale=multi_scale,
    )
    text = yaml.safe_dump({'Models': [metafile_entry(entry)]}, sort_keys=False, allow_unicode=True)
    if args.out:
        temporary = Path(f'{args.out}.part')
        temporary.write_text(text, encoding='utf-8')
        temporary.replace(args.out)
    else:
        sys.stdout.write(text + '\n')
    sys.stdout.write(f'{TABLE_HEAD}\n{table_row(entry)}\n')


if __name__ == '__main__':
    main()
