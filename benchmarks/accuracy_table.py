"""The table and the plot of the accuracy study, from the committed rows."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from talos_fast.markdown import grid
from talos_fast.methods import METHODS
from talos_fast.plots.figure import new_figure, save

RESULTS = Path(__file__).parent / "results" / "accuracy"
# Rows beside the five methods: what they change in the plan of TaLoS.
RECIPES = {"talos-0.3": {"density": 0.3}}
ROWS = (*METHODS, *RECIPES)
MEANING = """Test accuracy in %, mean over tasks (± standard deviation over seeds). *single*: each task with its own
vector. *added*, *norm.*, *of best*: all vectors added with one α, absolute, over the method's own *single*, and over
the best *single* of any method. *target*, *control*: one vector subtracted, accuracy on its task (lower is better)
and on the control task, kept at 95 % of its start on validation data. *kB*: a vector (for l-lora its factors B).
*s/task*: calibration and training at the chosen rate on a machine shared with other work: no speed measurement.
Learning rates and α were chosen on validation data. *talos-0.3* is talos at a density of 0.3 instead of 0.1.
"""
COLUMNS = ("method", "lr", "single", "added", "norm.", "of best", "α", "target", "control", "kB", "s/task", "seeds")


def mean(values: dict[str, float]) -> float:
    return sum(values.values()) / len(values)


def results(name: str) -> dict[str, list[dict]]:
    """Row -> what was measured, one entry a seed; those without a result are left out."""
    found = {m: [json.loads(p.read_text()) for p in sorted((RESULTS / name).glob(f"{m}_seed*.json"))] for m in ROWS}
    return {method: rows for method, rows in found.items() if rows}


def measures(rows: list[dict], best: dict[str, float]) -> dict[str, tuple[float, float]]:
    """Mean over tasks, then mean and standard deviation over seeds (0 for one seed), in percent.

    Args:
        rows: of one method.
        best: task -> the highest single-task accuracy of any method.
    """
    by_seed = {
        "single": [mean(row["single"]) for row in rows],
        "added": [mean(row["added"]) for row in rows],
        "norm.": [mean(row["normalized"]) for row in rows],
        "of best": [mean({task: value / best[task] for task, value in row["added"].items()}) for row in rows],
        "target": [mean(row["target"]) for row in rows],
        "control": [mean(row["control"]) for row in rows],
    }
    return {
        key: (100 * statistics.mean(values), 100 * statistics.stdev(values) if len(values) > 1 else 0.0)
        for key, values in by_seed.items()
    }


def best_single(found: dict[str, list[dict]]) -> dict[str, float]:
    """Task -> the highest single-task accuracy of any method, mean over its seeds."""
    means = [
        {task: statistics.mean(row["single"][task] for row in rows) for task in rows[0]["single"]}
        for rows in found.values()
    ]
    return {task: max(values[task] for values in means) for task in means[0]}


def table_text(names: Sequence[str]) -> str:
    """The table of every setting, and what the columns mean."""
    return "\n".join(_table(name) for name in names) + "\n" + MEANING


def _table(name: str) -> str:
    found = results(name)
    if not found:
        return f"**{name}**: not measured\n"
    best, first = best_single(found), next(iter(found.values()))[0]
    plan, zero, control = first["plan"], 100 * mean(first["zero_shot"]), 100 * first["zero_shot_control"]
    about = (
        f"**{name}**: {first['model'].split('/')[-1]}, {len(first['zero_shot'])} tasks, {plan['steps']} steps of "
        f"{plan['batch_size']}; control {first['control_task']}, α of negation up to {_reach(found)}"
    )
    shown = f"{zero:.1f}"
    rows = [["zero-shot", "", shown, shown, "", "", "", shown, f"{control:.1f}", "", "", ""]]
    for method in ROWS:
        missing = [method, "not measured", *[""] * (len(COLUMNS) - 2)]
        rows.append(_row(method, found[method], best) if method in found else missing)
    return f"{about}\n\n{grid([COLUMNS, *rows])}\n"


def _reach(found: dict[str, list[dict]]) -> str:
    """The largest α that negation tried, in every row."""
    tried = [max(trial["alpha"] for of in row["negation"].values() for trial in of["trials"])
             for rows in found.values() for row in rows]  # fmt: skip
    return " or ".join(f"{alpha:g}" for alpha in sorted(set(tried)))


def _row(method: str, rows: list[dict], best: dict[str, float]) -> list[str]:
    cells = {
        key: f"{value:.1f} ± {sd:.1f}" if len(rows) > 1 else f"{value:.1f}"
        for key, (value, sd) in measures(rows, best).items()
    }
    alphas = ", ".join(f"{alpha:g}" for alpha in sorted({row["addition"]["alpha"] for row in rows}))
    seconds = statistics.mean(row["seconds"] / len(row["single"]) for row in rows)
    kilobytes = statistics.mean(mean(row["vector_bytes"]) for row in rows) / 1e3
    addition = [cells[key] for key in ("single", "added", "norm.", "of best")]
    shown = [method, f"{rows[0]['lr']:g}", *addition, alphas, cells["target"], cells["control"]]
    return [*shown, f"{kilobytes:.0f}", f"{seconds:.0f}", str(len(rows))]


def plot(names: Sequence[str], path: Path) -> None:
    """Single-task against merged accuracy, and what negation leaves, for each setting; says what is not measured."""
    figure, axes = new_figure(4.2 * len(names), 7, nrows=2, ncols=len(names))
    for column, name in enumerate(names):
        found = results(name)
        axes[0, column].set(title=name, xlabel="single task, %", ylabel="all added, %")
        axes[1, column].set(ylabel="target after negation, % (lower is better)")
        if not found:
            for axis in axes[:, column]:
                axis.text(0.5, 0.5, "not measured", ha="center", transform=axis.transAxes)
            continue
        best, zero = best_single(found), 100 * mean(next(iter(found.values()))[0]["zero_shot"])
        for number, method in enumerate(ROWS):
            if method not in found:
                axes[1, column].bar(method, 0)
                axes[1, column].text(number, 1, "not measured", rotation=90, ha="center", va="bottom")
                continue
            values, color = measures(found[method], best), f"C{number}"
            (x, dx), (y, dy), (target, dt) = (values[key] for key in ("single", "added", "target"))
            axes[0, column].errorbar(x, y, dy or None, dx or None, fmt="o", color=color, label=method, capsize=2)
            axes[1, column].bar(method, target, yerr=dt or None, color=color, capsize=2)
        axes[0, column].axhline(zero, color="grey", ls=":", lw=1, label="zero-shot")
        axes[1, column].axhline(zero, color="grey", ls=":", lw=1)
        axes[1, column].tick_params(axis="x", rotation=30)
    if axes[0, 0].get_legend_handles_labels()[1]:
        axes[0, 0].legend(fontsize=8)
    save(figure, path)
