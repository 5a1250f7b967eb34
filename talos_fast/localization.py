"""Function localization: what each task vector does on its own task and on the others."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import jvp

from talos_fast.along import moved
from talos_fast.batch import Batch, Batches, to_device
from talos_fast.edit import fitting
from talos_fast.errors import TalosError
from talos_fast.fingerprint import require_base
from talos_fast.forward import Forward, default_forward, functional_forward
from talos_fast.linear import differentiable_forward
from talos_fast.merge import Evaluate
from talos_fast.modules import device_of, unwrapped
from talos_fast.sparse_vector import common
from talos_fast.task_vector import TaskVector


def accuracy_matrix(
    base: nn.Module, vectors: Sequence[TaskVector], evaluate: Sequence[Evaluate], *, alpha: float = 1.0
) -> Tensor:
    """The accuracy of θ0 + α τ_v on every task, (V, T), fp64: rows are vectors, columns tasks.

    A localized vector changes its own column only: compare with the pre-trained model's accuracies.

    Args:
        base: the pre-trained model; edited meanwhile and left bit-identical.
        vectors: V of this base.
        evaluate: ``model -> accuracy`` of T tasks.
        alpha: of every vector.

    Raises:
        TalosError: vectors of another base.
    """
    require_base(common(vectors)[0], base, "the task vectors")
    matrix = torch.zeros(len(vectors), len(evaluate), dtype=torch.float64, device="cpu")
    for row, vector in zip(matrix, vectors, strict=True):
        with moved(base, vector, alpha) as model:
            for column, evaluator in enumerate(evaluate):
                row[column] = float(evaluator(model))
    return matrix


def activation_matrix(
    vectors: Sequence[TaskVector], tasks: Sequence[tuple[nn.Module, Batches]], *, forward: Forward | None = None
) -> Tensor:
    """E_{x in D_t} mean_k |τ_vᵀ ∇_θ f_k(x, θ0)|, (V, T), fp64: how far a vector moves a task's logits, to first order.

    Function localization (Iurada et al. 2025) asks that it vanish off the diagonal. One forward-mode pass a vector and
    batch; nothing is written to the models.

    Args:
        vectors: V of the tasks' common base.
        tasks: T pairs of the pre-trained model with the task's head, and batches of the task's inputs.
        forward: ``forward(model, batch) -> logits (N, K)``; default: call the model.

    Raises:
        TalosError: vectors of another base, or a task without a batch.
    """
    matrix = torch.zeros(len(vectors), len(tasks), dtype=torch.float64, device="cpu")
    for column, (wrapped, batches) in enumerate(tasks):
        model = unwrapped(wrapped)
        require_base(common(vectors)[0], model, "the task vectors")
        seen = 0
        for batch in batches:
            batch = to_device(batch, device_of(model))
            for row, vector in enumerate(vectors):
                slopes = directional_derivative(model, vector, batch, forward or default_forward)
                matrix[row, column] += float(slopes.double().abs().mean(dim=-1).sum())
            seen += len(slopes)
        if seen == 0:
            raise TalosError(f"task {column} has no batch; an iterator can be read only once")
        matrix[:, column] /= seen
    return matrix


@torch.no_grad()
def directional_derivative(model: nn.Module, vector: TaskVector, batch: Batch, forward: Forward) -> Tensor:
    """J_θ f(x) τ, the derivative of the logits (N, K) along a vector, at the model's parameters, in evaluation mode.

    Buffers that the vector moves are no part of θ.
    """
    model = unwrapped(model)
    origin = {name: p.detach() for name, p in model.named_parameters()}
    deltas = fitting(model, vector.deltas)
    tangents = {name: delta.dense().to(origin[name]) for name, delta in deltas.items() if name in origin}
    if not tangents:
        return torch.zeros_like(functional_forward(forward, model, origin, batch))

    def logits(values: Mapping[str, Tensor]) -> Tensor:
        return functional_forward(forward, model, {**origin, **values}, batch)

    with differentiable_forward(model):
        slopes: Tensor = jvp(logits, ({name: origin[name] for name in tangents},), (tangents,))[1]
    return slopes
