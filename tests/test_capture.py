"""Inference captured as a CUDA graph against the same model run as ever."""

import pytest
import torch
from torch import Tensor, nn

import mmvil
from mmvil.models import VisionLSTM

OPTIONS = {'arch': {'embed_dims': 64, 'num_layers': 4}, 'img_size': 64, 'out_indices': (1, 3)}


def backbone(**options: object) -> VisionLSTM:
    """A small backbone whose gates matter."""
    model = VisionLSTM(**{**OPTIONS, **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


def test_what_cannot_be_captured_is_refused() -> None:
    model = backbone()
    with pytest.raises(ValueError, match=r'example on a CUDA device, got one on cpu'):
        mmvil.capture_inference(model, torch.zeros(1, 3, 64, 64))
    with pytest.raises(TypeError, match=r'example must be a torch\.Tensor, got list'):
        mmvil.capture_inference(model, [1])


@pytest.mark.gpu
def test_wrong_models_and_inputs_are_refused() -> None:
    image = torch.randn(2, 3, 64, 64, device='cuda')
    with pytest.raises(ValueError, match=r"device of the example, cuda:0, got \['cpu'\]"):
        mmvil.capture_inference(backbone(), image)
    with pytest.raises(ValueError, match='training mode'):
        mmvil.capture_inference(backbone().cuda().train(), image)
    run = mmvil.capture_inference(backbone().cuda(), image)
    for other in (image[:1], torch.randn(2, 3, 64, 80, device='cuda'), image.half(), image.cpu()):
        with pytest.raises(ValueError, match=r'captured for \(2, 3, 64, 64\) torch.float32 on cuda:0, got '):
            run(other)
    with pytest.raises(TypeError, match='got NoneType'):
        run(None)

    class Odd(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, str]:
            return x * 2, 'text'

    with pytest.raises(TypeError, match='can be captured, got str'):
        mmvil.capture_inference(Odd().eval(), image)


@pytest.mark.gpu
@pytest.mark.parametrize('fused', [False, True], ids=['plain', 'fused'])
@pytest.mark.parametrize('dtype', [None, torch.bfloat16], ids=['float32', 'autocast'])
def test_replays_give_what_the_model_gives(fused: bool, dtype: torch.dtype | None) -> None:
    model = backbone(fused=fused).cuda()
    first, second = torch.randn(2, 2, 3, 48, 80, device='cuda')
    with torch.autocast('cuda', dtype, enabled=dtype is not None):
        run = mmvil.capture_inference(model, first)
    kept = run(first)
    for image in (second, first.flip(-1), first.to(memory_format=torch.channels_last)):
        with torch.no_grad(), torch.autocast('cuda', dtype, enabled=dtype is not None):
            expected = model(image.contiguous())
        for one, other in zip(run(image), expected, strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)
    assert all(torch.equal(one, other) for one, other in zip(kept, run(first), strict=True))  # copies were handed out


@pytest.mark.gpu
def test_changed_weights_are_seen() -> None:
    model, image = backbone(fused=True).cuda(), torch.randn(1, 3, 64, 64, device='cuda')
    with torch.autocast('cuda', torch.bfloat16):
        model(image)  # autocast now holds casts of the weights
        run = mmvil.capture_inference(model, image)
    before = run(image)[-1]
    for parameter in model.parameters():
        parameter.data.mul_(1.1)
    with torch.no_grad(), torch.autocast('cuda', torch.bfloat16):
        expected = model(image)[-1]
    assert torch.equal(run(image)[-1], expected)
    assert not torch.equal(before, expected)
    model.half()  # the graph goes on with what it was captured with
    assert torch.equal(run(image)[-1], expected)


@pytest.mark.gpu
def test_own_memory_on_request() -> None:
    model = backbone().cuda()
    first, second = torch.randn(2, 1, 3, 64, 64, device='cuda')
    run = mmvil.capture_inference(model, first, copy=False)
    kept = run(first)[-1]
    value = kept.clone()
    assert run(second)[-1] is kept
    assert not torch.equal(kept, value)


@pytest.mark.gpu
def test_a_whole_classifier() -> None:
    pytest.importorskip('mmpretrain')
    from mmengine.registry import MODELS

    backbone_config = {'type': 'mmvil.VisionLSTM', **OPTIONS, 'out_indices': -1, 'out_type': 'bilateral_concat'}
    head = {'type': 'mmpretrain.LinearClsHead', 'num_classes': 7, 'in_channels': 128}
    model = MODELS.build({'type': 'mmpretrain.ImageClassifier', 'backbone': backbone_config, 'head': head})
    model, image = model.cuda().eval(), torch.randn(2, 3, 64, 64, device='cuda')
    run = mmvil.capture_inference(model, image, mode='tensor')
    with torch.no_grad():
        assert torch.equal(run(image), model(image, mode='tensor'))
