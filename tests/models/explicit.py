"""The layer and the backbone written out in float64 from the architecture's description, and small ones to test."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmvil.models import ViLLayer, VisionLSTM

from ..ops.definition import mlstm_by_definition


def small_backbone(**options: object) -> VisionLSTM:
    """Build a backbone of four narrow sub-blocks for 32 x 32 pixels and patches of 8."""
    settings = {'arch': {'embed_dims': 16, 'num_layers': 4}, 'img_size': 32, 'patch_size': 8}
    return VisionLSTM(**{**settings, **options})


def randomise(module: nn.Module, std: float = 0.5) -> None:
    """Draw every parameter, so that none can be left out without notice."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=std)


def explicit_layer(layer: ViLLayer, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Compute a layer token by token. Reading from the bottom right is a plain reversal of the tokens here."""
    p = dict(layer.named_parameters())
    tokens = x.flip(1) if layer.reverse else x
    up = tokens @ p['proj_up.weight'].T + p.get('proj_up.bias', 0)
    a, z = up[..., : layer.inner_dims], up[..., layer.inner_dims :]
    c = F.silu(explicit_convolution(p, a, grid))

    def project(name: str, y: Tensor) -> Tensor:
        return y @ torch.block_diag(*p[f'{name}.weight']).T + p.get(f'{name}.bias', 0)

    q, k, v = project('q_proj', c), project('k_proj', c), project('v_proj', a)
    joined = torch.cat([q, k, v], -1)
    gates = [(joined @ p[f'{name}.weight'].T + p[f'{name}.bias']).transpose(1, 2) for name in ('igate', 'fgate')]
    heads = layer.num_heads
    q, k, v = (torch.stack(y.chunk(heads, -1), 1) for y in (q, k, v))
    h = mlstm_by_definition(q, k, v, *gates)
    h = (h - h.mean(-1, keepdim=True)) / (h.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    h = torch.cat(h.unbind(1), -1) * (1 + p['head_norm.weight']) + p.get('head_norm.bias', 0)
    out = ((h + p['skip'] * c) * F.silu(z)) @ p['proj_down.weight'].T + p.get('proj_down.bias', 0)
    return out.flip(1) if layer.reverse else out


def explicit_convolution(p: dict[str, Tensor], a: Tensor, grid: tuple[int, int]) -> Tensor:
    """Convolve over the grid or along the sequence, as the kernel says; not at all without one."""
    if 'conv.weight' not in p:
        return a
    kernel, channels = p['conv.weight'], a.shape[-1]
    if kernel.dim() == 4:
        image = a.transpose(1, 2).unflatten(2, grid)
        convolved = F.conv2d(image, kernel, p['conv.bias'], padding=kernel.shape[-1] // 2, groups=channels)
        return convolved.flatten(2).transpose(1, 2)
    padded = F.pad(a.transpose(1, 2), (kernel.shape[-1] - 1, 0))
    return F.conv1d(padded, kernel, p['conv.bias'], groups=channels).transpose(1, 2)


def explicit_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Normalise the last axis."""
    normalised = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + eps).sqrt()
    return normalised * weight + (0 if bias is None else bias)


def explicit_tokens(model: VisionLSTM, image: Tensor, positions: Tensor, stride: int) -> list[Tensor]:
    """Compute the tokens after every sub-block, without the final norm."""
    patches = F.unfold(image, model.patch_size, stride=stride).transpose(1, 2)
    x = patches @ model.patch_embed.proj.weight.flatten(1).T + model.patch_embed.proj.bias + positions.flatten(1, 2)
    tokens = []
    for index, block in enumerate(model.blocks):
        assert block.layer.reverse == (index % 2 == 1)
        normalised = explicit_norm(x, 1 + block.norm.weight, block.norm.bias, 1e-5)
        x = x + explicit_layer(block.layer, normalised, positions.shape[1:3])
        tokens.append(x)
    return tokens
