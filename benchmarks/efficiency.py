"""The efficiency plot: time and peak memory of an iteration of every method, over full fine-tuning's."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import paper
from show import ALONE, BASELINE, ORDER, cells, rows_of

from talos_fast.plots.figure import new_figure, save

MARKERS = {"eager": "o", "compiled": "s"}
COLOURS = {method: f"C{number}" for number, method in enumerate(ORDER)}


@dataclass(frozen=True)
class Point:
    """A row: its iteration and its peak, the model included, over full fine-tuning's in the same variant."""

    method: str
    variant: str
    time: float
    memory: float
    alone: bool


def points(content: dict[str, Any]) -> list[Point]:
    """Of all rows but full fine-tuning's, which is 1, and those as the paper ran them."""
    found = []
    for row in rows_of(content):
        figures = cells(content, row) if row["variant"] in MARKERS and row["method"] != BASELINE else {}
        if {"total", "peak"} <= figures.keys():
            time, memory = figures["total"], figures["peak"]
            found.append(Point(row["method"], row["variant"], time.ratio, memory.ratio, time.alone))
    return found


def plot(contents: list[dict[str, Any]], path: Path) -> None:
    """A panel a table; hollow: the paper's figures.

    Raises:
        TalosError: matplotlib is not installed.
    """
    figure, axes = new_figure(3.9 * len(contents) + 2.2, 4.2, ncols=len(contents))
    for axis, content in zip(axes[0], contents, strict=True):
        _panel(axis, content)
    _legend(figure, axes[0, 0], any(row.get("alone") for content in contents for row in content["rows"]))
    save(figure, path)


def _panel(axis: Any, content: dict[str, Any]) -> None:
    axis.plot(1, 1, "k+", markersize=11)
    for point in points(content):
        axis.plot(point.time, point.memory, MARKERS[point.variant], color=COLOURS.get(point.method, "0.5"))
        if point.alone:
            axis.annotate("*", (point.time, point.memory), xytext=(5, 0), textcoords="offset points", fontsize=12)
    for method in ORDER[1:]:
        time, memory = (paper.ratio(content["model"], method, column) for column in ("total", "peak"))
        if time is not None and memory is not None:
            axis.plot(time, memory, "o", color=COLOURS[method], fillstyle="none")
    axis.margins(0.1)
    axis.set(
        xlabel="iteration time / full fine-tuning",
        ylabel="peak memory, model included / full fine-tuning",
        xlim=(0, None),
        ylim=(0, None),
        title=f"{content['model']}, {content['device_name']}",
    )
    axis.title.set_fontsize(9)


def _legend(figure: Any, axis: Any, alone: bool) -> None:
    """One for all panels: colours are methods, forms are variants."""
    axis.plot([], [], "k+", markersize=11, label="full fine-tuning, of each variant")
    for method in ORDER[1:]:
        axis.plot([], [], "D", color=COLOURS[method], label=method)
    for variant, marker in MARKERS.items():
        axis.plot([], [], marker, color="0.5", label=variant)
    axis.plot([], [], "o", color="0.5", fillstyle="none", label="the paper's, on a GPU")
    if alone:
        axis.plot([], [], " ", label=ALONE.partition(":")[0].replace(", ", ",\n"))
    figure.legend(loc="outside right upper", fontsize=8)
