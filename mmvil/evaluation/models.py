"""Models for VTAB-1K: any mmpretrain backbone or official ViL weights, with a new head for every run."""

import copy
import hashlib
import inspect
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from mmengine.logging import MMLogger, print_log
from torch import Tensor, nn

from ..models.checkpoint import load_strictly, read_checkpoint, select_prefix, unwrap_state_dict

__all__ = ['ModelFactory', 'hash_file', 'is_official', 'quiet_logger']


def hash_file(path: str | Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, 'rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def is_official(state_dict: Mapping[str, Tensor]) -> bool:
    """Whether a state dict has the keys of the authors' ViL files or modules."""
    return any(key.endswith('.learnable_skip') for key in state_dict)


@contextmanager
def quiet_logger() -> Iterator[None]:
    """Silence mmengine's messages below a warning."""
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


class ModelFactory:
    """Gives the same pre-trained backbone again and again, each time with a new head.

    The classifier is built once and reset for every run, so compiled kernels and memory are reused.

    Args:
        settings: See `load_settings`. Without `model`, the checkpoint must be official ViL weights with a head.
        checkpoint: Official ViL weights, or a checkpoint of mmpretrain or mmvil with or without head; None with
            `from_scratch`.
        device: Where the model lives.
        from_scratch: Allow random weights, for smoke runs and for comparison.

    Raises:
        ValueError: If there is neither checkpoint nor `from_scratch`, the checkpoint does not fit the backbone, or the
            backbone's output is no vector per image.
    """

    def __init__(
        self,
        settings: Mapping,
        checkpoint: str | Path | None,
        device: torch.device,
        from_scratch: bool = False,
    ) -> None:
        if (checkpoint is None) != from_scratch:
            raise ValueError(
                'give either a checkpoint or from_scratch: VTAB-1K measures pre-trained weights, and random ones are '
                'used on purpose only'
            )
        self.device, self.task_head = device, settings['task_head']
        self.input_size = _input_size(settings['cached_pipeline'])
        state_dict = unwrap_state_dict(read_checkpoint(checkpoint)) if checkpoint is not None else None
        torch.manual_seed(0)  # random weights are the same for every run, too
        self.model = self._build(settings, state_dict)
        if state_dict is None:
            with quiet_logger():
                self.model.init_weights()
        elif 'model' in settings:
            _load(self.model, state_dict)
        self.model.to(device)
        self.in_channels = self._measure_width()
        self._initial = copy.deepcopy(self.model.state_dict())

    @property
    def num_parameters(self) -> int:
        """Number of parameters without the head."""
        return sum(value.numel() for name, value in self._initial.items() if name.startswith(('backbone.', 'neck.')))

    def fresh(self, num_classes: int, seed: int) -> nn.Module:
        """Reset the backbone to the pre-trained weights and give it a new head.

        The model of an earlier call is the same object and must not be used any more.

        Args:
            num_classes: Width of the head.
            seed: Seed of torch's generators, set before the head is drawn.

        Returns:
            The classifier, on the device.
        """
        from mmpretrain.registry import MODELS

        self.model.head = None
        self.model.load_state_dict(self._initial)
        self.model.zero_grad(set_to_none=True)
        torch.manual_seed(seed)
        head = MODELS.build(
            {**copy.deepcopy(dict(self.task_head)), 'num_classes': num_classes, 'in_channels': self.in_channels}
        )
        with quiet_logger():
            head.init_weights()
        self.model.head = head.to(self.device)
        return self.model

    def _build(self, settings: Mapping, state_dict: Mapping[str, Tensor] | None) -> nn.Module:
        """Build the classifier without a head."""
        import mmpretrain.models
        from mmpretrain.registry import MODELS

        overrides = settings['backbone_overrides']
        if 'model' not in settings:
            if state_dict is None or not is_official(state_dict):
                raise ValueError('without a config the checkpoint must be official ViL weights')
            from ..convert import from_official

            model = from_official(state_dict, **overrides)
            if not isinstance(model, mmpretrain.models.ImageClassifier):
                raise ValueError('these official weights have no head, so their pooling is not known; give a --config')
            model.head = None
            model.data_preprocessor = MODELS.build(_preprocessor(settings))
            return model
        config = copy.deepcopy(settings['model'])
        kind = str(config.get('type', 'ImageClassifier')).rpartition('.')[2]
        if kind != 'ImageClassifier' or 'backbone' not in config:
            raise ValueError(f'the model must be an ImageClassifier with a backbone, got {config.get("type")!r}')
        options = _options(config['backbone']['type'])
        config['backbone'].update({key: value for key, value in overrides.items() if key in options})
        return MODELS.build(
            {
                'type': 'mmpretrain.ImageClassifier',
                'backbone': config['backbone'],
                'neck': config.get('neck'),
                'head': None,
                'data_preprocessor': _preprocessor(settings),
            }
        )

    @torch.no_grad()
    def _measure_width(self) -> int:
        """Run one image to see how wide the input of the head is."""
        self.model.eval()
        features = self.model.extract_feat(torch.zeros(1, 3, *self.input_size, device=self.device))
        last = features[-1] if isinstance(features, (tuple, list)) else features
        if not isinstance(last, Tensor) or last.dim() != 2:
            shape = tuple(last.shape) if isinstance(last, Tensor) else type(last).__name__
            raise ValueError(
                f'the backbone (with neck) must give one vector per image, got {shape}: choose a pooled out_type, or '
                "add neck=dict(type='GlobalAveragePooling')"
            )
        return last.shape[1]


def _options(backbone: str | type) -> set[str]:
    """Names of the options of a backbone; some, such as Swin, have a drop path unless they are told otherwise.

    Raises:
        ValueError: If no such backbone is registered.
    """
    from mmpretrain.registry import MODELS

    kind = MODELS.get(backbone) if isinstance(backbone, str) else backbone
    if kind is None:
        raise ValueError(f'no backbone {backbone!r} is registered; does the config lack custom_imports?')
    return set(inspect.signature(kind).parameters)


def _preprocessor(settings: Mapping) -> dict:
    """Config of the normalisation, without what depends on a number of classes."""
    config = {key: value for key, value in settings['data_preprocessor'].items() if key != 'num_classes'}
    return {'type': 'mmpretrain.ClsDataPreprocessor', **config}


def _input_size(pipeline: list) -> tuple[int, int]:
    """Height and width that the cached pipeline ends with."""
    for step in reversed(list(pipeline)):
        scale = step.get('scale', step.get('crop_size'))
        if scale is not None:
            return (scale, scale) if isinstance(scale, int) else (scale[1], scale[0])
    raise ValueError('cached_pipeline must contain a Resize with `scale`, so that all images have one size')


def _load(model: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Load backbone and neck strictly; a head in the checkpoint is left out."""
    if is_official(state_dict):
        from ..convert import official_to_mmvil

        state_dict = official_to_mmvil(state_dict)
    is_whole = any(key.startswith('backbone.') for key in state_dict)
    weights = select_prefix(state_dict, 'backbone.') if is_whole else dict(state_dict)
    backbone = model.backbone
    if hasattr(backbone, 'load_pretrained'):
        backbone.load_pretrained(weights)
    else:
        load_strictly(backbone, weights, optional=() if is_whole else ('head.',))
    if model.with_neck and any(True for _ in model.neck.parameters()):
        load_strictly(model.neck, select_prefix(state_dict, 'neck.'))
    print_log(f'loaded {len(weights)} tensors; the head is new for every run', logger='current')
