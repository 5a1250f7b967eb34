"""Batches in, logits out: the one hook that adapts any model, and the checks on what comes through it."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from talos_fast.batch import Batch, labels_of
from talos_fast.errors import TalosError

Forward = Callable[[nn.Module, Batch], Tensor]
"""``forward(model, batch) -> logits`` of shape (N, K): classes, or answer choices."""


def default_forward(model: nn.Module, batch: Batch) -> Tensor:
    """``model(inputs)`` for tuples, ``model(**everything but labels)`` for mappings; the logits of what has them."""
    if isinstance(batch, Mapping):
        output = model(**{key: value for key, value in batch.items() if key != "labels"})
    else:
        output = model(batch[0])
    if isinstance(output, Mapping) and "logits" in output:
        output = output["logits"]
    logits: Tensor = getattr(output, "logits", output)
    return logits


class _Hooked(nn.Module):
    """Gives `functional_call` a module whose forward is the user's ``forward(model, batch)``."""

    def __init__(self, model: nn.Module, forward: Forward) -> None:
        super().__init__()
        self.model = model
        self._forward = forward

    def forward(self, batch: Batch) -> Tensor:
        return self._forward(self.model, batch)


def functional_forward(forward: Forward, model: nn.Module, values: Mapping[str, Tensor], batch: Batch) -> Tensor:
    """``forward(model, batch)`` as a function of parameters: ``values`` by name stand in for the model's own."""
    prefixed = {f"model.{name}": value for name, value in values.items()}
    logits: Tensor = functional_call(_Hooked(model, forward), prefixed, (batch,))
    return logits


def logits_of(forward: Forward, model: nn.Module, batch: Batch, where: str) -> tuple[Tensor, Tensor]:
    """Logits (N, K) and labels (N,) of a batch; their values are not looked at.

    Raises:
        TalosError: no labels, or logits of another shape; names the batch.
    """
    labels = labels_of(batch, where)
    logits = forward(model, batch)
    if not isinstance(logits, Tensor):
        raise TalosError(
            f"{where}: the model gave a {type(logits).__name__}, not logits (N, K); pick them with forward="
        )
    if logits.dim() != 2 or logits.shape[0] != len(labels):
        raise TalosError(
            f"{where}: forward gave logits of shape {tuple(logits.shape)} for {len(labels)} labels; expected (N, K). "
            "Batches are cut along the first dimension of their tensors, and lists of as many texts: samples come "
            "first, forward= may transpose"
        )
    return logits, labels


def logits_facts(logits: Tensor, labels: Tensor) -> Tensor:
    """What `check_facts` needs, on the logits' device: lowest and highest label, whether all logits are finite."""
    return torch.stack([labels.min(), labels.max(), logits.isfinite().all().to(labels.dtype)]).to(logits.dtype)


def check_facts(facts: list[float], classes: int, where: str) -> None:
    """Refuses logits and labels by their facts.

    Raises:
        TalosError: NaN or infinite logits, or labels outside the classes; names the batch.
    """
    low, high, finite = facts
    if low < 0 or high >= classes:
        raise TalosError(
            f"{where}: labels {low:.0f} … {high:.0f}, but the model has {classes} classes, 0 … {classes - 1}"
        )
    if not finite:
        raise TalosError(f"{where}: the logits hold NaN or infinite entries; check the inputs and the learning rate")


def check_logits(logits: Tensor, labels: Tensor, where: str) -> None:
    """Looks at logits (N, K) and labels (N,) of a batch; waits for the device.

    Raises:
        TalosError: logits that are NaN or infinite, or labels outside the classes; names the batch.
    """
    check_facts(logits_facts(logits.float(), labels).tolist(), logits.shape[1], where)


def checked_logits(forward: Forward, model: nn.Module, batch: Batch, where: str) -> tuple[Tensor, Tensor]:
    """Logits (N, K) and labels (N,) of a batch, looked at; waits for the device.

    Raises:
        TalosError: logits of another shape, NaN or infinite, or labels outside the classes; names the batch.
    """
    logits, labels = logits_of(forward, model, batch, where)
    check_logits(logits, labels, where)
    return logits, labels
