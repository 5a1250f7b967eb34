"""A study: every task fine-tuned by every method, added, and negated; what `talos-fast demo` runs."""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from talos_fast.calibrate import calibrate, restored
from talos_fast.cells import Cells
from talos_fast.evaluate import evaluate_along
from talos_fast.finetune import finetune
from talos_fast.forward import Batches, default_forward, device_of, to_device
from talos_fast.mask import Mask
from talos_fast.merge import GRID, AlphaSearch, choose_alpha
from talos_fast.merging import combine
from talos_fast.models import Backbone, Classifier
from talos_fast.study_plan import MethodResult as MethodResult
from talos_fast.study_plan import Plan as Plan
from talos_fast.study_plan import StudyResult as StudyResult
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


class Study:
    """Runs a `Plan` on the tasks of one pre-trained model; the model is left as it was.

    Args:
        backbone: the pre-trained model.
        tasks: to learn, add and forget.
        control: what negation must not harm; None leaves negation out.
        plan: see `Plan`.
        progress: bars on a terminal.
        cells: where finished parts are kept; by default in memory.
        stand_in: the control when the task being negated is the control itself.
        recipes: task -> options of `finetune` that go before those of the plan; ``epochs`` takes the place of steps.
    """

    def __init__(
        self, backbone: Backbone, tasks: Sequence[Task], control: Task | None, plan: Plan, progress: bool = True,
        cells: Cells | None = None, stand_in: Task | None = None,
        recipes: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:  # fmt: skip
        self._backbone, self._tasks, self._control, self._plan = backbone, list(tasks), control, plan
        self._progress, self._cells, self._stand_in = progress, cells or Cells(), stand_in
        # Before any fine-tuning: heads may be computed with the encoder.
        self._recipes = recipes or {}
        everything = {task.name: task for task in (*tasks, control, stand_in) if task is not None}
        self._classifiers: dict[str, Classifier] = {
            name: backbone.classifier(task) for name, task in everything.items()
        }
        self._base = next(reversed(self._classifiers.values()))
        self._nothing = TaskVector.from_deltas({})
        self._validation: dict[str, Batches] = {}

    def run(self) -> StudyResult:
        """Calibrates, fine-tunes, adds and negates."""
        zero_shot, control = self.zero_shot()
        masks = {task.name: self.mask(task) for task in self._bar(self._tasks, "calibrate")}
        rows, vectors = [], {}
        for method in self._plan.learning_rates:
            row, vectors[method] = self.learn(method)
            rows.append(self.edit(row, vectors[method]))
        seconds = sum(mask.info["seconds"] for mask in masks.values())
        return StudyResult(self._plan, zero_shot, control, rows, masks, vectors, seconds)

    def zero_shot(self) -> tuple[dict[str, float], float | None]:
        """Test accuracies of the pre-trained model: on each task, and on the control."""

        def measure() -> dict[str, Any]:
            tasks = {task.name: self._test(task, self._nothing) for task in self._tasks}
            return {"tasks": tasks, "control": self._control and self._test(self._control, self._nothing)}

        found = self._cells.value("zero_shot", measure)
        return found["tasks"], found["control"]

    def mask(self, task: Task) -> Mask:
        """The TaLoS mask of a task."""
        plan = self._plan

        def make() -> Mask:
            batches = self._backbone.batches(task.train, batch_size=plan.batch_size, seed=plan.seed, limit=plan.samples)
            return calibrate(
                self._classifiers[task.name], batches,
                density=plan.density, seed=plan.seed, progress=False, **plan.calibration,
            )  # fmt: skip

        return self._cells.mask(f"masks/{task.name}", make)

    def row(self, method: str) -> dict[str, Any]:
        """`learn` and `edit` as JSON, measured once."""
        return self._cells.value(f"{method}/result", lambda: self.edit(*self.learn(method)).to_json())

    def rate(self, method: str) -> dict[str, Any]:
        """The learning rate of a method, one for all tasks, and the mean validation accuracy of every rate it tried."""
        return self._cells.value(f"{method}/rate", lambda: self._choose_rate(method))

    def learn(self, method: str) -> tuple[MethodResult, dict[str, TaskVector]]:
        """Fine-tunes every task by one method, at its best rate."""
        rate = self.rate(method)
        runs = self._bar(self._tasks, f"{method}: fine-tune")
        seconds = sum(self._trained(method, rate["lr"], task)["seconds"] for task in runs)
        vectors = {task.name: self._vector(method, rate["lr"], task) for task in self._tasks}
        row = MethodResult(method, rate["lr"], rate["validation_by_lr"], seconds=seconds)
        row.vector_bytes = {name: vector.info.get("factor_bytes", vector.nbytes) for name, vector in vectors.items()}
        return row, vectors

    def edit(self, row: MethodResult, vectors: dict[str, TaskVector]) -> MethodResult:
        """Completes a row: tests every vector alone, adds all, and negates each."""

        def alone() -> dict[str, float]:
            return {task.name: self._test(task, vectors[task.name]) for task in self._tasks}

        row.single = self._cells.value(f"{row.method}/single", alone)
        self._add(row, vectors, combine(list(vectors.values())))
        for task in self._bar(self._tasks if self._control else [], f"{row.method}: negate"):
            negate = partial(self._negated, task, vectors[task.name])
            found = self._cells.value(f"{row.method}/negation/{task.name}", negate)
            row.negation[task.name] = AlphaSearch.from_json(found["search"])
            row.target[task.name], row.control[task.name] = found["target"], found["control"]
        return row

    def rival(self, merging: str, learned: str = "nonlinear") -> dict[str, Any]:
        """A row of a post-hoc merging method (`talos_fast.merging`) on the vectors of a method; addition only."""

        def make() -> dict[str, Any]:
            row, vectors = self.learn(learned)
            row.single, row.method = self.row(learned)["single"], f"{learned}+{merging}"
            self._add(row, vectors, combine(list(vectors.values()), method=merging))
            return row.to_json()

        return self._cells.value(f"{learned}+{merging}/result", make)

    def _add(self, row: MethodResult, vectors: dict[str, TaskVector], merged: TaskVector) -> None:
        def make() -> dict[str, Any]:
            search = self._search_addition(vectors, merged)
            added = {task.name: self._test(task, merged, search.alpha) for task in self._tasks}
            return {"search": search.to_json(), "added": added}

        found = self._cells.value(f"{row.method}/addition", make)
        row.addition, row.added = AlphaSearch.from_json(found["search"]), found["added"]

    def _negated(self, task: Task, vector: TaskVector) -> dict[str, Any]:
        forget, control = -vector, self._control_of(task)
        search = self._search_negation(task, control, forget)
        target, kept = (self._test(judge, forget, search.alpha) for judge in (task, control))
        return {"search": search.to_json(), "target": target, "control": kept}

    def classifier(self, task: Task) -> Classifier:
        """The shared encoder with the head of a task."""
        return self._classifiers[task.name]

    def predict(self, task: Task, limit: int) -> Callable[[nn.Module], Tensor]:
        """A function that gives a model's classes on ``limit`` validation inputs of a task."""
        device = device_of(self._base)
        batches = [to_device(batch, device) for batch in self.batches(task.validation, limit=limit)]

        @torch.no_grad()
        def classes(model: nn.Module) -> Tensor:
            return torch.cat([default_forward(model, batch).argmax(-1).cpu() for batch in batches])

        return classes

    def batches(self, split: Split, *, limit: int | None = None) -> DataLoader[Any]:
        """Batches to evaluate on."""
        size = max(self._plan.batch_size, EVALUATION_BATCH)
        return self._backbone.batches(split, batch_size=size, seed=self._plan.seed, limit=limit)

    def _bar(self, items: Sequence[Any], label: str) -> Any:
        return tqdm(items, label, disable=None if self._progress else True, leave=False)

    def _choose_rate(self, method: str) -> dict[str, Any]:
        plan, rates = self._plan, list(self._plan.learning_rates[method])
        chosen_on, scores = self._tasks[: plan.selection], dict[float, float]()
        for number in range(plan.extend + 1):
            new = [rate for rate in rates if rate not in scores]
            runs = self._bar([(lr, task) for lr in new for task in chosen_on], f"{method}: choose a rate")
            found = {(lr, task.name): self._trained(method, lr, task)["validation"] for lr, task in runs}
            scores |= {lr: sum(found[lr, task.name] for task in chosen_on) / len(chosen_on) for lr in new}
            best = max(rates, key=lambda lr: scores[lr])
            if number == plan.extend or best not in (rates[0], rates[-1]):
                break
            rates = _extended(rates, best)
        for lr, task in ((lr, task) for lr in rates if lr != best for task in chosen_on):
            self._cells.drop(f"{method}/{lr:g}/{task.name}")
        return {"lr": best, "validation_by_lr": {f"{lr:g}": scores[lr] for lr in rates}}

    def _trained(self, method: str, lr: float, task: Task) -> dict[str, Any]:
        """The validation accuracy of a task's vector, and the seconds it took, with all that its method needs first."""

        def make() -> dict[str, Any]:
            vector = self._vector(method, lr, task)
            (accuracy,) = self._validate(task, vector, [1.0])
            seconds = vector.info["seconds"]
            if method == "talos":
                seconds += self.mask(task).info["seconds"]
            elif method == "lota" and (rate := self._full_rate()):
                seconds += self._trained("nonlinear", rate, task)["seconds"]
            return {"validation": accuracy, "seconds": seconds, "last_loss": vector.info["last_loss"]}

        return self._cells.value(f"{method}/{lr:g}/{task.name}", make)

    def _vector(self, method: str, lr: float, task: Task) -> TaskVector:
        return self._cells.vector(f"{method}/{lr:g}/{task.name}", lambda: self._finetune(method, lr, task))

    def _full_rate(self) -> float | None:
        """The rate of full fine-tuning, if it is one of the methods: LoTA then starts from its vectors."""
        return self.rate("nonlinear")["lr"] if "nonlinear" in self._plan.learning_rates else None

    def _finetune(self, method: str, lr: float, task: Task) -> TaskVector:
        """The vector of a task; the shared encoder is restored afterwards."""
        classifier, plan = self._classifiers[task.name], self._plan
        options: dict[str, Any] = {}
        if method == "talos":
            options = {"mask": self.mask(task)}
        elif method == "lota":
            rate = self._full_rate()
            options = {"density": plan.density, "finetuned": rate and self._vector("nonlinear", rate, task)}
        recipe = dict(self._recipes.get(task.name, {}))
        length = {} if "epochs" in recipe else {"steps": plan.steps}
        batches = self._backbone.batches(task.train, batch_size=plan.batch_size, shuffle=True, seed=plan.seed)
        with restored(dict(classifier.named_parameters())):
            return finetune(
                classifier, batches, method=method, lr=lr, seed=plan.seed, progress=False,
                checkpoint_dir=self._cells.checkpoint(f"{method}/{lr:g}/{task.name}"),
                **{"weight_decay": plan.weight_decay, **length, **options, **recipe},
            )  # fmt: skip

    def _search_addition(self, vectors: dict[str, TaskVector], merged: TaskVector) -> AlphaSearch:
        references = tuple(self._validate(task, vectors[task.name], [1.0])[0] for task in self._tasks)
        by_task = [self._validate(task, merged, GRID) for task in self._tasks]
        return choose_alpha(GRID, list(zip(*by_task, strict=True)), [None] * len(GRID), references, None)

    def _search_negation(self, task: Task, control: Task, forget: TaskVector) -> AlphaSearch:
        (target,), (kept,) = (self._validate(judge, self._nothing, [0.0]) for judge in (task, control))
        targets, controls = (self._validate(judge, forget, GRID) for judge in (task, control))
        return choose_alpha(
            GRID, [(accuracy,) for accuracy in targets], controls, (target,), kept, self._plan.control_floor
        )

    def _control_of(self, task: Task) -> Task:
        assert self._control is not None
        return self._stand_in if self._stand_in is not None and task.name == self._control.name else self._control

    def _validate(self, task: Task, vector: TaskVector, alphas: Sequence[float]) -> list[float]:
        if task.name not in self._validation:
            self._validation[task.name] = prepared(self.batches(task.validation, limit=self._plan.limit))
        found = evaluate_along(self._classifiers[task.name], vector, self._validation[task.name], alphas)
        return [float(accuracy) for accuracy in found]

    def _test(self, task: Task, vector: TaskVector, alpha: float = 1.0) -> float:
        batches = self.batches(task.test, limit=self._plan.test_limit)
        return float(evaluate_along(self._classifiers[task.name], vector, batches, [alpha])[0])


def _extended(rates: list[float], end: float) -> list[float]:
    """The rates with one more beyond an end, in the proportion of the two there."""
    if end == rates[-1]:
        return [*rates, rates[-1] * rates[-1] / rates[-2]]
    return [rates[0] * rates[0] / rates[1], *rates]
