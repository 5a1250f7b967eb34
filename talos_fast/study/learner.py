"""`Learner`: masks, learning rates and task vectors of a study, each made once."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import islice
from math import fsum
from typing import Any

from tqdm.auto import tqdm

from talos_fast.calibrate import calibrate
from talos_fast.cells import Cells
from talos_fast.finetune import finetune
from talos_fast.mask import Mask
from talos_fast.models import Backbone
from talos_fast.restoring import restoring_parameters
from talos_fast.study.examiner import Examiner
from talos_fast.study.plan import Plan
from talos_fast.task_vector import TaskVector
from talos_fast.tasks import Task


class Learner:
    """Fine-tunes the tasks of a study by every method; the shared encoder is as it was after each call.

    Args:
        backbone: the pre-trained model.
        tasks: the learning rate is chosen on the first ones.
        plan: see `Plan`.
        examiner: of these tasks.
        cells: where masks, rates and vectors are kept.
        recipes: task -> options of `finetune` that go before those of the plan; ``epochs`` takes the place of steps.
        progress: bars on a terminal.
    """

    def __init__(
        self, backbone: Backbone, tasks: Sequence[Task], plan: Plan, examiner: Examiner, cells: Cells,
        recipes: Mapping[str, Mapping[str, Any]], progress: bool,
    ) -> None:  # fmt: skip
        self._backbone, self._tasks, self._plan, self._examiner = backbone, tasks, plan, examiner
        self._cells, self._recipes, self._progress = cells, recipes, progress

    def mask(self, task: Task) -> Mask:
        """The TaLoS mask of a task."""
        plan = self._plan

        def make() -> Mask:
            batches = self._backbone.batches(task.train, batch_size=plan.batch_size, seed=plan.seed, limit=plan.samples)
            return calibrate(
                self._examiner.classifier(task), batches,
                density=plan.density, seed=plan.seed, progress=False, **plan.calibration,
            )  # fmt: skip

        return self._cells.mask(f"masks/{task.name}", make)

    def rate(self, method: str) -> dict[str, Any]:
        """The learning rate of a method, one for all tasks, and the mean validation accuracy of every rate it tried."""
        return self._cells.whole(f"{method}/rate", lambda: self._choose_rate(method))

    def outcomes(self, method: str, runs: Sequence[tuple[float, Task]], label: str) -> list[dict[str, Any]]:
        """For each rate and task the validation accuracy of the vector, and the seconds that all it needs took."""
        parts = {_cell(method, *run): partial(self._outcome, method, *run) for run in runs}
        return [*self.each(parts, f"{method}: {label}").values()]

    def each(self, parts: Mapping[str, Callable[[], Any]], label: str) -> dict[str, Any]:
        """The cells of these names, behind a bar on a terminal."""
        return self._cells.values(parts, self.bar(label, len(parts)))

    def vector(self, method: str, lr: float, task: Task) -> TaskVector:
        """What a method makes of a task at a rate."""
        return self._cells.vector(_cell(method, lr, task), lambda: self._finetune(method, lr, task))

    def _outcome(self, method: str, lr: float, task: Task) -> dict[str, Any]:
        vector = self.vector(method, lr, task)
        (accuracy,) = self._examiner.validate(task, vector)
        seconds = vector.info["seconds"]
        if method == "talos":
            seconds += self.mask(task).info["seconds"]
        elif method == "lota" and (rate := self._full_rate()):
            full = partial(self._outcome, "nonlinear", rate, task)
            seconds += self._cells.value(_cell("nonlinear", rate, task), full)["seconds"]
        return {"validation": accuracy, "seconds": seconds, "last_loss": vector.info["last_loss"]}

    def _choose_rate(self, method: str) -> dict[str, Any]:
        plan, rates = self._plan, list(self._plan.learning_rates[method])
        chosen_on, scores = self._tasks[: plan.selection], dict[float, float]()
        for number in range(plan.extend + 1):
            new = [lr for lr in rates if lr not in scores]
            outcomes = iter(self.outcomes(method, [(lr, task) for lr in new for task in chosen_on], "choose a rate"))
            for lr in new:
                found = [outcome["validation"] for outcome in islice(outcomes, len(chosen_on))]
                scores[lr] = fsum(found) / len(chosen_on)  # in any order of the tasks
            best = max(rates, key=lambda lr: scores[lr])
            if number == plan.extend or best not in (rates[0], rates[-1]):
                break
            rates = _extended(rates, best)
        for lr, task in ((lr, task) for lr in rates if lr != best for task in chosen_on):
            self._cells.drop(_cell(method, lr, task))
        return {"lr": best, "validation_by_lr": {f"{lr:g}": scores[lr] for lr in rates}}

    def _full_rate(self) -> float | None:
        """The rate of full fine-tuning, if it is one of the methods: LoTA then starts from its vectors."""
        return self.rate("nonlinear")["lr"] if "nonlinear" in self._plan.learning_rates else None

    def _finetune(self, method: str, lr: float, task: Task) -> TaskVector:
        classifier, plan = self._examiner.classifier(task), self._plan
        options: dict[str, Any] = {}
        if method == "talos":
            options = {"mask": self.mask(task)}
        elif method == "lota":
            rate = self._full_rate()
            options = {"density": plan.density, "finetuned": rate and self.vector("nonlinear", rate, task)}
        recipe = dict(self._recipes.get(task.name, {}))
        length = {} if "epochs" in recipe else {"steps": plan.steps}
        batches = self._backbone.batches(task.train, batch_size=plan.batch_size, shuffle=True, seed=plan.seed)
        with restoring_parameters(dict(classifier.named_parameters())):
            return finetune(
                classifier, batches, method=method, lr=lr, seed=plan.seed, progress=False,
                checkpoint_dir=self._cells.checkpoint(_cell(method, lr, task)),
                **{"weight_decay": plan.weight_decay, **length, **options, **recipe},
            )  # fmt: skip

    def bar(self, label: str, total: int) -> Callable[[Iterable[Any]], Any]:
        """Shows on a terminal how far a loop over so many items is."""
        return partial(tqdm, desc=label, total=total, disable=None if self._progress else True, leave=False)


def _cell(method: str, lr: float, task: Task) -> str:
    return f"{method}/{lr:g}/{task.name}"


def _extended(rates: list[float], end: float) -> list[float]:
    """The rates with one more beyond an end, in the proportion of the two there."""
    if end == rates[-1]:
        return [*rates, rates[-1] * rates[-1] / rates[-2]]
    return [rates[0] * rates[0] / rates[1], *rates]
