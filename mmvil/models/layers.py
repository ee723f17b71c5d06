"""Small parts of the ViL backbone: norms, projections, convolutions, drop path, patches and positions."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.mlstm import autocast_is_on

__all__ = [
    'BlockDiagonalLinear',
    'CausalConv1d',
    'DepthwiseConv2d',
    'DropPath',
    'MultiHeadNorm',
    'PatchEmbed',
    'ResidualLayerNorm',
    'check_drop_path_rate',
    'patch_grid',
    'resample_positions',
    'to_pair',
]


def to_pair(value: int | Sequence[int], name: str) -> tuple[int, int]:
    """Turn a size into (height, width).

    Args:
        value: One positive int for both, or two of them.
        name: The argument's name, for the error message.

    Returns:
        (height, width).

    Raises:
        TypeError: If the value is neither an int nor two ints.
        ValueError: If a size is not positive.
    """
    pair = (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, Sequence) else ()
    if len(pair) != 2 or not all(isinstance(x, int) and not isinstance(x, bool) for x in pair):
        raise TypeError(f'{name} must be an int or a (height, width) pair of ints, got {value!r}')
    if min(pair) < 1:
        raise ValueError(f'{name} must be positive, got {value!r}')
    return pair


def check_drop_path_rate(rate: float) -> None:
    """Refuse a rate that is no number from 0 (included) to 1 (excluded).

    Raises:
        TypeError: If it is no number.
        ValueError: If it is out of range.
    """
    if not isinstance(rate, (int, float)):
        raise TypeError(f'drop_path_rate must be a number, got {rate!r}')
    if not 0.0 <= rate < 1.0:
        raise ValueError(f'drop_path_rate must be in [0, 1), got {rate}')


def patch_grid(size: tuple[int, int], patch_size: int, stride: int) -> tuple[int, int]:
    """Compute the token grid of an image.

    Args:
        size: (height, width) in pixels, each at least one patch.
        patch_size: Edge of a patch in pixels.
        stride: Distance of two patches in pixels.

    Returns:
        (rows, columns) of tokens after padding the image to a multiple of the patch.

    Raises:
        ValueError: If the image is smaller than a patch.
    """
    if min(size) < patch_size:
        raise ValueError(f'an image must be at least one patch ({patch_size} x {patch_size}) large, got {size}')
    height, width = (math.ceil(x / patch_size) * patch_size for x in size)
    return (height - patch_size) // stride + 1, (width - patch_size) // stride + 1


def resample_positions(table: Tensor, grid: tuple[int, int], mode: str = 'bicubic') -> Tensor:
    """Resample a position table to another token grid.

    Args:
        table: (1, rows, columns, D).
        grid: Wanted (rows, columns).
        mode: 'bicubic', 'bilinear' or 'nearest': pixel centres at half-integers, borders clamped, no antialiasing.

    Returns:
        (1, *grid, D) in the table's dtype; the table itself if it has that grid already.

    Source: the reference implementation resamples bicubically without antialiasing, also when it shrinks a table.
    """
    if tuple(table.shape[1:3]) == tuple(grid):
        return table
    align = {} if mode == 'nearest' else {'align_corners': False}
    channels_first = table.permute(0, 3, 1, 2)
    if table.dtype in (torch.bfloat16, torch.float16):  # interpolation weights need more than 8 bits
        channels_first = channels_first.float()
    resampled = F.interpolate(channels_first, size=tuple(grid), mode=mode, **align)
    return resampled.to(table.dtype).permute(0, 2, 3, 1)


class PatchEmbed(nn.Module):
    """Cut an image into patches and project each to a token.

    Args:
        in_channels: Channels of the image.
        embed_dims: Channels of a token.
        patch_size: Edge of a patch in pixels.
        stride: Distance of two patches in pixels.

    Source: Vision-LSTM section 3; Xavier initialisation over the flattened patch.
    """

    def __init__(self, in_channels: int, embed_dims: int, patch_size: int, stride: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, embed_dims, patch_size, stride)
        nn.init.xavier_uniform_(self.proj.weight.flatten(1))
        nn.init.zeros_(self.proj.bias)

    def forward(self, image: Tensor) -> Tensor:
        """Embed an image.

        Args:
            image: (B, C, H, W), H and W at least one patch; padded with zeros at the bottom and right to full patches.

        Returns:
            (B, rows, columns, D).

        Raises:
            TypeError: If the image is no tensor, or its dtype is not that of the weights (under autocast: not a float).
            ValueError: If the image has another number of channels, is smaller than a patch or on another device.
        """
        self._check_image(image)
        height, width = image.shape[-2:]
        # By division: the remainder of a symbolic size stops torch.compile with dynamic shapes (seen with torch 2.11).
        bottom, right = (-(-size // self.patch_size) * self.patch_size - size for size in (height, width))
        if bottom or right:
            image = F.pad(image, (0, right, 0, bottom))
        if image.is_cuda and self.proj.stride == self.proj.kernel_size:
            return self._as_matrix_product(image)
        return self.proj(image).permute(0, 2, 3, 1)

    def _as_matrix_product(self, image: Tensor) -> Tensor:
        """The convolution of patches that do not overlap: on GPUs a matrix product is several times faster."""
        amp = autocast_is_on(image.device.type)
        dtype = torch.get_autocast_dtype(image.device.type) if amp else image.dtype
        size = self.patch_size
        patches = image.unflatten(3, (-1, size)).unflatten(2, (-1, size)).permute(0, 2, 4, 1, 3, 5)
        # One pass over the image: cast, and cut into patches.
        patches = patches.to(dtype, memory_format=torch.contiguous_format, copy=True).flatten(3)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)

    def _check_image(self, image: Tensor) -> None:
        """Refuse what cannot be embedded, naming what is accepted."""
        weight = self.proj.weight
        if not isinstance(image, Tensor):
            raise TypeError(
                f'expected images as one tensor (B, {self.proj.in_channels}, H, W), got {type(image).__name__}'
            )
        if image.dim() != 4 or image.shape[1] != self.proj.in_channels:
            raise ValueError(
                f'expected images of shape (B, {self.proj.in_channels}, H, W), got shape {tuple(image.shape)}'
            )
        if not image.is_floating_point():
            raise TypeError(f'expected images of a floating-point dtype, got {image.dtype}')
        if image.dtype != weight.dtype and not autocast_is_on(image.device.type):
            raise TypeError(f'expected images of the dtype of the weights ({weight.dtype}), got {image.dtype}')
        if image.device != weight.device:
            raise ValueError(f'expected images on the device of the weights ({weight.device}), got {image.device}')
        height, width = image.shape[-2:]
        if height < self.patch_size or width < self.patch_size:
            raise ValueError(
                f'images must be at least one patch ({self.patch_size} x {self.patch_size}) large, '
                f'got {height} x {width}'
            )


class ResidualLayerNorm(nn.Module):
    """Layer norm whose stored weight is the difference from one, so that zero means identity.

    Args:
        dims: Channels.
        eps: Added to the variance.
        bias: Whether to learn a bias.
    """

    def __init__(self, dims: int, eps: float = 1e-5, bias: bool = True) -> None:
        super().__init__()
        self.dims, self.eps = dims, eps
        self.weight = nn.Parameter(torch.zeros(dims))
        self.bias = nn.Parameter(torch.zeros(dims)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis of x, any leading shape; same shape out."""
        return F.layer_norm(x, (self.dims,), 1.0 + self.weight, self.bias, self.eps)


