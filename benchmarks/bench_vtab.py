"""How near the runs of VTAB-1K come to the model's own throughput, and what a campaign costs.

    python benchmarks/bench_vtab.py [--models tiny small base] [--blocks plain fused] [--eager] [--out FILE]

A final run is timed as the tool does it: 750 steps on 1,000 images that live in memory, then the test images from the
host's memory. The model's own throughput is that of the same updates, as a CUDA graph, and of the same float32 forward
passes, on one batch that lies normalised on the device. S and B take fewer steps and images: `SIZES`. The images are
noise; decoding them, once per task, is not part of either figure.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.optim import OptimWrapper
from mmpretrain.structures import DataSample
from torch import nn

from mmvil.datasets.vtab_tasks import TASKS
from mmvil.evaluation.data import LoadedSplit
from mmvil.evaluation.models import ModelFactory
from mmvil.evaluation.protocol import load_settings
from mmvil.evaluation.training import build_optimizer, count_correct, train_model
from mmvil.evaluation.updates import why_not_graphed

if __package__:
    from .common import environment, graphed, table, write_json
else:
    from common import environment, graphed, table, write_json

START = time.perf_counter()
ROOT = Path(__file__).parents[1]
NUM_CLASSES, TRAIN_IMAGES, WARMUP = 10, 1000, 3
SIZES = {'tiny': (50, 10_000), 'small': (10, 5_120), 'base': (5, 2_560)}
"""Epochs of 15 steps, and test images."""
COLUMNS = [
    'model', 'blocks', 'steps', 'train img/s', 'own train img/s', 'train %', 'own eager img/s', 'eval img/s',
    'own eval img/s', 'eval %', 'peak GiB', 'campaign h',
]  # fmt: skip


@dataclass(frozen=True)
class Own:
    """Throughput of the model on one batch on the device, images per second."""

    train: float
    evaluate: float
    train_eager: float | None


def make_split(count: int, size: tuple[int, int], device: torch.device, on_device: bool) -> LoadedSplit:
    """Noise in place of decoded images, where the tool keeps them."""
    images = torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8, device=device)
    if not on_device and device.type == 'cuda':
        images = torch.empty(images.shape, dtype=torch.uint8, pin_memory=True).copy_(images)
    return LoadedSplit(None, torch.randint(0, NUM_CLASSES, (count,), device=device), images, {})


def rate(work: Callable[[], object], images: int, repeats: int, device: torch.device) -> float:
    """Images per second of a piece of work, after a warm-up."""
    for _ in range(WARMUP):
        work()
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    synchronize(device)
    return images * repeats / (time.perf_counter() - start)


def say(what: str) -> None:
    """Print what is done, with the seconds since the start: a run cut off by a clock shows where it was."""
    print(f'{time.perf_counter() - START:6.1f} s  {what}', flush=True)


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def make_update(model: nn.Module, optim_wrapper: OptimWrapper, images: torch.Tensor) -> Callable[[], None]:
    """Updates on one batch that needs no preparation."""
    labels = torch.zeros(len(images), 1, dtype=torch.int64, device=images.device)
    samples = [DataSample().set_gt_label(label) for label in labels]

    def update() -> None:
        with optim_wrapper.optim_context(model):
            loss = model(images, samples, mode='loss')['loss']
        optim_wrapper.update_params(loss)

    return update


def measure_own(factory: ModelFactory, settings: Config, device: torch.device, repeats: int, eager: bool) -> Own:
    """Throughput of the model on one batch."""
    batch, eval_batch = settings.protocol.batch_size, settings.runtime.eval_batch_size
    model = factory.fresh(NUM_CLASSES, 0).train()
    optim_wrapper, _ = build_optimizer(model, settings, 1e-5, TRAIN_IMAGES // batch)
    update = make_update(model, optim_wrapper, torch.randn(batch, 3, *factory.input_size, device=device))
    graph = why_not_graphed(optim_wrapper, device) is None
    if graph:
        for group in optim_wrapper.optimizer.param_groups:
            group['capturable'] = True
    train = rate(graphed(update) if graph else update, batch, repeats, device)
    say(f'own training {train:.0f} images/s')
    train_eager = round(rate(update, batch, max(repeats // 4, 1), device), 2) if eager else None
    model.eval()
    images = torch.randn(eval_batch, 3, *factory.input_size, device=device)
    with torch.inference_mode():
        evaluate = rate(lambda: model(images, mode='tensor'), eval_batch, max(repeats // 4, 1), device)
    say(f'own evaluation {evaluate:.0f} images/s')
    return Own(train, evaluate, train_eager)


def campaign_hours(train_rate: float, eval_rate: float, settings: Config) -> float:
    """Hours of all tuning and final runs of 19 tasks on one GPU, decoding apart."""
    protocol = settings.protocol
    final = len(protocol.seeds)
    tuning = len(protocol.learning_rates) * final
    steps = tuning * (800 // protocol.batch_size) + final * (TRAIN_IMAGES // protocol.batch_size)
    trained = len(TASKS) * steps * 50 * protocol.batch_size
    evaluated = len(TASKS) * tuning * 200 + final * sum(task.test for task in TASKS.values())
    return (trained / train_rate + evaluated / eval_rate) / 3600


def measure(name: str, blocks: str, options: argparse.Namespace, device: torch.device) -> dict[str, object]:
    """Measure one model."""
    epochs, test_images = options.epochs or SIZES[name][0], options.test_images or SIZES[name][1]
    overrides = {'protocol.epochs': epochs, 'param_scheduler.warmup': epochs / 10}
    overrides['model.backbone.fused'] = blocks == 'fused'
    settings = load_settings(ROOT / 'configs' / 'vtab' / f'vil-{name}_vtab1k.py', overrides)
    settings.protocol.batch_size = options.batch_size
    settings.runtime.eval_batch_size = options.eval_batch_size
    say(f'{name}, {blocks}')
    factory = ModelFactory(settings, None, device, from_scratch=True)
    say('built and run once')
    own = measure_own(factory, settings, device, options.repeats, options.eager)
    if device.type == 'cuda':
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    train = make_split(TRAIN_IMAGES, factory.input_size, device, on_device=True)
    model = factory.fresh(NUM_CLASSES, 0)
    training = train_model(model, train, settings, 1e-5, 0)
    if training.diverged:
        raise FloatingPointError(f'{name}, {blocks}: the loss is {training.final_loss}, nothing is measured')
    say(f'{training.steps} steps, {training.images_per_second:.0f} images/s')
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == 'cuda' else 0.0
    test = make_split(test_images, factory.input_size, device, on_device=False)
    evaluation = count_correct(model, test, settings.runtime.eval_batch_size)
    eval_rate = evaluation.total / evaluation.seconds
    say(f'{evaluation.total} test images, {eval_rate:.0f} images/s')
    figures = {
        'train img/s': training.images_per_second,
        'own train img/s': own.train,
        'train %': 100 * training.images_per_second / own.train,
        'eval img/s': eval_rate,
        'own eval img/s': own.evaluate,
        'eval %': 100 * eval_rate / own.evaluate,
        'peak GiB': peak,
        'campaign h': campaign_hours(training.images_per_second, eval_rate, settings),
    }
    row: dict[str, object] = {'model': f'ViL-{name[0].upper()}', 'blocks': blocks, 'steps': training.steps}
    row.update({key: round(figure, 2) for key, figure in figures.items()})
    return row | {
        'own eager img/s': own.train_eager,
        'test images': test_images,
        'train seconds': round(training.seconds, 2),
        'eval seconds': round(evaluation.seconds, 2),
    }


def main() -> None:
    """Measure, print a table and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', default=list(SIZES), choices=list(SIZES))
    parser.add_argument('--blocks', nargs='+', default=['plain', 'fused'], choices=['plain', 'fused'])
    parser.add_argument('--epochs', type=int, help='instead of those in SIZES; 50 are the 750 steps of a final run')
    parser.add_argument('--test-images', type=int, help='instead of those in SIZES')
    parser.add_argument('--batch-size', type=int, default=64)
    parser.add_argument('--eval-batch-size', type=int, default=256)
    parser.add_argument('--repeats', type=int, default=20, help='timed updates of the model alone')
    parser.add_argument('--eager', action='store_true', help="also time the model's updates without a CUDA graph")
    parser.add_argument('--out', type=Path, help='JSON file')
    options = parser.parse_args()
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    say(f'imported, with {time.process_time():.0f} s of CPU time')
    facts = environment() if device.type == 'cuda' else {'device': 'cpu', 'torch': torch.__version__}
    sizes = {'batch_size': options.batch_size, 'eval_batch_size': options.eval_batch_size}
    rows: list[dict[str, object]] = []
    for blocks in options.blocks:
        for name in options.models:
            rows.append(measure(name, blocks, options, device))
            if options.out:  # after every row: what was measured outlives an end by a clock
                write_json(options.out, {'environment': facts, **sizes, 'rows': rows})
    print(table(rows, COLUMNS))


if __name__ == '__main__':
    main()
