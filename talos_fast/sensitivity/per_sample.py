"""Per-sample squared gradients without capture: torch.func for what no rule covers, a plain loop as the judge."""

import logging
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils._pytree import tree_flatten, tree_unflatten

from talos_fast.forward import Batch, Forward, take

logger = logging.getLogger("talos_fast")

# Entries of per-sample gradients that vmap may hold at once: 256 MB in fp32.
CHUNK_ENTRIES = 2**26


class _Hooked(nn.Module):
    """Gives `functional_call` a module whose forward is the user's ``forward(model, batch)``."""

    def __init__(self, model: nn.Module, forward: Forward) -> None:
        super().__init__()
        self.model = model
        self._forward = forward

    def forward(self, batch: Batch) -> Tensor:
        return self._forward(self.model, batch)


def add_squares(
    model: nn.Module, parameters: Mapping[str, Tensor], scores: Mapping[str, Tensor],
    forward: Forward, batch: Batch, probe: Tensor,
) -> None:  # fmt: skip
    """Adds the squares by `add_squares_by_vmap`, or by `add_squares_by_loop` for a model that vmap refuses."""
    try:
        add_squares_by_vmap(model, parameters, scores, forward, batch, probe)
    except RuntimeError as refusal:
        logger.info("vmap refuses this model (%s); one backward a sample instead", str(refusal).split("\n")[0])
        add_squares_by_loop(model, parameters, scores, forward, batch, probe)


def add_squares_by_vmap(
    model: nn.Module, parameters: Mapping[str, Tensor], scores: Mapping[str, Tensor],
    forward: Forward, batch: Batch, probe: Tensor,
) -> None:  # fmt: skip
    """Adds Σ_n (∂ probe[n]·f(x_n) / ∂θ)² to ``scores``, through ``vmap(grad)``, in chunks of bounded memory.

    Args:
        model: evaluated sample by sample, so operations that need batching rules get them from torch.
        parameters: the ones to differentiate, by name in the model.
        scores: name -> accumulator of the parameter's shape.
        forward: the user's hook.
        batch: of N samples; every tensor led by N is split.
        probe: (N, K), constant.
    """
    samples = len(probe)
    hooked = _Hooked(model, forward)
    leaves, structure = tree_flatten(batch)
    batched = [isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == samples for leaf in leaves]

    def scalar(tracked: dict[str, Tensor], coefficients: Tensor, *rows: Tensor) -> Tensor:
        split = iter(rows)
        one = [next(split).unsqueeze(0) if is_row else leaf for leaf, is_row in zip(leaves, batched, strict=True)]
        logits = functional_call(hooked, tracked, (tree_unflatten(one, structure),))
        total: Tensor = (logits[0] * coefficients).sum()
        return total

    tracked = {f"model.{name}": parameter.detach() for name, parameter in parameters.items()}
    rows = [leaf for leaf, is_row in zip(leaves, batched, strict=True) if is_row]
    chunk = max(1, CHUNK_ENTRIES // sum(parameter.numel() for parameter in parameters.values()))
    for start in range(0, samples, chunk):
        part = slice(start, start + chunk)
        per_sample: Callable[..., dict[str, Tensor]] = vmap(grad(scalar), in_dims=(None, *[0] * (len(rows) + 1)))
        gradients = per_sample(tracked, probe[part], *[row[part] for row in rows])
        for name, score in scores.items():
            score += gradients[f"model.{name}"].to(score.dtype).square().sum(0)


def add_squares_by_loop(
    model: nn.Module, parameters: Mapping[str, Tensor], scores: Mapping[str, Tensor],
    forward: Forward, batch: Batch, probe: Tensor,
) -> Tensor:  # fmt: skip
    """The same, by one plain backward a sample; returns the logits (N, K), each from a batch of one."""
    names, tensors = list(parameters), list(parameters.values())
    flags = [tensor.requires_grad for tensor in tensors]
    logits = []
    try:
        for tensor in tensors:
            tensor.requires_grad_(True)
        for n, coefficients in enumerate(probe):
            single = forward(model, take(batch, n, n + 1, len(probe)))
            gradients = torch.autograd.grad((single[0] * coefficients).sum(), tensors, allow_unused=True)
            logits.append(single.detach())
            for name, gradient in zip(names, gradients, strict=True):
                if gradient is not None:
                    scores[name].add_(gradient.to(scores[name].dtype).square())
    finally:
        for tensor, flag in zip(tensors, flags, strict=True):
            tensor.requires_grad_(flag)
    return torch.cat(logits)
