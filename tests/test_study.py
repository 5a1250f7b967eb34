"""The demo's engine on a tiny CLIP and tasks of a few images: what it writes, and that its numbers can be had again."""

import json
from dataclasses import replace

import pytest
import torch
from tiny_models import image_task, tiny_clip

from talos_fast import Mask, TalosError, TaskVector, evaluate, merge
from talos_fast.demo.run import OWN, _plan, run

RATES = {"nonlinear": [1e-3, 3e-3], "talos": [1e-2, 3e-2]}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    torch.manual_seed(0)
    backbone, out = tiny_clip(), tmp_path_factory.mktemp("study")
    tasks = [image_task("three", 3), image_task("four", 4)]
    control = image_task("control", 5)
    before = {name: p.clone() for name, p in backbone.encoder.named_parameters()}
    summary = run(backbone, tasks, control, out, {"steps": 6, "batch_size": 6, "samples": 8}, RATES, progress=False)
    return backbone, tasks, control, out, before, summary


def test_the_model_is_left_as_it_was(study):
    backbone, _, _, _, before, _ = study
    assert all(torch.equal(p, before[name]) for name, p in backbone.encoder.named_parameters())


def test_everything_is_written(study):
    _, _, _, out, _, summary = study
    table = (out / "table.md").read_text().splitlines()
    assert len(table) == 5 and [line.split(" | ")[0] for line in table[2:]] == ["| zero-shot", "| nonlinear", "| talos"]
    for name in ("mask_structure.png", "disentanglement_nonlinear.png", "disentanglement_talos.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    json.dumps(summary)
    assert (summary["model"], summary["plan"]["steps"], summary["plan"]["limit"]) == ("tiny-clip", 6, None)
    assert [method["method"] for method in summary["methods"]] == ["nonlinear", "talos"]
    assert all(len(method["validation_by_lr"]) == 2 for method in summary["methods"])


@pytest.mark.parametrize("method", ["nonlinear", "talos"])
def test_the_numbers_come_from_the_files(study, method):
    """Single-task, merged and negated accuracies, again from the saved vectors and the reported alphas."""
    backbone, tasks, control, out, _, summary = study
    row = next(entry for entry in summary["methods"] if entry["method"] == method)
    vectors = {task.name: TaskVector.from_pretrained(out / "vectors" / method / task.name) for task in tasks}

    def accuracy(task, applied, alpha):
        model = merge(backbone.classifier(task), applied, alpha=alpha)
        return float(evaluate(model, backbone.batches(task.test, batch_size=5)))

    for task in tasks:
        vector, alpha = vectors[task.name], row["negation"][task.name]["alpha"]
        assert row["single"][task.name] == accuracy(task, [vector], 1.0)
        assert row["added"][task.name] == accuracy(task, list(vectors.values()), row["addition"]["alpha"])
        assert row["target"][task.name] == accuracy(task, [-vector], alpha)
        assert row["control"][task.name] == accuracy(control, [-vector], alpha)
        assert row["vector_bytes"][task.name] == vector.nbytes


def test_talos_vectors_lie_inside_their_masks(study):
    _, tasks, _, out, _, _ = study
    for task in tasks:
        mask = Mask.load(out / "masks" / f"{task.name}.safetensors")
        moved = TaskVector.from_pretrained(out / "vectors" / "talos" / task.name).mask()
        assert all(not (moved[name] & ~mask[name]).any() for name in moved)


def test_zero_is_a_choice_and_rates_ascend():
    plan = _plan(OWN, {"weight_decay": 0.0, "steps": None}, {"talos": [3e-2, 1e-2], "nonlinear": None})
    assert plan == replace(OWN, weight_decay=0.0, learning_rates={**OWN.learning_rates, "talos": (1e-2, 3e-2)})


def test_refusals(tmp_path):
    backbone, task = tiny_clip(), image_task()
    with pytest.raises(TalosError, match="give both --data and --control"):
        run(backbone, [task], None, tmp_path, {}, {})
    with pytest.raises(TalosError, match="different numbers of learning rates"):
        run(backbone, [task], task, tmp_path, {}, {"talos": [1.0]})
    (tmp_path / "file").touch()
    with pytest.raises(TalosError, match="cannot be written"):
        run(backbone, [task], task, tmp_path / "file", {"steps": 1}, {})


def test_tasks_of_one_name_are_refused(tmp_path):
    tasks = [image_task("same", 3), image_task("same", 4)]
    with pytest.raises(TalosError, match="two tasks are called 'same'"):
        run(tiny_clip(), tasks, image_task("control", 5), tmp_path, {}, RATES, progress=False)
