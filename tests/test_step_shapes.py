"""The shapes and masks of the step's benchmark, and the memory they take: counted, against the models themselves."""

import importlib
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from talos_fast.optim.selection import select
from talos_fast.profiling.work import touched_sectors

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
shapes, occupancy = map(importlib.import_module, ("shapes", "occupancy"))


@pytest.mark.parametrize("model, tensors, numel", [
    ("ViT-B-32", 152, 87_849_216), ("ViT-L-14", 296, 303_966_208), ("T5-Large", 509, 737_668_096),
])  # fmt: skip
def test_sizes(model, tensors, numel):
    found = shapes.MODELS[model]
    assert (len(found), sum(torch.Size(shape).numel() for shape in found.values())) == (tensors, numel)


def test_t5_is_that_of_transformers():
    t5 = pytest.importorskip("transformers.models.t5")
    config = t5.T5Config(d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, vocab_size=100)
    with torch.device("meta"):
        model = t5.T5ForConditionalGeneration(config)
    model.tie_weights()  # which transformers 5.0 leaves out on meta
    assert shapes.MODELS["smoke-T5"] == {name: tuple(p.shape) for name, p in model.named_parameters()}


def test_state_of_vit_l_14_at_ten_percent_is_at_most_300_mb():
    count = Counter(shapes.MODELS["ViT-L-14"].values())
    held = 0
    for shape, times in count.items():
        selection = select(torch.rand(shape) < 0.1, torch.empty(shape))
        held += times * (2 * 4 * selection.count + selection.nbytes)
    assert 0.28e9 < held <= 0.30e9


@pytest.mark.parametrize("name", shapes.MASKS)
@pytest.mark.parametrize("model", ["smoke", "smoke-T5"])
def test_masks(model, name):
    masks = shapes.MASKS[name](shapes.MODELS[model], torch.Generator().manual_seed(0))
    assert {n: tuple(m.shape) for n, m in masks.items()} == shapes.MODELS[model]
    share = sum(int(m.sum()) for m in masks.values()) / sum(m.numel() for m in masks.values())
    assert share == pytest.approx(0.1, abs=0.1 if name == "TaLoS mask" else 0.01)
    if name == "TaLoS mask":
        live = {n for n, m in masks.items() if m.any()}
        assert live == {n for n in masks if n.endswith(("in_proj_weight", "Attention.q.weight", "Attention.k.weight"))}


def test_occupancy_counts_lines_and_sectors():
    mask = torch.zeros(2, 40, dtype=torch.bool)
    mask[0, 0] = mask[0, 9] = mask[1, 39] = True  # sectors 0, 1 and 9; lines 0 and 4
    selection = select(mask, torch.empty(2, 40))
    found = occupancy.occupancy({"w": mask}, {"w": selection})
    assert (found["sectors_32"], found["lines_64"]) == (24 / 80, 32 / 80)
    assert found["floor_32"] == (12 * 24 + 16 * 3 + selection.nbytes) / (28 * 80)
    assert touched_sectors(torch.ones(3, dtype=torch.bool)) == 1
