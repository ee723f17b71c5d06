"""Official ViL weights to mmvil and back.

Three layouts of keys hold the same tensors:

- *published*: the files that the authors offer (`xlstm.blocks.0.xlstm.proj_up.weight`, ...);
- *module*: the authors' released modules (`blocks.0.rowwise_from_top_left.layer.proj_up.weight`, ...);
- *mmvil*: `blocks.0.layer.proj_up.weight`, ...; in a classifier under `backbone.`, with `head.fc.` beside it.

Source: released modules and files of arXiv 2406.04303, first and second generation.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from .models.checkpoint import describe_keys, load_strictly, read_checkpoint, select_prefix, unwrap_state_dict

__all__ = ['from_official', 'mmvil_to_official', 'official_to_mmvil']

# Inside a sub-block: mmvil's name -> the official one, where they differ. The convolution depends on the generation.
LAYER_NAMES = {
    'layer.skip': 'layer.learnable_skip',
    'layer.igate.': 'layer.mlstm_cell.igate.',
    'layer.fgate.': 'layer.mlstm_cell.fgate.',
    'layer.head_norm.': 'layer.mlstm_cell.outnorm.',
}
DIRECTIONS = ('rowwise_from_top_left', 'rowwise_from_bot_right')
LAYOUTS = ('module', 'published')


def official_to_mmvil(state_dict: Mapping) -> dict[str, Tensor]:
    """Rename an official state dict's keys.

    Args:
        state_dict: Published or module keys, first or second generation, with or without an outer `state_dict` entry;
            not changed.

    Returns:
        A new dictionary with the same tensors. With a classifier head: keys of mmpretrain's `ImageClassifier`
        (`backbone.`, `head.fc.`); without one: keys of `VisionLSTM`.

    Raises:
        TypeError: If it is no dictionary.
        ValueError: If it is no state dict of a ViL; the message lists the keys that are not understood.
    """
    state_dict = unwrap_state_dict(state_dict)
    version = _official_version(state_dict)
    renamed = {key: _official_key_to_mmvil(key, version) for key in state_dict}
    strange = [key for key, name in renamed.items() if name is None]
    if strange or len(set(renamed.values())) != len(renamed):
        strange = strange or list(renamed)
        raise ValueError(f'these keys do not belong to an official ViL: {describe_keys(strange)}')
    with_head = any(name.startswith('head.') for name in renamed.values())
    prefix = 'backbone.' if with_head else ''
    return {name if name.startswith('head.') else prefix + name: state_dict[key] for key, name in renamed.items()}


def mmvil_to_official(state_dict: Mapping, layout: str = 'module', version: str | None = None) -> dict[str, Tensor]:
    """Rename an mmvil state dict's keys: the exact inverse of `official_to_mmvil`.

    Args:
        state_dict: Keys of a classifier or a bare backbone, with or without an outer `state_dict` entry; not changed.
        layout: 'module' or 'published'.
        version: 'v1' or 'v2'. Default: read from keys and shapes; an unbiased model with causal convolutions of size 4
            whose head, if any, takes one token's width is taken for v1.

    Returns:
        A new dictionary with the same tensors.

    Raises:
        TypeError: If it is no dictionary.
        ValueError: If the layout or version is unknown, or it is no state dict of mmvil.
    """
    if layout not in LAYOUTS:
        raise ValueError(f'layout must be one of {list(LAYOUTS)}, got {layout!r}')
    if version not in (None, 'v1', 'v2'):
        raise ValueError(f"version must be 'v1', 'v2' or None, got {version!r}")
    state_dict = unwrap_state_dict(state_dict)
    flat = {key.removeprefix('backbone.'): value for key, value in state_dict.items()}
    if 'blocks.0.layer.proj_up.weight' not in flat or len(flat) != len(state_dict):
        raise ValueError(f'this is no state dict of an mmvil ViL; its keys are {describe_keys(state_dict)}')
    version = version or _mmvil_version(flat)
    two_dimensional = any(key.endswith('layer.conv.weight') and value.dim() == 4 for key, value in flat.items())
    renamed = {key: _mmvil_key_to_module(key, version, two_dimensional) for key in flat}
    strange = [key for key, name in renamed.items() if name is None]
    if strange:
        raise ValueError(f'these keys do not belong to an mmvil ViL classifier: {describe_keys(strange)}')
    if layout == 'published':
        with_pool_norm = 'pool_norm.weight' in flat
        renamed = {key: _module_key_to_published(name, version, with_pool_norm) for key, name in renamed.items()}
    return {renamed[key]: value for key, value in flat.items()}


def from_official(checkpoint: str | Path | Mapping, **overrides: object) -> nn.Module:
    """Build the model that an official checkpoint was made for, and load it strictly.

    Version, widths, depth, biases, norms, classes, patch size and kind of pooling are read from the keys and shapes.

    Args:
        checkpoint: A file or a dictionary in the published or module layout.
        **overrides: Options of `VisionLSTM` that replace what was read, for example `img_size`, `patch_stride`,
            `out_type`, `out_indices`, `drop_path_rate`; and `num_classes`: with another number of classes the head
            starts anew.

    Returns:
        mmpretrain's `ImageClassifier` if the checkpoint has a head that fits the output: `model(images,
        mode='tensor')` gives logits. Otherwise the `VisionLSTM` backbone. Either in evaluation mode.

    Raises:
        FileNotFoundError: If there is no such file.
        TypeError: If an override is not known.
        ValueError: If the file is damaged or not an official ViL, or does not fit the overrides.

    Example:
        >>> classifier = from_official('vil2_tiny16_e800_in1k.th')  # doctest: +SKIP
        >>> backbone = from_official('vil2_tiny16_e800_in1k.th', out_type='featmap', img_size=512)  # doctest: +SKIP
    """
    from mmengine.registry import MODELS

    source = checkpoint if isinstance(checkpoint, Mapping) else read_checkpoint(checkpoint)
    official = unwrap_state_dict(source)
    converted = official_to_mmvil(official)
    head = {key: value for key, value in converted.items() if key.startswith('head.')}
    weights = select_prefix(converted, 'backbone.') if head else converted
    settings = {**read_settings(weights, _official_version(official)), **overrides}
    stored_classes, head_width = head['head.fc.weight'].shape if head else (0, 0)
    num_classes = settings.pop('num_classes', stored_classes)
    stored_type = _pooling_of(head_width, weights)
    settings.setdefault('out_type', stored_type)
    if settings['out_type'] != stored_type and 'pool_norm' not in overrides:
        settings['pool_norm'] = False  # the stored one was trained for another kind of pooling

    backbone_config = {'type': 'mmvil.VisionLSTM', **settings}
    backbone = MODELS.build(dict(backbone_config))
    keeps_head = bool(head) and num_classes == stored_classes and head_width == backbone.out_channels
    if (
        not num_classes
        or backbone.out_type not in backbone.POOLED_OUT_TYPES
        or not (keeps_head or 'num_classes' in overrides)
    ):
        if overrides.get('num_classes'):
            raise ValueError(
                f'num_classes needs an out_type among {list(backbone.POOLED_OUT_TYPES)}, got {backbone.out_type!r}'
            )
        backbone.load_pretrained({**weights, **head})
        return backbone.eval()
    classifier = _build_classifier(backbone_config, num_classes, backbone.out_channels)
    classifier.backbone.load_pretrained(weights if keeps_head else {**weights, **head})
    if keeps_head:
        load_strictly(classifier.head, select_prefix(head, 'head.'))
    return classifier.eval()


def read_settings(weights: Mapping[str, Tensor], version: str) -> dict:
    """Read the options of `VisionLSTM` off a state dict with mmvil's backbone keys.

    Args:
        weights: Keys of `VisionLSTM` -> tensors.
        version: 'v1' or 'v2'.

    Returns:
        Keyword arguments of `VisionLSTM`, all but `out_type`.

    Raises:
        ValueError: If a key that the reading needs is missing.
    """
    first = 'blocks.0.layer.'
    needed = [
        'patch_embed.proj.weight',
        'pos_embed',
        f'{first}proj_down.weight',
        f'{first}igate.bias',
        f'{first}q_proj.weight',
    ]
    missing = [key for key in needed if key not in weights]
    if missing:
        raise ValueError(f'the checkpoint is incomplete, it lacks {describe_keys(missing)}')
    embed_dims, in_channels, patch_size, _ = weights['patch_embed.proj.weight'].shape
    rows, columns = weights['pos_embed'].shape[1:3]
    conv = weights.get(f'{first}conv.weight')
    settings = {
        'arch': {
            'embed_dims': embed_dims,
            'num_layers': 1 + max(int(key.split('.')[1]) for key in weights if key.startswith('blocks.')),
            'expand_ratio': weights[f'{first}proj_down.weight'].shape[1] / embed_dims,
            'num_heads': weights[f'{first}igate.bias'].shape[0],
            'qkv_block_size': weights[f'{first}q_proj.weight'].shape[-1],
        },
        'version': version,
        'img_size': (rows * patch_size, columns * patch_size),
        'patch_size': patch_size,
        'in_channels': in_channels,
        'conv': None if conv is None else 'conv2d' if conv.dim() == 4 else 'causal_conv1d',
        'proj_bias': f'{first}proj_up.bias' in weights,
        'norm_bias': 'blocks.0.norm.bias' in weights,
        'final_norm': 'norm.weight' in weights,
        'pool_norm': 'pool_norm.weight' in weights,
    }
    if conv is not None:
        settings['conv_kernel_size'] = conv.shape[-1]
    return settings


def _pooling_of(head_width: int, weights: Mapping[str, Tensor]) -> str:
    """Tell the kind of output from the width that the head, or the norm before it, takes."""
    embed_dims = weights['patch_embed.proj.weight'].shape[0]
    if not head_width and 'pool_norm.weight' in weights:
        head_width = weights['pool_norm.weight'].shape[0]
    if not head_width:
        return 'featmap'
    if head_width not in (embed_dims, 2 * embed_dims):
        raise ValueError(f'the head must take {embed_dims} or {2 * embed_dims} channels, but it takes {head_width}')
    return 'bilateral_concat' if head_width == 2 * embed_dims else 'bilateral_avg'


def _build_classifier(backbone: dict, num_classes: int, in_channels: int) -> nn.Module:
    """Build mmpretrain's classifier around a backbone config, with the preprocessing of the published models."""
    import mmpretrain.models  # noqa: F401  (fills the registry)
    from mmengine.registry import MODELS

    return MODELS.build(
        {
            'type': 'mmpretrain.ImageClassifier',
            '_scope_': 'mmpretrain',  # the loss inside of the head is named without a scope
            'data_preprocessor': {
                'type': 'mmpretrain.ClsDataPreprocessor',
                'num_classes': num_classes,
                'mean': [123.675, 116.28, 103.53],
                'std': [58.395, 57.12, 57.375],
                'to_rgb': True,
            },
            'backbone': backbone,
            'head': {
                'type': 'mmpretrain.LinearClsHead',
                'num_classes': num_classes,
                'in_channels': in_channels,
                'init_cfg': {'type': 'TruncNormal', 'layer': 'Linear', 'std': 2e-5},
            },
        }
    )


def _official_version(state_dict: Mapping[str, Tensor]) -> str:
    """Tell the generation of a state dict in the published or module layout."""
    if any(f'.{direction}.' in key for key in state_dict for direction in DIRECTIONS):
        return 'v2'
    blocks = [key for key in state_dict if key.startswith('xlstm.blocks.')]
    if (
        blocks
    ):  # published: both generations number their blocks alike, but only the second has biased norms or 2-D kernels
        two_dimensional = any(key.endswith('.conv1d.weight') for key in blocks)
        return 'v2' if two_dimensional or any(key.endswith('.xlstm_norm.bias') for key in blocks) else 'v1'
    if any(re.match(r'blocks\.\d+\.layer\.learnable_skip$', key) for key in state_dict):
        return 'v1'
    raise ValueError(f'this is no state dict of an official ViL; its keys are {describe_keys(state_dict)}')


def _mmvil_version(flat: Mapping[str, Tensor]) -> str:
    """Tell the generation of a backbone's state dict with mmvil keys."""
    conv = flat.get('blocks.0.layer.conv.weight')
    head = flat.get('head.fc.weight')
    only_v2 = (
        conv is None or conv.dim() == 4 or conv.shape[-1] != 4,
        'blocks.0.norm.bias' in flat,
        head is not None and head.shape[1] != flat['patch_embed.proj.weight'].shape[0],
    )
    return 'v2' if any(only_v2) else 'v1'


def _official_key_to_mmvil(key: str, version: str) -> str | None:
    """Rename one published or module key; None if it is not understood."""
    key = _published_key_to_module(key, version)
    if key == 'pos_embed.embed':
        return 'pos_embed'
    if re.fullmatch(r'patch_embed\.proj\.(weight|bias)', key):
        return key
    norms = (
        {'norm': 'norm', 'legacy_norm': 'pool_norm'}
        if version == 'v2'
        else {'legacy_norm': 'norm', 'norm': 'pool_norm'}
    )
    end = re.fullmatch(r'(norm|legacy_norm|head)\.(weight|bias)', key)
    if end:
        return f'{"head.fc" if end[1] == "head" else norms[end[1]]}.{end[2]}'
    if version == 'v2':
        block = re.fullmatch(rf'blocks\.(\d+)\.({"|".join(DIRECTIONS)})\.(.+)', key)
        index, rest = (2 * int(block[1]) + DIRECTIONS.index(block[2]), block[3]) if block else (0, '')
    else:
        block = re.fullmatch(r'blocks\.(\d+)\.(.+)', key)
        index, rest = (int(block[1]), block[2]) if block else (0, '')
    if not block:
        return None
    rest = re.sub(r'^layer\.(conv1d\.conv|conv\.conv|conv)\.', 'layer.conv.', rest)
    for ours, theirs in LAYER_NAMES.items():
        if rest.startswith(theirs):
            rest = ours + rest[len(theirs) :]
    return f'blocks.{index}.{rest}' if _is_block_key(rest) else None


def _is_block_key(rest: str) -> bool:
    """Whether a name is that of a sub-block's parameter in mmvil."""
    linear = 'layer.(proj_up|proj_down|q_proj|k_proj|v_proj|igate|fgate|conv|head_norm)|norm'
    return rest == 'layer.skip' or bool(re.fullmatch(rf'({linear})\.(weight|bias)', rest))


def _mmvil_key_to_module(key: str, version: str, two_dimensional: bool) -> str | None:
    """Rename one mmvil backbone or head key to the module layout; None if it is not understood."""
    if key == 'pos_embed':
        return 'pos_embed.embed'
    if key.startswith('patch_embed.proj.'):
        return key
    norms = (
        {'norm': 'norm', 'pool_norm': 'legacy_norm'}
        if version == 'v2'
        else {'norm': 'legacy_norm', 'pool_norm': 'norm'}
    )
    end = re.fullmatch(r'(norm|pool_norm|head\.fc)\.(weight|bias)', key)
    if end:
        return f'{"head" if end[1] == "head.fc" else norms[end[1]]}.{end[2]}'
    block = re.fullmatch(r'blocks\.(\d+)\.(.+)', key)
    if not block or not _is_block_key(block[2]):
        return None
    index, rest = int(block[1]), block[2]
    for ours, theirs in LAYER_NAMES.items():
        if rest.startswith(ours):
            rest = theirs + rest[len(ours) :]
    if version == 'v1':
        return f'blocks.{index}.{rest.replace("layer.conv.", "layer.conv1d.conv.")}'
    if not two_dimensional:
        rest = rest.replace('layer.conv.', 'layer.conv.conv.')
    return f'blocks.{index // 2}.{DIRECTIONS[index % 2]}.{rest}'


def _published_key_to_module(key: str, version: str) -> str:
    """Rename one published key to the module layout; module keys come back as they are."""
    block = re.fullmatch(r'xlstm\.blocks\.(\d+)\.(xlstm|xlstm_norm)\.(.+)', key)
    if block:
        index, part, rest = int(block[1]), {'xlstm': 'layer', 'xlstm_norm': 'norm'}[block[2]], block[3]
        if version == 'v1':
            return f'blocks.{index}.{part}.{rest}'
        return f'blocks.{index // 2}.{DIRECTIONS[index % 2]}.{part}.{re.sub("^conv1d", "conv", rest)}'
    after, before_head = ('norm', 'legacy_norm') if version == 'v2' else ('legacy_norm', 'norm')
    key = re.sub(r'^xlstm\.post_blocks_norm\.', f'{after}.', key)
    key = re.sub(r'^head\.0\.', f'{before_head}.', key)
    return re.sub(r'^head\.1\.', 'head.', key)


def _module_key_to_published(key: str, version: str, with_pool_norm: bool) -> str:
    """Rename one module key to the published layout."""
    paired = re.fullmatch(rf'blocks\.(\d+)\.({"|".join(DIRECTIONS)})\.(layer|norm)\.(.+)', key)
    if paired:
        index, part, rest = 2 * int(paired[1]) + DIRECTIONS.index(paired[2]), paired[3], paired[4]
        return f'xlstm.blocks.{index}.{"xlstm" if part == "layer" else "xlstm_norm"}.{re.sub("^conv", "conv1d", rest)}'
    single = re.fullmatch(r'blocks\.(\d+)\.(layer|norm)\.(.+)', key)
    if single:
        return f'xlstm.blocks.{single[1]}.{"xlstm" if single[2] == "layer" else "xlstm_norm"}.{single[3]}'
    after, before_head = ('norm', 'legacy_norm') if version == 'v2' else ('legacy_norm', 'norm')
    if re.match(rf'{after}\.', key):
        return key.replace(f'{after}.', 'xlstm.post_blocks_norm.', 1)
    if re.match(rf'{before_head}\.', key):
        return key.replace(f'{before_head}.', 'head.0.', 1)
    return key.replace('head.', 'head.1.', 1) if with_pool_norm and key.startswith('head.') else key
