"""The mLSTM operator against causal attention of the same shape, by length and head size.

    python benchmarks/bench_mlstm.py [--out FILE] [--rows speed forms length] [--backends ...]

Rows: 'speed' compares backends with attention, 'forms' finds the lengths where the chunkwise form gets faster than the
quadratic one, 'length' gives time per token and peak memory at a constant number of tokens.

Every backend is first compared with float64, output and all gradients; a miss is reported in its row in place of times.
Times are medians over runs with a flushed L2 cache, replayed from a CUDA graph; 'eager' includes autograd and launches
where the GPU waits for them. 'of_floor' is the time that bytes and FLOPs take at the rates measured on this device.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from mmvil.ops import mlstm
from mmvil.ops.chunkwise import mlstm_chunkwise
from mmvil.ops.custom_op import FORMS, mlstm_triton
from mmvil.ops.flops import mlstm_flops

if __package__:
    from .common import Stopwatch, chosen_form, copy_rate, environment, graphed, matmul_rate, table, write_json
else:
    from common import Stopwatch, chosen_form, copy_rate, environment, graphed, matmul_rate, table, write_json

HEADS = 4
SPEED = [
    (128, 196, 96),
    (128, 196, 192),
    (128, 196, 384),
    (32, 1024, 96),
    (32, 1024, 192),
    (8, 4096, 96),
    (8, 4096, 192),
]
SPEED += [(2, 16384, 96)]
LENGTHS = [4096, 8192, 16384, 32768, 65536]
LENGTH_DIMS = [96, 192]
TOKENS = 65536
FORM_LENGTHS = {96: [768, 1024, 1280, 1536], 192: [1024, 1280, 1536, 2048], 384: [1024, 1280, 1536, 2048, 3072]}
FORM_TOKENS = 16384
EPS = 1e-6
ROWS = ['speed', 'forms', 'length']
LIMITS = {'h': 2e-2, 'dq': 2e-2, 'dk': 2e-2, 'dv': 2e-2, 'digate': 5e-2, 'dfgate': 5e-2}
COLUMNS = [
    'batch',
    'tokens',
    'dim',
    'backend',
    'runs',
    'forward',
    'train',
    'forward/sdpa',
    'train/sdpa',
    'forward_of_floor',
]
COLUMNS += ['train_of_floor', 'forward_eager', 'train_eager', 'error']


def make_inputs(batch: int, length: int, dim: int, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    """q, k, v, igate, fgate and dh: bfloat16 and float32 gates of a freshly made model (forget gates near 0.98)."""
    generator = torch.Generator('cuda').manual_seed(seed)
    shape = (batch, HEADS, length, dim)
    q, k, v, dh = (torch.randn(shape, device='cuda', generator=generator).bfloat16() for _ in range(4))
    igate, fgate = (torch.randn(shape[:3], device='cuda', generator=generator) for _ in range(2))
    return [q, k, v, igate, fgate + 4], dh


def backends(length: int, dim: int) -> dict[str, Callable[..., Tensor]]:
    """What can be measured: the operator's choice, each form of the kernels, plain torch, an installed third party."""

    def form(name: str) -> Callable[..., Tensor]:
        return lambda *x: mlstm_triton(*x, False, EPS, name)

    found = {'auto': lambda *x: mlstm(*x), **{f'triton {name}': form(name) for name in FORMS}}
    found['torch chunkwise'] = lambda *x: mlstm(*x, backend='chunkwise')
    try:
        from mlstm_kernels.torch import get_mlstm_kernel
    except ImportError:
        return found
    return {**found, 'mlstm_kernels': get_mlstm_kernel('chunkwise--triton_xl_chunk')}