class MultiHeadNorm(ResidualLayerNorm):
    """Layer norm over each head's channels, followed by one scale and bias for all heads' channels.

    Args:
        dims: Channels of all heads together.
        num_heads: Number of heads.
        eps: Added to the variance.
        bias: Whether to learn a bias.
    """

    def __init__(self, dims: int, num_heads: int, eps: float = 1e-5, bias: bool = True) -> None:
        super().__init__(dims, eps, bias)
        self.num_heads = num_heads

    def forward(self, heads: Tensor) -> Tensor:
        """Normalise heads (B, NH, S, DH) and join them to (B, S, NH * DH)."""
        normalised = F.layer_norm(heads, heads.shape[-1:], eps=self.eps).transpose(1, 2).flatten(2)
        scaled = normalised * (1.0 + self.weight)
        return scaled if self.bias is None else scaled + self.bias


class BlockDiagonalLinear(nn.Module):
    """Linear projection whose weight is block-diagonal with small square blocks.

    Args:
        dims: Channels in and out, a multiple of the block size.
        block_size: Edge of a block.
        bias: Whether to learn a bias.
    """

    def __init__(self, dims: int, block_size: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dims // block_size, block_size, block_size))  # [block, out, in]
        self.bias = nn.Parameter(torch.zeros(dims)) if bias else None
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Project x (..., dims); same shape out."""
        blocks = x.unflatten(-1, self.weight.shape[:2])
        projected = torch.einsum('...ni,noi->...no', blocks, self.weight).flatten(-2)
        return projected if self.bias is None else projected + self.bias


class DepthwiseConv2d(nn.Conv2d):
    """Depthwise convolution over the token grid, the same size out.

    Args:
        dims: Channels.
        kernel_size: Odd edge of the kernel.
        reverse: Read the tokens from the bottom right: that turns the grid by 180 degrees, so the kernel is turned.
    """

    def __init__(self, dims: int, kernel_size: int = 3, reverse: bool = False) -> None:
        if kernel_size % 2 != 1:
            raise ValueError(f"conv_kernel_size must be odd for conv='conv2d', got {kernel_size}")
        super().__init__(dims, dims, kernel_size, padding=kernel_size // 2, groups=dims)
        self.reverse = reverse

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Convolve tokens (B, S, E) lying on grid (rows, columns); same shape out."""
        image = tokens.unflatten(1, grid).permute(0, 3, 1, 2)
        weight = self.weight.flip(2, 3) if self.reverse else self.weight
        return self._conv_forward(image, weight, self.bias).permute(0, 2, 3, 1).flatten(1, 2)


class CausalConv1d(nn.Conv1d):
    """Depthwise causal convolution along the token sequence.

    Args:
        dims: Channels.
        kernel_size: Number of tokens seen: the current one and its predecessors in reading order.
        reverse: Read the tokens from the end: the successors are seen.
    """

    def __init__(self, dims: int, kernel_size: int = 4, reverse: bool = False) -> None:
        super().__init__(dims, dims, kernel_size, groups=dims)
        self.reverse = reverse

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Convolve tokens (B, S, E); the grid is not needed; same shape out."""
        span = self.kernel_size[0] - 1
        sequence = F.pad(tokens.transpose(1, 2), (0, span) if self.reverse else (span, 0))
        weight = self.weight.flip(2) if self.reverse else self.weight
        return self._conv_forward(sequence, weight, self.bias).transpose(1, 2)


class DropPath(nn.Module):
    """Drop a residual branch for whole samples in training, scaling the others up.

    Args:
        rate: Probability of dropping a sample's branch, in [0, 1).

    Source: stochastic depth (arXiv 1603.09382), per sample.
    """

    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        check_drop_path_rate(rate)
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """Return x (B, ...) with the branches of some samples set to zero."""
        factors = self.factors(x)
        return x if factors is None else x * factors.view(-1, *[1] * (x.dim() - 1))

    def factors(self, x: Tensor) -> Tensor | None:
        """Draw what the branch of each sample is multiplied by, (B,) in x's dtype; None if nothing is dropped."""
        if self.rate == 0.0 or not self.training:
            return None
        return x.new_empty(x.shape[0]).bernoulli_(1.0 - self.rate) / (1.0 - self.rate)

    def extra_repr(self) -> str:
        """Show the rate when the module is printed."""
        return f'rate={self.rate}'
