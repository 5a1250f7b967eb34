"""A network and two optimizers of it that the tests of gradient compaction share."""

import torch
from torch import nn

from talos_fast import MaskedAdam

X = torch.randn(4, 8, 6, 6, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """A channels_last convolution, linear maps of which one is used twice, and a head without a mask."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(8, 16, 3).to(memory_format=torch.channels_last)
        self.twice, self.frozen, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.to(dtype)

    def loss(self, batch: int = 0) -> torch.Tensor:
        x = X.roll(batch, 0).to(self.conv.weight.dtype)
        hidden = self.conv(x).mean((2, 3))
        hidden = self.twice(self.twice(hidden).tanh()).tanh() + self.frozen(hidden)
        return self.head(hidden).square().mean() * (batch + 1)


def masks(net: Net) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    names = ("conv.weight", "twice.weight", "twice.bias", "frozen.weight")
    chosen = {name: torch.rand(net.get_parameter(name).shape) < 0.3 for name in names}
    chosen["frozen.weight"][:] = False
    return chosen


def pair(norm="selected", dtype=torch.float32, accumulate=1, **kwargs):
    """A net whose optimizer compacts, and its twin whose optimizer does not."""
    nets = Net(dtype), Net(dtype)
    optimizers = [MaskedAdam(net.named_parameters(), lr=0.05, masks=masks(net), **kwargs) for net in nets]
    optimizers[0].compact_gradients(norm=norm, accumulate=accumulate)
    return nets, optimizers


def assert_same(nets) -> None:
    for (name, p), q in zip(nets[0].named_parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
