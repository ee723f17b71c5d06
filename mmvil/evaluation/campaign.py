"""The shared folder of a campaign: which runs there are, which are done, and who works on which.

Any number of processes on any number of machines may work in one folder. A run is claimed by locking its file and done
once its record is there; records are renamed into place, so each is whole or absent.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from mmengine.config import Config

from ..datasets.vtab_tasks import Task
from .protocol import PHASES, Run, find_deviations, plan_final_runs, plan_tuning_runs, select_learning_rate
from .records import lock_file, read_record, write_atomically, write_once

__all__ = ['Campaign', 'campaign_identity', 'plain']


def plain(value: object) -> object:
    """Turn configs and tuples into what JSON can hold."""
    if isinstance(value, Config):
        return plain(value.to_dict())
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def campaign_identity(settings: Config, checkpoint_hash: str | None, is_smoke: bool) -> dict:
    """Describe everything that the scores of a campaign depend on, apart from the data.

    Args:
        settings: See `load_settings`.
        checkpoint_hash: SHA-256 of the checkpoint, None for random weights.
        is_smoke: Whether the data are the miniature.

    Returns:
        `kind` ('standard', 'modified' or 'smoke'), `deviations` from the protocol, `settings`, `checkpoint_sha256` and
        a `fingerprint` over them.
    """
    deviations = find_deviations(settings)
    kept = {key: value for key, value in plain(settings).items() if key not in ('runtime', 'data_root')}
    identity = {
        'kind': 'smoke' if is_smoke else 'modified' if deviations or checkpoint_hash is None else 'standard',
        'deviations': deviations + ([] if checkpoint_hash else ['random weights instead of pre-trained ones']),
        'settings': kept,
        'checkpoint_sha256': checkpoint_hash,
    }
    canonical = json.dumps(identity, sort_keys=True)
    return {**identity, 'fingerprint': hashlib.sha256(canonical.encode()).hexdigest()}


class Campaign:
    """A campaign's folder.

    Args:
        work_dir: The folder, on a file system that all workers share and that has file locks.

    Raises:
        FileNotFoundError: If the folder holds no campaign.
    """

    def __init__(self, work_dir: str | Path) -> None:
        self.work_dir = Path(work_dir)
        if not (self.work_dir / 'campaign.json').is_file():
            raise FileNotFoundError(f'{self.work_dir} holds no campaign: it has no campaign.json')
        self.header = read_record(self.work_dir / 'campaign.json')
        self.protocol: dict = self.header['settings']['protocol']
        self._known: dict[Run, dict] = {}

    @classmethod
    def start_or_join(cls, work_dir: str | Path, identity: dict, environment: dict) -> 'Campaign':
        """Create a campaign, or join the one that is there.

        Args:
            work_dir: The folder.
            identity: See `campaign_identity`.
            environment: See `describe_environment`; kept for information.

        Returns:
            The campaign.

        Raises:
            ValueError: If the folder holds a campaign with other settings or weights; the message says which.
        """
        header = {**identity, 'environment': environment}
        write_once(Path(work_dir) / 'campaign.json', json.dumps(header, indent=2) + '\n')
        campaign = cls(work_dir)
        if campaign.header['fingerprint'] != identity['fingerprint']:
            differences = _differences(campaign.header, identity)
            raise ValueError(
                f'{work_dir} holds a campaign with other settings; give another --work-dir. Differences:\n  '
                + '\n  '.join(differences)
            )
        return campaign

    @property
    def kind(self) -> str:
        """'standard', 'modified' or 'smoke'."""
        return self.header['kind']

    def record_path(self, run: Run) -> Path:
        """Where the record of a run lies."""
        return self.work_dir / 'runs' / f'{run.name}.json'

    def record(self, run: Run) -> dict | None:
        """Read the record of a run; None if the run is not done.

        Raises:
            ValueError: If the record is damaged or belongs to another campaign.
        """
        if run not in self._known:
            path = self.record_path(run)
            if not path.is_file():
                return None
            record = read_record(path)
            if record.get('fingerprint') != self.header['fingerprint'] or record.get('run') != asdict(run):
                raise ValueError(f'{path} is not a record of this campaign; move it away')
            self._known[run] = record
        return self._known[run]

    def save(self, run: Run, record: dict) -> None:
        """Write the record of a run."""
        record = {'run': asdict(run), 'fingerprint': self.header['fingerprint'], 'kind': self.kind, **record}
        write_atomically(self.record_path(run), json.dumps(record, indent=2, allow_nan=False) + '\n')

    @contextmanager
    def claim(self, run: Run) -> Iterator[bool]:
        """Claim a run for the time of a `with` block.

        Yields:
            Whether the run is claimed and not done yet. If not, another worker has it.
        """
        with lock_file(self.work_dir / 'locks' / f'{run.name}.lock') as held:
            yield held and self.record(run) is None

    def tuning_runs(self, task: Task) -> list[Run]:
        """Runs of the tuning phase of a task."""
        return plan_tuning_runs(task, self.protocol)

    def chosen_rate(self, task: Task) -> float | None:
        """Learning rate that tuning chose; None while tuning is not complete."""
        scores: dict[float, list[int]] = {}
        for run in self.tuning_runs(task):
            record = self.record(run)
            if record is None:
                return None
            scores.setdefault(run.learning_rate, []).append(record['correct'])
        return select_learning_rate(scores, self.protocol['learning_rates'])

    def final_runs(self, task: Task) -> list[Run]:
        """Runs of the final phase of a task; none while tuning is not complete."""
        rate = self.chosen_rate(task)
        return [] if rate is None else plan_final_runs(task, self.protocol, rate)

    def open_runs(self, task: Task, phases: Sequence[str] = PHASES) -> list[Run]:
        """Runs of a task that can start now and are not done; another worker may be at them."""
        runs = self.tuning_runs(task) if 'tune' in phases else []
        if 'final' in phases:
            runs = runs + self.final_runs(task)
        return [run for run in runs if self.record(run) is None]

    def count_runs(self, task: Task, phases: Sequence[str] = PHASES) -> tuple[int, int]:
        """Count the runs of a task that are done, and all of them."""
        tuning = self.tuning_runs(task) if 'tune' in phases else []
        done = sum(self.record(run) is not None for run in tuning)
        total = len(tuning)
        if 'final' in phases:
            total += len(self.protocol['seeds'])
            done += sum(self.record(run) is not None for run in self.final_runs(task))
        return done, total


def _differences(old: Mapping, new: Mapping, name: str = '') -> list[str]:
    """List the values in which two headers differ."""
    found: list[str] = []
    for key in sorted({*old, *new} - {'fingerprint', 'environment', 'deviations'}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found.extend(_differences(a, b, f'{name}{key}.'))
        elif a != b:
            found.append(f'{name}{key}: {a!r} there, {b!r} here')
    return found
