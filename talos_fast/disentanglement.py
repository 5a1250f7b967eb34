"""Weight disentanglement error of two tasks: does adding one task vector change what the other one predicts?"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from talos_fast.edit import Edit
from talos_fast.errors import TalosError
from talos_fast.fingerprint import require_base
from talos_fast.linear import Linearized, dense_direction
from talos_fast.modules import unwrapped
from talos_fast.sparse_vector import common
from talos_fast.task_vector import TaskVector

Predict = Callable[[nn.Module], Tensor]
"""``predict(model) -> classes (N,)`` on one task's inputs."""

GRID = tuple(round(-3.0 + 0.3 * step, 1) for step in range(21))
"""The paper's square, [-3, 3]²."""


class _Plane:
    """A model at α1 τ1 + α2 τ2: edited in place, or expanded if the vectors are of a linearized model."""

    def __init__(self, base: nn.Module, vectors: tuple[TaskVector, TaskVector]) -> None:
        self.model = base
        self._edit = Edit(base, *(vector.deltas for vector in vectors))  # checks names and shapes
        self._linearized = vectors[0].linearized
        self._coefficients = (0.0, 0.0)
        if self._linearized:
            inner = unwrapped(base)
            self._parameters = dict(inner.named_parameters())
            self.model = Linearized(inner, self._tangents)
            self._directions = [dense_direction(inner, vector) for vector in vectors]

    def move(self, first: float, second: float) -> nn.Module:
        self._coefficients = (first, second)
        if not self._linearized:
            self._edit.move(first, second)
        return self.model

    def revert(self) -> None:
        if not self._linearized:
            self._edit.revert()

    def _tangents(self) -> Mapping[str, Tensor]:
        total: dict[str, Tensor] = {}
        for coefficient, direction in zip(self._coefficients, self._directions, strict=True):
            for name, delta in direction.items():
                step = coefficient * delta.to(self._parameters[name])
                total[name] = total[name] + step if name in total else step
        return total


def disentanglement_error(
    base: nn.Module | tuple[nn.Module, nn.Module],
    vectors: tuple[TaskVector, TaskVector],
    predict: tuple[Predict, Predict],
    alphas: Sequence[float] = GRID,
) -> Tensor:
    """ξ(α1, α2) = Σ_t E_{x in D_t}[pred(x; θ0 + α_t τ_t) ≠ pred(x; θ0 + α1 τ1 + α2 τ2)] (Ortiz-Jimenez et al. 2023).

    Only the entries that the two vectors hold are written between grid points; vectors of linearized fine-tuning are
    evaluated as directions of the expansion, and nothing is written.

    Args:
        base: the pre-trained model, edited meanwhile and left bit-identical; or one a task, with its head, around a
            shared encoder.
        vectors: τ1, τ2.
        predict: of task 1 and of task 2; called A + A² times each, with the task's model.
        alphas: the grid, used for both.

    Returns:
        (A, A) in [0, 2], on the CPU: rows α1, columns α2.

    Raises:
        TalosError: an empty grid, or vectors of another model.
    """
    if not alphas:
        raise TalosError("the grid of alphas is empty")
    models = base if isinstance(base, tuple) else (base, base)
    for model in models:
        require_base(common(vectors)[0], model, "the task vectors")
    planes = [_Plane(model, vectors) for model in models]
    errors = torch.zeros(len(alphas), len(alphas), dtype=torch.float32, device="cpu")
    try:
        for task, (plane, classify) in enumerate(zip(planes, predict, strict=True)):
            points = [(alpha, 0.0) if task == 0 else (0.0, alpha) for alpha in alphas]
            alone = [classify(plane.move(*point)) for point in points]
            for i, first in enumerate(alphas):
                for j, second in enumerate(alphas):
                    together = classify(plane.move(first, second))
                    errors[i, j] += (together != alone[j if task else i]).float().mean().cpu()
    finally:
        for plane in planes:
            plane.revert()
    return errors
