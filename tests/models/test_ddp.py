"""Data-parallel training needs no search for unused parameters, whatever is returned."""

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from mmvil.models import VisionLSTM


@pytest.mark.usefixtures('process_group')
@pytest.mark.parametrize(
    'options',
    [
        {},
        {'out_indices': (0, 2)},
        {'out_type': 'bilateral_concat'},
        {'out_type': 'avg', 'version': 'v1'},
        {'out_type': 'raw', 'final_norm': False, 'with_cp': True},
        {'frozen_stages': 2, 'drop_path_rate': 0.5},
    ],
    ids=['featmap', 'early outputs', 'pooled', 'v1', 'checkpointed', 'frozen'],
)
def test_every_parameter_takes_part(options: dict) -> None:
    model = VisionLSTM({'embed_dims': 16, 'num_layers': 4}, img_size=32, **options)
    wrapped = DistributedDataParallel(model, find_unused_parameters=False)
    for _ in range(2):  # the wrapper complains in the second forward about what the first left out
        outputs = wrapped(torch.randn(2, 3, 32, 48))
        sum(output.square().mean() for output in outputs).backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.usefixtures('process_group')
def test_an_unused_parameter_would_be_noticed() -> None:
    model = VisionLSTM({'embed_dims': 16, 'num_layers': 2}, img_size=32)
    model.unused = torch.nn.Parameter(torch.zeros(1))
    wrapped = DistributedDataParallel(model, find_unused_parameters=False)
    image = torch.randn(1, 3, 32, 32)
    wrapped(image)[0].sum().backward()
    with pytest.raises(RuntimeError, match='finished reduction'):
        wrapped(image)
