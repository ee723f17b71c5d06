"""Stops a run whose checkpoint does not fill the model."""

from typing import Any

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.runner import BaseLoop
from torch import Tensor

from ..models.checkpoint import describe_keys
from ..registry import HOOKS

__all__ = ['StrictLoadHook']


@HOOKS.register_module()
class StrictLoadHook(Hook):
    """Refuses a checkpoint that leaves weights of the model at their start values.

    mmengine loads `load_from` and test checkpoints loosely: keys that do not match are a line in the log, and the run
    goes on with random weights. With this hook

    * testing, validating and resuming need every weight of the model;
    * a training that starts from a checkpoint (`load_from`) needs every weight of the backbone. Other parts, such as a
      head with another number of classes or a decoder, may be missing or have another shape: they start anew, and one
      log line names them. Position tables may have another grid, since backbones resample them.

    Raises:
        ValueError: A weight is missing or has another shape; the message counts and names them.
    """

    # Before the EMA hook loads the same weights.
    priority = 'VERY_HIGH'

    def after_load_checkpoint(self, runner: Any, checkpoint: dict) -> None:
        """Compare the keys and shapes of model and checkpoint, before mmengine loads them."""
        model = runner.model
        while is_model_wrapper(model) or isinstance(model, BaseTTAModel):  # processes, test-time augmentation
            model = model.module
        stored = checkpoint.get('state_dict', checkpoint)
        given = {key.removeprefix('module.'): key for key, value in stored.items() if isinstance(value, Tensor)}
        own = model.state_dict()
        missing = [key for key in own if key not in given and not key.endswith('num_batches_tracked')]
        other_shape = [
            key
            for key in own
            if key in given and stored[given[key]].shape != own[key].shape and not key.endswith('pos_embed')
        ]
        starts_training = isinstance(runner._train_loop, BaseLoop) and not runner._resume
        fatal = [key for key in missing + other_shape if not starts_training or 'backbone.' in key]
        if fatal:
            raise ValueError(_explain(fatal, missing, own, list(given)))
        for key in other_shape:  # mmengine would refuse them one by one in a warning each
            del stored[given[key]]
        anew = missing + other_shape
        if anew:
            print_log(
                f'{len(own) - len(anew)} of {len(own)} tensors come from the checkpoint; '
                f'these start anew: {describe_keys(anew)}',
                logger='current',
            )


def _explain(fatal: list[str], missing: list[str], own: dict[str, Tensor], given: list[str]) -> str:
    """Say what does not fit, and what to do about it."""
    absent = set(missing)
    lacking = [key for key in fatal if key in absent]
    shaped = [key for key in fatal if key not in absent]
    text = f'the checkpoint does not fit the model ({len(own)} tensors, {len(given)} in the checkpoint)'
    if lacking:
        text += f'; {len(lacking)} are missing from it: {describe_keys(lacking)}'
    if shaped:
        text += f'; {len(shaped)} have another shape: {describe_keys(shaped)}'
    if any('xlstm.' in key or 'rowwise_from' in key or 'mlstm_cell' in key for key in given):
        text += '. It is an official ViL file: convert it with tools/convert_vil.py first'
    elif len(lacking) == len(own):
        text += f'. Its keys are {describe_keys(given)}'
    return text
