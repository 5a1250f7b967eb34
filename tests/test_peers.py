"""Our scores against two libraries of per-sample gradients, on what each supports; float64."""

import pytest
import torch
from oracles import assert_equal, randomized
from torch import nn

from talos_fast.sensitivity import sensitivities

pytestmark = pytest.mark.filterwarnings("ignore")  # both warn about their own use of torch


def ours(model, batch):
    return sensitivities(model, [batch], estimator="empirical", include=["*"])


def test_backpack_sum_grad_squared():
    backpack = pytest.importorskip("backpack", reason="pip install backpack-for-pytorch")
    from backpack.extensions import SumGradSquared

    model = randomized(
        nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Sigmoid(), nn.Conv2d(3, 4, 2, stride=2), nn.Sigmoid(),
                      nn.Flatten(), nn.Linear(64, 8), nn.Sigmoid(), nn.Linear(8, 3))
    )  # fmt: skip
    x, y = torch.randn(5, 2, 8, 8).double(), torch.randint(0, 3, (5,))
    found = ours(model, (x, y))
    loss = backpack.extend(nn.CrossEntropyLoss(reduction="sum"))
    with backpack.backpack(SumGradSquared()):
        loss(backpack.extend(model)(x), y).backward()
    assert_equal(found, {name: p.sum_grad_squared for name, p in model.named_parameters()})


def test_opacus_grad_sample():
    pytest.importorskip("opacus", reason="pip install opacus")
    from opacus.grad_sample import GradSampleModule

    class Sentences(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm, self.hidden = nn.Embedding(20, 6), nn.LayerNorm(6), nn.Linear(6, 8)
            self.out = nn.Linear(8, 3)

        def forward(self, x):
            return self.out(torch.tanh(self.hidden(self.norm(self.embed(x)))).sum(1))

    model = randomized(Sentences())
    x, y = torch.randint(0, 20, (5, 7)), torch.randint(0, 3, (5,))
    found = ours(model, (x, y))
    wrapped = GradSampleModule(model.train(), loss_reduction="sum")
    # Its rule of embeddings sets a global flag, which torch's own test suite, if another test imported it, forbids.
    with getattr(torch.backends, "__allow_nonbracketed_mutation")():
        nn.CrossEntropyLoss(reduction="sum")(wrapped(x), y).backward()
    expected = {name: p.grad_sample.square().sum(0) for name, p in model.named_parameters()}
    assert_equal(found, expected)
