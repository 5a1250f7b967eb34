"""Parameters, masks and gradients that the optimizer's tests share."""

import io

import torch
from torch import nn

from talos_fast import MaskedAdam

SHAPES = [(50, 20), (7,), (5,), (), (2, 3, 4)]
CLOSE = dict(rtol=1e-6, atol=1e-7)
CLOSE_ON = {"cpu": CLOSE, "interpreter": CLOSE, "cuda": dict(rtol=1e-5, atol=1e-6)}


def device_of(place: str) -> str:
    return "cuda" if place == "cuda" else "cpu"


def parameters(dtype: torch.dtype = torch.float32, place: str = "cpu") -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, dtype=dtype).to(device_of(place))) for shape in SHAPES]


def masks() -> list[torch.Tensor]:
    """A tenth, all, nothing, a scalar, a half."""
    torch.manual_seed(1)
    sizes = [0.1, 1.1, -1.0, 1.1, 0.5]
    return [torch.rand(shape) < size for shape, size in zip(SHAPES, sizes, strict=True)]


def give_gradients(params, step: int, factor: float = 1.0) -> None:
    torch.manual_seed(100 + step)
    for p in params:
        p.grad = (torch.randn(p.shape) * factor).to(p.device, p.dtype)


def run(optimizer, params, steps=range(10)) -> None:
    for step in steps:
        give_gradients(params, step)
        optimizer.step()


def launches(optimizer: MaskedAdam) -> list:
    """The Triton launches that the optimizer keeps."""
    return [one for group in optimizer._launches._groups.values() for _, one in group._launches]


def assert_stepped_by(optimizer: MaskedAdam, place: str) -> None:
    """Triton stepped every parameter, or none: no test of one backend may pass by another."""
    groups = optimizer._launches._groups.values()
    assert bool(groups) == (place != "cpu")
    assert not any(group.others for group in groups)


def assert_unselected_equal(params, before, given_masks) -> None:
    for p, start, mask in zip(params, before, given_masks, strict=True):
        assert torch.equal(p.detach().cpu()[~mask], start.detach().cpu()[~mask])


def on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu()


def assert_same_on_selected(masked, dense, place="cpu"):
    assert_unselected_equal(masked, parameters(), masks())
    for p, q, mask in zip(masked, dense, masks(), strict=True):
        torch.testing.assert_close(on_cpu(p)[mask], on_cpu(q)[mask], **CLOSE_ON[place])


def copied(params):
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


def through_a_file(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def equal(first, second) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def linear(place: str = "cpu") -> tuple[nn.Linear, torch.Tensor]:
    """A layer without a bias, and a mask of about half of it."""
    net = nn.Linear(4, 4, bias=False, device=device_of(place))
    net.weight.data.copy_(drawn(4, 4))
    return net, drawn(4, 4, seed=1) > 0


def backward(net: nn.Linear) -> None:
    net(torch.ones(1, 4, device=net.weight.device)).sum().backward()
