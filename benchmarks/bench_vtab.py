"""How near the runs of VTAB-1K come to the model's own throughput, and what a campaign costs.

    python benchmarks/bench_vtab.py [--models tiny small base] [--test-images 10000] [--out FILE]

A final run is timed as the tool does it: 750 steps on 1,000 images that live in memory, then the test images from the
host's memory. The model's own throughput is that of the same updates, and the same float32 forward passes, on one batch
that lies normalised on the device. The images are noise; decoding them, once per task, is not part of either figure.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from mmengine.config import Config
from mmpretrain.structures import DataSample

from mmvil.datasets.vtab_tasks import TASKS
from mmvil.evaluation.data import LoadedSplit
from mmvil.evaluation.models import ModelFactory
from mmvil.evaluation.protocol import load_settings
from mmvil.evaluation.training import build_optimizer, count_correct, train_model

if __package__:
    from .common import environment, table, write_json
else:
    from common import environment, table, write_json

ROOT = Path(__file__).parents[1]
NUM_CLASSES, TRAIN_IMAGES, WARMUP = 10, 1000, 10
COLUMNS = ['model', 'train img/s', 'own train img/s', 'train %', 'eval img/s', 'own eval img/s', 'eval %', 'campaign h']
NUM_TASKS, TEST_IMAGES = len(TASKS), sum(task.test for task in TASKS.values())


def make_split(count: int, size: tuple[int, int], device: torch.device, on_device: bool) -> LoadedSplit:
    """Noise in place of decoded images, where the tool keeps them."""
    images = torch.randint(0, 256, (count, 3, *size), dtype=torch.uint8)
    images = images.to(device) if on_device else images.pin_memory() if device.type == 'cuda' else images
    return LoadedSplit(None, torch.randint(0, NUM_CLASSES, (count,)).to(device), images, {})


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


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)


def measure_own(factory: ModelFactory, settings: Config, device: torch.device, repeats: int) -> tuple[float, float]:
    """Throughput of the model on one batch: images per second in training and evaluation."""
    batch, eval_batch = settings.protocol.batch_size, settings.runtime.eval_batch_size
    model = factory.fresh(NUM_CLASSES, 0)
    optim_wrapper, _ = build_optimizer(model, settings, 1e-5, TRAIN_IMAGES // batch)
    images = torch.randn(batch, 3, *factory.input_size, device=device)
    samples = [DataSample().set_gt_label(torch.zeros(1, dtype=torch.int64, device=device)) for _ in range(batch)]

    def update() -> None:
        with optim_wrapper.optim_context(model):
            loss = model(images, samples, mode='loss')['loss']
        optim_wrapper.update_params(loss)

    model.train()
    train = rate(update, batch, repeats, device)
    model.eval()
    images = torch.randn(eval_batch, 3, *factory.input_size, device=device)
    with torch.inference_mode():
        return train, rate(lambda: model(images, mode='tensor'), eval_batch, max(repeats // 4, 1), device)


def measure(name: str, options: argparse.Namespace, device: torch.device) -> dict[str, object]:
    """Measure one model."""
    overrides = {'protocol.epochs': options.epochs, 'param_scheduler.warmup': options.epochs / 10}
    settings = load_settings(ROOT / 'configs' / 'vtab' / f'vil-{name}_vtab1k.py', overrides)
    factory = ModelFactory(settings, None, device, from_scratch=True)
    own_train, own_eval = measure_own(factory, settings, device, options.repeats)
    train = make_split(TRAIN_IMAGES, factory.input_size, device, on_device=True)
    test = make_split(options.test_images, factory.input_size, device, on_device=False)
    model = factory.fresh(NUM_CLASSES, 0)
    training = train_model(model, train, settings, 1e-5, 0)
    evaluation = count_correct(model, test, settings.runtime.eval_batch_size)
    train_rate, eval_rate = training.images_per_second, evaluation.total / evaluation.seconds
    batch, seeds = 64, 5
    tuning_images = NUM_TASKS * 25 * 600 * batch
    final_images = NUM_TASKS * seeds * 750 * batch
    evaluated = NUM_TASKS * 25 * 200 + seeds * TEST_IMAGES
    hours = ((tuning_images + final_images) / train_rate + evaluated / eval_rate) / 3600
    figures = [train_rate, own_train, 100 * train_rate / own_train, eval_rate, own_eval, 100 * eval_rate / own_eval]
    row: dict[str, object] = {'model': f'ViL-{name[0].upper()}', 'steps': training.steps}
    row.update(zip(COLUMNS[1:], (round(figure, 1) for figure in (*figures, hours)), strict=True))
    return row


def main() -> None:
    """Measure, print a table and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--models', nargs='+', default=['tiny', 'small', 'base'], choices=['tiny', 'small', 'base'])
    parser.add_argument('--test-images', type=int, default=10_000)
    parser.add_argument('--epochs', type=int, default=50, help='50 are the 750 steps of a final run')
    parser.add_argument('--repeats', type=int, default=100, help='timed updates of the model alone')
    parser.add_argument('--out', type=Path, help='JSON file')
    options = parser.parse_args()
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    rows = [measure(name, options, device) for name in options.models]
    print(table(rows, COLUMNS))
    if options.out:
        facts = environment() if device.type == 'cuda' else {'device': 'cpu', 'torch': torch.__version__}
        write_json(options.out, {'environment': facts, 'rows': rows})


if __name__ == '__main__':
    main()
