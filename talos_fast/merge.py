"""`merge` and `search_alpha`: edit a model with task vectors."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from talos_fast.edit import by_first_names
from talos_fast.errors import TalosError
from talos_fast.evaluate import Accuracy
from talos_fast.fingerprint import require_base
from talos_fast.linear import edited, moved, require_parameters
from talos_fast.merging import combine
from talos_fast.sparse_vector import require_several
from talos_fast.task_vector import TaskVector

Evaluate = Callable[[nn.Module], float | Accuracy]
"""``evaluate(model) -> accuracy`` in [0, 1] of one task."""

GRID = tuple(round(0.05 * step, 2) for step in range(21))


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
    vector = combine(_named(base, vectors), weights, method, **options)
    if check_base:
        require_base(vector.base, base, "the task vector")
    if inplace:
        require_parameters(vector, "inplace=True")
    model, edit = edited(base if inplace else copy.deepcopy(base), vector)
    edit.move(alpha)
    return model


@dataclass(frozen=True)
class Trial:
    """One α: the accuracy of every task (as it is in the edited model) and of the control."""

    alpha: float
    accuracies: tuple[float, ...]
    normalized: tuple[float, ...]
    control: float | None


@dataclass(frozen=True)
class AlphaSearch:
    """What `search_alpha` found.

    Args:
        alpha: the chosen coefficient.
        trials: every α tried, in the order of the grid.
        references: addition: each task's accuracy with its own vector alone at α = 1; negation: of the pre-trained
            model.
        control: the pre-trained model's control accuracy, if there is a control.
        why: the choice in words.
    """

    alpha: float
    trials: tuple[Trial, ...]
    references: tuple[float, ...]
    control: float | None
    why: str

    def __str__(self) -> str:
        """The choice, and what it gives each task."""
        return "\n".join([f"alpha {self.alpha:g}: {self.why}", *self.lines()])

    def lines(self, names: Sequence[str] = ()) -> list[str]:
        """A line a task, by its name or number: accuracy, and of what that is which part."""
        best = self.best
        rows = zip(best.accuracies, self.references, best.normalized, strict=True)
        found = [
            f"{names[n] if names else f'task {n}'}: {accuracy:.2%}, {part:.3f} of {reference:.2%}"
            for n, (accuracy, reference, part) in enumerate(rows)
        ]
        if best.control is not None and self.control is not None:
            found.append(f"control: {best.control:.2%}, before {self.control:.2%}")
        return found

    @property
    def best(self) -> Trial:
        """The trial at the chosen α."""
        return next(trial for trial in self.trials if trial.alpha == self.alpha)

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "AlphaSearch":
        """What `to_json` gave, before or after a file."""
        trials = tuple(
            Trial(t["alpha"], tuple(t["accuracies"]), tuple(t["normalized"]), t["control"]) for t in content["trials"]
        )
        return cls(**{**content, "trials": trials, "references": tuple(content["references"])})


def search_alpha(
    base: nn.Module,
    vectors: Sequence[TaskVector],
    *,
    evaluate: Sequence[Evaluate] | Evaluate,
    control: Evaluate | None = None,
    control_floor: float = 0.95,
    grid: Sequence[float] | None = None,
    method: str = "task_arithmetic",
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
        **options: of the method.

    Raises:
        TalosError: no vector, another number of evaluators, an empty grid, another base, an unknown method or option,
            an evaluation that gives NaN, or no α keeps the control.
    """
    evaluators = [evaluate] if callable(evaluate) else list(evaluate)
    alphas = sorted(GRID if grid is None else {float(alpha) for alpha in grid})
    require_several(vectors)
    for judge in (*evaluators, *(() if control is None else (control,))):
        if not callable(judge):
            raise TalosError(
                f"evaluate, control: found a {type(judge).__name__}; give functions model -> accuracy, such as "
                "lambda model: talos_fast.evaluate(model, batches)"
            )
    if len(evaluators) != len(vectors):
        raise TalosError(f"{len(evaluators)} evaluators for {len(vectors)} task vectors; give one a vector")
    if not alphas:
        raise TalosError("the grid is empty; give at least one alpha")
    vectors = _named(base, vectors)
    vector = combine(vectors, None, method, **options)
    require_base(vector.base, base, "the task vector")
    untouched = None if control is None else float(control(base))
    if control is None:
        references = tuple(_alone(base, single, judge) for single, judge in zip(vectors, evaluators, strict=True))
    else:
        references = tuple(float(judge(base)) for judge in evaluators)
    model, edit = edited(base, vector)
    accuracies, controls = [], []
    try:
        for alpha in alphas:
            edit.move(alpha)
            accuracies.append(tuple(float(judge(model)) for judge in evaluators))
            controls.append(None if control is None else float(control(model)))
    finally:
        edit.revert()
    return choose_alpha(alphas, accuracies, controls, references, untouched, control_floor)


def choose_alpha(
    alphas: Sequence[float],
    accuracies: Sequence[tuple[float, ...]],
    controls: Sequence[float | None],
    references: tuple[float, ...],
    control: float | None,
    control_floor: float = 0.95,
) -> AlphaSearch:
    """Chooses α as `search_alpha` does, from what was measured at each.

    Args:
        alphas: ascending.
        accuracies: of every task, at each α.
        controls: the control's, at each α.
        references: see `AlphaSearch`.
        control: the pre-trained model's control accuracy; None for addition.
        control_floor: fraction of it to keep.

    Raises:
        TalosError: no α keeps the control, or an accuracy is NaN.
    """
    trials = [
        Trial(alpha, found, tuple(a / r if r else 0.0 for a, r in zip(found, references, strict=True)), kept)
        for alpha, found, kept in zip(alphas, accuracies, controls, strict=True)
    ]
    if any(math.isnan(value) for t in trials for value in (*t.accuracies, *references, t.control or 0.0)):
        raise TalosError("an evaluation gave NaN; there is no best alpha")
    chosen, why = _add(trials) if control is None else _negate(trials, control_floor * control)
    return AlphaSearch(chosen.alpha, tuple(trials), references, control, why)


def _named(base: nn.Module, vectors: Sequence[TaskVector]) -> list[TaskVector]:
    """The vectors with each parameter by its first name, so that they meet before they are combined."""
    require_several(vectors)
    deltas = [by_first_names(base, vector.deltas) for vector in vectors]
    return [TaskVector.from_deltas(d, base=v.base, info=v.info) for d, v in zip(deltas, vectors, strict=True)]


def _alone(base: nn.Module, vector: TaskVector, judge: Evaluate) -> float:
    with moved(base, vector) as model:
        return float(judge(model))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)  # exact sums, so that ties are ties in whatever order tasks come


def _add(trials: Sequence[Trial]) -> tuple[Trial, str]:
    best = max(trials, key=lambda trial: (_mean(trial.normalized), -trial.alpha))
    return best, f"highest mean normalised accuracy, {_mean(best.normalized):.4f}; the smallest alpha on ties"


def _negate(trials: Sequence[Trial], floor: float) -> tuple[Trial, str]:
    allowed = [trial for trial in trials if trial.control is not None and trial.control >= floor]
    if not allowed:
        raise TalosError(
            f"no alpha of the grid keeps the control accuracy at {floor:.4f}; add 0 to the grid, or smaller steps"
        )
    best = min(allowed, key=lambda trial: (_mean(trial.accuracies), trial.alpha))
    return best, f"lowest target accuracy, {_mean(best.accuracies):.4f}, with the control at {floor:.4f} or above"
