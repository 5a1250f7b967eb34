"""What the TaLoS recipe is made of, one change at a time, on the embedded tiny CLIP; judged on validation data only.

python benchmarks/ablation.py --out FOLDER    # resumable; writes results/accuracy/ablation.json and .md
"""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path

import torch
from accuracy import RESULTS, SETTINGS, mean

from talos_fast.cells import Cells
from talos_fast.storage import write_json
from talos_fast.study import Plan, Study

COLUMNS = ("recipe", "lr", "single", "added", "norm.", "α", "target", "control")


def variants(lr: float) -> dict[str, dict]:
    """Name -> what differs from the default: density 0.1, 4 rounds, damage 0.1, fisher, 256 samples, ``lr``."""
    return {
        "default": {},
        "learning rate / 3": {"learning_rates": {"talos": (lr / 3,)}},
        "learning rate / 10": {"learning_rates": {"talos": (lr / 10,)}},
        "density 0.03": {"density": 0.03},
        "density 0.3": {"density": 0.3},
        "1 round": {"calibration": {"rounds": 1}},
        "damage 0 (hard)": {"calibration": {"damage": 0.0}},
        "damage 1 (none)": {"calibration": {"damage": 1.0}},
        "jacobian": {"calibration": {"estimator": "jacobian"}},
        "empirical Fisher": {"calibration": {"estimator": "empirical"}},
        "64 samples": {"samples": 64},
        "no weight decay": {"weight_decay": 0.0},
        "steps × 3, learning rate / 3": {"steps": 600, "learning_rates": {"talos": (lr / 3,)}},
    }


def measure(name: str, plan: Plan, out: Path) -> dict:
    """One row; every accuracy is of validation data."""
    setting = SETTINGS["clip"]
    folder = out / "ablation" / "".join(c if c.isalnum() else "_" for c in name)
    study = Study(
        setting.load(), setting.tasks(), setting.control(), plan, progress=False, cells=Cells(folder, asdict(plan))
    )
    row = study.row("talos")
    addition, negation = row["addition"], row["negation"].values()
    best = next(trial for trial in addition["trials"] if trial["alpha"] == addition["alpha"])
    chosen = [next(t for t in search["trials"] if t["alpha"] == search["alpha"]) for search in negation]
    return {
        "lr": row["lr"], "single": mean(dict(enumerate(addition["references"]))),
        "added": mean(dict(enumerate(best["accuracies"]))), "norm.": mean(dict(enumerate(best["normalized"]))),
        "α": addition["alpha"], "target": mean({i: t["accuracies"][0] for i, t in enumerate(chosen)}),
        "control": mean({i: t["control"] for i, t in enumerate(chosen)}), "plan": asdict(plan),
    }  # fmt: skip


def markdown(found: dict[str, dict]) -> str:
    lines = ["| " + " | ".join(COLUMNS) + " |", "| " + " | ".join(["---"] * len(COLUMNS)) + " |"]
    for name, row in found.items():
        shown = [f"{100 * row[key]:.1f}" for key in ("single", "added", "norm.", "target", "control")]
        shown.insert(3, f"{row['α']:g}")
        lines.append(f"| {name} | {row['lr']:.2g} | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("accuracy-output"))
    out = parser.parse_args().out
    torch.set_num_threads(1)
    lr = float(json.loads((RESULTS / "clip" / "talos_seed0.json").read_text())["lr"])
    default = replace(SETTINGS["clip"].plan, learning_rates={"talos": (lr,)}, extend=0)
    found: dict[str, dict] = {}
    for name, change in variants(lr).items():
        found[name] = measure(name, replace(default, **change), out)
        write_json(RESULTS / "ablation.json", found)
        (RESULTS / "ablation.md").write_text(markdown(found), encoding="utf-8")
        print(markdown({name: found[name]}).splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
