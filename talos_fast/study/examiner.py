"""`Examiner`: how well the model of a task does along a vector, on validation and on test data."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from talos_fast.batch import Batches, tensors_of, to_device
from talos_fast.evaluate import evaluate_along
from talos_fast.forward import default_forward
from talos_fast.models import Backbone, Classifier
from talos_fast.modules import device_of
from talos_fast.study.plan import Plan
from talos_fast.task_vector import TaskVector
from talos_fast.tasks import Split, Task

# A sweep over α reads the same inputs dozens of times: they are prepared once, if they fit.
PREPARED_BYTES = 2**28


def prepared(batches: DataLoader[Any]) -> Batches:
    """The batches as a list, or the loader itself if they would take more than `PREPARED_BYTES`."""
    size = sum(tensor.nbytes for tensor in tensors_of(next(iter(batches))))
    return list(batches) if size * len(batches) <= PREPARED_BYTES else batches


class Examiner:
    """The shared encoder under the frozen head of each task, and its accuracies.

    Args:
        backbone: the pre-trained model, not yet fine-tuned: heads may be computed with the encoder.
        tasks: every task that will be asked about.
        plan: batch size, seed and limits.
    """

    def __init__(self, backbone: Backbone, tasks: Iterable[Task], plan: Plan) -> None:
        self._backbone, self._plan = backbone, plan
        self._classifiers: dict[str, Classifier] = {task.name: backbone.classifier(task) for task in tasks}
        self._validation: dict[str, Batches] = {}

    def classifier(self, task: Task) -> Classifier:
        """The shared encoder with the head of a task."""
        return self._classifiers[task.name]

    def validate(self, task: Task, vector: TaskVector, alphas: Sequence[float] = (1.0,)) -> list[float]:
        """Validation accuracy at each α."""
        if task.name not in self._validation:
            self._validation[task.name] = prepared(self._batches(task.validation, self._plan.limit))
        found = evaluate_along(self.classifier(task), vector, self._validation[task.name], alphas)
        return [float(accuracy) for accuracy in found]

    def test(self, task: Task, vector: TaskVector, alpha: float = 1.0) -> float:
        """Test accuracy."""
        batches = self._batches(task.test, self._plan.test_limit)
        return float(evaluate_along(self.classifier(task), vector, batches, [alpha])[0])

    def predict(self, task: Task, limit: int) -> Callable[[nn.Module], Tensor]:
        """A function that gives a model's classes on ``limit`` validation inputs of a task."""
        device = device_of(self.classifier(task))
        batches = [to_device(batch, device) for batch in self._batches(task.validation, limit)]

        @torch.no_grad()
        def classes(model: nn.Module) -> Tensor:
            return torch.cat([default_forward(model, batch).argmax(-1).cpu() for batch in batches])

        return classes

    def _batches(self, split: Split, limit: int | None) -> DataLoader[Any]:
        if split.modality == "text":
            # Texts of like lengths need little padding.
            split = split.select(sorted(range(len(split)), key=lambda i: len(str(split.inputs[i]))))
        size = self._plan.evaluation_batch
        return self._backbone.batches(split, batch_size=size, seed=self._plan.seed, limit=limit)
