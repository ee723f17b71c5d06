"""ViL backbones against DeiT of the same size: images per second, memory, latency, by size and resolution.

    python benchmarks/bench_backbone.py [--out FILE] [--plot FILE] [--sizes tiny] [--resolutions 224 512] [--profile]

Each size and resolution runs in a process of its own, with DeiT (the yardstick) and the device's copy and matrix rates
measured in the same process. A ViL variant is first compared with float64 on one image: features and all gradients of a
training pass, and the features of inference in the form that repeated calls have. One whose rounding errors are larger
than those of plain torch gets no times. Models: 'fused' (kernels for whole sub-blocks), 'plain'
(modules and the mLSTM kernels), 'parallel' (modules and the quadratic mLSTM in plain torch, the official code's way and
cost), 'deit' (timm's, else mmpretrain's, with scaled_dot_product_attention). Everything under bfloat16 autocast as in
training; 'train' is forward and backward, without an optimizer step. 'graph' replays a CUDA graph, of 'forward_bf16'
with weights and residual stream in bfloat16; 'train_replayed' is a usual training loop on cuda_graphs=True.
"""

import argparse
import copy
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from mmvil.models import VisionLSTM

if __package__:
    from . import backbone_models as backbone
    from .backbone_report import COLUMNS, TIMES_ROUNDING, add_ratios, draw, earlier_rows, known_bytes, verdict
    from .common import Stopwatch, copy_rate, environment, graphed, host_rate, matmul_rate, table, write_json
else:
    import backbone_models as backbone
    from backbone_report import COLUMNS, TIMES_ROUNDING, add_ratios, draw, earlier_rows, known_bytes, verdict
    from common import Stopwatch, copy_rate, environment, graphed, host_rate, matmul_rate, table, write_json

SIZES = ('tiny', 'small', 'base')
RESOLUTIONS = (224, 384, 512, 768, 1024, 2048)
MODELS = ('deit', 'fused', 'plain', 'parallel')
MODES = ('eager', 'compiled', 'graph')
TOKENS = 128 * 196
"""Tokens of a batch, about: 128 images of 224 pixels."""
PARALLEL_TOKENS = 1024
"""Above this the plain quadratic form is left out: its S x S matrices of 24 blocks do not fit."""
PROFILE_COLUMNS = ['work', 'kernel', 'launches', 'us', 'bytes', 'GB/s']


