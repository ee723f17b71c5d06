"""Convert official ViL weights to mmvil, or back with --reverse, and check the result before it is written."""

import argparse
import hashlib
import os
import sys
import tempfile
from pathlib import Path

import torch

from mmvil import __version__
from mmvil.convert import from_official, mmvil_to_official, official_to_mmvil
from mmvil.models.checkpoint import read_checkpoint, unwrap_state_dict


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('src', type=Path, help='checkpoint to read')
    parser.add_argument('dst', type=Path, help='checkpoint to write; its folder is made if it is missing')
    parser.add_argument('--reverse', action='store_true', help='from mmvil to the official layout')
    parser.add_argument('--layout', choices=['module', 'published'], default='published', help='layout with --reverse')
    return parser.parse_args(argv)


def save_atomically(content: dict, path: Path) -> None:
    """Write a checkpoint under a temporary name, read it back, and only then give it its name.

    Args:
        content: Tensors and plain values.
        path: Final file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f'.{path.name}.')
    os.close(handle)
    try:
        torch.save(content, temporary)
        read_checkpoint(temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def check_same(first: dict, second: dict) -> None:
    """Raise ValueError unless two state dicts hold the same keys and the same bits."""
    if first.keys() != second.keys() or not all(torch.equal(first[key], second[key]) for key in first):
        raise ValueError('converting there and back does not give the source again; nothing was written')


def describe_model(official: dict) -> str:
    """Build the converted model, run it on a fixed image, and say what came out."""
    model = from_official(official)
    backbone = getattr(model, 'backbone', model)
    count = sum(parameter.numel() for parameter in model.parameters())
    rows, columns = backbone.pos_embed.shape[1:3]
    channels = backbone.patch_embed.proj.in_channels
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, channels, rows * backbone.patch_stride, columns * backbone.patch_stride, generator=generator)
    with torch.no_grad():
        output = model(image, mode='tensor') if model is not backbone else model(image)[-1]
    if not torch.isfinite(output).all():
        raise ValueError('the converted model gives values that are not finite; nothing was written')
    text = f'{backbone.version}, {backbone.embed_dims} channels, {backbone.num_layers} sub-blocks, {count:,} parameters'
    if model is not backbone:
        highest = output[0].topk(min(5, output.shape[1])).indices.tolist()
        text += f'\nhighest classes of a fixed random image: {highest}'
    return text


def main(argv: list[str] | None = None) -> int:
    """Run the command."""
    args = parse_args(argv)
    try:
        source = unwrap_state_dict(read_checkpoint(args.src))
        if args.reverse:
            converted = mmvil_to_official(source, layout=args.layout)
            official, back = converted, official_to_mmvil(converted)
            check_same(
                {key.removeprefix('backbone.'): value for key, value in source.items()},
                {key.removeprefix('backbone.'): value for key, value in back.items()},
            )
        else:
            converted, official = official_to_mmvil(source), source
            layout = 'published' if any(key.startswith('xlstm.') for key in source) else 'module'
            check_same(source, mmvil_to_official(converted, layout=layout))
        summary = describe_model(official)
        digest = hashlib.sha256(args.src.read_bytes()).hexdigest()
        meta = {'source': args.src.name, 'source_sha256': digest, 'mmvil_version': __version__}
        save_atomically({'meta': meta, 'state_dict': converted}, args.dst)
    except (OSError, TypeError, ValueError) as error:
        print(f'convert_vil.py: {error}', file=sys.stderr)
        return 1
    print(f'{summary}\nsha256 of {args.src.name}: {digest}\nwrote {args.dst} ({len(converted)} tensors)')
    return 0


if __name__ == '__main__':
    sys.exit(main())
