"""What `bench_backbone.py` makes of its figures: the floor, ratios to DeiT, shares, the plot. Needs no device.

    python benchmarks/backbone_report.py PLOT FILE [FILE ...]

draws the rows of result files of one device; the last file with a size, resolution and model counts.
"""

import argparse
import json
import math
import re
import statistics
from collections.abc import Iterable
from pathlib import Path

from mmvil.ops.flops import mlstm_flops

if __package__:
    from .common import chosen_form
else:
    from common import chosen_form

__all__ = [
    'BLOCK_NAME',
    'COLUMNS',
    'TIMES_ROUNDING',
    'add_ratios',
    'block_floor',
    'draw',
    'earlier_rows',
    'known_bytes',
    'rows_of',
    'verdict',
]

HEADS, EXPAND, CHUNK = 4, 2, 64
# Bytes and FLOPs of a block's parts for one image, bfloat16: (name, bytes / (S D), FLOPs / (S D^2)).
FORWARD_PARTS = (('norm', 4, 0), ('up', 10, 8), ('conv and gates', 8, 0), ('down', 8, 4))
CELL_BYTES, BACKWARD_BYTES = 16, 88
BACKWARD_PRODUCTS, BACKWARD_CELL = 2, 2.5

# Bytes that a launch of a kernel has to move, in units of S D: residual stream float32, E = 2 D, all else bfloat16, so
# that a tensor of E channels counts 4. In training, and in inference where that makes do with less.
KERNEL_BYTES = {
    'prepare_kernel': 4 + 2 + 4 + 2,  # its sum and norm
    'mix2d_kernel': 5 * 4 + 2,  # with the shares of the gates
    'gates_kernel': 2,
    'gates_scan_kernel': 2,
    'quadratic_forward_kernel': 4 * 4,
    'carry_kernel': 4 * 4,
    'segment_state_kernel': 2 * 4,
    'output_kernel': 4 * 4,
    'residual_kernel': 2 + 4 + 4,
    'output_backward_kernel': 8 * 4,
    'query_key_kernel': 3 * 4,
    'query_gradient_kernel': 6 * 4,
    'matrix_kernel': 4 * 4,  # and matrices, below
    'matrix_gradient_kernel': 3 * 4,  # on average of one launch for dq and one for dk and dv
    'mix_backward_kernel': 5 * 4,
    'value_backward_kernel': 3 * 4,
    'conv2d_backward_kernel': 4 * 4,
    'layer_norm_backward_kernel': 4 + 2 + 4 + 4 + 2,
}
INFERENCE_BYTES = {
    'quadratic': {'mix2d_kernel': 3 * 4 + 3, 'gates_kernel': 3, 'gates_scan_kernel': 3},
    'chunkwise': {'mix2d_kernel': 4 * 4 + 2},
}
"""Where keys and values do not exist, or only values."""
KEY_GRADIENT_BYTES = {True: 6 * 4, False: 18}
"""Of the kernel for dk and dv by whether it makes both; else one launch for dk (20) and one for dv (16)."""
MATRICES = {'matrix_kernel': 2, 'matrix_gradient_kernel': 1.5}
"""Matrices of S x S that a launch writes or reads for each head, blocks of 64 on and below the diagonal."""
COLUMNS = [
    'size', 'pixels', 'images', 'model', 'forward', 'forward_compiled', 'forward_graph', 'forward_bf16', 'train',
    'train_compiled', 'train_graph', 'train_replayed', 'forward/deit', 'forward_bf16/deit', 'train/deit', 'memory/deit',
    'forward_of_floor', 'forward_bf16_of_floor', 'train_of_floor', 'train_GiB', 'latency_ms', 'latency_graph_ms',
    'error',
]  # fmt: skip
TIMES_ROUNDING = 2.0
"""Gradients may be this many times as far from float64 as those of plain torch under the same autocast."""
BLOCK_NAME = re.compile(r'^(_orig_mod\.)?blocks\.\d+\.')
COLOURS = {'deit': '#6b7280', 'fused': '#2563eb', 'plain': '#db2777', 'parallel': '#ea580c'}
MARKERS = {'tiny': 'o', 'small': 's', 'base': '^'}


