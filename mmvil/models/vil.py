"""The Vision-LSTM backbone."""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from mmengine.logging import print_log
from mmengine.model import BaseModule, PretrainedInit
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..registry import MODELS
from .block import ViLBlock, run_joined
from .checkpoint import load_strictly, read_checkpoint, select_prefix, unwrap_state_dict
from .graphed import TrainingGraphs
from .layers import PatchEmbed, ResidualLayerNorm, check_drop_path_rate, patch_grid, resample_positions, to_pair

__all__ = ['VisionLSTM']


@MODELS.register_module(name=['VisionLSTM', 'ViL'])
class VisionLSTM(BaseModule):
    """Vision-LSTM: an isotropic backbone of mLSTM blocks that read the patches in alternating directions.

    Shapes of the outputs, one per entry of `out_indices` (D channels, grid of Gh x Gw = S tokens):

    | out_type | shape |
    |---|---|
    | 'featmap' | (B, D, Gh, Gw) |
    | 'raw' | (B, S, D) |
    | 'bilateral_concat' | (B, 2D): first and last token |
    | 'bilateral_avg' | (B, D): mean of first and last token |
    | 'avg' | (B, D): mean of all tokens |

    Args:
        arch: 'tiny', 'small', 'base', for v1 also 'tiny_plus' and 'small_plus'; or a dict with `embed_dims` and
            `num_layers` (sub-blocks), and optionally `expand_ratio`, `num_heads` and `qkv_block_size`.
        version: 'v2' (the paper's final model: 2-D convolutions, biases) or 'v1' (the first release: causal 1-D
            convolutions, no biases). It sets the defaults of `conv`, `conv_kernel_size`, `proj_bias`, `norm_bias`.
        img_size: Pixels, an int or (height, width): the grid that the position table is made for. Other sizes can be
            fed at any time.
        patch_size: Edge of a patch in pixels.
        patch_stride: Distance of two patches in pixels. Default: patch_size.
        in_channels: Channels of the image.
        out_indices: Sub-blocks whose outputs are returned, in this order; negative ones count from the end. Sub-blocks
            after the last one are not built.
        out_type: See the table.
        final_norm: Whether the output of the last sub-block is normalised. Other outputs never are.
        pool_norm: Whether pooled outputs are normalised, as the head of the published classifiers expects.
        drop_path_rate: Probability of dropping a sub-block for a sample in training, in [0, 1).
        drop_path_decay: Let the rate grow linearly from 0 to `drop_path_rate` over the sub-blocks.
        frozen_stages: -1 freezes nothing, 0 the patch and position embedding, n also the first n sub-blocks.
        with_cp: Recompute the sub-blocks' activations in the backward pass to save memory.
        interpolate_mode: How the position table is resampled: 'bicubic', 'bilinear' or 'nearest'.
        mlstm_backend: Backend of `mmvil.ops.mlstm`.
        fused: Run the sub-blocks on fused kernels where a GPU can; where it cannot, the plain modules run, and one log
            line says why.
        cuda_graphs: Replay training passes on a GPU as CUDA graphs, from the third batch of a shape on: a host that
            launches kernels more slowly than the GPU runs them is then no limit. See `mmvil.models.graphed`.
        pos_grid: Rows and columns of the position table, an int or a pair. Default: the token grid of `img_size`. With
            another one the table is resampled in each forward, as the published stride-8 models do.
        conv: 'conv2d', 'causal_conv1d', None (no convolution) or 'default' (as the version says).
        conv_kernel_size: Kernel size of the convolution. Default: 3 for 'conv2d', 4 for 'causal_conv1d'.
        proj_bias: Whether projections have biases. Default: as the version says.
        norm_bias: Whether block, head and final norms have biases. Default: as the version says.
        init_mode: 'original' (used for all published models) or 'original-fixed', which divides the initial scale of
            the down-projections by the number of sub-blocks.
        init_cfg: mmengine initialisation config. `dict(type='Pretrained', checkpoint=..., prefix='backbone.')` is
            strict: a missing key is an error.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option is unknown or out of range; the message says what is accepted.

    Source: Vision-LSTM (arXiv 2406.04303).

    Example:
        >>> import torch
        >>> backbone = VisionLSTM(arch=dict(embed_dims=32, num_layers=4), img_size=64, out_indices=(1, 3))
        >>> [tuple(feature.shape) for feature in backbone(torch.randn(1, 3, 48, 80))]
        [(1, 32, 3, 5), (1, 32, 3, 5)]
    """

    arch_zoo: ClassVar[dict[str, dict[str, int]]] = {
        'tiny': {'embed_dims': 192, 'num_layers': 24},
        'small': {'embed_dims': 384, 'num_layers': 24},
        'base': {'embed_dims': 768, 'num_layers': 24},
        'tiny_plus': {'embed_dims': 192, 'num_layers': 29},
        'small_plus': {'embed_dims': 384, 'num_layers': 26},
    }
    version_zoo: ClassVar[dict[str, dict]] = {
        'v1': {'conv': 'causal_conv1d', 'proj_bias': False, 'norm_bias': False},
        'v2': {'conv': 'conv2d', 'proj_bias': True, 'norm_bias': True},
    }
    # The released modules of the two versions have these the other way round; each version's files expect its own.
    norm_eps: ClassVar[dict[str, dict[str, float]]] = {
        'v1': {'final': 1e-5, 'pool': 1e-6},
        'v2': {'final': 1e-6, 'pool': 1e-5},
    }
    OUT_TYPES = ('featmap', 'raw', 'bilateral_concat', 'bilateral_avg', 'avg')
    POOLED_OUT_TYPES = ('bilateral_concat', 'bilateral_avg', 'avg')

    def __init__(
        self,
        arch: str | dict = 'tiny',
        version: str = 'v2',
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        patch_stride: int | None = None,
        in_channels: int = 3,
        out_indices: int | Sequence[int] = -1,
        out_type: str = 'featmap',
        final_norm: bool = True,
        pool_norm: bool = True,
        drop_path_rate: float = 0.0,
        drop_path_decay: bool = False,
        frozen_stages: int = -1,
        with_cp: bool = False,
        interpolate_mode: str = 'bicubic',
        mlstm_backend: str = 'auto',
        fused: bool = True,
        cuda_graphs: bool = False,
        pos_grid: int | Sequence[int] | None = None,
        conv: str | None = 'default',
        conv_kernel_size: int | None = None,
        proj_bias: bool | None = None,
        norm_bias: bool | None = None,
        init_mode: str = 'original',
        init_cfg: dict | list | None = None,
    ) -> None:
        super().__init__(init_cfg)
        _check_choice('version', version, self.version_zoo)
        _check_choice('out_type', out_type, self.OUT_TYPES)
        _check_choice('interpolate_mode', interpolate_mode, ('bicubic', 'bilinear', 'nearest'))
        _check_choice('init_mode', init_mode, ('original', 'original-fixed'))
        settings = self._resolve_arch(arch, version)
        self.embed_dims: int = settings.pop('embed_dims')
        self.num_layers: int = settings.pop('num_layers')
        self.version, self.out_type, self.with_cp = version, out_type, with_cp
        self.interpolate_mode = interpolate_mode
        self._graphs = TrainingGraphs() if cuda_graphs else None
        self.out_indices = _resolve_out_indices(out_indices, self.num_layers)
        self.frozen_stages = _check_frozen_stages(frozen_stages, self.num_layers)
        self.patch_size = _check_positive('patch_size', patch_size)
        self.patch_stride = _check_positive('patch_stride', patch_size if patch_stride is None else patch_stride)

        self.patch_embed = PatchEmbed(
            _check_positive('in_channels', in_channels), self.embed_dims, self.patch_size, self.patch_stride
        )
        grid = patch_grid(to_pair(img_size, 'img_size'), self.patch_size, self.patch_stride)
        grid = grid if pos_grid is None else to_pair(pos_grid, 'pos_grid')
        self.pos_embed = nn.Parameter(torch.zeros(1, *grid, self.embed_dims))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.register_load_state_dict_pre_hook(_resample_loaded_positions)

        defaults = self.version_zoo[version]
        conv = defaults['conv'] if conv == 'default' else conv
        norm_bias = defaults['norm_bias'] if norm_bias is None else norm_bias
        layer_options = {
            **settings,
            'conv': conv,
            'conv_kernel_size': (4 if conv == 'causal_conv1d' else 3) if conv_kernel_size is None else conv_kernel_size,
            'proj_bias': defaults['proj_bias'] if proj_bias is None else proj_bias,
            'norm_bias': norm_bias,
            'mlstm_backend': mlstm_backend,
            'fused': fused,
            'init_num_blocks': self.num_layers if init_mode == 'original-fixed' else 1,
        }
        rates = _drop_path_rates(drop_path_rate, drop_path_decay, self.num_layers)
        self.blocks = nn.ModuleList(
            ViLBlock(self.embed_dims, reverse=index % 2 == 1, drop_path_rate=rates[index], **layer_options)
            for index in range(max(self.out_indices) + 1)
        )
        eps = self.norm_eps[version]
        ends_with_norm = final_norm and len(self.blocks) == self.num_layers
        self.norm = ResidualLayerNorm(self.embed_dims, eps['final'], norm_bias) if ends_with_norm else None
        pooled = pool_norm and out_type in self.POOLED_OUT_TYPES
        self.pool_norm = nn.LayerNorm(self.out_channels, eps['pool']) if pooled else None
        self._freeze()

    @property
    def out_channels(self) -> int:
        """Channels of each output."""
        return 2 * self.embed_dims if self.out_type == 'bilateral_concat' else self.embed_dims

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Compute the features of a batch of images.

        Args:
            x: Images, (B, C, H, W), any H and W of at least one patch. They are padded with zeros at the bottom and
                right to full patches; the grid has floor((H_padded - patch) / stride) + 1 rows, likewise columns.

        Returns:
            One tensor per entry of `out_indices`, of the shape given in the class's table.

        Raises:
            TypeError: If the images are no tensor of the weights' dtype (under autocast: of a floating-point dtype).
            ValueError: If the images have another number of channels, are smaller than a patch or on another device.
        """
        return self._run(x) if self._graphs is None else self._graphs(self, self._run, x)

    def _run(self, x: Tensor) -> tuple[Tensor, ...]:
        """The forward pass, launched kernel by kernel."""
        tokens = self.patch_embed(x)
        grid = (tokens.shape[1], tokens.shape[2])
        positions = resample_positions(self.pos_embed, grid, self.interpolate_mode)
        # Under autocast the residual stream is float32 from here on; token-major, or every norm would copy it.
        tokens = (tokens + positions).flatten(1, 2).contiguous()
        outputs, blocks, done = {}, list(self.blocks), 0
        for wanted in sorted(self.out_indices):  # there is no block behind the last one
            while done <= wanted:
                if self.with_cp and torch.is_grad_enabled():
                    tokens, joined = checkpoint(blocks[done], tokens, grid, use_reentrant=False), 1
                else:
                    tokens, joined = run_joined(blocks[done : wanted + 1], tokens, grid)
                if not joined:
                    tokens, joined = blocks[done](tokens, grid), 1
                done += joined
            outputs[wanted] = self._format_output(tokens, grid, wanted)
        return tuple(outputs[index] for index in self.out_indices)

    def _format_output(self, tokens: Tensor, grid: tuple[int, int], index: int) -> Tensor:
        """Turn the tokens after sub-block `index` into the wanted kind of output."""
        if self.out_type.startswith('bilateral'):
            tokens = tokens[:, :: max(tokens.shape[1] - 1, 1)]  # the first and the last: no other needs a norm
        if self.norm is not None and index == self.num_layers - 1:
            tokens = self.norm(tokens)
        if self.out_type == 'raw':
            return tokens
        if self.out_type == 'featmap':
            return tokens.transpose(1, 2).unflatten(2, grid).contiguous()
        if self.out_type == 'avg':
            pooled = tokens.mean(1)
        else:
            first, last = tokens[:, 0], tokens[:, -1]
            pooled = torch.cat([first, last], -1) if self.out_type == 'bilateral_concat' else (first + last) / 2
        return pooled if self.pool_norm is None else self.pool_norm(pooled)

    def init_weights(self) -> None:
        """Apply `init_cfg`. A 'Pretrained' entry is loaded strictly.

        Raises:
            ValueError: A pretrained checkpoint cannot be read, or lacks a key, or holds one that is unknown.
        """
        configs = [self.init_cfg] if isinstance(self.init_cfg, Mapping) else list(self.init_cfg or [])
        pretrained = [config for config in configs if config.get('type') in ('Pretrained', PretrainedInit)]
        if self.is_init or not pretrained:
            super().init_weights()
            return
        original, self.init_cfg = self.init_cfg, [config for config in configs if config not in pretrained]
        try:
            super().init_weights()
        finally:
            self.init_cfg = original
        for config in pretrained:
            print_log(f'load {config.get("prefix") or "all keys"} from {config["checkpoint"]}', logger='current')
            state_dict = unwrap_state_dict(read_checkpoint(config['checkpoint']))
            if config.get('prefix'):
                state_dict = select_prefix(state_dict, config['prefix'])
            self.load_pretrained(state_dict)

    def load_pretrained(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load a backbone's weights strictly, resampling the position table if its grid differs.

        Args:
            state_dict: Keys of this module -> tensors; not changed. It may also hold what this backbone was built
                without: a head, final or pooled norm, and sub-blocks after the last output.

        Raises:
            ValueError: A key is missing, unknown or of another shape.
        """
        optional = [f'blocks.{index}.' for index in range(len(self.blocks), self.num_layers)]
        optional += [f'{name}.' for name in ('norm', 'pool_norm') if getattr(self, name) is None]
        load_strictly(self, state_dict, optional=[*optional, 'head.'])

    def train(self, mode: bool = True) -> 'VisionLSTM':
        """Set the training mode; frozen stages stay in evaluation mode."""
        super().train(mode)
        self._freeze()
        return self

    def _freeze(self) -> None:
        """Switch off gradients and training behaviour of the first `frozen_stages` stages."""
        if self.frozen_stages < 0:
            return
        self.pos_embed.requires_grad_(False)
        for module in (self.patch_embed, *self.blocks[: self.frozen_stages]):
            module.eval()
            module.requires_grad_(False)

    def get_layer_depth(self, param_name: str, prefix: str = '') -> tuple[int, int]:
        """Tell how deep a parameter sits, for layer-wise learning-rate decay.

        Args:
            param_name: Full name of the parameter.
            prefix: What the names of this backbone's parameters start with, for example 'backbone.'.

        Returns:
            (depth, number of depths). The patch and position embedding have depth 0, the j-th pair of sub-blocks depth
            j, and everything after them, inside or outside of the backbone, the last depth.

        Source: the reference's segmentation recipe decays by pairs of sub-blocks.
        """
        num_depths = (self.num_layers + 1) // 2 + 2
        name = param_name.removeprefix(prefix)
        if not param_name.startswith(prefix):
            return num_depths - 1, num_depths
        if name == 'pos_embed' or name.startswith('patch_embed.'):
            return 0, num_depths
        if name.startswith('blocks.'):
            return int(name.split('.')[1]) // 2 + 1, num_depths
        return num_depths - 1, num_depths

    @classmethod
    def _resolve_arch(cls, arch: str | dict, version: str) -> dict:
        """Turn `arch` into settings: embed_dims, num_layers and options of the layer."""
        if isinstance(arch, str):
            names = [name for name in cls.arch_zoo if version == 'v1' or not name.endswith('_plus')]
            if arch not in names:
                raise ValueError(f'arch must be a dict or, for version {version!r}, one of {names}, got {arch!r}')
            return dict(cls.arch_zoo[arch])
        if not isinstance(arch, Mapping):
            raise TypeError(f'arch must be a name or a dict, got {type(arch).__name__}')
        required, allowed = {'embed_dims', 'num_layers'}, {'expand_ratio', 'num_heads', 'qkv_block_size'}
        if not required <= set(arch) <= required | allowed:
            raise ValueError(
                f'an arch dict needs {sorted(required)} and may have {sorted(allowed)}, got {sorted(map(str, arch))}'
            )
        settings = dict(arch)
        _check_positive('embed_dims', settings['embed_dims'])
        num_layers = _check_positive('num_layers', settings['num_layers'])
        if version == 'v2' and num_layers % 2:
            raise ValueError(f'version v2 has pairs of sub-blocks: num_layers must be even, got {num_layers}')
        return settings


