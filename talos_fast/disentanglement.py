"""Weight disentanglement error of two tasks: does adding one task vector change what the other one predicts?"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from talos_fast.edit import Edit
from talos_fast.errors import TalosError
from talos_fast.fingerprint import require_base
from talos_fast.stack import common_base
from talos_fast.task_vector import TaskVector

Predict = Callable[[nn.Module], Tensor]
"""``predict(model) -> classes (N,)`` on one task's inputs."""

GRID = tuple(round(-3.0 + 0.3 * step, 1) for step in range(21))
"""The paper's square, [-3, 3]²."""


def disentanglement_error(
    base: nn.Module,
    vectors: tuple[TaskVector, TaskVector],
    predict: tuple[Predict, Predict],
    alphas: Sequence[float] = GRID,
) -> Tensor:
    """ξ(α1, α2) = Σ_t E_{x in D_t}[pred(x; θ0 + α_t τ_t) ≠ pred(x; θ0 + α1 τ1 + α2 τ2)] (Ortiz-Jimenez et al. 2023).

    Only the entries that the two vectors hold are written between grid points.

    Args:
        base: the pre-trained model; edited meanwhile and left bit-identical.
        vectors: τ1, τ2.
        predict: of task 1 and of task 2; called A + A² times each.
        alphas: the grid, used for both.

    Returns:
        (A, A) in [0, 2], on the CPU: rows α1, columns α2.

    Raises:
        TalosError: an empty grid, or vectors of another model.
    """
    if not alphas:
        raise TalosError("the grid of alphas is empty")
    require_base(common_base(vectors), base, "the task vectors")
    edit = Edit(base, *(vector.deltas for vector in vectors))

    def predicted(first: float, second: float, judges: Sequence[Predict]) -> list[Tensor]:
        edit.move(first, second)
        return [judge(base) for judge in judges]

    errors = torch.zeros(len(alphas), len(alphas))
    try:
        alone = [predicted(alpha, 0.0, predict[:1])[0] for alpha in alphas]
        alone_second = [predicted(0.0, alpha, predict[1:])[0] for alpha in alphas]
        for i, first in enumerate(alphas):
            for j, second in enumerate(alphas):
                together = predicted(first, second, predict)
                pairs = zip(together, (alone[i], alone_second[j]), strict=True)
                errors[i, j] = sum(float((both != one).float().mean()) for both, one in pairs)
    finally:
        edit.revert()
    return errors
