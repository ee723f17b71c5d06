"""A worker of a campaign: claims runs, does them, records them, until none is left."""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime, timezone

import torch
from mmengine.config import Config

from ..datasets.vtab_sources import DataRoot
from ..datasets.vtab_tasks import Task, find_task
from .campaign import Campaign
from .data import LoadedSplit, load_split
from .models import ModelFactory
from .progress import format_duration, format_progress
from .protocol import FINAL_SPLITS, PHASES, TUNING_SPLITS, Run
from .provenance import WorkerPlace, describe_environment
from .records import write_atomically
from .training import build_optimizer, count_correct, now, train_model
from .updates import Updater

__all__ = ['Worker', 'estimate_seconds']

SECONDS_BETWEEN_TABLES = 60.0


class Worker:
    """Works on the runs of a campaign.

    Images stay in memory for all runs of a task and the model is reset, not rebuilt, so that compiled kernels are
    reused. Workers begin with different tasks and help each other out at the end.

    Args:
        campaign: The shared folder.
        settings: See `load_settings`.
        factory: Gives the model.
        data_root: Folder or zip.
        tasks: Tasks to work on.
        phases: 'tune', 'final' or both.
        place: Place among the workers that were started together.
        say: Where messages go. Default: print.
        poll_seconds: Pause before looking again, when all that is left is in the hands of others.
    """

    def __init__(
        self,
        campaign: Campaign,
        settings: Config,
        factory: ModelFactory,
        data_root: str,
        tasks: Sequence[Task],
        phases: Sequence[str] = PHASES,
        place: WorkerPlace | None = None,
        say: Callable[[str], None] = print,
        poll_seconds: float = 5.0,
    ) -> None:
        self.campaign, self.settings, self.factory = campaign, settings, factory
        self.data_root, self.phases, self.say = data_root, tuple(phases), say
        self.place, self.poll_seconds = place or WorkerPlace(), poll_seconds
        start = self.place.index * len(tasks) // self.place.count
        self.tasks, self.order = list(tasks), [*tasks[start:], *tasks[:start]]
        self.environment = describe_environment(factory.device)
        self._splits: dict[tuple[str, str], LoadedSplit] = {}
        self._durations: list[float] = []
        self._last_table = time.monotonic()

    def work(self) -> int:
        """Work until every run is done, by this worker or another.

        Returns:
            Number of runs that this worker did.
        """
        done = 0
        while True:
            before = done
            for task in self.order:
                done += self._work_on(task)
            if all(a == b for a, b in (self.campaign.count_runs(task, self.phases) for task in self.tasks)):
                self._report_table()
                return done
            if self._waits_in_vain():
                raise ValueError('the final phase needs the tuning phase: run it first, or both with --phase all')
            if done == before:
                time.sleep(self.poll_seconds)

    def _work_on(self, task: Task) -> int:
        """Do what is open of one task; returns the number of runs done."""
        done = 0
        while True:
            before = done
            for run in self.campaign.open_runs(task, self.phases):
                with self.campaign.claim(run) as is_mine:
                    if is_mine:
                        self._do(run)
                        done += 1
            if done == before:
                return done
            if time.monotonic() - self._last_table > SECONDS_BETWEEN_TABLES:
                self._report_table()

    def _waits_in_vain(self) -> bool:
        """Whether only the final phase was asked for and tuning is incomplete, which nobody may be working on."""
        return 'tune' not in self.phases and any(self.campaign.chosen_rate(task) is None for task in self.tasks)

    def _do(self, run: Run) -> None:
        """Do one run and record it."""
        start = time.perf_counter()
        record = self._execute(run)
        self.campaign.save(run, record)
        self._durations.append(time.perf_counter() - start)
        done, total = map(sum, zip(*(self.campaign.count_runs(task, self.phases) for task in self.tasks), strict=True))
        mean = sum(self._durations) / len(self._durations)
        left = format_duration((total - done) * mean / self.place.count)
        mark = 'SMOKE ' if self.campaign.kind == 'smoke' else ''
        self.say(
            f'{mark}[{done}/{total}] {run.task} {run.phase} lr {run.learning_rate:g} seed {run.seed}: '
            f'{record["accuracy"]:.2f} %, {self._durations[-1]:.1f} s; about {left} left'
        )
        write_atomically(self.campaign.work_dir / 'progress.md', format_progress(self.campaign, self.tasks))

    def _execute(self, run: Run) -> dict:
        """Train and evaluate; returns the record."""
        splits = TUNING_SPLITS if run.phase == 'tune' else FINAL_SPLITS
        train, score = (self._load(run.task, split, splits) for split in splits)
        model = self.factory.fresh(find_task(run.task).num_classes, run.seed)
        training = train_model(model, train, self.settings, run.learning_rate, run.seed)
        evaluation = count_correct(model, score, self.settings.runtime.eval_batch_size)
        # A diverged model gives no answers; it must not win the selection by guessing.
        correct = 0 if training.diverged else evaluation.correct
        return {
            'accuracy': 100 * correct / evaluation.total,
            'correct': correct,
            'total': evaluation.total,
            'training': asdict(training) | ({'final_loss': None} if training.diverged else {}),  # JSON has no NaN
            'evaluation_seconds': evaluation.seconds,
            'data': {split: self._splits[run.task, split].identity for split in splits},
            'environment': self.environment,
            'finished': datetime.now(timezone.utc).isoformat(timespec='seconds'),
        }

    def _load(self, task: str, split: str, open_splits: tuple[str, ...]) -> LoadedSplit:
        """Load a split, or take it from memory; the images of other tasks are let go."""
        if any(name != task for name, _ in self._splits):
            self._splits.clear()
            gc.collect()
        if (task, split) not in self._splits:
            is_training = split.startswith('train')
            self._splits[task, split] = load_split(
                self.settings, self.data_root, task, split, open_splits, self.factory.device, on_device=is_training
            )
        return self._splits[task, split]

    def _report_table(self) -> None:
        """Print the table of what is done."""
        self._last_table = time.monotonic()
        self.say(format_progress(self.campaign, self.tasks))


