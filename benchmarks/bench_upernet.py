"""UperNet training at 512 pixels with a ViL and with a DeiT backbone of equal width: images per second and memory.

    python benchmarks/bench_upernet.py [--sizes tiny small] [--backbones vil deit vil-fused] [--out FILE]

The step is the recipe's: forward and backward in bf16, AdamW; every part of the model but the backbone is the same.
'step ms' is the time from one step to the next, 'device ms' the sum of its kernels' times, which a host that launches
slowly does not change; 'backbone ms' is the forward and backward pass of the backbone alone, as a CUDA graph.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from mmengine.config import Config, ConfigDict
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import DefaultScope
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch import nn

if __package__:
    from .common import Stopwatch, environment, graphed, table, write_json
else:
    from common import Stopwatch, environment, graphed, table, write_json

ROOT = Path(__file__).parents[1]
CLASSES = 150
COLUMNS = [
    'model', 'backbone', 'parameters (M)', 'images/s', 'step ms', 'low', 'high', 'device ms', 'backbone ms', 'peak GiB',
]  # fmt: skip
BACKBONES = ('vil', 'deit', 'vil-fused')


def segmentor_config(size: str, backbone: str, pixels: int) -> ConfigDict:
    """Take the shipped ADE20K model and, for DeiT, exchange the backbone only.

    Args:
        size: 'tiny', 'small' or 'base'.
        backbone: 'vil', 'vil-fused' or 'deit'.
        pixels: Edge of the image.

    Returns:
        The model's config.
    """
    name = f'vil-{size}_upernet_1xb16-160k_ade20k-512x512.py'
    model = Config.fromfile(str(ROOT / 'configs' / 'vil' / name)).model
    model.data_preprocessor.size = (pixels, pixels)
    model.backbone.update(init_cfg=None, img_size=(pixels, pixels))
    if backbone.startswith('vil'):
        model.backbone.fused = backbone == 'vil-fused'
    else:
        model.backbone = ConfigDict(
            type='mmpretrain.VisionTransformer',
            arch=f'deit-{size}',
            img_size=(pixels, pixels),
            patch_size=16,
            out_indices=(3, 5, 7, 11),
            out_type='featmap',
            final_norm=False,
            drop_path_rate=model.backbone.drop_path_rate,
        )
    return model


def build(size: str, backbone: str, pixels: int, device: str) -> nn.Module:
    """Build a segmentor for training."""
    with DefaultScope.overwrite_default_scope('mmseg'):
        model = revert_sync_batchnorm(MODELS.build(segmentor_config(size, backbone, pixels)))
    return model.to(device).train()


def random_batch(images: int, pixels: int, device: str) -> tuple[torch.Tensor, list[SegDataSample]]:
    """Draw normalised images and labels."""
    labels = torch.randint(0, CLASSES, (images, 1, pixels, pixels), device=device)
    samples = [SegDataSample(gt_sem_seg=PixelData(data=label)) for label in labels]
    return torch.randn(images, 3, pixels, pixels, device=device), samples


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple) -> torch.Tensor:
    """Forward, backward and update in bf16, as the recipe does; returns the loss."""
    inputs, samples = batch
    optimizer.zero_grad(set_to_none=True)
    with torch.autocast(inputs.device.type, dtype=torch.bfloat16):
        loss, _ = model.parse_losses(model(inputs, samples, mode='loss'))
    loss.backward()
    optimizer.step()
    return loss.detach()


def device_milliseconds(work: Callable[[], object]) -> float:
    """Sum of the times of all kernels that a piece of work launches."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profiler.key_averages()) / 1e3


def backbone_milliseconds(model: nn.Module, images: torch.Tensor, repeats: int) -> float:
    """Forward and backward pass of the backbone alone, without gaps between kernels."""

    def work() -> None:
        with torch.autocast('cuda', dtype=torch.bfloat16):
            features = model.backbone(images)
        torch.autograd.backward(features, [torch.ones_like(feature) for feature in features])
        model.zero_grad(set_to_none=True)

    return Stopwatch(repeats=repeats, warmup=1)(graphed(work))['median'] / 1e3


def measure(size: str, backbone: str, images: int, pixels: int, repeats: int) -> dict[str, object]:
    """Measure one model; refuse to if its loss is not finite."""
    torch.manual_seed(0)
    model = build(size, backbone, pixels, 'cuda')
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.05, fused=True)
    batch = random_batch(images, pixels, 'cuda')

    def step() -> torch.Tensor:
        return train_step(model, optimizer, batch)

    step()
    torch.cuda.reset_peak_memory_stats()
    loss = step()
    peak = torch.cuda.max_memory_allocated()
    if not torch.isfinite(loss):
        raise FloatingPointError(f'{backbone}-{size}: the loss is {loss.item()}, nothing is measured')
    times = Stopwatch(repeats=repeats, warmup=1)(step)
    return {
        'model': size,
        'backbone': backbone,
        'parameters (M)': round(sum(p.numel() for p in model.parameters()) / 1e6, 1),
        'images/s': round(images / times['median'] * 1e6, 1),
        'step ms': round(times['median'] / 1e3, 1),
        'low': round(times['low'] / 1e3, 1),
        'high': round(times['high'] / 1e3, 1),
        'device ms': round(device_milliseconds(step), 1),
        'backbone ms': round(backbone_milliseconds(model, batch[0], repeats), 1),
        'peak GiB': round(peak / 2**30, 2),
    }


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--sizes', nargs='+', default=['tiny', 'small'], choices=['tiny', 'small', 'base'])
    parser.add_argument('--backbones', nargs='+', default=list(BACKBONES), choices=BACKBONES)
    parser.add_argument('--batch-size', type=int, default=16)
    parser.add_argument('--pixels', type=int, default=512)
    parser.add_argument('--repeats', type=int, default=10)
    parser.add_argument('--out', help='JSON file to write')
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit('bench_upernet measures on a GPU, and there is none')
    rows: list[dict[str, object]] = []
    for backbone in args.backbones:
        for size in args.sizes:
            rows.append(measure(size, backbone, args.batch_size, args.pixels, args.repeats))
            print(rows[-1], flush=True)
            if args.out:  # after every row: what was measured outlives an end by a clock
                write_json(Path(args.out), {'environment': environment(), 'batch_size': args.batch_size, 'rows': rows})
            torch.cuda.empty_cache()
    print(table(rows, COLUMNS))


if __name__ == '__main__':
    main()
