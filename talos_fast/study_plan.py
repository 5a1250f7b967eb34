"""What a study does, and what it found."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from talos_fast.mask import Mask
from talos_fast.merge import GRID, AlphaSearch
from talos_fast.task_vector import TaskVector


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
    """What a study found; vectors and masks by method and task, accuracies on test data."""

    plan: Plan
    zero_shot: dict[str, float]
    zero_shot_control: float | None
    methods: list[MethodResult]
    masks: dict[str, Mask]
    vectors: dict[str, dict[str, TaskVector]]
    calibration_seconds: float
