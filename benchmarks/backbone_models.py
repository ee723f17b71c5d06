"""Models of the backbone benchmark, what they are asked to do, and what is exact."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mmvil.models import VisionLSTM

__all__ = [
    'PATCH',
    'SETTLING_CALLS',
    'build_deit',
    'build_vil',
    'difference',
    'draw_weights',
    'features',
    'forward_work',
    'half_work',
    'loop_work',
    'references',
    'relative_errors',
    'results',
    'settled',
    'train_work',
]

PATCH = 16
SETTLING_CALLS = 12
"""Calls before eager launches are timed or compared: all blocks' are repeated as one by then."""


def build_vil(model: str, size: str, pixels: int, **options: object) -> VisionLSTM:
    """Build a ViL variant with the pooled features that its classifier uses."""
    backend = 'parallel' if model == 'parallel' else 'auto'
    options |= {'arch': size, 'img_size': pixels, 'patch_size': PATCH, 'out_type': 'bilateral_concat'}
    return VisionLSTM(**options, fused=model == 'fused', mlstm_backend=backend)


def build_deit(size: str, pixels: int) -> tuple[nn.Module, str]:
    """Build DeiT without a classifier, and say whose it is."""
    try:
        import timm
    except ImportError:
        import mmpretrain
        from mmpretrain.models.backbones import VisionTransformer

        options = {'arch': f'deit-{size}', 'img_size': pixels, 'patch_size': PATCH}
        return VisionTransformer(**options), f'mmpretrain {mmpretrain.__version__}'
    model = timm.create_model(f'deit_{size}_patch16_224', img_size=pixels, num_classes=0)
    return model, f'timm {timm.__version__}'


def features(output: object) -> Tensor:
    """The one tensor that a backbone returns."""
    return output[-1] if isinstance(output, tuple | list) else output


def weighted_sum(x: Tensor) -> Tensor:
    """A loss that depends on every element differently."""
    return (x * torch.linspace(-1, 1, x.numel(), device=x.device, dtype=x.dtype).view_as(x)).sum()


def draw_weights(model: nn.Module) -> None:
    """Move all parameters off their start values, where gates and biases would be zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator).to(parameter.device))


def results(model: nn.Module, image: Tensor, autocast: bool) -> list[Tensor]:
    """Features and the gradients of all parameters, on the host as float64."""
    with torch.autocast(image.device.type, torch.bfloat16, enabled=autocast):
        out = features(model(image))
    gradients = torch.autograd.grad(weighted_sum(out), list(model.parameters()))
    return [x.detach().double().cpu() for x in (out, *gradients)]


def settled(work: Callable[[], Tensor]) -> Tensor:
    """What repeated inference gives once it has its last form, on the host as float64."""
    for _ in range(SETTLING_CALLS):
        out = work()
    return out.detach().double().cpu()


def difference(replay: Callable[[], Tensor], work: Callable[[], Tensor]) -> float:
    """Relative L2 difference of what a captured batch gives from what its kernels give launched one by one."""
    (error,) = relative_errors([replay().double().cpu()], [work().double().cpu()])
    return float(f'{error:.2e}')


def relative_errors(actual: list[Tensor], exact: list[Tensor]) -> list[float]:
    """Relative L2 error of each tensor."""
    return [((x - y).norm() / y.norm().clamp(min=1e-300)).item() for x, y in zip(actual, exact, strict=True)]


def references(size: str, pixels: int, state: dict[str, Tensor]) -> tuple[list[Tensor], list[float], float, Tensor]:
    """Exact results for one image, the rounding errors of plain torch, also with bfloat16 weights, and the image."""
    image = torch.randn(1, 3, pixels, pixels, generator=torch.Generator().manual_seed(1)).cuda()
    plain = build_vil('plain', size, pixels).cuda()
    plain.load_state_dict(state)
    for block in plain.blocks:
        block.layer.mlstm_backend = 'chunkwise'
    plain.with_cp = True
    rounded = results(plain, image, autocast=True)
    half = half_work(copy.deepcopy(plain).bfloat16(), image)().double().cpu()
    exact = results(plain.double(), image.double(), autocast=False)
    return exact, relative_errors(rounded, exact), *relative_errors([half], exact[:1]), image


def forward_work(model: nn.Module, images: Tensor) -> Callable[[], object]:
    """Inference as one piece of work."""

    def work() -> Tensor:
        with torch.no_grad(), torch.autocast('cuda', torch.bfloat16):
            return features(model(images))

    return work


def half_work(model: nn.Module, images: Tensor) -> Callable[[], object]:
    """Inference with weights and images in bfloat16."""
    images = images.bfloat16()

    def work() -> Tensor:
        with torch.no_grad():
            return features(model(images))

    return work


def loop_work(model: nn.Module, images: Tensor) -> Callable[[], object]:
    """A training step without the optimizer's, as a training loop does it."""

    def work() -> None:
        model.zero_grad()
        with torch.autocast('cuda', torch.bfloat16):
            loss = weighted_sum(features(model(images)).float())
        loss.backward()

    return work


def train_work(model: nn.Module, images: Tensor) -> Callable[[], object]:
    """Forward and backward as one piece of work."""
    parameters = list(model.parameters())

    def work() -> tuple[Tensor, ...]:
        with torch.autocast('cuda', torch.bfloat16):
            loss = weighted_sum(features(model(images)).float())
        return torch.autograd.grad(loss, parameters)

    return work
