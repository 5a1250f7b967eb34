"""A task: named classes, prompt templates, and three splits of labelled images or texts."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from talos_fast.errors import TalosError

Modality = Literal["image", "text"]
Inputs = npt.NDArray[np.uint8] | list[Path] | list[str]


@dataclass(frozen=True)
class Split:
    """Labelled examples.

    Args:
        inputs: images as one uint8 array of shape (N, H, W, 3), or a list of N image files (`pathlib.Path`), or a
            list of N texts (`str`).
        labels: class indices, int64, shape (N,).
        choices: of a text task whose answers differ from example to example: N tuples of K texts, the label being the
            position of the right one; None where the class names are the answers.

    Raises:
        TalosError: inputs of another type, or labels or choices that are not one an input.
    """

    inputs: Inputs
    labels: npt.NDArray[np.int64]
    choices: list[tuple[str, ...]] | None = None

    def __post_init__(self) -> None:
        _check_inputs(self.inputs)
        _check_choices(self.choices, self.inputs)
        labels = np.asarray(self.labels)
        if labels.size == 0 and len(self.inputs) == 0:
            labels = labels.astype(np.int64).reshape(0)
        if labels.ndim != 1 or labels.dtype.kind not in "iu":
            raise TalosError(
                f"labels: found dtype {labels.dtype} and shape {labels.shape}; give class indices, int64, shape (N,)"
            )
        if len(labels) != len(self.inputs):
            raise TalosError(f"labels: found {len(labels)} labels for {len(self.inputs)} inputs; give one label each")
        object.__setattr__(self, "labels", labels.astype(np.int64, copy=False))

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def modality(self) -> Modality:
        """Kind of inputs: "image" for an array or image files, "text" for strings."""
        return "text" if len(self.inputs) and isinstance(self.inputs[0], str) else "image"

    def select(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> "Split":
        """The examples at `indices` (shape (M,)), in that order."""
        labels = self.labels[np.asarray(indices, dtype=np.int64)]
        if isinstance(self.inputs, np.ndarray):
            return Split(self.inputs[np.asarray(indices, dtype=np.int64)], labels)
        chosen: Any = [self.inputs[index] for index in indices]
        return Split(chosen, labels, None if self.choices is None else [self.choices[index] for index in indices])


@dataclass(frozen=True)
class Task:
    """A classification task.

    Args:
        name: what the task is called in files and tables.
        class_names: human-readable names; the position is the label. Where every example has choices of its own, what
            the positions are called, such as "A" and "B".
        templates: prompts with one `{}` for the class name, such as `"a photo of a {}."`; empty for the model's own.
        train: examples to fine-tune and calibrate on.
        validation: examples to choose scaling coefficients on.
        test: examples to report on.

    Raises:
        TalosError: fewer than two or repeated class names, a template without `{}`, an empty split, a label outside
            the class names, splits of both images and texts, or another number of choices than class names.
    """

    name: str
    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    train: Split
    validation: Split
    test: Split

    def __post_init__(self) -> None:
        if isinstance(self.class_names, str) or isinstance(self.templates, str):
            raise TalosError(f"task {self.name!r}: class_names and templates are tuples of strings, found one string")
        object.__setattr__(self, "class_names", tuple(self.class_names))
        object.__setattr__(self, "templates", tuple(self.templates))
        _check_class_names(self.name, self.class_names)
        for template in self.templates:
            _check_template(self.name, template)
        for split_name in ("train", "validation", "test"):
            self._check_split(split_name, getattr(self, split_name))

    @property
    def modality(self) -> Modality:
        """Kind of inputs of all splits, "image" or "text"."""
        return self.train.modality

    @property
    def num_classes(self) -> int:
        """K, the number of classes."""
        return len(self.class_names)

    @property
    def has_choices(self) -> bool:
        """Whether every example has answers of its own."""
        return self.train.choices is not None

    def _check_split(self, split_name: str, split: Split) -> None:
        where = f"task {self.name!r}, split {split_name}"
        if len(split) == 0:
            raise TalosError(f"{where}: found no examples; every split needs at least one")
        if split.modality != self.modality:
            raise TalosError(f"{where}: found {split.modality} inputs, but train has {self.modality} inputs")
        numbers = {len(row) for row in split.choices or []}
        if (split.choices is not None) != self.has_choices or numbers - {self.num_classes}:
            raise TalosError(
                f"{where}: found {sorted(numbers) or 'no'} choices an example for {self.num_classes} class names; "
                "give as many in every split, or none"
            )
        low, high = int(split.labels.min()), int(split.labels.max())
        if low < 0 or high >= self.num_classes:
            raise TalosError(
                f"{where}: found labels from {low} to {high} for {self.num_classes} class names; "
                f"labels must lie in 0 ... {self.num_classes - 1}: give all class names, or correct the labels"
            )


def check_distinct(tasks: Iterable[Task]) -> None:
    """Refuses tasks whose results could not be told apart.

    Raises:
        TalosError: two of the same name.
    """
    names = [task.name for task in tasks]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise TalosError(f"two tasks are called {repeated[0]!r}; results are kept by name: rename one folder")


def _check_inputs(inputs: object) -> None:
    if isinstance(inputs, np.ndarray):
        if inputs.dtype != np.uint8 or inputs.ndim != 4 or inputs.shape[-1] != 3:
            raise TalosError(
                f"inputs: found an array of dtype {inputs.dtype} and shape {inputs.shape}; "
                "give uint8 images of shape (N, H, W, 3)"
            )
        return
    kinds = {"path" if isinstance(i, Path) else type(i).__name__ for i in inputs} if isinstance(inputs, list) else None
    if kinds is None or len(kinds) > 1 or not kinds <= {"path", "str"}:
        found = type(inputs).__name__ if kinds is None else f"a list of {', '.join(sorted(kinds))}"
        raise TalosError(f"inputs: found {found}; give a uint8 image array, a list of pathlib.Path or a list of str")


def _check_choices(choices: list[tuple[str, ...]] | None, inputs: Inputs) -> None:
    if choices is None:
        return
    if len(choices) != len(inputs) or not all(
        isinstance(text, str) and text.strip() for row in choices for text in row
    ):
        raise TalosError(f"choices: found {len(choices)} for {len(inputs)} inputs; give one tuple of texts each")


def _check_template(name: str, template: str) -> None:
    try:
        usable = "{}" in template and bool(template.format("class"))
    except (KeyError, IndexError, ValueError):
        usable = False
    if not usable:
        raise TalosError(
            f"task {name!r}: template {template!r} needs one {{}}, for the class name, and no other braces"
        )


def _check_class_names(name: str, class_names: tuple[str, ...]) -> None:
    if len(class_names) < 2 or not all(isinstance(c, str) and c.strip() for c in class_names):
        raise TalosError(f"task {name!r}: found class_names {class_names!r}; give at least two non-empty names")
    repeated = sorted({c for c in class_names if class_names.count(c) > 1})
    if repeated:
        raise TalosError(f"task {name!r}: class_names {repeated} occur twice; classes need different names")
