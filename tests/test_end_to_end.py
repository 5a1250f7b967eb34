"""calibrate, finetune and merge on every kind of model that can be loaded, and by every method, tiny."""

import copy

import pytest
import torch
from tiny_models import image_task, text_task, tiny_clip, tiny_timm, write_bert, write_t5

from talos_fast import calibrate, evaluate, finetune, merge, models, search_alpha
from talos_fast.methods import METHODS
from talos_fast.structure import density_by_kind

KINDS = {
    "open_clip": lambda folder: tiny_clip(),
    "timm": lambda folder: tiny_timm(),
    "bert": lambda folder: models.load(f"hf:{write_bert(folder)}"),
    "t5": lambda folder: models.load(f"t5:{write_t5(folder)}"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_three_verbs(kind, device, tmp_path, caplog):
    torch.manual_seed(0)
    backbone = KINDS[kind](tmp_path)
    task = image_task(per_split=24) if backbone.modality == "image" else text_task(per_split=24)
    model = backbone.classifier(task).to(device)
    base = copy.deepcopy(model)
    with caplog.at_level("INFO", "talos_fast"):
        mask = calibrate(model, backbone.batches(task.train, batch_size=8), density=0.2, rounds=2, progress=False)
    assert not [record for record in caplog.records if "torch.func" in record.getMessage()], "a rule is missing"
    assert {"query", "key", "value"} <= set(density_by_kind(mask))
    batches = backbone.batches(task.train, batch_size=8, shuffle=True)
    vector = finetune(model, batches, mask=mask, lr=1e-2, steps=6, progress=False)
    for name, p in model.named_parameters():
        still = ~mask[name] if name in mask else torch.ones_like(p, dtype=torch.bool)
        assert torch.equal(p[still], base.get_parameter(name)[still]), name
    edited = merge(base, [vector])
    assert all(torch.equal(p, edited.get_parameter(name)) for name, p in model.named_parameters())
    test = backbone.batches(task.test, batch_size=8)
    assert evaluate(edited, test) == evaluate(model, test)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_adds_and_forgets(method, device):
    backbone, task = tiny_clip(), image_task(per_split=24)
    base = backbone.classifier(task).to(device)
    test = backbone.batches(task.test, batch_size=8)
    mask = None
    if method == "talos":
        mask = calibrate(base, backbone.batches(task.train, batch_size=8), density=0.5, rounds=1, progress=False)
    model = copy.deepcopy(base)
    batches = backbone.batches(task.train, batch_size=8, shuffle=True)
    vector = finetune(model, batches, method=method, mask=mask, lr=3e-2, steps=40, progress=False)
    grid = [0.0, 0.5, 1.0]
    found = search_alpha(base, [vector], evaluate=lambda edited: evaluate(edited, test).value, grid=grid)
    accuracies = [evaluate(merge(base, [vector], alpha=alpha), test).value for alpha in grid]
    assert found.alpha == grid[accuracies.index(max(accuracies))]
    assert max(accuracies) > accuracies[0]
    forgetting = merge(base, [-vector])
    assert evaluate(forgetting, test).value <= accuracies[0]
    assert {p.device.type for p in forgetting.parameters()} == {device}
