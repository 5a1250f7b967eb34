"""What the TaLoS recipe is made of, one change at a time; judged on validation data only.

    python benchmarks/ablation.py --setting clip --out FOLDER    # resumable; writes results/accuracy/ablation_clip.*

The learning rate is that of the committed row of seed 0, unless it is what changes.
"""

import argparse
import json
from collections.abc import Collection
from dataclasses import asdict, replace
from pathlib import Path
from urllib.parse import quote

import torch
from accuracy_settings import SETTINGS
from accuracy_table import RESULTS, mean

from talos_fast import Mask
from talos_fast.cells import Cells
from talos_fast.markdown import grid
from talos_fast.methods import METHODS
from talos_fast.structure import parts
from talos_fast.study import Plan, Study
from talos_fast.writing import write_json

COLUMNS = ("recipe", "lr", "single", "added", "norm.", "α", "target", "control")


def variants(lr: float, steps: int) -> dict[str, dict]:
    """Name -> what differs from the default: density 0.1, 4 rounds, damage 0.1, fisher, the setting's samples, ``lr``.

    "only" is no field of the plan: the kinds of entries (`talos_fast.structure`) that stay of the mask.
    """
    third = {"learning_rates": {"talos": (lr / 3,)}}
    return {
        "default": {},
        "learning rate / 3": third,
        "learning rate / 10": {"learning_rates": {"talos": (lr / 10,)}},
        "finetune's default rate": {"learning_rates": {"talos": (METHODS["talos"].lr,)}},
        "full fine-tuning's": {"learning_rates": {"talos": (METHODS["nonlinear"].lr,)}},
        "learning rate × 3": {"learning_rates": {"talos": (lr * 3,)}},
        "only queries": {"only": ("query",)},
        "only keys": {"only": ("key",)},
        "density 0.03": {"density": 0.03},
        "density 0.3": {"density": 0.3},
        "1 round": {"calibration": {"rounds": 1}},
        "damage 0 (hard)": {"calibration": {"damage": 0.0}},
        "damage 0, learning rate / 3": {"calibration": {"damage": 0.0}, **third},
        "damage 1 (none)": {"calibration": {"damage": 1.0}},
        "density 0.17, learning rate / 3": {"density": 0.17, **third},
        "density 0.3, learning rate / 3": {"density": 0.3, **third},
        "the same, queries and keys": {
            "density": 0.3,
            **third,
            "only": ("query", "key"),
        },
        "jacobian": {"calibration": {"estimator": "jacobian"}},
        "empirical Fisher": {"calibration": {"estimator": "empirical"}},
        "64 samples": {"samples": 64},
        "no weight decay": {"weight_decay": 0.0},
        "steps × 3, learning rate / 3": {"steps": 3 * steps, **third},
    }


def of_kinds(mask: Mask, kinds: Collection[str]) -> Mask:
    """What a mask selects of some kinds of entries."""
    kept = {}
    for name, tensor in mask.items():
        kept[name] = torch.zeros_like(tensor)
        for part in parts(name, tuple(tensor.shape)):
            if part.kind in kinds:
                part.of(kept[name]).copy_(part.of(tensor))
    return Mask(kept, base=mask.base, info={**mask.info, "only": list(kinds)})


def measure(name: str, variant: str, change: dict, default: Plan, out: Path, tasks: int | None) -> dict:
    """The row of a variant; every accuracy is of validation data. Masks that it shares with the default are reused."""
    setting, only = SETTINGS[name], change.get("only")
    plan = replace(default, **{key: value for key, value in change.items() if key != "only"})
    backbone, chosen = setting.load(), setting.tasks()[:tasks]
    folder = out / f"ablation-{name}"
    cells = Cells(folder / quote(variant, safe=""), asdict(plan))
    same = not change.keys() & {"density", "samples", "calibration"}
    if same or only is not None:
        of = Cells(folder / "default", asdict(default)) if same else Cells()
        masks = Study(backbone, chosen, None, default if same else plan, cells=of, progress=False)
        for task in chosen:
            mask = masks.mask(task)
            cells.mask(f"masks/{task.name}", lambda mask=mask: mask if only is None else of_kinds(mask, only))
    study = Study(
        backbone, chosen, setting.control(), plan, progress=False, cells=cells, stand_in=setting.stand_in()
    )  # fmt: skip
    row = study.row("talos")
    addition, negation = row["addition"], row["negation"].values()
    best = next(trial for trial in addition["trials"] if trial["alpha"] == addition["alpha"])
    found = [next(t for t in search["trials"] if t["alpha"] == search["alpha"]) for search in negation]
    return {
        "lr": row["lr"], "single": mean(dict(enumerate(addition["references"]))),
        "added": mean(dict(enumerate(best["accuracies"]))), "norm.": mean(dict(enumerate(best["normalized"]))),
        "α": addition["alpha"], "target": mean({i: t["accuracies"][0] for i, t in enumerate(found)}),
        "control": mean({i: t["control"] for i, t in enumerate(found)}), "tasks": [task.name for task in chosen],
        "plan": asdict(plan),
    }  # fmt: skip


def markdown(found: dict[str, dict]) -> str:
    """The rows as a table, accuracies in percent."""
    rows = [list(COLUMNS)]
    for name, row in found.items():
        shown = [f"{100 * row[key]:.1f}" for key in ("single", "added", "norm.", "target", "control")]
        shown.insert(3, f"{row['α']:g}")
        rows.append([name, f"{row['lr']:.2g}", *shown])
    return grid(rows) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("accuracy-output"))
    parser.add_argument("--setting", choices=list(SETTINGS), default="clip")
    parser.add_argument("--tasks", type=int, help="only the first ones")
    parser.add_argument("--rows", nargs="*", help="only these; default: all")
    parser.add_argument("--lr", type=float, help="default: of the committed row of seed 0")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    name, committed = arguments.setting, RESULTS / arguments.setting / "talos_seed0.json"
    lr = arguments.lr or float(json.loads(committed.read_text())["lr"])
    plan = SETTINGS[name].plan
    # One test example, for form's sake: nothing here may depend on test data.
    default = replace(plan, learning_rates={"talos": (lr,)}, extend=0, test_limit=1)
    path = RESULTS / f"ablation_{name}.json"
    found: dict[str, dict] = json.loads(path.read_text()) if path.is_file() else {}
    for variant, change in variants(lr, plan.steps).items():
        if arguments.rows and variant not in arguments.rows:
            continue
        found[variant] = measure(name, variant, change, default, arguments.out, arguments.tasks)
        write_json(path, found)
        ordered = {name: found[name] for name in variants(lr, plan.steps) if name in found}
        about = f"**{name}**: {', '.join(found[variant]['tasks'])}; validation data, means over tasks in %\n\n"
        path.with_suffix(".md").write_text(about + markdown(ordered), encoding="utf-8")
        print(markdown({variant: found[variant]}).splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