def _resample_loaded_positions(module: VisionLSTM, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Fit the position table of a state dict that is about to be loaded to the module's grid."""
    key = f'{prefix}pos_embed'
    table = state_dict.get(key)
    own = module.pos_embed
    if table is None or table.shape == own.shape or table.dim() != 4 or table.shape[-1] != own.shape[-1]:
        return
    grid = (own.shape[1], own.shape[2])
    print_log(f'resample the position table from {tuple(table.shape[1:3])} to {grid} tokens', logger='current')
    state_dict[key] = resample_positions(table.double(), grid, module.interpolate_mode).to(table.dtype)


def _check_choice(name: str, value: object, choices: Sequence[str] | Mapping[str, object]) -> None:
    """Refuse a value that is not among the choices."""
    if value not in list(choices):
        raise ValueError(f'{name} must be one of {list(choices)}, got {value!r}')


def _check_positive(name: str, value: int) -> int:
    """Refuse anything but a positive int."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f'{name} must be a positive int, got {value!r}')
    return value


def _resolve_out_indices(out_indices: int | Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Turn out_indices into distinct non-negative indices, in the caller's order."""
    indices = list(out_indices) if isinstance(out_indices, Sequence) else [out_indices]
    if not indices or not all(isinstance(index, int) and not isinstance(index, bool) for index in indices):
        raise TypeError(f'out_indices must be an int or a non-empty sequence of ints, got {out_indices!r}')
    if not all(-num_layers <= index < num_layers for index in indices):
        raise ValueError(f'out_indices must be from {-num_layers} to {num_layers - 1}, got {out_indices!r}')
    resolved = tuple(index % num_layers for index in indices)
    if len(set(resolved)) != len(resolved):
        raise ValueError(f'out_indices must be distinct, got {out_indices!r}')
    return resolved


def _check_frozen_stages(frozen_stages: int, num_layers: int) -> int:
    """Refuse a frozen_stages that is out of range."""
    if not isinstance(frozen_stages, int) or isinstance(frozen_stages, bool) or not -1 <= frozen_stages <= num_layers:
        raise ValueError(f'frozen_stages must be an int from -1 to {num_layers}, got {frozen_stages!r}')
    return frozen_stages


def _drop_path_rates(rate: float, decay: bool, num_layers: int) -> list[float]:
    """Compute the drop path rate of each sub-block."""
    check_drop_path_rate(rate)
    if not decay:
        return [rate] * num_layers
    return [rate * index / max(num_layers - 1, 1) for index in range(num_layers)]