def estimate_seconds(
    factory: ModelFactory,
    settings: Config,
    campaign: Campaign,
    tasks: Sequence[Task],
    data_root: DataRoot,
    phases: Sequence[str] = PHASES,
) -> tuple[float, float, float]:
    """Estimate how long the open runs take on one device, from a few steps on noise.

    Args:
        factory: Gives the model.
        settings: See `load_settings`.
        campaign: The campaign, whose finished runs do not count.
        tasks: Tasks to work on.
        data_root: Tells the number of test images.
        phases: 'tune', 'final' or both.

    Returns:
        Seconds in total, for one training step, and for the evaluation of one image. Decoding comes on top.
    """
    step, image = measure_speed(factory, settings)
    protocol, total = settings.protocol, 0.0
    for task in tasks:
        sizes = {split: max(data_root.accepted_sizes(task, split)) for split in (*TUNING_SPLITS, *FINAL_SPLITS)}
        for phase, splits in (('tune', TUNING_SPLITS), ('final', FINAL_SPLITS)):
            if phase not in phases:
                continue
            done, count = campaign.count_runs(task, (phase,))
            steps = sizes[splits[0]] // protocol.batch_size * protocol.epochs
            total += (count - done) * (steps * step + sizes[splits[1]] * image)
    return total, step, image


def measure_speed(factory: ModelFactory, settings: Config, repeats: int = 5) -> tuple[float, float]:
    """Time training steps and evaluation on noise, after a warm-up.

    Returns:
        Seconds of one training step, and of the evaluation of one image.
    """
    device, batch = factory.device, settings.protocol.batch_size
    eval_batch = settings.runtime.eval_batch_size
    generator = torch.Generator().manual_seed(0)

    def noise(count: int) -> LoadedSplit:
        images = torch.randint(0, 256, (count, 3, *factory.input_size), dtype=torch.uint8, generator=generator)
        labels = torch.randint(0, 10, (count,), generator=generator)
        return LoadedSplit(None, labels.to(device), images.to(device), {})

    model = factory.fresh(10, seed=0)
    count_correct(model, noise(eval_batch), eval_batch)
    image = count_correct(model, noise(eval_batch * 2), eval_batch).seconds / (eval_batch * 2)
    model.train()
    optim_wrapper, _ = build_optimizer(model, settings, 1e-6, repeats)
    update = Updater(model, optim_wrapper, batch, settings.runtime.cuda_graph)
    split = noise(batch)
    for _ in range(update.warmup_steps):
        update(split.images, split.labels)
    start = now(device)
    for _ in range(repeats):
        update(split.images, split.labels)
    return (now(device) - start) / repeats, image
