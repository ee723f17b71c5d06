"""Reading checkpoints and loading them strictly: a missing weight stops, it is never left at its start value."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
from mmengine.fileio import get_local_path
from mmengine.logging import HistoryBuffer, print_log
from torch import Tensor, nn

__all__ = ['describe_keys', 'load_strictly', 'read_checkpoint', 'select_prefix', 'unwrap_state_dict']


def read_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint file without running any code that it may carry.

    Args:
        path: A file, or a URL of any mmengine file backend.

    Returns:
        The stored dictionary, tensors on the CPU.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, is no checkpoint, or holds objects other than tensors and plain values.
    """
    try:
        with get_local_path(str(path)) as local, torch.serialization.safe_globals(_training_state_types()):
            if not Path(local).is_file():
                raise FileNotFoundError(f'checkpoint {path} does not exist')
            content = torch.load(local, map_location='cpu', weights_only=True)
    except FileNotFoundError:
        raise
    except UnpicklingError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f'{path} is no checkpoint of tensors and plain values: {reason}') from error
    except (
        Exception
    ) as error:  # damaged bytes make the unpickler fail in almost any way (IndexError, struct.error, ...)
        raise ValueError(f'{path} cannot be read as a checkpoint, it may be truncated: {error!r}') from error
    if not isinstance(content, Mapping):
        raise ValueError(f'{path} must hold a dictionary of tensors, got {type(content).__name__}')
    return dict(content)


def unwrap_state_dict(checkpoint: Mapping) -> dict[str, Tensor]:
    """Take the tensors out of a checkpoint.

    Args:
        checkpoint: A state dict, or a dictionary that holds one under `state_dict`.

    Returns:
        A new dictionary, key -> tensor.

    Raises:
        TypeError: If the checkpoint is no dictionary.
        ValueError: If it holds anything but named tensors.
    """
    if not isinstance(checkpoint, Mapping):
        raise TypeError(f'a checkpoint must be a path or a dictionary, got {type(checkpoint).__name__}')
    state_dict = checkpoint.get('state_dict', checkpoint)
    if not isinstance(state_dict, Mapping) or not state_dict:
        raise ValueError('the checkpoint holds no state dict: expected a non-empty dictionary of tensors')
    strange = [key for key, value in state_dict.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if strange:
        raise ValueError(f'a state dict must map names to tensors, but these entries do not: {describe_keys(strange)}')
    return dict(state_dict)


def select_prefix(state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Keep the keys that start with a prefix, and strip it.

    Args:
        state_dict: Key -> tensor.
        prefix: For example 'backbone.'; the final dot may be left out.

    Returns:
        A new dictionary.

    Raises:
        ValueError: If no key has the prefix.
    """
    prefix = prefix if not prefix or prefix.endswith('.') else f'{prefix}.'
    selected = {key[len(prefix) :]: value for key, value in state_dict.items() if key.startswith(prefix)}
    if not selected:
        raise ValueError(f'no key of the checkpoint starts with {prefix!r}; its keys are {describe_keys(state_dict)}')
    return selected


def load_strictly(module: nn.Module, state_dict: Mapping[str, Tensor], optional: Iterable[str] = ()) -> None:
    """Load a state dict, refusing anything missing, superfluous or of another shape.

    Args:
        module: The module to fill.
        state_dict: Key -> tensor; not changed.
        optional: Beginnings of keys that the state dict may hold although the module does not.

    Raises:
        ValueError: A key is missing, unexpected, or has another shape.
    """
    own = module.state_dict()
    missing = [key for key in own if key not in state_dict]
    if missing:
        hint = ''
        if any(key.endswith(missing[0]) for key in state_dict):
            wrapper = next(key for key in state_dict if key.endswith(missing[0]))[: -len(missing[0])]
            hint = f'. The checkpoint has these keys under the prefix {wrapper!r}: pass prefix={wrapper!r}'
        raise ValueError(
            f'the checkpoint lacks {len(missing)} of the {len(own)} keys of {type(module).__name__}: '
            f'{describe_keys(missing)}; it holds {len(state_dict)}: {describe_keys(state_dict)}{hint}'
        )
    extra = [key for key in state_dict if key not in own]
    refused = [key for key in extra if not key.startswith(tuple(optional))]
    if refused:
        raise ValueError(
            f'the checkpoint holds {len(refused)} keys that {type(module).__name__} does not know: '
            f'{describe_keys(refused)}'
        )
    try:
        module.load_state_dict({key: value for key, value in state_dict.items() if key in own}, strict=True)
    except RuntimeError as error:
        raise ValueError(f'the checkpoint does not fit {type(module).__name__}: {error}') from error
    dropped = f'; left out {len(extra)} that it was built without: {describe_keys(extra)}' if extra else ''
    print_log(f'loaded {len(own)} tensors into {type(module).__name__}{dropped}', logger='current')


def describe_keys(keys: Iterable[str], most: int = 8) -> str:
    """List keys for a message, at most `most` of them by name."""
    names = [str(key) for key in keys]
    rest = len(names) - most
    return ', '.join(names[:most]) + (f' and {rest} more' if rest > 0 else '')


def _training_state_types() -> list[type]:
    """Harmless types beside tensors that mmengine stores in a training checkpoint: numbers, arrays, loss histories."""
    core = np._core if hasattr(np, '_core') else np.core
    dtypes = [type(np.dtype(name)) for name in ('float32', 'float64', 'int32', 'int64', 'uint32', 'uint8', 'bool')]
    # A loss history refers to its statistics as attributes of its class, which the unpickler looks up with getattr.
    return [getattr, HistoryBuffer, np.ndarray, np.dtype, core.multiarray.scalar, core.multiarray._reconstruct, *dtypes]
