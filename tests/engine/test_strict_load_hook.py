"""A checkpoint that does not fill the model stops the run."""

from types import SimpleNamespace

import pytest
import torch
from mmengine.runner import BaseLoop
from torch import nn

from mmvil.engine.strict_load_hook import StrictLoadHook


class Loop(BaseLoop):
    def __init__(self) -> None:
        pass

    def run(self) -> None:
        pass


class Classifier(nn.Module):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.backbone = nn.Linear(2, 4)
        self.backbone.pos_embed = nn.Parameter(torch.zeros(1, 2, 2, 4))
        self.head = nn.Linear(4, classes)


def run(kind: str, model: nn.Module, state_dict: dict) -> dict:
    """Call the hook as mmengine does when it trains, resumes or tests; return what is left to load."""
    loop = dict(type='EpochBasedTrainLoop') if kind == 'test' else Loop()
    checkpoint = {'state_dict': dict(state_dict)}
    runner = SimpleNamespace(model=model, _train_loop=loop, _resume=kind == 'resume')
    StrictLoadHook().after_load_checkpoint(runner, checkpoint)
    return checkpoint['state_dict']


@pytest.mark.parametrize('kind', ['train', 'resume', 'test'])
def test_complete_checkpoint_passes(kind: str) -> None:
    wrapped = {f'module.{key}': value for key, value in Classifier().state_dict().items()}
    assert run(kind, Classifier(), wrapped).keys() == wrapped.keys()


@pytest.mark.parametrize('kind', ['train', 'resume', 'test'])
def test_missing_backbone_weight_stops(kind: str) -> None:
    state_dict = Classifier().state_dict()
    del state_dict['backbone.weight']
    with pytest.raises(ValueError, match=r'1 are missing from it: backbone\.weight'):
        run(kind, Classifier(), state_dict)


def test_backbone_of_another_width_stops() -> None:
    state_dict = Classifier().state_dict()
    state_dict['backbone.bias'] = torch.zeros(5)
    with pytest.raises(ValueError, match=r'1 have another shape: backbone\.bias'):
        run('train', Classifier(), state_dict)


def test_head_of_other_classes_starts_anew_in_training_only() -> None:
    state_dict = Classifier(classes=5).state_dict()
    assert run('train', Classifier(), state_dict).keys() == {'backbone.weight', 'backbone.bias', 'backbone.pos_embed'}
    for kind in ('resume', 'test'):
        with pytest.raises(ValueError, match=r'2 have another shape: head\.weight'):
            run(kind, Classifier(), state_dict)


def test_position_table_of_another_grid_passes() -> None:
    state_dict = Classifier().state_dict()
    state_dict['backbone.pos_embed'] = torch.zeros(1, 3, 5, 4)
    assert 'backbone.pos_embed' in run('train', Classifier(), state_dict)


def test_official_file_gets_a_hint() -> None:
    with pytest.raises(ValueError, match='convert_vil'):
        run('test', Classifier(), {'xlstm.blocks.0.xlstm.learnable_skip': torch.zeros(2)})
