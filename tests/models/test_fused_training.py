"""Training on the fused path against training on the plain modules: real images, the same start, the same batches."""

import copy
import statistics
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmvil.models import VisionLSTM

BATCH = 64


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 handwritten digits as (N, 3, 16, 16) and labels."""
    from sklearn.datasets import load_digits

    loaded = load_digits()
    images = torch.tensor(loaded.images, dtype=torch.float32)[:, None] / 8 - 1
    return images.expand(-1, 3, -1, -1).repeat_interleave(2, 2).repeat_interleave(2, 3), torch.tensor(loaded.target)


class Classifier(nn.Module):
    """A ViL of 64 tokens with a linear head."""

    def __init__(self, layers: int, fused: bool, backend: str = 'auto') -> None:
        super().__init__()
        arch = {'embed_dims': 64, 'num_layers': layers}
        options = {'img_size': 16, 'patch_size': 2, 'out_type': 'bilateral_concat'}
        self.backbone = VisionLSTM(arch, fused=fused, mlstm_backend=backend, **options)
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x)[-1])


def train(model: Classifier, steps: int, dtype: torch.dtype | None, device: str = 'cuda') -> tuple[list[float], float]:
    """Losses of all steps, and the share of the last 297 images, never trained on, that end up recognised."""
    images, labels = (x.to(device) for x in digits())
    model = copy.deepcopy(model).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    order, losses = torch.Generator().manual_seed(0), []
    for _ in range(steps):
        chosen = torch.randint(0, 1500, (BATCH,), generator=order).to(device)
        with torch.autocast(device, dtype or torch.bfloat16, enabled=dtype is not None):
            loss = F.cross_entropy(model(images[chosen]).float(), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    with torch.no_grad(), torch.autocast(device, dtype or torch.bfloat16, enabled=dtype is not None):
        right = model.eval()(images[1500:]).argmax(1) == labels[1500:]
    return torch.stack(losses).tolist(), right.float().mean().item()


def classifiers() -> tuple[Classifier, Classifier]:
    """Fused and plain, with the same weights."""
    torch.manual_seed(0)
    fused, plain = Classifier(2, fused=True), Classifier(2, fused=False)
    plain.load_state_dict(fused.state_dict())
    return fused, plain


def farthest(one: list[float], other: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(one, other, strict=True))


def test_the_task_is_learned_and_the_same_seed_gives_the_same_curve() -> None:
    _, plain = classifiers()
    curves = [train(plain, 4, None, 'cpu')[0] for _ in range(2)]
    assert curves[0] == curves[1]
    assert curves[0][-1] < curves[0][0]


@pytest.mark.gpu
def test_curves_lie_on_each_other(monkeypatch: pytest.MonkeyPatch, fused_runs: Counter) -> None:
    monkeypatch.setattr(torch.backends.cudnn, 'allow_tf32', False)  # or the plain convolutions round coarsely
    fused, plain = classifiers()
    exact, accuracy = train(plain, 100, None)
    assert not fused_runs
    assert statistics.mean(exact[-20:]) < 0.5
    assert accuracy > 0.8
    # Measured on a CPU: bfloat16 moves a loss by up to 1e-2 in 60 steps, and float32 rounds 65,000 times finer.
    assert farthest(train(fused, 100, None)[0], exact) < 1e-3
    rounding = farthest(train(plain, 100, torch.bfloat16)[0], exact)
    assert 1e-4 < rounding < 5e-2
    assert farthest(train(fused, 100, torch.bfloat16)[0], exact) < 3 * rounding
    assert fused_runs['ViLBlock'] == 2 * 2 * (100 + 1)


@pytest.mark.gpu
def test_no_drift_over_a_thousand_steps_in_bfloat16(fused_runs: Counter) -> None:
    curves, accuracies = zip(*(train(model, 1000, torch.bfloat16) for model in classifiers()), strict=True)
    assert fused_runs['ViLBlock'] == 2 * (1000 + 1)
    for losses, accuracy in zip(curves, accuracies, strict=True):
        assert all(0 <= loss < 3 for loss in losses)  # a loss that is not a number is in no range
        assert accuracy > 0.9
    for start in range(200, 1000, 200):  # smoothed: single steps of long runs need not agree
        fused, plain = (statistics.mean(losses[start : start + 200]) for losses in curves)
        assert abs(fused - plain) < 0.01 + 0.3 * plain, (start, fused, plain)
