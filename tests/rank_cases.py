"""A small network, its data and runs of `finetune`, for one rank or two."""

import os
import signal

import torch
from torch import nn

from talos_fast import Mask, TaskVector, finetune

RUNS = {
    "talos": {}, "nonlinear": {}, "lota": {"density": 0.3}, "linearized": {}, "l-lora": {"rank": 2},
    "talos, accumulated": {"accumulate": 2, "steps": 5}, "talos, released": {"compat": "released"},
    "nonlinear, not clipped": {"clip": None},
}  # fmt: skip


class Net(nn.Module):
    """With a query and a value for L-LoRA, a channels_last weight, and dropout where asked for."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.q_proj, self.v_proj = nn.Linear(16, 16), nn.Linear(16, 16)
        self.dropout, self.head = nn.Dropout(dropout), nn.Linear(16, 3)
        self.double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x).flatten(1)
        return self.head(self.dropout(torch.tanh(self.q_proj(x)) * self.v_proj(x)))


def examples() -> list[tuple[torch.Tensor, int]]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(48, 3, 4, 4, generator=generator, dtype=torch.float64)
    return [(x, int(x.sum() > 0) + int(x.sum() > 3)) for x in inputs]


def batches(rank: int = 0, world: int = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Eight samples each, of which a rank of two has four."""
    inputs, labels = zip(*examples(), strict=True)
    whole = zip(torch.stack(inputs).split(8), torch.tensor(labels).split(8), strict=True)
    return [(x[rank::world], y[rank::world]) for x, y in whole]


def mask() -> Mask:
    generator = torch.Generator().manual_seed(2)
    flags = {name: torch.rand(p.shape, generator=generator) < 0.3 for name, p in Net().named_parameters()}
    flags["v_proj.weight"][:6] = False
    return Mask({name: flag for name, flag in flags.items() if name != "head.weight"})


def run(name: str, data, model: nn.Module | None = None, **options) -> TaskVector:
    method = name.split(",")[0]
    given = {"mask": mask()} if method == "talos" else {}
    options = {"epochs": 2, "lr": 1e-2, "progress": False, **RUNS.get(name, {}), **given, **options}
    if "steps" in options:
        del options["epochs"]
    return finetune(model or Net(), data, method=method, **options)


def interrupting(at: int, rank: int):
    """A forward during whose ``at``-th call the second rank gets SIGTERM."""
    calls = 0

    def forward(model, batch):
        nonlocal calls
        calls += 1
        if calls == at and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return model(batch[0])

    return forward
