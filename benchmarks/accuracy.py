"""The accuracy study: five methods on real models and tasks; resumable, and a table and plots from what it found.

    python benchmarks/accuracy.py run --out FOLDER     # goes on where it stood; hours on two CPU cores
    python benchmarks/accuracy.py table                # from the committed results, with the plots

`run` keeps masks, vectors and one JSON a finished part in FOLDER and copies every finished row to
`benchmarks/results/accuracy/`. Real data come from TALOS_DATA. Learning rates are chosen on the validation splits with
seed 0; the other seeds take them from its committed rows.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from accuracy_settings import SETTINGS
from accuracy_table import RECIPES, RESULTS, ROWS, mean, plot, table_text
from records import header

from talos_fast.cells import Cells
from talos_fast.methods import METHODS
from talos_fast.study import Plan, Study
from talos_fast.writing import write_json


def run(out: Path, name: str, seed: int, rows: Sequence[str] = ROWS) -> None:
    """The rows of one model and seed, in order; each is copied to the results as soon as it is finished."""
    setting = SETTINGS[name]
    backbone, control = setting.load(), setting.control()
    studies: dict[str, Study] = {}  # the methods share one, a recipe has its own
    for row_name in rows:
        plan = plan_of(name, seed, row_name)
        folder = f"seed{seed}" + f"-{row_name}" * (row_name in RECIPES)
        if folder not in studies:
            studies[folder] = Study(
                backbone, setting.tasks(), control, plan, progress=False, stand_in=setting.stand_in(),
                cells=Cells(out / name / folder, asdict(plan)),
            )  # fmt: skip
        study = studies[folder]
        start, (zero, zero_control) = time.perf_counter(), study.zero_shot()
        row = study.row("talos" if row_name in RECIPES else row_name)
        print(f"{name} seed {seed} {row_name}: {time.perf_counter() - start:.0f} s {_line(row)}", flush=True)
        about = {
            "model": backbone.name, "control_task": control.name, "zero_shot": zero, "plan": asdict(plan),
            "zero_shot_control": zero_control, **header("cpu"),
        }  # fmt: skip
        write_json(RESULTS / name / f"{row_name}_seed{seed}.json", {**about, **row})


def plan_of(name: str, seed: int, row: str = "talos") -> Plan:
    """Seed 0 chooses each method's rate from its grid; other seeds have that one only. A recipe has a plan of its own.

    Raises:
        FileNotFoundError: seed 0 has not been measured yet.
    """
    plan, takes = replace(SETTINGS[name].plan, seed=seed), {method: method for method in METHODS}
    if row in RECIPES:
        takes = {"talos": row}
        plan = replace(plan, learning_rates={"talos": plan.learning_rates["talos"]}, **RECIPES[row])
    if seed == 0:
        return plan
    paths = {method: RESULTS / name / f"{taken}_seed0.json" for method, taken in takes.items()}
    chosen = {m: (float(json.loads(path.read_text())["lr"]),) for m, path in paths.items() if path.is_file()}
    if not chosen:
        raise FileNotFoundError(f"{RESULTS / name}: no row of seed 0, which chooses the learning rates; run it first")
    return replace(plan, learning_rates=chosen, extend=0)


def _line(row: dict) -> str:
    parts = {key: mean(row[key]) for key in ("single", "added", "normalized", "target", "control")}
    return f"lr {row['lr']:g} " + " ".join(f"{key} {100 * value:.1f}" for key, value in parts.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("--out", type=Path, default=Path("accuracy-output"))
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS))
    parser.add_argument("--methods", nargs="*", default=list(ROWS), help="several processes may share one folder")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.what == "run":
        for seed in arguments.seeds:
            for name in arguments.settings:
                run(arguments.out, name, seed, arguments.methods)
        return
    text = table_text(arguments.settings)
    print(text)
    (RESULTS / "table.md").write_text(text, encoding="utf-8")
    plot(arguments.settings, RESULTS / "arithmetic.png")


if __name__ == "__main__":
    main()
