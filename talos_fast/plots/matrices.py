"""Matrices with their numbers in the cells: tasks against tasks, or vectors against tasks."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from talos_fast.interference import Interference
from talos_fast.plots.figure import new_figure, save

Values = Tensor | Sequence[Sequence[float]]


def draw_matrix(
    figure: Any, axis: Any, values: Values, rows: Sequence[str], columns: Sequence[str], *,
    label: str, limits: tuple[float, float] | None = None, diverging: bool = False,
) -> None:  # fmt: skip
    """One matrix as a heat map, every finite cell with its number in a colour that can be read on it."""
    table = np.asarray(values, dtype=float)
    low, high = limits or (float(np.nanmin(table)), float(np.nanmax(table)))
    image = axis.imshow(table, vmin=low, vmax=high, cmap="RdBu_r" if diverging else "viridis", aspect="auto")
    axis.set_xticks(range(len(columns)), columns, rotation=35, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(len(rows)), rows)
    for (row, column), value in np.ndenumerate(table):
        if np.isnan(value):
            continue
        red, green, blue, _ = image.cmap(image.norm(value))
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8, color="w" if dark else "k")
    figure.colorbar(image, ax=axis)
    axis.set_title(label, fontsize=9)


def plot_matrix(
    values: Values, path: str | Path, *, rows: Sequence[str], columns: Sequence[str], label: str, title: str = "",
) -> None:  # fmt: skip
    """One matrix, such as what `talos_fast.localization` gives.

    Args:
        values: (R, C).
        path: of the PNG, PDF or SVG, written atomically.
        rows: R names.
        columns: C names.
        label: what the numbers are.
        title: printed on top.

    Raises:
        TalosError: matplotlib is missing, or the path cannot be written.
    """
    figure, axes = new_figure(3.2 + 0.62 * len(columns), 1.8 + 0.5 * len(rows))
    draw_matrix(figure, axes[0, 0], values, rows, columns, label=label)
    axes[0, 0].set_ylabel("task vector")
    axes[0, 0].set_xlabel("task")
    figure.suptitle(title)
    save(figure, path)


def plot_interference(report: Interference, path: str | Path, *, title: str = "") -> None:
    """Cosine, overlap, sign conflicts and shared norm of every pair of vectors, side by side.

    Args:
        report: what `talos_fast.interference` gave.
        path: of the picture.
        title: printed on top.

    Raises:
        TalosError: matplotlib is missing, or the path cannot be written.
    """
    names = report.names
    side = 1.6 + 0.55 * len(names)
    figure, axes = new_figure(2 * side + 2.4, 2 * side, nrows=2, ncols=2)
    panels: tuple[tuple[Values, str, tuple[float, float], bool], ...] = (
        (report.cosine, "cosine", (-1, 1), True),
        (report.overlap, "overlap of moved entries (Jaccard)", (0, 1), False),
        (report.sign_conflict, "opposite signs, of shared entries", (0, 1), False),
        (report.shared_norm, "share of the row's ‖τ‖² on shared entries", (0, 1), False),
    )
    for axis, (values, label, limits, diverging) in zip(axes.flat, panels, strict=True):
        draw_matrix(figure, axis, values, names, names, label=label, limits=limits, diverging=diverging)
    figure.suptitle(title or "interference of the task vectors")
    save(figure, path)
