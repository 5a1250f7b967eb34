"""The accuracy study's own code: its table and plot from rows on disk, its plans, its ablations; T5's one step."""

import json
import sys
from dataclasses import asdict
from itertools import pairwise

import pytest
import torch
from conftest import ROOT
from tiny_models import image_task, tiny_clip

sys.path.insert(0, str(ROOT / "benchmarks"))

import ablation
import accuracy
import accuracy_settings
import accuracy_table
import t5_large_step

from talos_fast import Mask, calibrate
from talos_fast.methods import METHODS
from talos_fast.structure import density_by_kind
from talos_fast.study import Plan

PLAN = Plan(
    {"nonlinear": (1e-3, 3e-3), "talos": (1e-2, 3e-2)}, steps=3, batch_size=6, samples=8, selection=1,
    addition_grid=(0.0, 0.5), negation_grid=(0.0, 1.0, 3.0),
)  # fmt: skip


def setting(plan: Plan = PLAN) -> accuracy_settings.Setting:
    def load():
        torch.manual_seed(0)
        return tiny_clip()

    three = image_task("three", 3)
    return accuracy_settings.Setting(
        load, lambda: [three, image_task("four", 4)], lambda: three, lambda: image_task("two", 2), plan
    )


@pytest.fixture
def results(tmp_path, monkeypatch):
    """An empty folder of results, and "small", a setting of a tiny model."""
    folder = tmp_path / "results"
    for module in (accuracy, accuracy_table, ablation):
        monkeypatch.setattr(module, "RESULTS", folder)
    for module in (accuracy, ablation):
        monkeypatch.setattr(module, "SETTINGS", {"small": setting()})
    return folder


def test_rows_table_and_plot(results, tmp_path):
    out = tmp_path / "cells"
    with pytest.raises(FileNotFoundError, match="no row of seed 0, which chooses the learning rates"):
        accuracy.plan_of("small", 1)
    accuracy.run(out, "small", 0, ["nonlinear", "talos"])
    chosen = {m: json.loads((results / "small" / f"{m}_seed0.json").read_text())["lr"] for m in ("nonlinear", "talos")}
    plan = accuracy.plan_of("small", 1)
    assert plan.learning_rates == {m: (lr,) for m, lr in chosen.items()} and plan.seed == 1
    accuracy.run(out, "small", 1, ["talos"])
    accuracy.run(out, "small", 0, ["talos-0.3"])
    recipe = json.loads((results / "small" / "talos-0.3_seed0.json").read_text())
    assert recipe["plan"]["density"] == 0.3 and set(recipe["plan"]["learning_rates"]) == {"talos"}
    default = json.loads((results / "small" / "talos_seed0.json").read_text())
    assert accuracy_table.mean(recipe["vector_bytes"]) > 1.5 * accuracy_table.mean(default["vector_bytes"])
    assert accuracy.plan_of("small", 1, "talos-0.3").learning_rates == {"talos": (recipe["lr"],)}
    text = accuracy_table.table_text(["small", "other"])
    assert "**other**: not measured" in text and text.count("not measured") == 4
    talos = next(line for line in text.splitlines() if line.startswith("| talos |"))
    assert talos.endswith("| 2 |") and talos.count("±") == 6
    row = json.loads((results / "small" / "talos_seed1.json").read_text())
    assert [trial["alpha"] for trial in row["addition"]["trials"]] == [0.0, 0.5]
    assert [trial["alpha"] for trial in row["negation"]["four"]["trials"]] == [0.0, 1.0, 3.0]
    accuracy_table.plot(["small", "other"], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_real_settings_are_fair():
    """As many rates for each method, half a decade apart, and one pair of grids, from 0 on."""
    for made in accuracy_settings.SETTINGS.values():
        rates = made.plan.learning_rates
        assert set(rates) == set(METHODS) and {len(values) for values in rates.values()} == {4}
        assert all(2.9 < b / a < 3.4 for values in rates.values() for a, b in pairwise(values))
        assert made.plan.negation_grid[0] == made.plan.addition_grid[0] == 0 and made.plan.addition_grid[-1] == 1


def test_an_ablation_row_of_one_kind(results, tmp_path):
    model = tiny_clip().classifier(image_task())
    batches = [(torch.randn(4, 3, 16, 16), torch.arange(4) % 3)]
    mask = calibrate(model, batches, density=0.5, rounds=1, progress=False)
    counts = density_by_kind(ablation.of_kinds(mask, ("query",)))
    assert counts["query"].selected == density_by_kind(mask)["query"].selected > 0
    assert sum(count.selected for count in counts.values()) == counts["query"].selected
    plan = Plan(**{**asdict(PLAN), "learning_rates": {"talos": (1e-2,)}, "density": 0.5})
    row = ablation.measure("small", "only queries", {"only": ("query",)}, plan, tmp_path, 1)
    used = Mask.load(tmp_path / "ablation-small" / "only%20queries" / "masks" / "three.safetensors")
    assert used.info["only"] == ["query"] and row["tasks"] == ["three"]
    assert "| only queries | 0.01 |" in ablation.markdown({"only queries": row})


@pytest.mark.parametrize("method", METHODS)
def test_one_step_of_a_small_t5(method):
    row = t5_large_step.one_step("smoke-T5", method)
    assert row["everything_moved"] and row["parameters"] > 0
    assert row["peak_bytes"] is None or row["peak_bytes"] > row["above_bytes"]


def test_a_step_that_does_not_fit_is_not_started(monkeypatch):
    monkeypatch.setattr(t5_large_step, "bytes_free", lambda device: 2**30)
    assert t5_large_step.measure("T5-Large", "lota") == {"missing": "needs about 8 GiB, 1.0 GiB were free"}
