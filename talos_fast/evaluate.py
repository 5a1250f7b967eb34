"""`evaluate`: top-1 accuracy."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from talos_fast.along import movable
from talos_fast.batch import Batches, to_device
from talos_fast.edit import require_finite
from talos_fast.errors import TalosError
from talos_fast.forward import Forward, checked_logits, default_forward
from talos_fast.linear import Linearized
from talos_fast.modules import device_of
from talos_fast.restoring import restoring_modes
from talos_fast.task_vector import TaskVector


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
    device, total = device_of(model), 0
    correct = torch.zeros((), dtype=torch.int64, device=device)
    with restoring_modes(model):
        model.train()  # some models cache what they derive from parameters in evaluation mode, until `train`
        model.eval()
        for index, batch in enumerate(tqdm(batches, "evaluate", disable=None if progress else True, leave=False)):
            logits, labels = checked_logits(forward, model, to_device(batch, device), f"batch {index}")
            correct += (logits.argmax(-1) == labels).sum()
            total += len(labels)
    return _accuracies(correct.view(1), total)[0]


@torch.no_grad()
def evaluate_along(
    model: nn.Module, vector: TaskVector, batches: Batches, alphas: Sequence[float], *, forward: Forward | None = None
) -> list[Accuracy]:
    """The accuracy of model + α vector for each α, as `evaluate` measures it; the model is left bit-identical.

    Logits along a vector of linearized fine-tuning are affine in α: they cost one forward and one forward-mode pass a
    batch, however many α there are.

    Args:
        model: the base of the vector.
        vector: where to move.
        batches: read once an α; of a linearized vector once in all.
        alphas: coefficients.
        forward: as in `evaluate`; it must be affine in what the model returns, if the vector is of a linearized model.

    Raises:
        TalosError: as `evaluate`, or the vector does not fit the model.
    """
    require_finite(alphas)
    module, edit = movable(model, vector)
    if isinstance(edit, Linearized):
        return _along_line(edit, batches, alphas, forward or default_forward)
    try:
        found = []
        for alpha in alphas:
            edit.move(alpha)
            found.append(evaluate(module, batches, forward=forward))
        return found
    finally:
        edit.revert()


def _along_line(line: Linearized, batches: Batches, alphas: Sequence[float], forward: Forward) -> list[Accuracy]:
    device, total = device_of(line), 0
    coefficients = torch.tensor(alphas, dtype=torch.float64, device=device).view(-1, 1, 1)
    correct = torch.zeros(len(alphas), dtype=torch.int64, device=device)
    finite = torch.ones((), dtype=torch.bool, device=device)
    for index, batch in enumerate(batches):
        batch, ends = to_device(batch, device), []
        for alpha in (0.0, 1.0):
            line.move(alpha)
            logits, labels = checked_logits(forward, line, batch, f"batch {index}")
            ends.append(logits)
        path = ends[0] + coefficients.to(ends[0].dtype) * (ends[1] - ends[0])  # (A, N, K)
        correct += (path.argmax(-1) == labels).sum(-1)
        finite &= path.isfinite().all()
        total += len(labels)
    if not finite:
        raise TalosError(f"alphas {list(alphas)}: the logits hold NaN or infinite entries; give smaller coefficients")
    return _accuracies(correct, total)


def _accuracies(correct: Tensor, total: int) -> list[Accuracy]:
    if total == 0:
        raise TalosError("there is no batch to evaluate on; the iterable was empty (an iterator can be read only once)")
    return [Accuracy(count / total, count, total) for count in correct.tolist()]
