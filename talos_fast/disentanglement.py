"""Weight disentanglement error of two tasks: does adding one task vector change what the other one predicts?"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from talos_fast.edit import Edit
from talos_fast.errors import TalosError
from talos_fast.task_vector import TaskVector

Predict = Callable[[nn.Module], Tensor]
"""``predict(model) -> classes (N,)`` on one task's inputs."""


def predictions(model: nn.Module, vector: TaskVector, predict: Predict) -> Tensor:
    """What ``predict`` gives on the model with ``vector`` applied; the model is left bit-identical."""
    edit = Edit(model, vector.deltas)
    try:
        edit.move(1.0)
        return predict(model)
    finally:
        edit.revert()


def disentanglement_error(
    base: nn.Module, vectors: tuple[TaskVector, TaskVector], predict: tuple[Predict, Predict], alphas: Sequence[float]
) -> Tensor:
    """ξ(α1, α2) = mean over t of E_{x in D_t}[pred(x; θ0 + α_t τ_t) ≠ pred(x; θ0 + α1 τ1 + α2 τ2)].

    Ortiz-Jimenez et al. 2023, Eq. 4, divided by two so that it lies in [0, 1].

    Args:
        base: the pre-trained model; edited meanwhile and left bit-identical.
        vectors: τ1, τ2.
        predict: of task 1 and of task 2.
        alphas: the grid, used for both.

    Returns:
        (A, A): rows α1, columns α2.

    Raises:
        TalosError: an empty grid, or vectors of another model.
    """
    if not alphas:
        raise TalosError("the grid of alphas is empty")
    scaled = [[alpha * vector for alpha in alphas] for vector in vectors]
    alone = [[predictions(base, v, judge) for v in row] for row, judge in zip(scaled, predict, strict=True)]
    errors = torch.zeros(len(alphas), len(alphas))
    for i, first in enumerate(scaled[0]):
        for j, second in enumerate(scaled[1]):
            edit = Edit(base, (first + second).deltas)
            try:
                edit.move(1.0)
                differ = [
                    (judge(base) != one).float().mean()
                    for judge, one in zip(predict, (alone[0][i], alone[1][j]), strict=True)
                ]
            finally:
                edit.revert()
            errors[i, j] = torch.stack(differ).mean()
    return errors
