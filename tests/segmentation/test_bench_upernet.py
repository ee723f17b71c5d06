"""The benchmark compares what it says: the same neck and heads, only the backbone differs."""

import pytest
import torch

from benchmarks.bench_upernet import build, random_batch, segmentor_config, train_step


def test_only_the_backbone_differs():
    vil, deit = (segmentor_config('small', backbone, 512) for backbone in ('vil', 'deit'))
    assert {key for key in vil if vil[key] != deit[key]} == {'backbone'}
    assert deit.backbone.drop_path_rate == vil.backbone.drop_path_rate == 0.05


@pytest.mark.parametrize('backbone', ['vil', 'deit'])
def test_one_step_trains(backbone):
    model = build('tiny', backbone, 64, 'cpu')
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    before = model.backbone.pos_embed.detach().clone()
    assert torch.isfinite(train_step(model, optimizer, random_batch(2, 64, 'cpu')))
    assert not torch.equal(model.backbone.pos_embed, before)
