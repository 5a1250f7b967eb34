"""`merge` and `search_alpha`: edit a model with task vectors."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, SupportsFloat

from torch import nn

from talos_fast.along import movable, moved, require_parameters
from talos_fast.alpha_search import GRID, AlphaSearch, check_control_floor, choose_alpha
from talos_fast.edit import by_first_names
from talos_fast.errors import TalosError
from talos_fast.fingerprint import require_base
from talos_fast.merging import combine
from talos_fast.sparse_vector import require_several
from talos_fast.task_vector import TaskVector

Evaluate = Callable[[nn.Module], SupportsFloat]
"""``evaluate(model) -> accuracy`` in [0, 1] of one task."""


def merge(
    base: nn.Module,
    vectors: Sequence[TaskVector],
    *,
    alpha: float = 1.0,
    weights: Sequence[float] | None = None,
    method: str = "task_arithmetic",
    inplace: bool = False,
    check_base: bool = True,
    **options: Any,
) -> nn.Module:
    """The model θ0 + alpha Σ_t w_t τ_t (Ilharco et al. 2023): add tasks, or forget them by ``-vector``.

    Vectors of linearized fine-tuning give a `talos_fast.linear.Linearized` around the base instead: a module that
    computes f(x, θ0) + alpha J Σ_t w_t τ_t.

    Args:
        base: the pre-trained model; copied unless ``inplace``.
        vectors: of this base.
        alpha: one coefficient for all; `search_alpha` finds it.
        weights: one a vector, times ``alpha``.
        method: how the vectors become one: "task_arithmetic" is their sum; "ties", "dare_linear", "dare_ties",
            "magnitude_prune", "breadcrumbs" and "consensus" are in `talos_fast.merging`.
        inplace: edit ``base`` itself.
        check_base: refuse a model that is not the vectors' base.
        **options: of the method, such as ``density``.

    Raises:
        TalosError: no vector, another base, unknown names or shapes, an unknown method or option, or ``inplace`` with
            vectors of linearized fine-tuning; nothing is written then.
    """
    try:
        coefficient = float(alpha)
    except (TypeError, ValueError) as error:
        raise TalosError(f"alpha={alpha!r}: give a number; search_alpha finds one") from error
    vector = combine(_named(base, vectors), weights, method, **options)
    if check_base:
        require_base(vector.base, base, "the task vector")
    if inplace:
        require_parameters(vector, "inplace=True")
    model, edit = movable(base if inplace else copy.deepcopy(base), vector)
    edit.move(coefficient)
    return model


def search_alpha(
    base: nn.Module,
    vectors: Sequence[TaskVector],
    *,
    evaluate: Sequence[Evaluate] | Evaluate,
    control: Evaluate | None = None,
    control_floor: float = 0.95,
    grid: Sequence[float] | None = None,
    method: str = "task_arithmetic",
    check_base: bool = True,
    **options: Any,
) -> AlphaSearch:
    """Finds α for θ0 + α Σ_t τ_t on validation data; ``base`` is edited meanwhile and left bit-identical.

    Only the entries that the vectors hold are written between grid points.

    * Addition (no ``control``, whatever the vectors' sign): the α with the highest mean normalised accuracy,
      acc_t(merged) / acc_t(own vector, α = 1).
    * Negation (``control`` given, vectors negated, ``[-vector]``): the α with the lowest mean target accuracy among
      those that keep control accuracy ≥ ``control_floor`` times the pre-trained one.

    The smallest α wins ties.

    Args:
        base: the pre-trained model.
        vectors: of this base.
        evaluate: ``model -> accuracy``, one a vector, in their order; one alone for a single vector.
        control: ``model -> accuracy`` of the control task.
        control_floor: fraction of the control accuracy to keep.
        grid: the α to try; default 0, 0.05, …, 1.
        method: how the vectors become one, as in `merge`; α scales the result.
        check_base: refuse a model that is not the vectors' base.
        **options: of the method.

    Raises:
        TalosError: no vector, another number of evaluators, an empty grid, another base, an unknown method or option,
            an evaluation that gives NaN, or no α keeps the control.
    """
    evaluators = [evaluate] if callable(evaluate) else list(evaluate)
    alphas = sorted(GRID if grid is None else {float(alpha) for alpha in grid})
    check_control_floor(control_floor)
    vectors = _named(base, vectors)
    for evaluator in (*evaluators, *(() if control is None else (control,))):
        if not callable(evaluator):
            raise TalosError(
                f"evaluate, control: found a {type(evaluator).__name__}; give functions model -> accuracy, such as "
                "lambda model: talos_fast.evaluate(model, batches)"
            )
    if len(evaluators) != len(vectors):
        raise TalosError(f"{len(evaluators)} evaluators for {len(vectors)} task vectors; give one a vector")
    if not alphas:
        raise TalosError("the grid is empty; give at least one alpha")
    vector = combine(vectors, None, method, **options)
    if check_base:
        require_base(vector.base, base, "the task vector")
    if control is None:
        pairs = zip(vectors, evaluators, strict=True)
        untouched, references = None, tuple(_alone(base, single, evaluator) for single, evaluator in pairs)
    else:
        untouched, references = float(control(base)), tuple(float(evaluator(base)) for evaluator in evaluators)
    model, edit = movable(base, vector)
    accuracies, controls = [], []
    try:
        for alpha in alphas:
            edit.move(alpha)
            accuracies.append(tuple(float(evaluator(model)) for evaluator in evaluators))
            controls.append(None if control is None else float(control(model)))
    finally:
        edit.revert()
    return choose_alpha(alphas, accuracies, controls, references, untouched, control_floor)


def _named(base: nn.Module, vectors: Sequence[TaskVector]) -> list[TaskVector]:
    """The vectors with each parameter by its first name, so that they meet before they are combined."""
    vectors = require_several(vectors)
    deltas = [by_first_names(base, vector.deltas) for vector in vectors]
    return [vector.with_deltas(own) for vector, own in zip(vectors, deltas, strict=True)]


def _alone(base: nn.Module, vector: TaskVector, evaluator: Evaluate) -> float:
    with moved(base, vector) as model:
        return float(evaluator(model))