def train_step(run: Callable[..., Tensor], inputs: list[Tensor], dh: Tensor) -> Callable[[], object]:
    """Forward and backward as one piece of work."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    return lambda: torch.autograd.grad(run(*leaves), leaves, dh)


def check(run: Callable[..., Tensor], length: int, dim: int) -> dict[str, float]:
    """Relative L2 errors against float64 on the same rounded inputs, one image."""
    inputs, dh = make_inputs(1, length, dim, seed=1)
    leaves = [x.double().requires_grad_() for x in inputs]
    h = mlstm_chunkwise(*leaves)
    reference = [h, *torch.autograd.grad(h, leaves, dh.double())]
    leaves = [x.detach().requires_grad_() for x in inputs]
    h = run(*leaves)
    actual = [h, *torch.autograd.grad(h, leaves, dh)]
    scales = [x.norm() for x in reference]
    scales[5] = max(scales[4:])
    errors = [(x.double() - y).norm() / scale for x, y, scale in zip(actual, reference, scales, strict=True)]
    return {name: float(f'{error.item():.2e}') for name, error in zip(LIMITS, errors, strict=True)}


def floor(batch: int, length: int, dim: int, rates: dict[str, float]) -> dict[str, float]:
    """Microseconds below which no implementation can be: bytes or FLOPs of the cheaper form at the measured rates."""
    size = 2 * batch * HEADS * length * dim
    shape, times = (batch, HEADS, length, dim), {}
    for name, tensors, passes in (('forward', 4, [False]), ('train', 4 + 8, [False, True])):
        work = min(sum(mlstm_flops(shape, form, 64, backward) for backward in passes) for form in FORMS)
        times[name] = 1e6 * max(tensors * size / rates['copy_bytes_per_second'], work / rates['matmul_flop_per_second'])
    return times


def attention(stopwatch: Stopwatch, inputs: list[Tensor], dh: Tensor) -> dict[str, object]:
    """Time causal scaled_dot_product_attention and name the backend torch chose."""
    q, k, v = inputs[:3]
    choice = torch._fused_sdp_choice(*(x.detach().requires_grad_() for x in (q, k, v)), is_causal=True)

    def run(*x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*x, is_causal=True)

    step = train_step(run, [q, k, v], dh)
    return {
        'backend': f'sdpa ({torch.nn.attention.SDPBackend(choice).name.lower()})',
        'forward': stopwatch(graphed(lambda: run(q, k, v)))['median'],
        'train': stopwatch(graphed(step))['median'],
        'forward_eager': stopwatch(lambda: run(q, k, v))['median'],
        'train_eager': stopwatch(step)['median'],
    }


def chosen_forms(length: int, dim: int) -> str:
    """What 'auto' runs without and with a backward pass."""
    return ', '.join(dict.fromkeys(chosen_form(length, dim, trains) for trains in (False, True)))


def speed_rows(
    stopwatch: Stopwatch, rates: dict[str, float], names: list[str], cases: list[tuple[int, int, int]]
) -> list[dict[str, object]]:
    """One row per shape and backend, attention first."""
    rows = []
    for batch, length, dim in cases:
        inputs, dh = make_inputs(batch, length, dim)
        shape = {'batch': batch, 'tokens': length, 'dim': dim}
        base = attention(stopwatch, inputs, dh)
        rows.append({**shape, **base})
        limit = floor(batch, length, dim, rates)
        chosen = chosen_forms(length, dim)
        for name in names:
            if 'auto' in names and name == f'triton {chosen}':
                continue  # the row of 'auto' is the same
            run = backends(length, dim)[name]
            row = {**shape, 'backend': name, 'runs': chosen if name == 'auto' else ''}
            rows.append(row)
            if 'torch' in name and batch * length * length * 4 > 2**33:
                row['error'] = 'left out: too slow'
                continue
            row['errors'] = check(run, length, dim)
            row['error'] = max(row['errors'].values())
            if any(not row['errors'][key] <= LIMITS[key] for key in LIMITS):
                row['error'] = f'WRONG {row["errors"]}'
                continue
            step = train_step(run, inputs, dh)
            for key, work in (('forward', lambda run=run, inputs=inputs: run(*inputs)), ('train', step)):
                timing = stopwatch(graphed(work))
                row[key], row[f'{key}_quartiles'] = timing['median'], [timing['low'], timing['high']]
                row[f'{key}/sdpa'] = round(timing['median'] / base[key], 2)
                row[f'{key}_of_floor'] = f'{limit[key] / timing["median"]:.0%}'
                row[f'{key}_eager'] = stopwatch(work)['median']
            print(
                row['backend'], shape, row['forward'], row['train'], row['forward/sdpa'], row['train/sdpa'], flush=True
            )
        torch.cuda.empty_cache()
    return rows


def form_rows(stopwatch: Stopwatch) -> list[dict[str, object]]:
    """Times of both forms around the lengths where one overtakes the other."""
    rows = []
    for dim, lengths in FORM_LENGTHS.items():
        for length in lengths:
            batch = FORM_TOKENS // length
            inputs, dh = make_inputs(batch, length, dim)
            row: dict[str, object] = {'batch': batch, 'tokens': length, 'dim': dim, 'auto': chosen_forms(length, dim)}
            for form in FORMS:
                run = backends(length, dim)[f'triton {form}']
                row[f'{form} forward'] = stopwatch(graphed(lambda run=run, inputs=inputs: run(*inputs)))['median']
                row[f'{form} train'] = stopwatch(graphed(train_step(run, inputs, dh)))['median']
            rows.append(row)
    return rows


def length_rows(stopwatch: Stopwatch, dim: int) -> list[dict[str, object]]:
    """Time per token and peak memory of 'auto' with batch x tokens held at TOKENS."""
    rows = []
    for length in LENGTHS:
        inputs, dh = make_inputs(TOKENS // length, length, dim)
        step = train_step(lambda *x: mlstm(*x), inputs, dh)
        step()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        peak = torch.cuda.max_memory_allocated() - before
        forward = stopwatch(graphed(lambda inputs=inputs: mlstm(*inputs)))['median']
        train = stopwatch(graphed(step))['median']
        nanoseconds = {'forward': round(forward * 1e3 / TOKENS, 2), 'train': round(train * 1e3 / TOKENS, 2)}
        rows.append({'batch': TOKENS // length, 'tokens': length, 'dim': dim, **nanoseconds, 'peak_MiB': peak >> 20})
    return rows


def main() -> int:
    """Measure, print tables, write JSON; 1 if any backend was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, help='JSON file to write')
    parser.add_argument('--backends', nargs='+', default=['auto', *(f'triton {name}' for name in FORMS)])
    parser.add_argument('--rows', nargs='+', default=ROWS, choices=ROWS)
    parser.add_argument('--repeats', type=int, default=25)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error('this benchmark needs a CUDA device')
    stopwatch = Stopwatch(options.repeats)
    rates = {'copy_bytes_per_second': copy_rate(stopwatch), 'matmul_flop_per_second': matmul_rate(stopwatch)}
    result: dict[str, object] = {'environment': environment(), 'rates': rates, 'unit': 'microseconds'}
    print(result['environment'], rates)
    if 'speed' in options.rows:
        result['speed'] = speed_rows(stopwatch, rates, options.backends, SPEED)
        print(table(result['speed'], COLUMNS))
    if 'forms' in options.rows:
        result['forms'] = form_rows(stopwatch)
        print(table(result['forms'], list(result['forms'][0])))
    if 'length' in options.rows:
        result['nanoseconds_per_token'] = [row for dim in LENGTH_DIMS for row in length_rows(stopwatch, dim)]
        print(table(result['nanoseconds_per_token'], ['batch', 'tokens', 'dim', 'forward', 'train', 'peak_MiB']))
    if options.out:
        write_json(options.out, result)
    return int(any('WRONG' in str(row.get('error')) for row in result.get('speed', [])))


if __name__ == '__main__':
    sys.exit(main())
