"""`AlphaSearch`: which coefficient α is best for adding or forgetting tasks, from the accuracies at each."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from talos_fast.errors import TalosError

GRID = tuple(round(0.05 * step, 2) for step in range(21))


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
        """One line per task, by name or number: accuracy, and its ratio to the reference accuracy."""
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


def check_control_floor(value: float) -> None:
    """Refuses what is no fraction of the control accuracy."""
    if not 0 <= value <= 1:
        raise TalosError(f"control_floor={value}: give a fraction of the control accuracy, 0 to 1")


def choose_alpha(
    alphas: Sequence[float],
    accuracies: Sequence[tuple[float, ...]],
    controls: Sequence[float | None],
    references: tuple[float, ...],
    control: float | None,
    control_floor: float = 0.95,
) -> AlphaSearch:
    """Chooses α as `talos_fast.search_alpha` does, from what was measured at each.

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


def _add(trials: Sequence[Trial]) -> tuple[Trial, str]:
    # fmean's sums are exact, so that ties are ties in whatever order tasks come.
    best = max(trials, key=lambda trial: (fmean(trial.normalized), -trial.alpha))
    return best, f"highest mean normalised accuracy, {fmean(best.normalized):.4f}; the smallest alpha on ties"


def _negate(trials: Sequence[Trial], floor: float) -> tuple[Trial, str]:
    allowed = [trial for trial in trials if trial.control is not None and trial.control >= floor]
    if not allowed:
        raise TalosError(
            f"no alpha of the grid keeps the control accuracy at {floor:.4f}; add 0 to the grid, or smaller steps"
        )
    best = min(allowed, key=lambda trial: (fmean(trial.accuracies), trial.alpha))
    return best, f"lowest target accuracy, {fmean(best.accuracies):.4f}, with the control at {floor:.4f} or above"
