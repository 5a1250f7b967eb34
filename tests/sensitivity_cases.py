"""A model of one layer whose use is given, and its exact scores, for tests of sensitivities."""

from oracles import by_loop
from torch import nn


class Net(nn.Module):
    """A linear layer ``first``, whatever ``use`` makes of it, and a head."""

    def __init__(self, use) -> None:
        super().__init__()
        self.first, self.out, self.use = nn.Linear(6, 6), nn.Linear(6, 4), use

    def forward(self, x):
        return self.out(self.use(self.first, x).sum(1))


def expected(model, batch):
    return by_loop(model, lambda m, b: m(b[0]), batch, batch[1])
