"""Blocks of the sizes T, S and B under other settings of their kernels, and one pass of a block for a profiler.

    python benchmarks/bench_block.py --scenes T "T train" --set "triton_quadratic.STORED_TOKENS[128]=0" \
        --set "block.SETTINGS['mix_rows']=(2, 2, 4)"
    ncu --profile-from-start off --clock-control none --kernel-name regex:_kernel$ \
        --section SpeedOfLight --section Occupancy --section WarpStateStats \
        python benchmarks/bench_block.py --scenes T "T train" --one-pass

Times four blocks in a row as a model runs them, both directions, bfloat16 autocast, in a CUDA graph: median of 12
replays over four, without a flushed cache. `--set` assigns to a name of a module of `mmvil.ops`, or to a place in one
of its tables; tiles are written as tuples. Results are compared with those of the settings in use.
"""

import argparse
import ast
import importlib
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from mmvil.models import ViLBlock
from mmvil.models.block import run_joined
from mmvil.ops import block_op
from mmvil.ops.triton_launch import Tiles

if __package__:
    from .common import environment, graphed, write_json
else:
    from common import environment, graphed, write_json

SCENES = {
    'T': (192, 128, (14, 14)),
    'S': (384, 128, (14, 14)),
    'B': (768, 64, (14, 14)),
    'T512': (192, 32, (32, 32)),
    'S512': (384, 16, (32, 32)),
    'T1024': (192, 6, (64, 64)),
    'B384': (768, 44, (24, 24)),
    'B512': (768, 24, (32, 32)),
}
"""Channels, images and tokens."""
BLOCKS, REPEATS, LIMIT = 4, 12, 2e-2


def work_of(scene: str, blocks: int) -> Callable[[], list[Tensor]]:
    """Inference, or forward and backward, of a scene: its name, with ' train' behind it for the latter."""
    name, _, trains = scene.partition(' ')
    dims, batch, grid = SCENES[name]
    torch.manual_seed(0)
    stack = torch.nn.ModuleList([ViLBlock(dims, reverse=bool(i % 2)) for i in range(blocks)]).cuda()
    parameters = list(stack.parameters())
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(torch.randn_like(parameter) * 0.02)
    tokens = torch.randn(batch, grid[0] * grid[1], dims, device='cuda', requires_grad=bool(trains))
    upstream = torch.randn_like(tokens)

    def work() -> list[Tensor]:
        with torch.set_grad_enabled(bool(trains)), torch.autocast('cuda', torch.bfloat16):
            out, done = tokens, 0
            while done < blocks:
                out, joined = run_joined(stack[done:], out, grid)
                out, done = (out, done + joined) if joined else (stack[done](out, grid), done + 1)
        if not trains:
            return [out]
        # Detached: while a graph lives, autograd waits for the stream that it was made on, which a capture forbids.
        return [out.detach(), *torch.autograd.grad(out, [tokens, *parameters], upstream)]

    return work


def microseconds(work: Callable[[], object]) -> float:
    """Median time of a block, from replays of a graph."""
    replay = graphed(work)
    times = []
    for _ in range(REPEATS + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / BLOCKS)
    return round(statistics.median(times[2:]), 1)


def like(old: object, new: object) -> object:
    """A literal with tiles where the old value has them."""
    if isinstance(old, Tiles):
        return Tiles(*new)
    if isinstance(old, tuple | list) and old and isinstance(new, tuple | list):
        return type(old)(like(old[0], x) for x in new)
    return new


def assign(text: str) -> None:
    """Do what MODULE.NAME=VALUE or MODULE.NAME['KEY']...=VALUE says, and drop what was worked out before."""
    target, _, value = text.partition('=')
    module_name, _, rest = target.strip().partition('.')
    module = importlib.import_module(f'mmvil.ops.{module_name}')
    parsed = ast.parse(rest, mode='eval').body
    keys = []
    while isinstance(parsed, ast.Subscript):
        keys.insert(0, ast.literal_eval(parsed.slice))
        parsed = parsed.value
    if not isinstance(parsed, ast.Name) or not hasattr(module, parsed.id):
        raise ValueError(f'expected a name or a place in a table of mmvil.ops.{module_name}, got {rest!r}')
    table, *keys = vars(module), parsed.id, *keys
    for key in keys[:-1]:
        table = table[key]
    table[keys[-1]] = like(table[keys[-1]], ast.literal_eval(value.strip()))
    block_op.forget_tapes()
    importlib.import_module('mmvil.ops.triton_quadratic').tile_candidates.cache_clear()


def scene(text: str) -> str:
    """Check one scene."""
    if text.removesuffix(' train') not in SCENES:
        raise argparse.ArgumentTypeError(f"expected one of {list(SCENES)}, ' train' behind it or not, got {text!r}")
    return text


def main(arguments: list[str] | None = None) -> int:
    """Time, or run once; 1 if a result is off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--scenes', nargs='+', type=scene, default=['T', 'S', 'B', 'T train', 'S train', 'B train'])
    parser.add_argument('--set', action='append', default=[], metavar='SETTING', help='may be given several times')
    parser.add_argument(
        '--one-pass', action='store_true', help='one pass of one block, between profiler start and stop'
    )
    parser.add_argument('--out', type=Path, help='JSON file to write')
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit('bench_block measures on a GPU, and there is none')
    expected = {}
    if options.set:
        expected = {name: [x.detach().float() for x in work_of(name, BLOCKS)()] for name in options.scenes}
    for text in options.set:
        assign(text)
    rows, bad = [], False
    for name in options.scenes:
        work = work_of(name, 1 if options.one_pass else BLOCKS)
        for _ in range(3):
            found = work()
        if options.one_pass:
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaProfilerStart()
            work()
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaProfilerStop()
            continue
        pairs = zip(found, expected.get(name, found), strict=True)
        error = max(((x.float() - y.float()).norm() / y.float().norm()).item() for x, y in pairs)
        bad |= not error <= LIMIT
        rows.append({'scene': name, 'us a block': microseconds(work), 'difference': float(f'{error:.1e}')})
        print(rows[-1], flush=True)
    if options.out:
        write_json(options.out, {'environment': environment(), 'settings': options.set, 'rows': rows})
    return int(bad)


if __name__ == '__main__':
    sys.exit(main())
