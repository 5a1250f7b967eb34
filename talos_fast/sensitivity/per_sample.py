"""Per-sample squared gradients without capture: torch.func for what no rule covers, a plain loop as the judge."""

import logging
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from talos_fast.errors import TalosError
from talos_fast.forward import Batch, Forward, map_tensors, take
from talos_fast.sensitivity.uses import Accumulator

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


def add_squares_by_func(
    model: nn.Module, parameters: Mapping[str, Tensor], ledger: Mapping[str, Accumulator],
    forward: Forward, batch: Batch, probe: Tensor,
) -> None:  # fmt: skip
    """Adds Σ_n (∂ probe[n]·f(x_n) / ∂θ)² in chunks of bounded memory: by vmap, or one by one where vmap refuses.

    Args:
        model: evaluated sample by sample.
        parameters: the ones to differentiate, by name in the model.
        ledger: name -> where the squares go.
        forward: the user's hook.
        batch: of N samples; every tensor led by N is split.
        probe: (N, K), constant.
    """
    samples = len(probe)
    chunk = max(1, CHUNK_ENTRIES // sum(parameter.numel() for parameter in parameters.values()))
    for start in range(0, samples, chunk):
        stop = min(samples, start + chunk)
        part = take(batch, start, stop, samples)
        try:
            found = _by_vmap(model, parameters, forward, part, probe[start:stop])
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as refusal:
            logger.info("vmap refuses this model (%s); one backward a sample instead", str(refusal).split("\n")[0])
            for _, gradients in gradients_one_by_one(model, parameters, forward, part, probe[start:stop]):
                for name, gradient in gradients.items():
                    ledger[name].add(gradient.to(ledger[name].values.dtype).square())
            continue
        for name, gradients_of_all in found.items():
            ledger[name].add(gradients_of_all.to(ledger[name].values.dtype).square().sum(0))


def _by_vmap(
    model: nn.Module, parameters: Mapping[str, Tensor], forward: Forward, batch: Batch, probe: Tensor
) -> dict[str, Tensor]:
    """Name -> per-sample gradients (N, *shape), by ``vmap(grad)``."""
    hooked = _Hooked(model, forward)
    rows: list[Tensor] = []

    def is_led_by_samples(tensor: Tensor) -> bool:
        return tensor.dim() > 0 and tensor.shape[0] == len(probe)

    def collect(tensor: Tensor) -> Tensor:
        if is_led_by_samples(tensor):
            rows.append(tensor)
        return tensor

    map_tensors(collect, batch)

    def scalar(tracked: dict[str, Tensor], coefficients: Tensor, *rows: Tensor) -> Tensor:
        split = iter(rows)
        one = map_tensors(lambda tensor: next(split)[None] if is_led_by_samples(tensor) else tensor, batch)
        logits = functional_call(hooked, tracked, (one,))
        total: Tensor = (logits[0] * coefficients).sum()
        return total

    tracked = {f"model.{name}": parameter.detach() for name, parameter in parameters.items()}
    per_sample: Callable[..., dict[str, Tensor]] = vmap(grad(scalar), in_dims=(None, *[0] * (len(rows) + 1)))
    return {name.removeprefix("model."): g for name, g in per_sample(tracked, probe, *rows).items()}


def gradients_one_by_one(
    model: nn.Module, parameters: Mapping[str, Tensor], forward: Forward, batch: Batch, probe: Tensor
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """For each sample in a batch of its own: its logits (K,), and the gradients by name of what is reached."""
    names, tensors = list(parameters), list(parameters.values())
    for n, coefficients in enumerate(probe):
        flags = [tensor.requires_grad for tensor in tensors]
        try:
            for tensor in tensors:
                tensor.requires_grad_(True)
            single = forward(model, take(batch, n, n + 1, len(probe)))
            if not single.requires_grad:
                raise TalosError("the logits do not depend on any maskable parameter; pass include= with others")
            gradients = torch.autograd.grad((single[0] * coefficients).sum(), tensors, allow_unused=True)
        finally:
            for tensor, flag in zip(tensors, flags, strict=True):
                tensor.requires_grad_(flag)
        reached = {name: g for name, g in zip(names, gradients, strict=True) if g is not None}
        yield single[0].detach(), reached
