"""Timing and reporting shared by the benchmarks: device events, flushed L2, medians, spread, JSON with the facts."""

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import torch

from mmvil.ops.triton_launch import choose_form

__all__ = [
    'Stopwatch',
    'chosen_form',
    'commit',
    'copy_rate',
    'environment',
    'graphed',
    'host_rate',
    'matmul_rate',
    'table',
    'write_json',
]

FLUSH_BYTES = 512 * 2**20


class Stopwatch:
    """Time GPU work with device events, with the L2 cache flushed before each run.

    Args:
        repeats: Timed runs.
        warmup: Untimed runs before them.
    """

    def __init__(self, repeats: int = 25, warmup: int = 5) -> None:
        self.repeats, self.warmup = repeats, warmup
        self.waste = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device='cuda')

    def __call__(self, work: Callable[[], object]) -> dict[str, float]:
        """Measure one piece of work.

        Args:
            work: Enqueues the work on the current stream.

        Returns:
            Microseconds: 'median', and 'low' and 'high' quartile.
        """
        for _ in range(self.warmup):
            work()
        events = [
            (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(self.repeats)
        ]
        for start, end in events:
            self.waste.zero_()  # long enough to hide the launches of what follows
            start.record()
            work()
            end.record()
        torch.cuda.synchronize()
        times = [start.elapsed_time(end) * 1e3 for start, end in events]
        low, median, high = statistics.quantiles(times, n=4)
        return {'median': round(median, 1), 'low': round(low, 1), 'high': round(high, 1)}


def graphed(work: Callable[[], object]) -> Callable[[], object]:
    """Capture work in a CUDA graph.

    Args:
        work: Enqueues work of fixed shapes on the current stream.

    Returns:
        A function that replays it and gives its result, in memory that the next replay writes to.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()

    def replay() -> object:
        graph.replay()
        return result

    return replay


def copy_rate(stopwatch: Stopwatch) -> float:
    """Measure device memory's copy rate.

    Returns:
        Bytes read plus bytes written per second.
    """
    source = torch.randn(2**28, device='cuda')
    target = torch.empty_like(source)
    return 2 * source.nbytes / stopwatch(lambda: target.copy_(source))['median'] * 1e6


def matmul_rate(stopwatch: Stopwatch) -> float:
    """Measure the rate of a large bfloat16 matrix product on random data.

    Returns:
        FLOP per second.
    """
    size = 8192
    a, b = (torch.randn(size, size, device='cuda', dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / stopwatch(lambda: a @ b)['median'] * 1e6


def commit() -> str | None:
    """Commit of this checkout: MMVIL_COMMIT where it is set, for copies without a repository, else what git says."""
    if 'MMVIL_COMMIT' in os.environ:
        return os.environ['MMVIL_COMMIT']
    try:
        return subprocess.run(
            ['git', 'rev-parse', '--short', 'HEAD'],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def environment() -> dict[str, object]:
    """Facts that a measurement is worth nothing without: device, versions, commit, date."""
    import triton

    return {
        'device': torch.cuda.get_device_name(),
        'capability': '.'.join(str(x) for x in torch.cuda.get_device_capability()),
        'torch': torch.__version__,
        'cuda': torch.version.cuda,
        'triton': triton.__version__,
        'python': platform.python_version(),
        'commit': commit(),
        'date': datetime.now(timezone.utc).date().isoformat(),
    }


def host_rate() -> float:
    """Measure how fast this host runs Python, which launches kernels one by one.

    Returns:
        Additions in a loop, per second; best of five.
    """

    def seconds() -> float:
        start, total = time.perf_counter(), 0
        for number in range(100_000):
            total += number
        return time.perf_counter() - start

    return 100_000 / min(seconds() for _ in range(5))


def chosen_form(length: int, head_dim: int, trains: bool) -> str:
    """What 'auto' runs here in bfloat16; without a GPU what it runs on one of most kinds."""
    device = torch.device('cuda') if torch.cuda.is_available() else None
    return choose_form(length, head_dim, trains, torch.bfloat16, device)


def table(rows: list[dict[str, object]], columns: list[str]) -> str:
    """Lay rows out as a Markdown table.

    Args:
        rows: One dict per row; missing cells stay empty.
        columns: Keys in order.

    Returns:
        The table.
    """
    lines = ['| ' + ' | '.join(columns) + ' |', '|' + '---|' * len(columns)]
    lines += ['| ' + ' | '.join(str(row.get(column, '')) for column in columns) + ' |' for row in rows]
    return '\n'.join(lines)


def write_json(path: Path, content: dict[str, object]) -> None:
    """Write a result file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix('.tmp')
    temporary.write_text(json.dumps(content, indent=1) + '\n', encoding='utf-8')
    temporary.replace(path)
