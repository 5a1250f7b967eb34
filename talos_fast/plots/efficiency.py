"""Efficiency against arithmetic: what a method costs, and how well its vectors add up."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from talos_fast.errors import TalosError
from talos_fast.plots.figure import new_figure, save

NEEDED = ("method", "seconds", "memory_gib", "accuracy")
COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:purple", "tab:red", "tab:brown", "tab:pink", "tab:olive")


def plot_efficiency(rows: Sequence[Mapping[str, Any]] | str | Path, path: str | Path, *, title: str = "") -> None:
    """Accuracy after addition over the time of an iteration, and over peak memory; up and to the left is better.

    Args:
        rows: one mapping a method, or a JSON file that holds such a list, with the keys ``method``, ``seconds`` (an
            iteration), ``memory_gib`` (peak; null where it was not measured) and ``accuracy`` (in [0, 1]).
        path: of the PNG, PDF or SVG, written atomically.
        title: printed on top.

    Raises:
        TalosError: no row, a row without one of the keys, a file that cannot be read, or matplotlib is missing.
    """
    table = _read(Path(rows)) if isinstance(rows, str | Path) else [dict(row) for row in rows]
    if not table:
        raise TalosError("there is no row to draw; give at least one method")
    for number, row in enumerate(table):
        if missing := [key for key in NEEDED if key not in row]:
            raise TalosError(f"row {number}: lacks {', '.join(missing)}; every row needs {', '.join(NEEDED)}")
    figure, axes = new_figure(9.6, 4.2, ncols=2, sharey=True)
    for axis, key, label in ((axes[0, 0], "seconds", "seconds an iteration"), (axes[0, 1], "memory_gib", "peak GiB")):
        measured = [(number, row) for number, row in enumerate(table) if row[key] is not None]
        for number, row in measured:
            point = (float(row[key]), 100 * float(row["accuracy"]))
            axis.scatter(*point, s=90, color=COLOURS[number % len(COLOURS)], edgecolor="k", linewidth=0.6, zorder=3)
            axis.annotate(row["method"], point, xytext=(0, 9), textcoords="offset points", ha="center", fontsize=9)
        if not measured:
            axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", color="0.5")
        axis.set_xlabel(label)
        axis.set_xlim(0, 1.2 * max((float(row[key]) for _, row in measured), default=1.0))  # room for the names
        axis.margins(y=0.18)
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("accuracy after addition, %")
    figure.suptitle(title or "efficiency against arithmetic")
    save(figure, path)


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return [dict(row) for row in content]
    except (OSError, ValueError, TypeError) as error:
        raise TalosError(f"{path}: not a JSON list of rows ({error}); give one object a method") from error