def batch_size(pixels: int) -> int:
    """Images of a batch, so that all resolutions have about the same number of tokens."""
    return max(1, round(TOKENS / (pixels // backbone.PATCH) ** 2))


def peak_memory(work: Callable[[], object], stopwatch: Stopwatch) -> int:
    """Bytes allocated at most while the work runs a second time: weights included, the stopwatch's own left out."""
    work()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - stopwatch.waste.nbytes


def latency(work: Callable[[], object], repeats: int = 20) -> float:
    """Median milliseconds from the call to the finished result, by the host's clock."""
    times = []
    for _ in range(backbone.SETTLING_CALLS + repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
    return round(statistics.median(times[backbone.SETTLING_CALLS :]), 2)


def measure(
    row: dict[str, object], model: nn.Module, images: Tensor, modes: Iterable[str], stopwatch: Stopwatch,
    check: Callable[[nn.Module], dict[str, object]], check_half: Callable[[nn.Module], dict[str, object]],
) -> None:  # fmt: skip
    """Fill in a row's images per second, memory and latency."""
    count = len(images)
    work = {'forward': backbone.forward_work(model, images), 'train': backbone.train_work(model, images)}
    single = backbone.forward_work(model, images[:1].clone())
    row['forward_GiB'] = round(peak_memory(work['forward'], stopwatch) / 2**30, 3)
    peak = peak_memory(work['train'], stopwatch)
    row['train_GiB'], row['train_MiB_per_image'] = round(peak / 2**30, 3), round(peak / count / 2**20, 1)

    def timed(name: str, run: Callable[[], object]) -> None:
        timing = stopwatch(run)
        row[name] = round(count / timing['median'] * 1e6, 1)
        row[f'{name}_quartiles'] = [round(count / timing[key] * 1e6, 1) for key in ('high', 'low')]

    for name, run in work.items():
        if 'eager' in modes:
            for _ in range(backbone.SETTLING_CALLS):
                run()
            timed(name, run)
        if 'graph' in modes:
            replay = graphed(run)
            if name == 'forward':
                row['graph_error'] = backbone.difference(replay, run)
            timed(f'{name}_graph', replay)
    if 'graph' in modes:
        half = copy.deepcopy(model).bfloat16()
        row.update(check_half(half))
        if 'error' in row:
            return
        run = backbone.half_work(half, images)
        replay = graphed(run)
        row['bf16_graph_error'] = backbone.difference(replay, run)
        timed('forward_bf16', replay)
    if 'eager' in modes and isinstance(model, VisionLSTM) and model.blocks[0].layer.fused:
        replayed = backbone.build_vil('fused', row['size'], row['pixels'], cuda_graphs=True).cuda().train()
        replayed.load_state_dict(model.state_dict())
        timed('train_replayed', backbone.loop_work(replayed, images))
        del replayed
    if 'compiled' in modes:
        compiled = torch.compile(model)
        row['compiled'] = check(compiled)
        if 'error' not in row['compiled']:
            timed('forward_compiled', backbone.forward_work(compiled, images))
            timed('train_compiled', backbone.train_work(compiled, images))
    if 'eager' in modes:
        row['latency_ms'] = latency(single)
    if 'graph' in modes:
        row['latency_graph_ms'] = latency(graphed(single))


def profile(model: nn.Module, images: Tensor, tokens: int, dims: int) -> list[dict[str, object]]:
    """Time on the device by kernel, forward and training apart: launches, microseconds of all, bytes where known."""
    rows = []
    for name, work in (
        ('forward', backbone.forward_work(model, images)),
        ('train', backbone.train_work(model, images)),
    ):
        work()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            work()
            torch.cuda.synchronize()
        events = [x for x in profiler.key_averages() if x.device_type == torch.autograd.DeviceType.CUDA]
        for event in sorted(events, key=lambda event: -event.self_device_time_total)[:25]:
            row = {'work': name, 'kernel': event.key[:70], 'launches': event.count}
            row['us'] = round(event.self_device_time_total, 1)
            size = known_bytes(event.key, len(images), tokens, dims, name)
            if size is not None:
                row['bytes'] = size * event.count
                row['GB/s'] = round(row['bytes'] / row['us'] / 1e3)
            rows.append(row)
    return rows


def build(name: str, size: str, pixels: int, state: dict[str, Tensor]) -> tuple[nn.Module, str | None]:
    """A model on the device, and who made it unless it is ours."""
    if name == 'deit':
        model, maker = backbone.build_deit(size, pixels)
    else:
        model, maker = backbone.build_vil(name, size, pixels), None
        model.load_state_dict(state)
    return model.cuda().eval(), maker


def profile_model(row: dict[str, object], images: Tensor, state: dict[str, Tensor], dims: int) -> None:
    """Fill in a measured row's table of kernels, with a model made anew."""
    model, _ = build(row['model'], row['size'], row['pixels'], state)
    try:
        row['profile'] = profile(model, images, row['tokens'], dims)
    except torch.cuda.OutOfMemoryError:
        row['error'] = 'out of memory'
    del model
    torch.cuda.empty_cache()


def measure_model(
    name: str, size: str, images: Tensor, state: dict[str, Tensor], exact: tuple, options: argparse.Namespace,
    stopwatch: Stopwatch,
) -> dict[str, object]:  # fmt: skip
    """One row: check, then measure."""
    pixels = images.shape[-1]
    tokens = (pixels // backbone.PATCH) ** 2
    row: dict[str, object] = {'size': size, 'pixels': pixels, 'images': len(images), 'tokens': tokens, 'model': name}
    if name == 'parallel' and tokens > PARALLEL_TOKENS:
        return {**row, 'error': 'left out: too large'}
    model, maker = build(name, size, pixels, state)
    if maker is not None:
        row['made_by'] = maker

    def check(candidate: nn.Module) -> dict[str, object]:
        if name == 'deit':
            return {}
        reference, rounding, _, image = exact
        names = ['features', *(name for name, _ in candidate.named_parameters())]
        found = verdict(
            backbone.relative_errors(backbone.results(candidate, image, autocast=True), reference), rounding, names
        )
        (error,) = backbone.relative_errors([backbone.settled(backbone.forward_work(candidate, image))], reference[:1])
        found['inference_error'] = float(f'{error:.2e}')
        if not error <= TIMES_ROUNDING * rounding[0]:  # not the negation: NaN is wrong, too
            found.setdefault('error', 'WRONG in inference')
        return found

    def check_half(candidate: nn.Module) -> dict[str, object]:
        if name == 'deit':
            return {}
        reference, _, rounding, image = exact
        (error,) = backbone.relative_errors([backbone.settled(backbone.half_work(candidate, image))], reference[:1])
        found = {'bf16_output_error': float(f'{error:.2e}'), 'bf16_plain_error': float(f'{rounding:.2e}')}
        # Not the negation: NaN is wrong, too.
        return found if error <= TIMES_ROUNDING * rounding else {**found, 'error': 'WRONG with bfloat16 weights'}

    row.update(check(model))
    if 'error' in row:
        return row
    row['parameters'] = sum(p.numel() for p in model.parameters())
    try:
        measure(row, model, images, options.modes, stopwatch, check, check_half)
    except torch.cuda.OutOfMemoryError:
        row['error'] = 'out of memory'
    if name != 'deit':
        row.update(graph_verdict(row, exact[1][0], exact[2]))
    return row


def graph_verdict(row: dict[str, object], rounding: float, bf16_rounding: float) -> dict[str, str]:
    """An error if a captured batch is farther from the launched one than a result may be from float64."""
    pairs = (row.get('graph_error', 0.0), rounding), (row.get('bf16_graph_error', 0.0), bf16_rounding)
    right = all(error <= TIMES_ROUNDING * limit for error, limit in pairs)  # NaN is wrong, too
    return {} if right else {'error': 'WRONG in a graph'}


def worker(options: argparse.Namespace) -> dict[str, object]:
    """Measure all models of one size and resolution in this process."""
    (size,), (pixels,) = options.sizes, options.resolutions
    stopwatch = Stopwatch(options.repeats, warmup=2)
    rates = {
        'copy_bytes_per_second': copy_rate(stopwatch),
        'matmul_flop_per_second': matmul_rate(stopwatch),
        'host_additions_per_second': host_rate(),
    }
    torch.manual_seed(0)
    drawn = backbone.build_vil('plain', size, pixels)
    backbone.draw_weights(drawn)
    state, exact = drawn.state_dict(), ()
    if set(options.models) - {'deit'}:
        exact = backbone.references(size, pixels, state)
    images = torch.randn(options.images or batch_size(pixels), 3, pixels, pixels, device='cuda')
    rows = []
    for name in options.models:
        rows.append(measure_model(name, size, images, state, exact, options, stopwatch))
        torch.cuda.empty_cache()
    arch = VisionLSTM.arch_zoo[size]
    if options.profile:  # last, so that nothing is timed in a process that a profiler has run in
        for row in rows:
            if 'error' not in row:
                profile_model(row, images, state, arch['embed_dims'])
    add_ratios(rows, arch['num_layers'], arch['embed_dims'], rates)
    return {'environment': environment(), 'rates': rates, 'rows': rows}


def warm(options: argparse.Namespace) -> None:
    """Compile the kernels of one size and resolution into Triton's cache with two images."""
    (size,), (pixels,) = options.sizes, options.resolutions
    for name in options.models:
        model, image = backbone.build_vil(name, size, pixels).cuda(), torch.randn(2, 3, pixels, pixels, device='cuda')
        backbone.train_work(model, image)()
        backbone.forward_work(model, image)()
        backbone.half_work(model.bfloat16(), image)()
    torch.cuda.synchronize()


def command(options: argparse.Namespace, size: str, pixels: int, models: Iterable[str], *extra: str) -> list[str]:
    """Command line of a process for one size and resolution."""
    chosen = ['--sizes', size, '--resolutions', str(pixels), '--variants', *models, '--modes', *options.modes]
    numbers = ['--repeats', str(options.repeats), '--images', str(options.images)]
    return [sys.executable, __file__, *chosen, *numbers, *(['--profile'] if options.profile else []), *extra]


def cases(options: argparse.Namespace) -> list[tuple[str, int]]:
    """Sizes and resolutions to run: all combinations, or those named one by one as SIZE:PIXELS."""
    if options.cases:
        pairs = [case.split(':') for case in options.cases]
        return [(size, int(pixels)) for size, pixels in pairs]
    return [(size, pixels) for size in options.sizes for pixels in options.resolutions]


def case(text: str) -> str:
    """Check one SIZE:PIXELS."""
    size, _, pixels = text.partition(':')
    if size not in SIZES or not pixels.isdigit() or int(pixels) < backbone.PATCH:
        raise argparse.ArgumentTypeError(f'expected SIZE:PIXELS with a size of {SIZES}, got {text!r}')
    return text


def warm_cases(pairs: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """Smallest and largest resolution of each size: nothing else is compiled for those between."""
    sizes = {size: [pixels for other, pixels in pairs if other == size] for size, _ in pairs}
    return [(size, pixels) for size, found in sizes.items() for pixels in sorted({min(found), max(found)})]


def warm_up(options: argparse.Namespace) -> None:
    """Compile what is needed in processes side by side: each variant and size at its two extreme resolutions."""
    models = [name for name in options.models if name in ('fused', 'plain')]
    chosen = warm_cases(cases(options))
    commands = [command(options, *which, [name], '--only-warm') for which in chosen for name in models]
    running = [subprocess.Popen(one, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for one in commands]
    deadline = time.monotonic() + options.limit
    for process in running:
        try:
            process.wait(max(1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()


def start_case(options: argparse.Namespace, size: str, pixels: int) -> tuple[subprocess.Popen, Path]:
    """Start a process that imports everything and then waits for its turn on the device."""
    file = Path(tempfile.mkdtemp()) / 'result.json'
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        command(options, size, pixels, options.models, '--worker', str(file)),
        stdin=pipe, stdout=subprocess.DEVNULL, stderr=pipe, text=True,
    )  # fmt: skip
    return process, file


def finish_case(process: subprocess.Popen, file: Path, size: str, pixels: int, limit: float) -> dict[str, object]:
    """Let a process measure, and read its result; a failure becomes a row."""
    try:
        _, errors = process.communicate('go\n', timeout=limit)
        failure = (errors.strip().splitlines() or ['no message'])[-1]
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        failure = f'took longer than {limit} s'
    try:
        return json.loads(file.read_text(encoding='utf-8'))
    except FileNotFoundError:
        return {'rows': [{'size': size, 'pixels': pixels, 'model': 'all', 'error': f'failed: {failure}'}]}
    finally:
        shutil.rmtree(file.parent)


def run_cases(options: argparse.Namespace) -> Iterator[tuple[str, int, dict[str, object]]]:
    """Run one process after the other, each started while the one before it measures."""
    pairs = cases(options)
    following = start_case(options, *pairs[0])
    for index, (size, pixels) in enumerate(pairs):
        running, following = following, start_case(options, *pairs[index + 1]) if index + 1 < len(pairs) else None
        yield size, pixels, finish_case(*running, size, pixels, options.limit)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--sizes', nargs='+', default=list(SIZES), choices=SIZES)
    parser.add_argument('--resolutions', nargs='+', type=int, default=list(RESOLUTIONS))
    parser.add_argument('--cases', nargs='+', type=case, help='SIZE:PIXELS one by one, in place of all combinations')
    parser.add_argument('--variants', dest='models', nargs='+', default=list(MODELS), choices=MODELS)
    parser.add_argument('--modes', nargs='+', default=['eager', 'graph'], choices=MODES)
    parser.add_argument('--repeats', type=int, default=10)
    parser.add_argument('--images', type=int, default=0, help='batch size; default: about 25,000 tokens')
    parser.add_argument('--profile', action='store_true', help='add a table of kernels for each row')
    parser.add_argument('--limit', type=float, default=180, help='most seconds for one size and resolution')
    parser.add_argument('--cold', action='store_true', help='do not compile all kernels beforehand, side by side')
    parser.add_argument('--out', type=Path, help='JSON file to write, or to complete by other cases of the same device')
    parser.add_argument('--plot', type=Path, help='SVG or PNG file to write')
    parser.add_argument('--worker', type=Path, help=argparse.SUPPRESS)
    parser.add_argument('--only-warm', action='store_true', help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print tables, write files; 1 if anything was wrong or failed."""
    options = parse(arguments)
    if not torch.cuda.is_available():
        raise SystemExit('bench_backbone measures on a GPU, and there is none')
    if options.only_warm:
        warm(options)
        return 0
    if options.worker:
        if 'deit' in options.models:
            backbone.build_deit('tiny', backbone.PATCH)  # for its imports
        if not sys.stdin.readline():  # the process that would have said go has ended
            return 1
        write_json(options.worker, worker(options))
        return 0
    facts = environment()
    result: dict[str, object] = {'environment': facts, **earlier_rows(options.out, facts, cases(options))}
    if not options.cold:
        warm_up(options)
    for size, pixels, found in run_cases(options):
        result['rows'] += found['rows']
        result['rates'][f'{size}:{pixels}'] = found.get('rates')
        print(table(found['rows'], COLUMNS), flush=True)
        for row in found['rows']:
            if 'profile' in row:
                print(row['model'], table(row['profile'], PROFILE_COLUMNS), sep='\n')
        if options.out:
            write_json(options.out, result)
    if options.plot:
        draw(result['rows'], options.plot, result['environment']['device'])
    bad = ('WRONG', 'failed')
    verdicts = [found.get('error', '') for row in result['rows'] for found in (row, row.get('compiled', {}))]
    return int(any(str(text).startswith(bad) for text in verdicts))


if __name__ == '__main__':
    sys.exit(main())
