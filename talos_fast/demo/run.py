"""The demo: a study of the embedded tasks, or of the user's own, printed, plotted and saved."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from talos_fast import report, writing
from talos_fast.demo.tasks import control_task, demo_tasks
from talos_fast.disentanglement import disentanglement_error
from talos_fast.errors import TalosError
from talos_fast.models import Backbone
from talos_fast.modules import device_of
from talos_fast.plots import plot_disentanglement, plot_mask
from talos_fast.study import Plan, Study, StudyResult
from talos_fast.tables import show, show_means, table
from talos_fast.tasks import Task

# TaLoS moves a tenth of the entries, nearly all of them queries and keys, and so needs the larger steps. Each method
# chooses from as many rates.
EMBEDDED = Plan(learning_rates={"nonlinear": (1e-3, 2e-3), "talos": (4e-3, 8e-3)}, steps=60, batch_size=32, limit=100)
OWN = Plan(learning_rates={"nonlinear": (1e-5, 3e-5), "talos": (1e-4, 3e-4)}, steps=2000, batch_size=128, samples=512)
HEAT_MAP = tuple(-3.0 + 0.75 * step for step in range(9))
HEAT_MAP_INPUTS = 64


def run(
    backbone: Backbone,
    tasks: Sequence[Task] | None,
    control: Task | None,
    out: Path,
    changes: Mapping[str, Any],
    rates: Mapping[str, Sequence[float] | None],
    progress: bool = True,
) -> dict[str, Any]:
    """Runs the study, prints the tables, and writes masks, vectors, table, plots and ``report.json`` to ``out``.

    Args:
        backbone: the pre-trained model.
        tasks: None for the embedded ones.
        control: what negation must not harm; None for the embedded one.
        out: folder, made if it is not there.
        changes: fields of the plan that differ from the default; None leaves one as it is.
        rates: method -> learning rates to choose from; None for the default ones.
        progress: bars on a terminal.

    Returns:
        What ``report.json`` holds.

    Raises:
        TalosError: own tasks without a control, or methods with different numbers of rates.
    """
    start = time.perf_counter()
    if (tasks is None) != (control is None):
        raise TalosError("own tasks need an own control, and the other way round: give both --data and --control")
    chosen, control = (demo_tasks(), control_task()) if tasks is None or control is None else (list(tasks), control)
    plan = _plan(EMBEDDED if tasks is None else OWN, changes, rates)
    study = Study(backbone, chosen, control, plan, progress)
    result = study.run()
    _print(result)
    for name, mask in result.masks.items():
        mask.save(out / "masks" / f"{name}.safetensors")
    for method, vectors in result.vectors.items():
        for name, vector in vectors.items():
            vector.save_pretrained(out / "vectors" / method / name)
    _plots(study, result, chosen, out)
    writing.write_text(out / "table.md", report.markdown(result))
    summary = {
        **report.to_json(result, device_of(backbone.encoder)),
        "model": backbone.name,
        "seconds": round(time.perf_counter() - start, 1),
    }
    writing.write_json(out / "report.json", summary)
    show(f"{summary['seconds']:.0f} s in all; table, report, masks, vectors and plots are in {out}/")
    return summary


def _plan(default: Plan, changes: Mapping[str, Any], rates: Mapping[str, Sequence[float] | None]) -> Plan:
    learning_rates = {
        method: tuple(sorted(rates.get(method) or known)) for method, known in default.learning_rates.items()
    }
    if len({len(values) for values in learning_rates.values()}) > 1:
        counts = {method: len(values) for method, values in learning_rates.items()}
        raise TalosError(f"methods choose from different numbers of learning rates, {counts}; give each as many")
    kept = {key: value for key, value in changes.items() if value is not None}
    return replace(default, **{**kept, "learning_rates": learning_rates})


def _print(result: StudyResult) -> None:
    methods = [method.method for method in result.methods]
    columns = ["task", "zero-shot", *methods]
    show(table(columns, report.task_rows(result), "single / added / after negation, %"))
    show_means(result)
    for method in result.methods:
        tried = ", ".join(f"{lr}: {100 * value:.1f}" for lr, value in method.validation_by_lr.items())
        show(f"{method.method}: learning rate {method.lr:g}, by validation accuracy ({tried})")


def _plots(study: Study, result: StudyResult, tasks: Sequence[Task], out: Path) -> None:
    name = tasks[0].name
    plot_mask(result.masks[name], out / "mask_structure.png", title=f"TaLoS mask of {name}")
    if len(tasks) < 2:
        return
    first, second = tasks[0], tasks[1]
    predict = (study.predict(first, HEAT_MAP_INPUTS), study.predict(second, HEAT_MAP_INPUTS))
    for method, vectors in result.vectors.items():
        models = (study.classifier(first), study.classifier(second))
        errors = disentanglement_error(models, (vectors[first.name], vectors[second.name]), predict, HEAT_MAP)
        pair = (first.name, second.name)
        mean = float(errors[torch.isfinite(errors)].mean())
        title = f"{method}: mean ξ {mean:.2f}"
        plot_disentanglement(errors, HEAT_MAP, out / f"disentanglement_{method}.png", tasks=pair, title=title)
