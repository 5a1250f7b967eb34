"""What a study does, and what it found."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from talos_fast.alpha_search import GRID, AlphaSearch, check_control_floor
from talos_fast.arguments import check_weight_decay, checked_seed, require_integer, resolve_density
from talos_fast.errors import TalosError
from talos_fast.mask import Mask
from talos_fast.task_vector import TaskVector

LEAST = {
    "steps": 1, "batch_size": 1, "evaluation_batch": 1, "samples": 1, "extend": 0, "selection": 1, "limit": 1,
    "test_limit": 1,
}  # fmt: skip
"""The least that each count of a plan may be."""


@dataclass(frozen=True)
class Plan:
    """What a study does.

    Args:
        learning_rates: method -> the rates it chooses from, ascending, by mean single-task validation accuracy; as
            many for each.
        extend: how many rates beyond an end of these a method may try, in the same proportion, while an end is best.
        selection: the rate is chosen on the first tasks, this many; None: on all.
        steps: of fine-tuning a task.
        batch_size: of calibration and fine-tuning.
        evaluation_batch: of evaluation; smaller ones need less padding of texts.
        density: of the masks of TaLoS and LoTA.
        samples: inputs to calibrate on.
        calibration: further options of `calibrate`.
        weight_decay: of fine-tuning.
        limit: at most this many examples of a validation split.
        test_limit: at most this many of a test split.
        control_floor: fraction of the control accuracy that negation keeps.
        addition_grid, negation_grid: the α to try, ascending, from 0 on; the paper's 0, 0.05, … 1. Negation at equal
            control may need more than 1 of a vector that moves little.
        seed: of everything.

    Raises:
        TalosError: a field out of range; a run would find most of them only after hours.
    """

    learning_rates: dict[str, tuple[float, ...]]
    steps: int
    batch_size: int = 32
    evaluation_batch: int = 128
    density: float = 0.1
    samples: int = 256
    calibration: dict[str, Any] = field(default_factory=dict)
    weight_decay: float = 0.1
    extend: int = 0
    selection: int | None = None
    limit: int | None = None
    test_limit: int | None = None
    control_floor: float = 0.95
    addition_grid: tuple[float, ...] = GRID
    negation_grid: tuple[float, ...] = GRID
    seed: int = 0

    def __post_init__(self) -> None:
        for method, rates in self.learning_rates.items():
            # Files and tables have six digits of a rate.
            if not (_ascends([float(f"{lr:g}") for lr in rates]) and rates[0] > 0):
                raise TalosError(f"learning rates {[*rates]} of {method!r}: give positive, finite ones, ascending")
            if self.extend and len(rates) < 2:
                raise TalosError(f"extend={self.extend}: {method!r} has one learning rate, and no proportion; give two")
        for name, least in LEAST.items():
            if (count := getattr(self, name)) is not None:
                require_integer(name, count, least)
        for name in ("addition_grid", "negation_grid"):
            if not _ascends(getattr(self, name)):
                raise TalosError(f"{name}={getattr(self, name)}: give finite numbers, ascending")
        check_control_floor(self.control_floor)
        resolve_density(self.density)
        check_weight_decay(self.weight_decay)
        checked_seed("seed", self.seed)


def _ascends(numbers: Sequence[float]) -> bool:
    return bool(numbers) and all(map(math.isfinite, numbers)) and [*numbers] == sorted(set(numbers))


@dataclass
class MethodResult:
    """One method's row; accuracies on test data, in [0, 1], by task; seconds of calibration and training, all tasks."""

    method: str
    lr: float
    validation_by_lr: dict[str, float]
    single: dict[str, float] = field(default_factory=dict)
    added: dict[str, float] = field(default_factory=dict)
    addition: AlphaSearch | None = None
    target: dict[str, float] = field(default_factory=dict)
    control: dict[str, float] = field(default_factory=dict)
    negation: dict[str, AlphaSearch] = field(default_factory=dict)
    vector_bytes: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    def normalized(self) -> dict[str, float]:
        """Accuracy of the merged model over that of each task's own fine-tuned model."""
        return {task: self.added[task] / value if value else 0.0 for task, value in self.single.items()}

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON."""
        return {**asdict(self), "normalized": self.normalized()}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "MethodResult":
        """What `to_json` gave, before or after a file."""
        fields = {key: value for key, value in content.items() if key != "normalized"}
        addition = content["addition"] and AlphaSearch.from_json(content["addition"])
        negation = {task: AlphaSearch.from_json(found) for task, found in content["negation"].items()}
        return cls(**{**fields, "addition": addition, "negation": negation})


@dataclass
class StudyResult:
    """What a study found: accuracies on test data.

    One that keeps them also gives masks by task, vectors by method and task, and the seconds that all masks took.
    """

    plan: Plan
    zero_shot: dict[str, float]
    zero_shot_control: float | None
    methods: list[MethodResult]
    masks: dict[str, Mask] = field(default_factory=dict)
    vectors: dict[str, dict[str, TaskVector]] = field(default_factory=dict)
    calibration_seconds: float | None = None
