"""What a result was obtained with: versions, commit, machine, and which of several workers this is."""

import os
import platform
import socket
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import torch

__all__ = ['WorkerPlace', 'describe_environment', 'find_place']

PACKAGES = ('mmvil', 'torch', 'torchvision', 'triton', 'numpy', 'PIL', 'mmengine', 'mmcv', 'mmpretrain')


@dataclass(frozen=True)
class WorkerPlace:
    """Place of this process among the workers of a campaign.

    Args:
        index: Number of this worker, from 0.
        count: Number of workers that were started together.
        local: Number among those of this machine, which picks the GPU.
    """

    index: int = 0
    count: int = 1
    local: int = 0


def find_place(environment: Mapping[str, str] | None = None) -> WorkerPlace:
    """Find this process' place in what torchrun or Slurm set.

    Args:
        environment: Environment variables. Default: those of the process.

    Returns:
        Place from `RANK`, `WORLD_SIZE` and `LOCAL_RANK` (torchrun), else from the Slurm array and the tasks of its
        jobs, else the only worker.
    """
    variables = os.environ if environment is None else environment

    def number(name: str, default: int) -> int:
        return int(variables.get(name) or default)

    if 'RANK' in variables and 'WORLD_SIZE' in variables:
        return WorkerPlace(number('RANK', 0), number('WORLD_SIZE', 1), number('LOCAL_RANK', 0))
    per_job = number('SLURM_NTASKS', 1) if 'SLURM_PROCID' in variables else 1
    job = number('SLURM_ARRAY_TASK_ID', 0) - number('SLURM_ARRAY_TASK_MIN', 0)
    jobs = number('SLURM_ARRAY_TASK_COUNT', 1)
    return WorkerPlace(job * per_job + number('SLURM_PROCID', 0), jobs * per_job, number('SLURM_LOCALID', 0))


def describe_environment(device: torch.device) -> dict:
    """Describe software and hardware.

    Args:
        device: The device that computes.

    Returns:
        Versions, commit (None outside of a git checkout), host and device.
    """
    versions = {'python': platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = str(import_module(name).__version__)
        except ImportError:
            versions[name] = 'not installed'
    is_gpu = device.type == 'cuda'
    return {
        'versions': versions,
        'commit': _find_commit(),
        'host': socket.gethostname(),
        'device': torch.cuda.get_device_name(device) if is_gpu else f'CPU ({torch.get_num_threads()} threads)',
    }


def _find_commit() -> str | None:
    """Commit of the checkout that this package is part of, with '+changes' if files differ from it."""
    folder = Path(__file__).parents[2]
    if not (folder / '.git').exists():
        return None

    def git(*arguments: str) -> str:
        command = ['git', '-C', str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git('rev-parse', 'HEAD') + ('+changes' if git('status', '--porcelain', '-uno') else '')
    except (OSError, subprocess.CalledProcessError):
        return None
