"""Exact resume: every random number of a training is a function of the seed and of the place in the training."""

from typing import Any

import numpy as np
import torch
from mmengine.dist import broadcast_object_list, get_rank, get_world_size
from mmengine.hooks import Hook
from mmengine.runner import IterBasedTrainLoop
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from ..registry import HOOKS
from .seeded_loading import PlacedSampler, SeededFetch, seed_generators

__all__ = ['RandomStateHook', 'allow_numpy_dtypes_in_checkpoints']

DATA, ITERATION, EPOCH = range(3)  # the third integer of every seed: what the numbers are for


def allow_numpy_dtypes_in_checkpoints() -> None:
    """Let `torch.load(weights_only=True)` read the NumPy values that mmengine keeps in its log buffers.

    mmengine allows three data types; mmsegmentation logs a fourth one (float32), and the load then falls back to plain
    unpickling, which runs whatever code the file holds.
    """
    dtypes = (np.float16, np.float32, np.float64, np.int32, np.int64, np.uint8, np.bool_)
    torch.serialization.add_safe_globals([type(np.dtype(dtype)) for dtype in dtypes])


@HOOKS.register_module()
class RandomStateHook(Hook):
    """Makes a resumed training equal to one that was never interrupted, and independent of the number of workers.

    mmengine saves weights, optimizer, schedulers and EMA, but no random state. Copies of the generators would not be
    enough: those of worker processes and of the other ranks are out of reach when a checkpoint is written. This hook
    seeds the generators of Python, NumPy, torch and all devices from (seed, rank, iteration) before each iteration, and
    from (seed, rank, epoch, place in the epoch) before each training sample is loaded. The state at any point is thus
    known from two integers, and the checkpoint holds them under `random_state` (plain Python types). Validation between
    two iterations no longer influences the training either.

    * Epoch-based and iteration-based loops. A checkpoint from the middle of an epoch (`by_epoch=False`) resumes at the
      right sample of that epoch; mmengine alone would start the epoch again.
    * The seed comes from `randomness.seed`; without one, the seed that mmengine drew is kept in the checkpoint and used
      again.
    * Every rank draws its own numbers.

    Not restored: gradients collected by gradient accumulation (save at a multiple of `accumulative_counts`), and the
    order of a batch sampler of variable size in the middle of an epoch; a warning is logged for the latter.

    Raises:
        ValueError: when resuming from a checkpoint without optimizer state, such as `best_*.pth`.
    """

    # before_train_iter of every other hook comes first, so that nothing draws numbers between the seed and the step.
    priority = 'VERY_LOW'

    def __init__(self) -> None:
        self._seed = 0
        self._resumed: dict[str, Any] | None = None
        self._sampler: PlacedSampler | None = None

    def before_run(self, runner: Any) -> None:
        """Agree on one seed, that of rank 0."""
        allow_numpy_dtypes_in_checkpoints()
        seed = [runner.seed]
        broadcast_object_list(seed)
        self._seed = int(seed[0])

    def after_load_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        """Take over the seeds of the checkpoint when the training is resumed."""
        if not runner._resume:
            return
        if 'optimizer' not in checkpoint:
            raise ValueError(
                'The training cannot continue from this checkpoint: it holds no optimizer state (mmengine leaves it '
                "out of 'best_*.pth'). Resume from 'epoch_*.pth' or 'iter_*.pth', or start a new training from its "
                'weights with load_from and resume=False.'
            )
        state = checkpoint.get('random_state')
        if state is None:
            runner.logger.warning(
                'The checkpoint was written without RandomStateHook: the resumed training draws other random '
                'numbers than an uninterrupted one would.'
            )
            return
        self._seed, self._resumed = state['seed'], state

    def before_train(self, runner: Any) -> None:
        """Connect sampler and data set of the training loader with the seeds."""
        loader = runner.train_dataloader
        batch_sampler = loader.batch_sampler
        if isinstance(loader.dataset, IterableDataset) or not hasattr(batch_sampler, 'sampler'):
            runner.logger.warning(
                f'RandomStateHook cannot place the samples of {type(loader.dataset).__name__} with batch sampler '
                f'{type(batch_sampler).__name__}: a resumed training loads its data with other random numbers.'
            )
            return
        if self._sampler is None:
            self._sampler = PlacedSampler(batch_sampler.sampler)
            batch_sampler.sampler = self._sampler
        if self._resumed is not None:
            self._check_same_batches(runner)
            self._restore_sampler_seed(self._sampler.sampler, self._resumed['sampler_seed'])
        loader.dataset.__getitems__ = SeededFetch(loader.dataset, (self._seed, get_rank(), DATA))
        self._discard_started_iterator(runner, loader)

    def before_train_epoch(self, runner: Any) -> None:
        """Seed what draws numbers once an epoch, and set the places of the samples to come."""
        seed_generators(self._seed, get_rank(), EPOCH, runner.epoch)
        if self._sampler is None:
            return
        loader = runner.train_dataloader
        if isinstance(runner.train_loop, IterBasedTrainLoop):
            self._sampler.start_epoch(0, first_place=self._samples_skipped_by_loop(runner, loader))
        else:
            self._sampler.start_epoch(runner.epoch, skipped=self._samples_done_in_epoch(runner, loader))

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        """Seed all generators for this iteration."""
        seed_generators(self._seed, get_rank(), ITERATION, runner.iter)

    def before_save_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        """Add the seeds, and what they are valid for, to the checkpoint."""
        sampler = self._sampler.sampler if self._sampler is not None else None
        sampler_seed = getattr(sampler, 'seed', None)
        checkpoint['random_state'] = dict(
            seed=self._seed,
            sampler_seed=None if sampler_seed is None else int(sampler_seed),
            **self._batch_layout(runner),
        )

    @staticmethod
    def _batch_layout(runner: Any) -> dict[str, int | None]:
        return dict(
            batch_size=runner.train_dataloader.batch_size,
            world_size=get_world_size(),
            num_samples=len(runner.train_dataloader.dataset),
        )

    def _check_same_batches(self, runner: Any) -> None:
        for name, now in self._batch_layout(runner).items():
            if now != self._resumed[name]:
                runner.logger.warning(
                    f'The checkpoint was written with {name}={self._resumed[name]}, now it is {now}: the order of the '
                    'samples differs from that of an uninterrupted training.'
                )

    @staticmethod
    def _restore_sampler_seed(sampler: Any, seed: int | None) -> None:
        if seed is None or not hasattr(sampler, 'seed'):
            return
        sampler.seed = seed
        if hasattr(sampler, '_indices_of_rank'):
            # mmengine's InfiniteSampler keeps a running stream; older versions have started it with the old seed.
            sampler.indices = sampler._indices_of_rank()

    @staticmethod
    def _discard_started_iterator(runner: Any, loader: DataLoader) -> None:
        # Older mmengine starts the workers when the loop is built, before the data set has its seeds.
        if getattr(loader, '_iterator', None) is not None:
            loader._iterator = None
        if hasattr(runner.train_loop, 'dataloader_iterator'):
            runner.train_loop.dataloader_iterator = type(runner.train_loop.dataloader_iterator)(loader)

    def _samples_skipped_by_loop(self, runner: Any, loader: DataLoader) -> int:
        # Where the sampler can skip, the loop fast-forwards it and our count starts there; otherwise the loop takes the
        # batches one by one, and we count them.
        sampler = self._sampler.sampler
        standard = loader.sampler is sampler or type(loader.batch_sampler) is BatchSampler
        jumps = (hasattr(sampler, 'skip') and standard) or getattr(runner.train_loop, 'fast_forward_on_resume', False)
        return runner.iter * (loader.batch_size or 1) if jumps else 0

    @staticmethod
    def _samples_done_in_epoch(runner: Any, loader: DataLoader) -> int:
        batches = runner.iter - runner.epoch * len(loader)
        if batches == 0:
            return 0
        if not 0 < batches <= len(loader) or type(loader.batch_sampler) is not BatchSampler:
            runner.logger.warning(
                f'Epoch {runner.epoch + 1} starts from its first batch, although iteration {runner.iter} is not the '
                f'start of an epoch of {len(loader)} batches of {type(loader.batch_sampler).__name__}.'
            )
            return 0
        runner.logger.info(f'Epoch {runner.epoch + 1} continues after {batches} of {len(loader)} batches.')
        return batches * loader.batch_size
