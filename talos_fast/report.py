"""A study as a table for the terminal, as Markdown, and as JSON."""

from collections.abc import Mapping
from dataclasses import asdict
from statistics import fmean
from typing import Any

import torch

from talos_fast.environment import environment
from talos_fast.markdown import grid
from talos_fast.study import MethodResult, StudyResult

COLUMNS_MEANING = (
    "single: each task with its own vector; added, norm.: all vectors added with α, absolute and over single; "
    "target, control: one vector subtracted, accuracy on its task (lower is better) and on the control task; "
    "s/task: calibration and training; kB: a vector's file; an empty cell was not measured"
)
COLUMNS = ("method", "lr", "single", "added", "norm.", "α", "target", "control", "s/task", "kB")


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _mean_percent(values: Mapping[str, float]) -> str:
    return _percent(fmean(values.values()) if values else None)


def rows(result: StudyResult) -> list[tuple[str, ...]]:
    """One row a method under `COLUMNS`, zero-shot first; accuracies are means over tasks, in percent."""
    zero, control = _mean_percent(result.zero_shot), result.zero_shot_control
    target = "" if control is None else zero
    table = [("zero-shot", "", zero, zero, "", "", target, _percent(control), "", "")]
    return table + [_row(method) for method in result.methods]


def _row(result: MethodResult) -> tuple[str, ...]:
    assert result.addition is not None
    tasks = len(result.single)
    return (
        result.method,
        f"{result.lr:g}",
        _percent(fmean(result.single.values())),
        _percent(fmean(result.added.values())),
        _percent(fmean(result.normalized().values())),
        f"{result.addition.alpha:g}",
        _mean_percent(result.target),
        _mean_percent(result.control),
        f"{result.seconds / tasks:.1f}",
        f"{fmean(result.vector_bytes.values()) / 1e3:.0f}",
    )


def markdown(result: StudyResult) -> str:
    """The table as Markdown."""
    return grid([COLUMNS, *rows(result)]) + "\n"


def task_rows(result: StudyResult) -> list[tuple[str, ...]]:
    """One row a task, in percent: zero-shot, then for each method single task, merged, and target after negation."""
    table = []
    for task, zero in result.zero_shot.items():
        cells = [
            f"{_percent(m.single[task])} / {_percent(m.added[task])} / {_percent(m.target.get(task))}"
            for m in result.methods
        ]
        table.append((task, _percent(zero), *cells))
    return table


def to_json(result: StudyResult, device: torch.device) -> dict[str, Any]:
    """Everything that was measured, with the machine, the versions and the date."""
    masks = {name: mask.info for name, mask in result.masks.items()}
    return {
        **environment(device),
        "plan": asdict(result.plan),
        "zero_shot": result.zero_shot,
        "zero_shot_control": result.zero_shot_control,
        **({"calibration_seconds": result.calibration_seconds, "masks": masks} if masks else {}),
        "methods": [method.to_json() for method in result.methods],
    }
