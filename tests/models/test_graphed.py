"""Training passes replayed as CUDA graphs against the same passes launched kernel by kernel: equal to the last bit."""

import copy
import pickle
from unittest import mock

import pytest
import torch
from torch import Tensor

from mmvil.models import VisionLSTM, graphed
from mmvil.models.fused import why_not_fused

SHAPE = (4, 3, 48, 32)
PASSES = graphed.EAGER_PASSES + 3


def build(**options: object) -> VisionLSTM:
    """A small ViL on the GPU, in training; the same weights each time."""
    torch.manual_seed(0)
    options = {'arch': {'embed_dims': 64, 'num_layers': 4}, 'img_size': 64, 'patch_size': 8, **options}
    return VisionLSTM(**options).cuda().train()


def captured(model: VisionLSTM) -> int:
    """Kinds of inputs that a model has graphs for."""
    return len(model._graphs._passes)


def train(
    model: VisionLSTM, shapes: list[tuple], dtype: torch.dtype | None = torch.bfloat16, accumulate: int = 1
) -> list[Tensor]:
    """Losses of SGD steps, one per `accumulate` shapes, and the weights afterwards."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(1)
    torch.cuda.manual_seed(2)
    losses = []
    for step, shape in enumerate(shapes):
        images = torch.randn(shape, generator=generator).cuda()
        with torch.autocast('cuda', dtype or torch.bfloat16, enabled=dtype is not None):
            features = model(images)
            weights = [torch.linspace(-1, 1, x[0].numel(), device='cuda').view_as(x[0]) for x in features]
            loss = sum((x.float() * w).square().mean() for x, w in zip(features, weights, strict=True))
        loss.backward()
        losses.append(loss.detach())
        if (step + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    return [*losses, *model.parameters()]


def assert_same_training(kinds: int, shapes: list[tuple], accumulate: int = 1, **options: object) -> None:
    """Train twice; the graphs must have been used, and change nothing."""
    eager, replayed = build(**options), build(cuda_graphs=True, **options)
    expected, actual = (train(model, shapes, accumulate=accumulate) for model in (eager, replayed))
    assert captured(replayed) == kinds
    assert why_not_fused(eager.blocks[0], torch.zeros(1, 1, 64, device='cuda')) == (
        None if options.get('fused', True) else 'it is switched off'
    )
    if options.get('fused', True):
        assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))
    else:  # torch's own kernels differ from run to run
        torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-3)


def test_nothing_changes_on_a_cpu() -> None:
    torch.manual_seed(0)
    model = VisionLSTM(arch={'embed_dims': 32, 'num_layers': 2}, img_size=32, cuda_graphs=True)
    image = torch.randn(2, 3, 32, 32)
    first = model(image)[0]
    for _ in range(PASSES):
        (again,) = model(image)
    again.sum().backward()
    assert torch.equal(first, again)
    assert captured(model) == 0
    assert model.pos_embed.grad is not None


def test_copies_begin_anew() -> None:
    model = VisionLSTM(arch={'embed_dims': 32, 'num_layers': 2}, img_size=32, cuda_graphs=True)
    assert not any('graph' in key for key in model.state_dict())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other._graphs is not model._graphs
        assert torch.equal(other(torch.ones(1, 3, 32, 32))[0], model(torch.ones(1, 3, 32, 32))[0])


@pytest.mark.gpu
@pytest.mark.parametrize(
    'options',
    [{}, {'drop_path_rate': 0.5}, {'fused': False}, {'frozen_stages': 2}, {'out_indices': (1, 3), 'version': 'v1'}],
    ids=lambda options: ' '.join(options) or 'default',
)
def test_training_is_the_same(options: dict) -> None:
    assert_same_training(1, [SHAPE] * PASSES, **options)


@pytest.mark.gpu
def test_gradients_accumulate() -> None:
    assert_same_training(1, [SHAPE] * 3 * PASSES, accumulate=3, drop_path_rate=0.2)


@pytest.mark.gpu
def test_some_shapes_are_captured_and_others_run() -> None:
    shapes = [SHAPE, (4, 3, 64, 64), (2, 3, 40, 40)]
    with mock.patch.object(graphed, 'print_log') as log:
        assert_same_training(2, shapes * PASSES)
    assert [call.args[0] for call in log.call_args_list] == [
        'training passes of (2, 3, 40, 40) run without CUDA graphs: there are more than 2 shapes of inputs'
    ]


@pytest.mark.gpu
def test_a_pass_that_waits_for_its_backward_keeps_its_activations() -> None:
    found = []
    for options in ({}, {'cuda_graphs': True}):
        model = build(**options)
        train(model, [SHAPE] * PASSES, dtype=None)
        assert not options or captured(model) == 1
        images = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(3)).cuda()
        first, second = model(images[0])[0], model(images[1])[0]
        (second * images[1].mean()).square().sum().backward()
        first.square().sum().backward()
        found.append([first, second, *(p.grad for p in model.parameters())])
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


@pytest.mark.gpu
def test_forgotten_passes_do_not_stop_replays() -> None:
    model = build(cuda_graphs=True)
    train(model, [SHAPE] * PASSES, dtype=None)
    (captured_pass,) = model._graphs._passes.values()
    image = torch.randn(SHAPE, device='cuda')
    kept = model(image)
    assert captured_pass.busy
    del kept
    assert not captured_pass.busy
    loss = model(image)[0].square().sum()
    loss.backward(retain_graph=True)
    assert not captured_pass.busy
    with pytest.raises(RuntimeError, match='activations of this pass are gone; use cuda_graphs=False'):
        loss.backward()


@pytest.mark.gpu
def test_weights_that_move_are_captured_again() -> None:
    model = build(cuda_graphs=True)
    train(model, [SHAPE] * PASSES)
    before = dict(model._graphs._passes)
    model.cpu()
    model.cuda()  # not in place
    expected = build()
    expected.load_state_dict(model.state_dict())
    actual, expected = (train(x, [SHAPE] * PASSES) for x in (model, expected))
    assert all(torch.equal(x, y) for x, y in zip(actual, expected, strict=True))
    assert captured(model) == 1
    assert list(model._graphs._passes) != list(before) or model._graphs._passes != before


@pytest.mark.gpu
def test_evaluation_and_inference_run_as_usual() -> None:
    model = build(cuda_graphs=True)
    image = torch.randn(SHAPE, device='cuda')
    with torch.no_grad():
        for _ in range(PASSES):
            model(image)
    model.eval()
    for _ in range(PASSES):
        model(image)
    assert captured(model) == 0


@pytest.mark.gpu
@pytest.mark.parametrize(('options', 'reason'), [({'with_cp': True}, 'with_cp recomputes'), ({}, 'has hooks')])
def test_what_cannot_be_captured_says_so_once(options: dict, reason: str) -> None:
    model = build(cuda_graphs=True, **options)
    if not options:
        model.blocks[1].register_forward_hook(lambda *_: None)
    with mock.patch.object(graphed, 'print_log') as log:
        train(model, [SHAPE] * PASSES)
    assert captured(model) == 0
    assert log.call_count == 1
    assert reason in log.call_args.args[0]


@pytest.mark.gpu
def test_a_capture_that_fails_does_no_harm() -> None:
    model = build(cuda_graphs=True, drop_path_rate=0.5)
    image = torch.randn(SHAPE, device='cuda')

    def run(x: Tensor) -> tuple[Tensor, ...]:
        return (model._run(x)[0] * x.mean().item(),)  # waits for the device

    with mock.patch.object(graphed, 'print_log') as log:
        for _ in range(PASSES):
            (out,) = model._graphs(model, run, image)
            out.sum().backward()
    assert captured(model) == 0
    assert log.call_count == 1
    assert torch.randn(3, device='cuda').isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.gpu
def test_loss_scaling_in_float16() -> None:
    found = []
    for options in ({}, {'cuda_graphs': True}):
        model = build(**options)
        scaler = torch.amp.GradScaler('cuda', init_scale=1024.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        for _ in range(PASSES):
            images = torch.ones(SHAPE, device='cuda')
            with torch.autocast('cuda', torch.float16):
                loss = model(images)[0].square().mean()
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        assert not options or captured(model) == 1
        found.append(list(model.parameters()))
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))
