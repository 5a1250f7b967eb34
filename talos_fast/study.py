"""A study: every task fine-tuned by every method, added, and negated; what `talos-fast demo` runs."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from talos_fast.calibrate import calibrate, restored
from talos_fast.edit import Edit
from talos_fast.evaluate import evaluate
from talos_fast.finetune import finetune
from talos_fast.forward import Batches, default_forward, device_of, to_device
from talos_fast.mask import Mask
from talos_fast.merge import AlphaSearch, search_alpha
from talos_fast.merging import combine
from talos_fast.models import Backbone, Classifier
from talos_fast.task_vector import TaskVector
from talos_fast.tasks import Split, Task

logger = logging.getLogger("talos_fast")


# A sweep over α reads the same inputs dozens of times: they are prepared once, if they fit.
PREPARED_BYTES = 2**28
EVALUATION_BATCH = 128


def prepared(batches: DataLoader[Any]) -> Batches:
    """The batches as a list, or the loader itself if they would take more than `PREPARED_BYTES`."""
    sizes = [leaf.nbytes for leaf in tree_leaves(next(iter(batches))) if isinstance(leaf, Tensor)]
    return list(batches) if sum(sizes) * len(batches) <= PREPARED_BYTES else batches


@dataclass(frozen=True)
class Plan:
    """What a study does.

    Args:
        learning_rates: method -> the rates it chooses from, by mean single-task validation accuracy; as many for each.
        steps: of fine-tuning a task.
        batch_size: of everything.
        density: of the masks.
        samples: inputs to calibrate on.
        weight_decay: of fine-tuning.
        limit: at most this many examples of a validation split.
        control_floor: fraction of the control accuracy that negation keeps.
        seed: of everything.
    """

    learning_rates: dict[str, tuple[float, ...]]
    steps: int
    batch_size: int = 32
    density: float = 0.1
    samples: int = 256
    weight_decay: float = 0.1
    limit: int | None = None
    control_floor: float = 0.95
    seed: int = 0


@dataclass
class MethodResult:
    """One method's row; accuracies on test data, in [0, 1], by task."""

    method: str
    lr: float
    validation_by_lr: dict[str, float]
    single: dict[str, float]
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


@dataclass
class StudyResult:
    """What a study found; vectors and masks by method and task, accuracies on test data."""

    plan: Plan
    zero_shot: dict[str, float]
    zero_shot_control: float
    methods: list[MethodResult]
    masks: dict[str, Mask]
    vectors: dict[str, dict[str, TaskVector]]
    calibration_seconds: float


