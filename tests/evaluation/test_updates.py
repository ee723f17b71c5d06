"""Updates one by one and as a CUDA graph."""

import pytest
import torch

from mmvil.evaluation.data import LoadedSplit
from mmvil.evaluation.models import ModelFactory
from mmvil.evaluation.protocol import load_settings
from mmvil.evaluation.training import build_optimizer, train_model
from mmvil.evaluation.updates import Updater, why_not_graphed

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')


def make_factory(tiny_config, device):
    return ModelFactory(load_settings(tiny_config), None, torch.device(device), from_scratch=True)


def make_batch(factory, count=8):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, *factory.input_size), dtype=torch.uint8, generator=generator)
    return images.to(factory.device), (torch.arange(count) % 4).to(factory.device)


def start(factory, tiny_settings, learning_rate=1e-3, **options):
    model = factory.fresh(4, 0).train()
    wrapper, _ = build_optimizer(model, tiny_settings, learning_rate, 4)
    return model, wrapper, Updater(model, wrapper, 8, **options)


def test_an_update_reads_the_labels_given_with_it(tiny_config, tiny_settings, cpu):
    factory = make_factory(tiny_config, cpu)
    images, labels = make_batch(factory)
    *_, first = start(factory, tiny_settings)
    expected = [first(images, given).item() for given in (labels, labels.roll(1))]
    *_, second = start(factory, tiny_settings)
    assert second(images, labels).item() == expected[0]
    assert second(images, labels).item() != expected[1]


def test_what_cannot_be_a_graph(tiny_config, tiny_settings, cpu):
    _, wrapper, update = start(make_factory(tiny_config, cpu), tiny_settings)
    assert not update.wants_graph
    assert 'GPU' in why_not_graphed(wrapper, cpu)
    cuda = torch.device('cuda')
    assert why_not_graphed(wrapper, cuda) is None
    wrapper.clip_grad_kwargs = {'max_norm': 1.0}
    assert 'clipping' in why_not_graphed(wrapper, cuda)
    wrapper.loss_scaler = torch.amp.GradScaler('cpu')
    assert 'loss scaling' in why_not_graphed(wrapper, cuda)
    del wrapper.optimizer.param_groups[0]['capturable']
    assert 'capturable' in why_not_graphed(wrapper, cuda)


@pytest.mark.gpu
@needs_gpu
def test_a_graph_trains_as_single_kernels_do(tiny_config, tiny_settings):
    factory = make_factory(tiny_config, 'cuda')
    images, labels = make_batch(factory, 24)
    split, results = LoadedSplit(None, labels, images, {}), []
    tiny_settings.protocol.update(batch_size=8, epochs=6)
    for graph in (False, True):
        tiny_settings.runtime.cuda_graph = graph
        model = factory.fresh(4, 0)
        training = train_model(model, split, tiny_settings, 1e-3, 0)
        assert training.steps == 18
        results.append([training.final_loss, *(value.clone() for value in model.state_dict().values())])
    for eager, graphed in zip(*results, strict=True):  # the same kernels in the same order
        torch.testing.assert_close(graphed, eager, rtol=1e-6, atol=1e-7)


@pytest.mark.gpu
@needs_gpu
def test_a_graph_follows_the_schedule(tiny_config, tiny_settings):
    factory = make_factory(tiny_config, 'cuda')
    model, wrapper, update = start(factory, tiny_settings)
    batch = make_batch(factory)
    for _ in range(update.warmup_steps):
        update(*batch)
    assert update.graph is not None
    before = model.head.fc.weight.clone()
    update(*batch)
    assert not torch.equal(model.head.fc.weight, before)
    for group in wrapper.optimizer.param_groups:
        assert isinstance(group['lr'], float)
        group['lr'] = 0.0
    before = model.head.fc.weight.clone()
    update(*batch)
    assert torch.equal(model.head.fc.weight, before)


@pytest.mark.gpu
@needs_gpu
def test_what_cannot_be_captured_goes_on_without(tiny_config, tiny_settings):
    factory = make_factory(tiny_config, 'cuda')
    model, _, update = start(factory, tiny_settings)
    hook = model.backbone.register_forward_hook(lambda module, args, output: output[-1].sum().item() and None)
    batch = make_batch(factory)
    losses = [update(*batch).item() for _ in range(update.EAGER_STEPS + 3)]
    hook.remove()
    assert update.graph is None
    assert losses == sorted(losses, reverse=True)
