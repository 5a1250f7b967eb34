"""`evaluate`: top-1 accuracy."""

from dataclasses import dataclass

import torch
from torch import nn
from tqdm.auto import tqdm

from talos_fast.errors import TalosError
from talos_fast.forward import Batches, Forward, checked_logits, default_forward, device_of, to_device


@dataclass(frozen=True, order=True)
class Accuracy:
    """``correct`` of ``total`` inputs; ``float(accuracy)`` is the fraction."""

    value: float
    correct: int
    total: int

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        return f"{100 * self.value:.2f} % ({self.correct} of {self.total})"


@torch.no_grad()
def evaluate(model: nn.Module, batches: Batches, *, forward: Forward | None = None, progress: bool = False) -> Accuracy:
    """How often the largest logit is the label's, in evaluation mode; the model is left as it was.

    Args:
        model: any module.
        batches: ``(inputs, labels)`` or mappings with ``labels``.
        forward: ``forward(model, batch) -> logits (N, K)``; default: call the model.
        progress: a bar on a terminal.

    Raises:
        TalosError: no batch, an empty one, labels outside the classes, NaN or infinite logits; names the batch.
    """
    forward = forward or default_forward
    modes = {module: module.training for module in model.modules()}
    device, total = device_of(model), 0
    correct = torch.zeros((), dtype=torch.int64, device=device)
    try:
        model.eval()
        for index, batch in enumerate(tqdm(batches, "evaluate", disable=None if progress else True, leave=False)):
            logits, labels = checked_logits(forward, model, to_device(batch, device), f"batch {index}")
            correct += (logits.argmax(-1) == labels).sum()
            total += len(labels)
    finally:
        for module, training in modes.items():
            module.training = training
    if total == 0:
        raise TalosError("there is no batch to evaluate on; the iterable was empty (an iterator can be read only once)")
    return Accuracy(int(correct) / total, int(correct), total)
