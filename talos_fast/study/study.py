"""A study: every task fine-tuned by every method, added, and negated; what `talos-fast demo` and `suite` run."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

from torch import Tensor, nn

from talos_fast.alpha_search import AlphaSearch, choose_alpha
from talos_fast.cells import Cells
from talos_fast.mask import Mask
from talos_fast.merging import combine
from talos_fast.models import Backbone, Classifier
from talos_fast.study.examiner import Examiner
from talos_fast.study.learner import Learner
from talos_fast.study.plan import MethodResult, Plan, StudyResult
from talos_fast.task_vector import TaskVector
from talos_fast.tasks import Task
from talos_fast.tasks.base import check_distinct


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
        self._tasks, self._control, self._stand_in = list(tasks), control, stand_in
        self._plan, self._cells = plan, cells or Cells()
        everything = {id(task): task for task in (*tasks, control, stand_in) if task is not None}.values()
        check_distinct(everything)
        self._examiner = Examiner(backbone, everything, plan)
        self._learner = Learner(backbone, self._tasks, plan, self._examiner, self._cells, recipes or {}, progress)
        self._nothing = TaskVector.from_deltas({})

    def run(self) -> StudyResult:
        """Calibrates, fine-tunes, adds and negates."""
        zero_shot, control = self.zero_shot()
        bar = self._learner.bar("calibrate", len(self._tasks))
        masks = {task.name: self.mask(task) for task in bar(self._tasks)}
        rows, vectors = [], {}
        for method in self._plan.learning_rates:
            row, vectors[method] = self.learn(method)
            rows.append(self.edit(row, vectors[method]))
        seconds = sum(mask.info["seconds"] for mask in masks.values())
        return StudyResult(self._plan, zero_shot, control, rows, masks, vectors, seconds)

    def zero_shot(self) -> tuple[dict[str, float], float | None]:
        """Test accuracies of the pre-trained model: on each task, and on the control."""
        tasks = {task.name: task for task in (*self._tasks, self._control) if task is not None}
        parts = {f"zero_shot/{name}": partial(self._examiner.test, task, self._nothing) for name, task in tasks.items()}
        found = dict(zip(tasks, self._learner.each(parts, "zero-shot").values(), strict=True))
        control = None if self._control is None else found[self._control.name]
        return {task.name: found[task.name] for task in self._tasks}, control

    def mask(self, task: Task) -> Mask:
        """The TaLoS mask of a task."""
        return self._learner.mask(task)

    def rows(self, mergings: Sequence[str] = ()) -> Iterator[MethodResult]:
        """A row a method, then one of each of these post-hoc merging methods (`talos_fast.merging`)."""
        for method in self._plan.learning_rates:
            yield MethodResult.from_json(self.row(method))
        if mergings:
            yield from self._rivals(dict.fromkeys(mergings))

    def row(self, method: str) -> dict[str, Any]:
        """`learn` and `edit` as JSON, measured once."""
        return self._cells.whole(f"{method}/result", lambda: self.edit(*self.learn(method)).to_json())

    def learn(self, method: str) -> tuple[MethodResult, dict[str, TaskVector]]:
        """Fine-tunes every task by one method, at its best rate."""
        rate = self._learner.rate(method)
        outcomes = self._learner.outcomes(method, [(rate["lr"], task) for task in self._tasks], "fine-tune")
        seconds = sum(outcome["seconds"] for outcome in outcomes)
        vectors = {task.name: self._learner.vector(method, rate["lr"], task) for task in self._tasks}
        row = MethodResult(method, rate["lr"], rate["validation_by_lr"], seconds=seconds)
        row.vector_bytes = {name: vector.info.get("factor_bytes", vector.nbytes) for name, vector in vectors.items()}
        return row, vectors

    def edit(self, row: MethodResult, vectors: dict[str, TaskVector]) -> MethodResult:
        """Completes a row: tests every vector alone, adds all, and negates each."""
        method, tasks = row.method, {task.name: task for task in self._tasks}
        negated = tasks if self._control else {}
        test, negate = self._examiner.test, self._negated
        parts: dict[str, Callable[[], Any]]
        parts = {f"{method}/single/{name}": partial(test, task, vectors[name]) for name, task in tasks.items()}
        parts[f"{method}/addition"] = partial(self._added, vectors)
        parts |= {f"{method}/negation/{name}": partial(negate, task, vectors[name]) for name, task in negated.items()}
        found = self._learner.each(parts, f"{method}: add and negate")
        row.single = {name: found[f"{method}/single/{name}"] for name in tasks}
        _take_addition(row, found[f"{method}/addition"])
        for name in negated:
            one = found[f"{method}/negation/{name}"]
            row.negation[name] = AlphaSearch.from_json(one["search"])
            row.target[name], row.control[name] = one["target"], one["control"]
        return row

    def classifier(self, task: Task) -> Classifier:
        """The shared encoder with the head of a task."""
        return self._examiner.classifier(task)

    def predict(self, task: Task, limit: int) -> Callable[[nn.Module], Tensor]:
        """See `Examiner.predict`."""
        return self._examiner.predict(task, limit)

    def _rivals(self, mergings: Collection[str]) -> Iterator[MethodResult]:
        """On the vectors of "nonlinear"; addition only."""
        start = replace(MethodResult.from_json(self.row("nonlinear")), target={}, control={}, negation={})
        vectors = cache(lambda: self.learn("nonlinear")[1])  # where an addition is not there yet

        def add(merging: str) -> dict[str, Any]:
            return self._added(vectors(), merging)

        parts = {f"nonlinear+{merging}/addition": partial(add, merging) for merging in mergings}
        for merging, found in zip(mergings, self._learner.each(parts, "nonlinear: merge").values(), strict=True):
            row = replace(start, method=f"nonlinear+{merging}")
            _take_addition(row, found)
            yield row

    def _added(self, vectors: dict[str, TaskVector], method: str = "task_arithmetic") -> dict[str, Any]:
        merged = combine(list(vectors.values()), method=method)
        search = self._search_addition(vectors, merged)
        added = {task.name: self._examiner.test(task, merged, search.alpha) for task in self._tasks}
        return {"search": search.to_json(), "added": added}

    def _search_addition(self, vectors: dict[str, TaskVector], merged: TaskVector) -> AlphaSearch:
        grid, validate = self._plan.addition_grid, self._examiner.validate
        references = tuple(validate(task, vectors[task.name])[0] for task in self._tasks)
        by_task = [validate(task, merged, grid) for task in self._tasks]
        return choose_alpha(grid, list(zip(*by_task, strict=True)), [None] * len(grid), references, None)

    def _negated(self, task: Task, vector: TaskVector) -> dict[str, Any]:
        forget, control = -vector, self._control_of(task)
        search = self._search_negation(task, control, forget)
        target, kept = (self._examiner.test(each, forget, search.alpha) for each in (task, control))
        return {"search": search.to_json(), "target": target, "control": kept}

    def _search_negation(self, task: Task, control: Task, forget: TaskVector) -> AlphaSearch:
        grid, validate = self._plan.negation_grid, self._examiner.validate
        (target,), (kept,) = (validate(each, self._nothing, [0.0]) for each in (task, control))
        targets, controls = (validate(each, forget, grid) for each in (task, control))
        single = [(accuracy,) for accuracy in targets]
        return choose_alpha(grid, single, controls, (target,), kept, self._plan.control_floor)

    def _control_of(self, task: Task) -> Task:
        assert self._control is not None
        return self._stand_in if self._stand_in is not None and task.name == self._control.name else self._control


def _take_addition(row: MethodResult, found: Mapping[str, Any]) -> None:
    row.addition, row.added = AlphaSearch.from_json(found["search"]), found["added"]