class Study:
    """Runs a `Plan` on the tasks of one pre-trained model; the model is left as it was.

    Args:
        backbone: the pre-trained model.
        tasks: to learn, add and forget.
        control: what negation must not harm.
        plan: see `Plan`.
        progress: bars on a terminal.
    """

    def __init__(
        self, backbone: Backbone, tasks: Sequence[Task], control: Task, plan: Plan, progress: bool = True
    ) -> None:
        self._backbone, self._tasks, self._control, self._plan = backbone, list(tasks), control, plan
        self._progress = progress
        # Before any fine-tuning: heads may be computed with the encoder.
        self._classifiers: dict[str, Classifier] = {task.name: backbone.classifier(task) for task in [*tasks, control]}
        self._base = self._classifiers[control.name]
        self._validation: dict[str, Batches] = {}

    def run(self) -> StudyResult:
        """Calibrates, fine-tunes, adds and negates."""
        zero_shot = {task.name: self._test(task) for task in self._tasks}
        start = time.perf_counter()
        masks = {task.name: self._calibrate(task) for task in self._bar(self._tasks, "calibrate")}
        calibration = time.perf_counter() - start
        rows, vectors = [], {}
        for method, rates in self._plan.learning_rates.items():
            row, vectors[method] = self._learn(method, rates, masks)
            row.seconds += calibration / len(rates) if method == "talos" else 0.0
            self._add(row, vectors[method])
            self._negate(row, vectors[method])
            rows.append(row)
        return StudyResult(self._plan, zero_shot, self._test(self._control), rows, masks, vectors, calibration)

    def predict(self, task: Task, limit: int) -> Callable[[Any], Tensor]:
        """A function that gives the shared encoder's classes on ``limit`` validation inputs of a task."""
        classifier, device = self._classifiers[task.name], device_of(self._base)
        batches = [to_device(batch, device) for batch in self.batches(task.validation, limit=limit)]

        @torch.no_grad()
        def classes(_: Any) -> Tensor:
            return torch.cat([default_forward(classifier, batch).argmax(-1).cpu() for batch in batches])

        return classes

    @property
    def model(self) -> Classifier:
        """The pre-trained model, with the head of the control task."""
        return self._base

    def batches(self, split: Split, *, limit: int | None = None) -> DataLoader[Any]:
        """Batches to evaluate on."""
        size = max(self._plan.batch_size, EVALUATION_BATCH)
        return self._backbone.batches(split, batch_size=size, seed=self._plan.seed, limit=limit)

    def _bar(self, items: Sequence[Any], label: str) -> Any:
        return tqdm(items, label, disable=None if self._progress else True, leave=False)

    def _calibrate(self, task: Task) -> Mask:
        plan = self._plan
        batches = self._backbone.batches(task.train, batch_size=plan.batch_size, seed=plan.seed, limit=plan.samples)
        return calibrate(self._classifiers[task.name], batches, density=plan.density, seed=plan.seed, progress=False)

    def _finetune(self, method: str, lr: float, task: Task, mask: Mask | None) -> tuple[TaskVector, float]:
        """The vector of a task, and its validation accuracy; the shared encoder is restored afterwards."""
        classifier, plan = self._classifiers[task.name], self._plan
        batches = self._backbone.batches(task.train, batch_size=plan.batch_size, shuffle=True, seed=plan.seed)
        with restored(dict(classifier.named_parameters())):
            vector = finetune(
                classifier, batches, method=method, mask=mask, steps=plan.steps, lr=lr,
                weight_decay=plan.weight_decay, seed=plan.seed, progress=False,
            )  # fmt: skip
            return vector, self._validate(task)

    def _learn(
        self, method: str, rates: Sequence[float], masks: dict[str, Mask]
    ) -> tuple[MethodResult, dict[str, TaskVector]]:
        """Every task at every rate; the rate with the highest mean validation accuracy wins, one for all tasks."""
        start, found = time.perf_counter(), {}
        for lr, task in self._bar([(lr, task) for lr in rates for task in self._tasks], f"{method}: fine-tune"):
            mask = masks[task.name] if method == "talos" else None
            found[lr, task.name] = self._finetune(method, lr, task, mask)
        mean = {lr: sum(found[lr, task.name][1] for task in self._tasks) / len(self._tasks) for lr in rates}
        best = max(rates, key=lambda lr: mean[lr])
        vectors = {task.name: found[best, task.name][0] for task in self._tasks}
        seconds = (time.perf_counter() - start) / len(rates)
        single = {task.name: self._test(task, vectors[task.name]) for task in self._tasks}
        sizes = {name: vector.nbytes for name, vector in vectors.items()}
        row = MethodResult(method, best, {f"{lr:g}": value for lr, value in mean.items()}, single, seconds=seconds)
        row.vector_bytes = sizes
        return row, vectors

    def _add(self, row: MethodResult, vectors: dict[str, TaskVector]) -> None:
        judges = [self._judge(task) for task in self._tasks]
        chosen = list(vectors.values())
        row.addition = search_alpha(self._base, chosen, evaluate=judges)
        merged = combine(chosen)
        row.added = {task.name: self._test(task, merged, row.addition.alpha) for task in self._tasks}

    def _negate(self, row: MethodResult, vectors: dict[str, TaskVector]) -> None:
        for task in self._bar(self._tasks, f"{row.method}: negate"):
            forget = -vectors[task.name]
            search = search_alpha(
                self._base, [forget], evaluate=self._judge(task), control=self._judge(self._control),
                control_floor=self._plan.control_floor,
            )  # fmt: skip
            row.negation[task.name] = search
            row.target[task.name] = self._test(task, forget, search.alpha)
            row.control[task.name] = self._test(self._control, forget, search.alpha)

    def _validate(self, task: Task) -> float:
        if task.name not in self._validation:
            self._validation[task.name] = prepared(self.batches(task.validation, limit=self._plan.limit))
        return float(evaluate(self._classifiers[task.name], self._validation[task.name]))

    def _judge(self, task: Task) -> Callable[[Any], float]:
        # The classifiers share the encoder that is being edited, so each is judged through its own head.
        return lambda _: self._validate(task)

    def _test(self, task: Task, vector: TaskVector | None = None, alpha: float = 1.0) -> float:
        with self._edited(vector, alpha):
            return float(evaluate(self._classifiers[task.name], self.batches(task.test)))

    @contextmanager
    def _edited(self, vector: TaskVector | None, alpha: float) -> Iterator[None]:
        edit = Edit(self._base, {} if vector is None else vector.deltas)
        try:
            edit.move(alpha)
            yield
        finally:
            edit.revert()
