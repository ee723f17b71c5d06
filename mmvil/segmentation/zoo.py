"""Model-zoo entries in mmsegmentation's format, made from a run's own log and checkpoint."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mmengine.config import Config

from ..models.checkpoint import read_checkpoint

__all__ = ['ZooEntry', 'collect_entry', 'metafile_entry', 'read_scalars', 'table_row']

TABLE_HEAD = (
    '| Method | Backbone | Crop Size | Lr schd | Mem (GB) | Inf time (fps) | Device | mIoU | mIoU(ms+flip) | config | '
    'download |\n| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |'
)


@dataclass(frozen=True)
class ZooEntry:
    """What is known about one trained model; None is what was not measured."""

    name: str
    config: str
    backbone: str
    crop_size: tuple[int, int]
    iterations: int
    batch_size: int
    device: str
    mean_iou: float
    multi_scale_mean_iou: float | None
    memory_gb: float | None
    images_per_second: float | None
    sha256: str
    seed: int | None
    weights: str
    log: str


def read_scalars(path: str | Path) -> list[dict]:
    """Read the values that mmengine logged, one JSON object a line (`vis_data/scalars.json`).

    Args:
        path: The file.

    Returns:
        One dict per line.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a line is no JSON object; the message gives its number.
    """
    lines = []
    for number, line in enumerate(Path(path).read_text(encoding='utf-8').splitlines(), 1):
        try:
            value = json.loads(line)
        except ValueError as error:
            raise ValueError(f'{path}, line {number} is not JSON: {error}') from error
        if not isinstance(value, dict):
            raise ValueError(f'{path}, line {number} is no JSON object: {line[:80]!r}')
        lines.append(value)
    return lines


def collect_entry(
    config_path: str | Path,
    checkpoint_path: str | Path,
    scalars: list[dict],
    *,
    weights: str,
    log: str,
    device: str,
    multi_scale: Mapping | None = None,
) -> ZooEntry:
    """Collect an entry and refuse parts that do not belong together.

    Args:
        config_path: The training config, in the repository.
        checkpoint_path: The checkpoint to be published.
        scalars: Values of the training's log, see `read_scalars`.
        weights: Address that the checkpoint will have.
        log: Address that the log will have.
        device: GPU that the memory and the speed were measured on, for example 'A100'.
        multi_scale: Metrics of a test with `--tta`, with 'mIoU'. Default: not measured.

    Returns:
        The entry.

    Raises:
        ValueError: If the checkpoint was trained with another model than the config's, the log has no validation at the
            checkpoint's iteration, or the multi-scale metrics have no mIoU.
    """
    config = Config.fromfile(str(config_path))
    checkpoint = read_checkpoint(checkpoint_path)
    meta = checkpoint.get('meta', {})
    _check_same_model(config, meta, checkpoint_path)
    iteration = meta.get('iter')
    validations = [line for line in scalars if 'mIoU' in line and line.get('step') == iteration]
    if not validations:
        steps = sorted({line['step'] for line in scalars if 'mIoU' in line})
        raise ValueError(f'the log has no validation at iteration {iteration} of {checkpoint_path}, but at {steps}')
    if multi_scale is not None and 'mIoU' not in multi_scale:
        raise ValueError(f'the multi-scale metrics have no mIoU, but {sorted(multi_scale)}')
    memory = [line['memory'] for line in scalars if 'memory' in line]
    seconds = validations[-1].get('time') if config.val_dataloader.batch_size == 1 else None
    backbone = config.model.backbone
    return ZooEntry(
        name=Path(config_path).stem,
        config=f'configs/vil/{Path(config_path).name}',
        backbone=f'ViL-{backbone.arch[0].upper()}' if isinstance(backbone.arch, str) else 'ViL',
        crop_size=tuple(config.model.data_preprocessor.size),
        iterations=config.train_cfg.max_iters,
        batch_size=config.train_dataloader.batch_size,
        device=device,
        mean_iou=float(validations[-1]['mIoU']),
        multi_scale_mean_iou=None if multi_scale is None else float(multi_scale['mIoU']),
        memory_gb=round(max(memory) / 1024, 1) if memory else None,
        images_per_second=round(1 / seconds, 2) if seconds else None,
        sha256=hashlib.sha256(Path(checkpoint_path).read_bytes()).hexdigest(),
        seed=meta.get('seed'),
        weights=weights,
        log=log,
    )


def _check_same_model(config: Config, meta: Mapping, checkpoint_path: str | Path) -> None:
    """Compare the config's model with the one that the checkpoint says it was trained with."""
    if not meta.get('cfg'):
        raise ValueError(f'{checkpoint_path} does not say with which config it was trained (meta.cfg)')
    trained = Config.fromstring(meta['cfg'], '.py')
    for key in sorted(set(config.model) | set(trained.model)):
        ours, theirs = config.model.get(key), trained.model.get(key)
        if key == 'backbone':  # where the start weights lay is no part of the model
            ours, theirs = ({k: v for k, v in (side or {}).items() if k != 'init_cfg'} for side in (ours, theirs))
        if ours != theirs:
            raise ValueError(f'{checkpoint_path} was trained with another model.{key} than the config has')


def metafile_entry(entry: ZooEntry) -> dict:
    """Turn an entry into a model of mmsegmentation's `metafile.yaml`.

    Args:
        entry: The entry.

    Returns:
        A dictionary for YAML.
    """
    metrics = {'mIoU': entry.mean_iou}
    if entry.multi_scale_mean_iou is not None:
        metrics['mIoU(ms+flip)'] = entry.multi_scale_mean_iou
    metadata = {
        'Training Data': 'ADE20K',
        'Batch Size': entry.batch_size,
        'Architecture': [entry.backbone, 'UPerNet'],
        'Training Resources': f'1x {entry.device} GPU',
        'Iterations': entry.iterations,
        'SHA256': entry.sha256,
    }
    if entry.memory_gb is not None:
        metadata['Memory (GB)'] = entry.memory_gb
    if entry.seed is not None:
        metadata['Seed'] = entry.seed
    return {
        'Name': entry.name,
        'In Collection': 'UPerNet',
        'Results': {'Task': 'Semantic Segmentation', 'Dataset': 'ADE20K', 'Metrics': metrics},
        'Config': entry.config,
        'Metadata': metadata,
        'Weights': entry.weights,
        'Training log': entry.log,
        'Paper': {
            'Title': 'Vision-LSTM: xLSTM as Generic Vision Backbone',
            'URL': 'https://arxiv.org/abs/2406.04303',
        },
        'Framework': 'PyTorch',
    }


def table_row(entry: ZooEntry) -> str:
    """Turn an entry into a row of the table in an mmsegmentation README; what was not measured is a dash.

    Args:
        entry: The entry.

    Returns:
        One line of Markdown; `TABLE_HEAD` is the head.
    """
    cells = [
        'UPerNet',
        entry.backbone,
        'x'.join(map(str, entry.crop_size)),
        entry.iterations,
        entry.memory_gb,
        entry.images_per_second,
        entry.device,
        f'{entry.mean_iou:.2f}',
        None if entry.multi_scale_mean_iou is None else f'{entry.multi_scale_mean_iou:.2f}',
        f'[config]({Path(entry.config).name})',
        f'[model]({entry.weights}) \\| [log]({entry.log})',
    ]
    return '| ' + ' | '.join('-' if cell is None else str(cell) for cell in cells) + ' |'
