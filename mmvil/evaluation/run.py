"""Start a worker on a campaign: read config and weights, check the data, estimate the time, work."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from mmengine.config import Config

from ..datasets.vtab_sources import DataRoot
from ..datasets.vtab_tasks import Task, select_tasks
from .campaign import Campaign, campaign_identity
from .check import check_root
from .models import ModelFactory, hash_file
from .progress import format_duration
from .protocol import FINAL_SPLITS, PHASES, TUNING_SPLITS, load_settings
from .provenance import WorkerPlace, describe_environment, find_place
from .training import build_optimizer
from .worker import Worker, estimate_seconds

__all__ = ['find_device', 'run_campaign']


def find_device(name: str | None, place: WorkerPlace) -> torch.device:
    """Choose the device of this worker.

    Args:
        name: 'cpu', 'cuda', 'cuda:1', ...; None for the GPU with this worker's local number, or the CPU without GPUs.
        place: Place of this worker.

    Returns:
        The device.
    """
    if name is not None:
        return torch.device(name)
    if not torch.cuda.is_available():
        return torch.device('cpu')
    return torch.device('cuda', place.local % torch.cuda.device_count())


def run_campaign(
    work_dir: str | Path,
    config: str | Path | None,
    checkpoint: str | Path | None,
    data_root: str | None = None,
    tasks: Sequence[str] | None = None,
    phase: str = 'all',
    overrides: Mapping[str, object] | None = None,
    device: str | None = None,
    from_scratch: bool = False,
    place: WorkerPlace | None = None,
    say: Callable[[str], None] = print,
    poll_seconds: float = 5.0,
) -> Campaign:
    """Run the protocol, alone or together with other workers on the same folder.

    Args:
        work_dir: Folder of the campaign; finished runs in it are not repeated.
        config: VTAB config or any mmpretrain config; None for official ViL weights.
        checkpoint: Weights, see `ModelFactory`.
        data_root: Folder or zip. Default: that of the config.
        tasks: Tasks or groups. Default: all 19.
        phase: 'tune', 'final' or 'all'.
        overrides: Values that replace those of the config.
        device: See `find_device`.
        from_scratch: Allow random weights.
        place: Place among the workers. Default: what torchrun or Slurm say.
        say: Where messages go. Default: print.
        poll_seconds: Pause before looking again for work that others left.

    Returns:
        The campaign.

    Raises:
        FileNotFoundError: If the data or a file is missing.
        ValueError: If config, weights or data have faults, or the folder holds another campaign.
    """
    if phase not in (*PHASES, 'all'):
        raise ValueError(f"phase must be 'tune', 'final' or 'all', got {phase!r}")
    phases = PHASES if phase == 'all' else (phase,)
    place = place or find_place()
    chosen = select_tasks(tasks)
    settings = load_settings(config, overrides)
    data_root = str(data_root or settings.data_root)
    _refuse_faulty_data(data_root, tasks, phases, say)

    torch_device = find_device(device, place)
    if torch_device.type == 'cuda':
        torch.cuda.set_device(torch_device)
    elif settings.optim_wrapper.get('type') == 'AmpOptimWrapper':
        say('no GPU: training runs in float32, not in bf16')
    root = DataRoot(data_root)
    factory = ModelFactory(settings, checkpoint, torch_device, from_scratch)
    # Fails here, before anything is written, if the backbone has no depths for the layer-wise decay.
    build_optimizer(factory.fresh(2, 0), settings, settings.protocol.learning_rates[0], settings.protocol.epochs * 100)
    identity = campaign_identity(settings, hash_file(checkpoint) if checkpoint is not None else None, root.is_smoke)
    campaign = Campaign.start_or_join(work_dir, identity, describe_environment(torch_device))
    _announce(campaign, factory, place, say)
    say(_estimate(factory, settings, campaign, chosen, root, phases, place))
    Worker(campaign, settings, factory, data_root, chosen, phases, place, say, poll_seconds).work()
    return campaign


def _refuse_faulty_data(
    data_root: str, tasks: Sequence[str] | None, phases: Sequence[str], say: Callable[[str], None]
) -> None:
    """Check lists and the existence of files before any training; lists of other phases are not opened."""
    splits = (*(TUNING_SPLITS if 'tune' in phases else ()), *(FINAL_SPLITS if 'final' in phases else ()))
    report = check_root(data_root, tasks, splits, read_images=False)
    if report.num_faults:
        faults = [f'{task.task}: {fault}' for task in report.tasks for fault in task.faults]
        raise ValueError(f'the data have {len(faults)} faults:\n  ' + '\n  '.join(faults))
    say(f'{len(report.tasks)} tasks in {data_root}: lists and files are there; images are checked as they are read')


def _announce(campaign: Campaign, factory: ModelFactory, place: WorkerPlace, say: Callable[[str], None]) -> None:
    """Say what is about to run, and how far it is from the standard."""
    if campaign.kind == 'smoke':
        say('SMOKE RUN on the miniature: nothing in here is a VTAB score')
    elif campaign.kind == 'modified':
        say('this differs from the published protocol:\n  ' + '\n  '.join(campaign.header['deviations']))
    say(
        f'worker {place.index} of {place.count} on {factory.device}; backbone with {factory.num_parameters:,} '
        f'parameters, head on {factory.in_channels} channels; results in {campaign.work_dir}'
    )


def _estimate(
    factory: ModelFactory,
    settings: Config,
    campaign: Campaign,
    tasks: Sequence[Task],
    root: DataRoot,
    phases: Sequence[str],
    place: WorkerPlace,
) -> str:
    """Write how long the open runs will take."""
    seconds, step, image = estimate_seconds(factory, settings, campaign, tasks, root, phases)
    return (
        f'estimate: {format_duration(seconds / place.count)} with {place.count} worker(s) like this one '
        f'({settings.protocol.batch_size / step:.0f} training and {1 / image:.0f} evaluation images/s); reading and '
        'decoding the images comes on top'
    )
