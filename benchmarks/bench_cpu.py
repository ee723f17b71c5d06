"""Inference on a CPU: the model as it chooses by itself against the plain quadratic form, time and memory.

    python benchmarks/bench_cpu.py [--models tiny small] [--pixels 512] [--out FILE]

One image in float32 without gradients. The two forms take turns; the shortest time counts, because whatever else the
machine does only adds to it; run it on an idle machine.
'allocated' is the most that PyTorch's allocator held at a time above weights and image, which is the same in every run;
'resident' is what the process's resident set grew by, read in a process of its own. 'error' is the distance from
float64, in units of the largest output.
"""

import argparse
import json
import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import torch
from torch import Tensor

from mmvil.models import VisionLSTM

if __package__:
    from .common import commit, table, write_json
else:
    from common import commit, table, write_json

BACKENDS = ('parallel', 'auto')
COLUMNS = ['model', 'backend', 'ms', 'times faster', 'allocated MiB', 'times less', 'resident MiB', 'error']


def build(arch: str, backend: str, pixels: int) -> VisionLSTM:
    """A model with random weights, the same for every backend."""
    torch.manual_seed(0)
    return VisionLSTM(arch, img_size=pixels, mlstm_backend=backend).eval()


def random_image(pixels: int) -> Tensor:
    """One image, the same every time."""
    return torch.randn(1, 3, pixels, pixels, generator=torch.Generator().manual_seed(1))


def peak_allocated(work: Callable[[], object]) -> int:
    """Most bytes that a piece of work held at a time, as PyTorch's allocator for CPU memory reports them.

    Args:
        work: Runs on the CPU; what it returns is freed.

    Returns:
        Bytes above what was allocated before.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        work()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / 'trace.json'
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding='utf-8'))['traceEvents']
    changes = [(event['ts'], event['args']['Bytes']) for event in events if event.get('name') == '[memory]']
    held = peak = 0
    for _, change in sorted(changes, key=lambda entry: entry[0]):
        held += change
        peak = max(peak, held)
    return peak


@torch.inference_mode()
def peak_resident(arch: str, backend: str, pixels: int, threads: int) -> float:
    """MiB that the resident set grows by in the first forward pass; for a fresh process; Linux only."""
    torch.set_num_threads(threads)
    model, image = build(arch, backend, pixels), random_image(pixels)
    model(image[:, :, :32, :32])  # loads libraries and starts threads
    Path('/proc/self/clear_refs').write_text('5', encoding='ascii')  # the high-water mark starts anew
    before = _status('VmRSS')
    model(image)
    return (_status('VmHWM') - before) / 1024


def _status(name: str) -> int:
    """A figure of this process in KiB."""
    lines = Path('/proc/self/status').read_text(encoding='ascii').splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ':'))


def relative_error(output: Tensor, expected: Tensor) -> float:
    """Distance in units of the largest expected value."""
    return float(f'{((output - expected).abs().max() / expected.abs().max()).item():.1e}')


@torch.inference_mode()
def measure(arch: str, pixels: int, repeats: int, threads: int) -> list[dict[str, object]]:
    """Measure one model with both backends."""
    models, image = {backend: build(arch, backend, pixels) for backend in BACKENDS}, random_image(pixels)
    best = dict.fromkeys(BACKENDS, float('inf'))
    for _ in range(repeats):
        for backend, model in models.items():
            start = time.perf_counter()
            model(image)
            best[backend] = min(best[backend], time.perf_counter() - start)
    expected = build(arch, 'auto', pixels).double()(image.double())[0]
    allocated = {backend: peak_allocated(lambda model=model: model(image)) for backend, model in models.items()}
    with multiprocessing.get_context('spawn').Pool(1, maxtasksperchild=1) as pool:
        resident = {backend: pool.apply(peak_resident, (arch, backend, pixels, threads)) for backend in BACKENDS}
    return [
        {
            'model': arch,
            'pixels': pixels,
            'backend': backend,
            'ms': round(1e3 * best[backend], 1),
            'times faster': round(best['parallel'] / best[backend], 2),
            'allocated MiB': round(allocated[backend] / 2**20, 2),
            'times less': round(allocated['parallel'] / allocated[backend], 2),
            'resident MiB': round(resident[backend], 1),
            'error': relative_error(model(image)[0], expected),
        }
        for backend, model in models.items()
    ]


def cpu_name() -> str:
    """Name of the processor."""
    info = Path('/proc/cpuinfo')
    lines = info.read_text(encoding='utf-8').splitlines() if info.exists() else []
    names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    return names[0] if names else platform.processor()


def main(arguments: list[str] | None = None) -> None:
    """Measure, print a table and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', default=['tiny', 'small'], choices=list(VisionLSTM.arch_zoo))
    parser.add_argument('--pixels', type=int, default=512)
    parser.add_argument('--repeats', type=int, default=10)
    parser.add_argument('--threads', type=int, default=2)
    parser.add_argument('--out', type=Path, help='JSON file')
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    rows = []
    for arch in options.models:
        rows += measure(arch, options.pixels, options.repeats, options.threads)
    print(table(rows, COLUMNS))
    if options.out:
        facts = {
            'device': cpu_name(),
            'threads': options.threads,
            'OMP_WAIT_POLICY': os.environ.get('OMP_WAIT_POLICY'),
            'torch': torch.__version__,
            'python': platform.python_version(),
            'commit': commit(),
            'date': datetime.now(timezone.utc).date().isoformat(),
        }
        write_json(options.out, {'environment': facts, 'repeats': options.repeats, 'rows': rows})


if __name__ == '__main__':
    main()
