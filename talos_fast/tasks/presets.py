"""The paper's two suites as presets: their tasks, controls, epochs, prompts and splits, read from a folder of data."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from talos_fast.errors import TalosError, needs
from talos_fast.tasks import language, vision, vision_names
from talos_fast.tasks.base import Task
from talos_fast.tasks.files import from_files
from talos_fast.tasks.hub import load_dataset
from talos_fast.tasks.splits import ALIASES, complete


@dataclass(frozen=True)
class Preset:
    """A suite.

    Args:
        name: what it is called.
        tasks: to learn, add and forget, in the order of the paper's tables.
        control: what negation must not harm.
        folders: task -> the names that its folder may have.
        read: ``read(task, folder, seed)`` makes the task.
        batch_size: of training.
        lr: the paper's learning rate, of every method.
        weight_decay: of training.
        recipe: further options of `talos_fast.finetune`, for every task.
        epochs: task -> epochs of training; none where the recipe counts steps.
    """

    name: str
    tasks: tuple[str, ...]
    control: str
    folders: Mapping[str, tuple[str, ...]]
    read: Callable[[str, Path, int], Task]
    batch_size: int
    lr: float
    weight_decay: float
    recipe: Mapping[str, Any] = field(default_factory=dict)
    epochs: Mapping[str, int] = field(default_factory=dict)

    def task(self, name: str, root: str | Path, seed: int = 0) -> Task:
        """One of the tasks, or the control, from its folder in ``root``.

        Raises:
            TalosError: an unknown name, a folder that is missing, or files that are missing or damaged.
        """
        if name not in (*self.tasks, self.control):
            raise TalosError(f"{self.name} has no task {name!r}; it has {', '.join(self.tasks)} and {self.control}")
        tried = (name, *self.folders.get(name, ()))
        folder = next((Path(root) / each for each in tried if (Path(root) / each).is_dir()), None)
        if folder is None:
            raise TalosError(f"{root}: found no folder {' or '.join(tried)} for {name}; put the data set there")
        return self.read(name, folder, seed)

    def recipes(self) -> dict[str, dict[str, Any]]:
        """Task -> options of `talos_fast.finetune`."""
        return {
            name: {**self.recipe, **({"epochs": self.epochs[name]} if name in self.epochs else {})}
            for name in self.tasks
        }


READERS: dict[str, vision.Reader] = {
    "cars": vision.cars, "dtd": vision.dtd, "eurosat": vision.eurosat, "gtsrb": vision.gtsrb, "mnist": vision.mnist,
    "resisc45": vision.resisc45, "sun397": vision.sun397, "svhn": vision.svhn, "imagenet": vision.imagenet,
}  # fmt: skip


def read_vision(name: str, folder: Path, seed: int) -> Task:
    """A vision task as it is published, or a folder that is laid out as ``train/<class>`` and ``test/<class>``."""
    if name != "imagenet" and (folder / "train").is_dir():
        return _named(from_files(folder, name=name, templates=vision_names.TEMPLATES[name], seed=seed))
    found, names = READERS[name](folder, seed)
    train, validation, test = complete(found, folder, seed)
    if name == "imagenet":
        names, templates = _imagenet_prompts()
    else:
        templates = vision_names.TEMPLATES[name]
    return _named(Task(name, tuple(n.replace("_", " ") for n in names or ()), templates, train, validation, test))


def _named(task: Task) -> Task:
    """The task with EuroSAT's code names, and GTSRB's numbers, in words."""
    names = tuple(vision_names.EUROSAT.get(name, name) for name in task.class_names)
    if task.name == "gtsrb" and len(names) == len(vision_names.GTSRB):
        names = vision_names.GTSRB
    return replace(task, class_names=names)


def _imagenet_prompts() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """open_clip's class names, in the order of the synsets, and its 80 templates, with {} for the name."""
    with needs("clip"):
        from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES
    names = [str(name) for name in IMAGENET_CLASSNAMES]
    # A few names stand for two synsets (crane, maillot); a task's class names must differ.
    unique = [name if names.index(name) == n else f"{name} (second sense)" for n, name in enumerate(names)]
    return tuple(unique), tuple(str(template("{}")) for template in OPENAI_IMAGENET_TEMPLATES)


def read_language(name: str, folder: Path, seed: int) -> Task:
    """A language task from the files of its data set on the Hub, or Story Cloze from its two CSV files."""
    source = language.SOURCES[name]
    splits = language.story_cloze_rows(folder) if name == "story_cloze" else load_dataset(folder)
    known = {ALIASES.get(split.lower(), split): list(rows) for split, rows in splits.items()}
    found = source.read(known, str(folder))
    return Task(name, source.answers, (), found["train"], found["validation"], found["test"])


PRESETS = {
    "vision8": Preset(
        "vision8", ("cars", "dtd", "eurosat", "gtsrb", "mnist", "resisc45", "sun397", "svhn"), "imagenet",
        {"cars": ("stanford_cars", "Cars"), "dtd": ("DTD",), "eurosat": ("EuroSAT", "EuroSAT_splits", "euro_sat"),
         "gtsrb": ("GTSRB",), "mnist": ("MNIST",), "resisc45": ("RESISC45", "NWPU-RESISC45"), "sun397": ("SUN397",),
         "svhn": ("SVHN",), "imagenet": ("ImageNet", "ilsvrc2012")},
        read_vision, batch_size=128, lr=1e-5, weight_decay=0.1, recipe={"warmup": 500, "clip": 1.0},
        epochs={"cars": 35, "dtd": 76, "eurosat": 12, "gtsrb": 11, "mnist": 5, "resisc45": 15, "sun397": 14, "svhn": 4},
    ),
    "language7": Preset(
        "language7", ("qasc", "wiki_qa", "quartz", "paws", "story_cloze", "winogrande", "wsc"), "rte",
        {"story_cloze": ("StoryCloze",), "winogrande": ("winogrande_xl",)},
        read_language, batch_size=64, lr=1e-4, weight_decay=0.0,
        recipe={"steps": 75_000, "accumulate": 16, "schedule": "constant", "warmup": 0, "clip": None},
    ),
}  # fmt: skip
"""The suites of the paper, by name."""


def get_preset(name: str) -> Preset:
    """The preset called ``name``.

    Raises:
        TalosError: there is none.
    """
    if name not in PRESETS:
        raise TalosError(f"preset {name!r}: choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