def block_floor(tokens: int, dims: int, rates: dict[str, float]) -> dict[str, float]:
    """Seconds below which no implementation of one block can be for one image.

    Args:
        tokens: S.
        dims: D.
        rates: 'copy_bytes_per_second' and 'matmul_flop_per_second' of the device.

    Returns:
        'forward' and 'train' (forward and backward).
    """

    def seconds(size: float, work: float) -> float:
        return max(size / rates['copy_bytes_per_second'], work / rates['matmul_flop_per_second'])

    plane, square = tokens * dims, tokens * dims**2
    shape = (1, HEADS, tokens, EXPAND * dims // HEADS)
    cell = min(mlstm_flops(shape, form, CHUNK) for form in ('quadratic', 'chunkwise'))
    forward = seconds(CELL_BYTES * plane, cell)
    forward += sum(seconds(size * plane, work * square) for _, size, work in FORWARD_PARTS)
    products = sum(work for _, _, work in FORWARD_PARTS) * square
    backward = seconds(BACKWARD_BYTES * plane, BACKWARD_PRODUCTS * products + BACKWARD_CELL * cell)
    return {'forward': forward, 'train': forward + backward}


def add_ratios(rows: list[dict[str, object]], blocks: int, dims: int, rates: dict[str, float]) -> None:
    """Complete the rows of one size and resolution in place.

    Ratios are images per second over DeiT's, graph against graph, else eager against eager; those with 'bf16' are of
    models whose weights are bfloat16, in a graph. Memory is bytes over DeiT's. Shares of the floor are those of all
    blocks together, patch embedding and final norm not counted.

    Args:
        rows: Measurements; the one whose model is 'deit' is the yardstick.
        blocks: Sub-blocks of the ViL.
        dims: Channels of a token.
        rates: As for `block_floor`.
    """
    deit = next((row for row in rows if row['model'] == 'deit' and 'error' not in row), {})
    for row in rows:
        floor = block_floor(row['tokens'], dims, rates)
        for work in ('forward', 'train'):
            name = next((name for name in (f'{work}_graph', work) if name in row and name in deit), None)
            if name and row is not deit:
                row[f'{work}/deit'] = round(row[name] / deit[name], 2)
            names = (work, f'{work}_compiled', f'{work}_graph', f'{work}_replayed')
            best = max((row[name] for name in names if name in row), default=None)
            if best and row['model'] != 'deit':
                row[f'{work}_of_floor'] = f'{best * blocks * floor[work]:.0%}'
        if 'forward_bf16' in row and row['model'] != 'deit':
            row['forward_bf16_of_floor'] = f'{row["forward_bf16"] * blocks * floor["forward"]:.0%}'
            if 'forward_bf16' in deit:
                row['forward_bf16/deit'] = round(row['forward_bf16'] / deit['forward_bf16'], 2)
        if 'train_GiB' in row and 'train_GiB' in deit and row is not deit:
            row['memory/deit'] = round(row['train_GiB'] / deit['train_GiB'], 2)


def verdict(errors: list[float], rounding: list[float], names: list[str]) -> dict[str, object]:
    """Compare errors with those that rounding alone makes in plain torch.

    Single tensors' errors change by several times from one draw of the image to the next, most of all those of the
    gates' biases. Hence the root mean square over all blocks is compared, for each kind of parameter.

    Args:
        errors: Of the features and of each gradient.
        rounding: The same of plain torch under the same autocast.
        names: The same, by name.

    Returns:
        'output_error', 'gradient_error' (median) and 'times_rounding' (of the worst kind; where plain torch is more
        exact than it is in the median, over that median), 'worst_kind', and 'error' if the variant is wrong.
    """
    typical = statistics.median(rounding)
    kinds: dict[str, list[tuple[float, float]]] = {}
    for name, *pair in zip(names, errors, rounding, strict=True):
        kinds.setdefault(BLOCK_NAME.sub('', name), []).append(pair)
    ratios = {}
    for kind, pairs in kinds.items():
        own, other = (math.sqrt(statistics.mean(x * x for x in column)) for column in zip(*pairs, strict=True))
        ratios[kind] = float('inf') if math.isnan(own) else own / max(other, typical)
    worst_kind = max(ratios, key=ratios.__getitem__)
    worst = ratios[worst_kind]
    found = {
        'output_error': float(f'{errors[0]:.2e}'),
        'gradient_error': float(f'{statistics.median(errors[1:]):.2e}'),
        'times_rounding': round(worst, 2),
        'worst_kind': worst_kind,
    }
    return found if worst <= TIMES_ROUNDING else {**found, 'error': f'WRONG: {worst:.1f} times the rounding errors'}


def known_bytes(kernel: str, images: int, tokens: int, dims: int, work: str) -> int | None:
    """Bytes that one launch of a kernel has to move, None where that is not written down here.

    Args:
        kernel: Name as the profiler gives it.
        images: B.
        tokens: S.
        dims: D.
        work: 'forward', which is inference, or 'train'.
    """
    form = chosen_form(tokens, EXPAND * dims // HEADS, trains=False)
    table = KERNEL_BYTES | INFERENCE_BYTES[form] if work == 'forward' else KERNEL_BYTES
    units = KEY_GRADIENT_BYTES[dims <= 256] if kernel == 'key_gradient_kernel' else table.get(kernel)
    if units is None:
        return None
    matrices = MATRICES.get(kernel, 0) * HEADS * (tokens + 64)  # two bytes an element, half of them
    return round((units * dims + matrices) * images * tokens)


def earlier_rows(path: Path | None, facts: dict[str, object], replaced: Iterable[tuple[str, int]]) -> dict[str, object]:
    """What a result file holds of other sizes and resolutions, to be completed.

    Args:
        path: The file; it need not be there.
        facts: Where the new rows are measured, as `environment` tells it.
        replaced: Sizes and resolutions that are measured anew.

    Returns:
        'rows' and 'rates'.

    Raises:
        ValueError: The file was measured elsewhere, or in another state of this package.
    """
    if path is None or not path.is_file():
        return {'rows': [], 'rates': {}}
    found = json.loads(path.read_text(encoding='utf-8'))
    for key in ('device', 'torch', 'triton', 'commit'):
        if found['environment'][key] != facts[key]:
            raise ValueError(f'{path} has {key} {found["environment"][key]!r}, this is {facts[key]!r}')
    gone = set(replaced)
    rows = [row for row in found['rows'] if (row['size'], row['pixels']) not in gone]
    kept = {f'{row["size"]}:{row["pixels"]}' for row in rows}
    return {'rows': rows, 'rates': {key: value for key, value in found['rates'].items() if key in kept}}


def rows_of(paths: Iterable[Path]) -> tuple[list[dict[str, object]], str]:
    """Rows of result files, later files first in importance, and the device that they are from.

    Args:
        paths: JSON files of `bench_backbone.py`.

    Returns:
        One row for each size, resolution and model, and the device's name.

    Raises:
        ValueError: The files are from several devices.
    """
    found: dict[tuple, dict[str, object]] = {}
    devices = set()
    for path in paths:
        content = json.loads(path.read_text(encoding='utf-8'))
        devices.add(content['environment']['device'])
        found |= {(row['size'], row['pixels'], row['model']): row for row in content['rows']}
    if len(devices) != 1:
        raise ValueError(f'expected results of one device, got those of {sorted(devices)}')
    return list(found.values()), devices.pop()


def draw(rows: list[dict[str, object]], path: Path, device: str) -> None:
    """Plot throughput and memory against resolution, one line per size and model, both axes logarithmic.

    Args:
        rows: Measurements of all sizes and resolutions; rows with an error and missing figures are left out.
        path: SVG or PNG file to write.
        device: Name of the device, for the title.

    Raises:
        ValueError: Another file type, or nothing to draw.
    """
    if path.suffix not in ('.svg', '.png'):
        raise ValueError(f'a plot must be an .svg or .png file, got {path.name!r}')
    panels = [
        (('forward_graph', 'forward'), 'forward, images/s'),
        (('train_graph', 'train'), 'forward and backward, images/s'),
        (('train_MiB_per_image',), 'peak memory of training, MiB per image'),
    ]
    drawn = {key: _lines(rows, *key) for key, _ in panels}
    if not any(drawn.values()):
        raise ValueError('there is nothing to draw: no row has a figure')
    import matplotlib as mpl

    mpl.use('Agg')
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(13, 4.6), layout='constrained')
    for axis, (key, title) in zip(axes, panels, strict=True):
        for (size, model), points in drawn[key].items():
            axis.plot(*zip(*points, strict=True), color=COLOURS.get(model), marker=MARKERS.get(size), lw=1.4, ms=5)
        axis.set(title=title, xlabel='pixels', xscale='log', yscale='log')
        pixels = sorted({row['pixels'] for row in rows})
        axis.set_xticks(pixels, [str(x) for x in pixels])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    names = list(dict.fromkeys(name for lines in drawn.values() for name in lines))
    handles = [
        plt.Line2D([], [], color=COLOURS.get(model), marker=MARKERS.get(size), label=f'{model}, {size}')
        for size, model in names
    ]
    figure.legend(handles=handles, loc='outside lower center', ncols=6, frameon=False)
    figure.suptitle(f'bfloat16 on one {device}: ViL (fused kernels, plain modules) and DeiT')
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={'Date': None} if path.suffix == '.svg' else None)
    plt.close(figure)


def _lines(rows: list[dict[str, object]], *keys: str) -> dict[tuple[str, str], list[tuple[int, float]]]:
    """(size, model) -> points (pixels, the first figure of `keys` that the row has), in order of resolution."""
    found: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for row in sorted(rows, key=lambda row: row['pixels']):
        value = next((row[key] for key in keys if key in row), None)
        if value is not None and 'error' not in row:
            found.setdefault((row['size'], row['model']), []).append((row['pixels'], value))
    return found


def main() -> None:
    """Draw what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('plot', type=Path, help='SVG or PNG file to write')
    parser.add_argument('files', type=Path, nargs='+', help='JSON files of bench_backbone.py')
    options = parser.parse_args()
    rows, device = rows_of(options.files)
    draw(rows, options.plot, device)


if __name__ == '__main__':
    main()
