"""`run_suite`: a whole table of methods over tasks, cell by cell on disk, so that a run that was killed goes on."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from talos_fast import report, writing
from talos_fast.cells import Cells
from talos_fast.errors import TalosError
from talos_fast.fingerprint import digest, fingerprint
from talos_fast.merging import METHODS as MERGINGS
from talos_fast.methods import METHODS, get_method
from talos_fast.models import Backbone
from talos_fast.modules import device_of
from talos_fast.study import Plan, Study, StudyResult
from talos_fast.tasks import Split, Task
from talos_fast.tasks.base import check_distinct

RATES = {
    "nonlinear": (1e-5, 3e-5), "linearized": (3e-5, 1e-4), "l-lora": (3e-4, 1e-3), "lota": (3e-5, 1e-4),
    "talos": (1e-4, 3e-4),
}  # fmt: skip
"""Learning rates to choose from where no preset gives one: two a method, around the rate at which it learns."""

REPORT = "report.json"


@dataclass(frozen=True)
class Suite:
    """What to run.

    Args:
        tasks: to learn, add and forget.
        control: what negation must not harm; None leaves negation out.
        plan: methods, learning rates and sizes.
        recipes: task -> options of `talos_fast.finetune` that go before those of the plan.
        mergings: post-hoc merging methods to try on the vectors of "nonlinear", by their names in `talos_fast.merging`.
    """

    tasks: Sequence[Task]
    control: Task | None
    plan: Plan
    recipes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    mergings: Sequence[str] = ()

    def __post_init__(self) -> None:
        everything = [*self.tasks, *([self.control] if self.control else [])]
        if not self.tasks:
            raise TalosError("there is no task to run; give at least one")
        check_distinct(everything)
        if unfit := [task.name for task in everything if task.name in ("", ".", "..") or set(task.name) & set("/\\")]:
            raise TalosError(f"a task is called {unfit[0]!r}; results are kept in files of its name: give it another")
        if "consensus" in self.mergings and len(self.tasks) < 2:
            raise TalosError("merging 'consensus' takes what two tasks agree on; give two or more, or leave it out")
        if unknown := sorted(set(self.mergings) - MERGINGS.keys()):
            raise TalosError(f"merging {unknown[0]!r}: choose from {', '.join(MERGINGS)}")
        if self.mergings and "nonlinear" not in self.plan.learning_rates:
            raise TalosError("post-hoc merging starts from the vectors of 'nonlinear'; add it to the methods")


def choose_methods(names: Sequence[str]) -> list[str]:
    """The methods named, or all for "all"; each name may hold several, separated by commas.

    Raises:
        TalosError: an unknown method, or none.
    """
    wanted = [part.strip() for name in names for part in name.split(",") if part.strip()]
    chosen = list(METHODS) if "all" in wanted else [name for name in METHODS if name in wanted]
    for name in wanted:
        if name != "all":
            get_method(name)
    if not chosen:
        raise TalosError(f"no method is given; choose from all, {', '.join(METHODS)}")
    return chosen


def run_suite(
    backbone: Backbone,
    suite: Suite,
    out: str | Path,
    *,
    identity: Mapping[str, Any] | None = None,
    progress: bool = True,
    finished: Callable[[StudyResult], None] | None = None,
) -> StudyResult:
    """Runs every cell that ``out`` does not hold yet, and writes ``table.md`` and ``report.json`` as rows are finished.

    A cell is a mask, a fine-tuned vector, the choice of a learning rate, a test, an addition, or one task's negation.
    It is written atomically when it is finished, and a fine-tuning that was interrupted goes on from its checkpoint; so
    whatever stops a run, the same call gives the same table.

    Args:
        backbone: the pre-trained model; left as it was.
        suite: what to run.
        out: folder of the results.
        identity: further facts that a run to go on must share (JSON), such as how the model was loaded.
        progress: bars on a terminal.
        finished: called after each row with what there is so far.

    Returns:
        The table's content; vectors and masks are in ``out``.

    Raises:
        TalosError: ``out`` holds results of other tasks, another model or another plan (says what differs), or cannot
            be written.
        KeyboardInterrupt: Ctrl-C; call again to go on.
    """
    out = Path(out)
    facts = {
        **(identity or {}), "model": backbone.name, "base": digest(fingerprint(backbone.encoder)),
        "plan": {key: value for key, value in asdict(suite.plan).items() if key != "learning_rates"},
        "tasks": {task.name: task_digest(task) for task in suite.tasks}, "recipes": dict(suite.recipes),
        "control": suite.control and [suite.control.name, task_digest(suite.control)],
        # The order and number of methods may change between runs, the rates of a method may not.
    }  # fmt: skip
    cells = Cells(out / "cells", facts, checkpoints=True)
    _keep_rates(cells, suite.plan)
    study = Study(backbone, suite.tasks, suite.control, suite.plan, progress, cells, recipes=suite.recipes)
    zero_shot, control = study.zero_shot()
    result, device = StudyResult(suite.plan, zero_shot, control, []), device_of(backbone.encoder)
    for row in study.rows(suite.mergings):
        result.methods.append(row)
        if not _goes_on(out / REPORT, result):
            _write(result, device, out)
        if finished is not None:
            finished(result)
    _write(result, device, out)
    return result


def _keep_rates(cells: Cells, plan: Plan) -> None:
    """Refuses other learning rates than those that a method's cells were made with; LoTA starts from nonlinear's."""
    for method, rates in plan.learning_rates.items():
        start = plan.learning_rates.get("nonlinear") if method == "lota" else None
        mine = {"rates": list(rates), "start": start and list(start)}
        found = cells.value(f"{method}/rates", partial(dict, mine))
        if found != mine:
            raise TalosError(
                f"the results of {method!r} there were made with the learning rates {found}, these are {mine}; "
                "give another folder, or the same rates and methods"
            )


def _goes_on(path: Path, result: StudyResult) -> bool:
    """Whether a report has these rows and more: another process is ahead, or an earlier run came further."""
    try:
        there = [row["method"] for row in json.loads(path.read_text(encoding="utf-8"))["methods"]]
    except (OSError, ValueError, TypeError, KeyError):  # none yet, or none of ours: it is written over
        return False
    mine = [row.method for row in result.methods]
    return len(there) > len(mine) and there[: len(mine)] == mine


def _write(result: StudyResult, device: torch.device, out: Path) -> None:
    writing.write_text(out / "table.md", report.markdown(result))
    writing.write_json(out / REPORT, report.to_json(result, device))


def task_digest(task: Task) -> str:
    """A 64-bit digest, as hex, of a task's names, prompts and examples; of image files, their names."""
    hasher = hashlib.blake2b(digest_size=8)
    hasher.update(repr((task.class_names, task.templates)).encode())
    for split in (task.train, task.validation, task.test):
        _update(hasher, split)
    return hasher.hexdigest()


def _update(hasher: Any, split: Split) -> None:
    hasher.update(np.ascontiguousarray(split.labels).tobytes())
    hasher.update(repr(split.choices).encode())
    if isinstance(split.inputs, np.ndarray):
        hasher.update(repr(split.inputs.shape).encode())
        hasher.update(np.ascontiguousarray(split.inputs).data)
        return
    for item in split.inputs:
        # The folder of the data may move; class folder and file name stay.
        hasher.update(("/".join(item.parts[-2:]) if isinstance(item, Path) else item).encode() + b"\0")
