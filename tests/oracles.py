"""Per-sample squared gradients by ways that are not ours, in float64, and the comparison with ours."""

import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from talos_fast.sensitivity import sensitivities

TOLERANCE = 1e-10


def randomized(model: nn.Module) -> nn.Module:
    """In float64 evaluation mode, with norms, biases and running statistics away from their trivial starts."""
    for p in model.parameters():
        if p.numel() and p.max() == p.min():
            nn.init.normal_(p, float(p.detach().mean()), 0.3)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    return model.double().eval()


def by_vmap(model, scalar, batch) -> dict[str, torch.Tensor]:
    """The textbook way: vmap over samples of the gradient of one sample's scalar."""
    tracked = {name: p.detach() for name, p in model.named_parameters()}

    def one(params, *sample):
        return scalar(lambda *args: functional_call(model, params, args), *sample)

    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        gradients = vmap(grad(one), in_dims=(None, *[0] * len(batch)))(tracked, *batch)
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
    return {name: g.square().sum(0) for name, g in gradients.items()}


def logit(call, x, y):
    """The scalar of a sample: its logit ``y``, from a batch of its own."""
    return call(x[None])[0].gather(0, y[None])[0]


def by_loop(model, forward, batch, labels) -> dict[str, torch.Tensor]:
    """One backward a sample, through the logits of the whole batch, as in the paper's code."""
    names, tensors = zip(*model.named_parameters(), strict=True)
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        logits = forward(model, batch)
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
    total = {name: torch.zeros_like(p) for name, p in zip(names, tensors, strict=True)}
    for n, label in enumerate(labels):
        gradients = torch.autograd.grad(logits[n, label], tensors, retain_graph=True, allow_unused=True)
        for name, g in zip(names, gradients, strict=True):
            if g is not None:
                total[name] += g.square()
    return total


def assert_equal(found, expected, zero=()):
    """Relative to each tensor's maximum; ``zero`` names tensors whose true gradient is 0 (attention key biases)."""
    for name, score in found.items():
        scale = expected[name].max()
        if any(part in name for part in zero):
            assert score.max() < 1e-25 and scale < 1e-25, name
        else:
            assert scale > 1e-15, f"{name}: nothing to compare"
            assert (score - expected[name]).abs().max() <= TOLERANCE * scale, name


def uncovered(caplog) -> list[str]:
    """The names for which no rule was found, from the log."""
    lines = [record.getMessage() for record in caplog.records if "no batched rule" in record.getMessage()]
    return [name for line in lines for name in line.split("for ")[1].split(" (")[0].split(", ")]


def data(samples: int, *shape: int, classes: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    """Random inputs in float64 and random labels."""
    return torch.randn(samples, *shape).double(), torch.randint(0, classes, (samples,))


def scores(model, *batches, **options):
    """Ours, of every parameter, for the labels' logits."""
    labels = [batch[1] for batch in batches]
    return sensitivities(model, batches, estimator="sampled-logit", labels=labels, include=["*"], **options)
