"""A study's runs follow its plan, read the split that they are for, and are compared with what they should be."""

import io
import sys
from dataclasses import replace

import pytest
import torch
from test_study_resume import PLAN
from tiny_models import image_task, tiny_clip
from torch.utils.data import DataLoader

from talos_fast import TaskVector
from talos_fast.cells import Cells
from talos_fast.models import Backbone
from talos_fast.study import Study, examiner
from talos_fast.study import study as engine

# No figure is a default, or that of another.
ODD = replace(
    PLAN, learning_rates={name: (1e-3,) for name in ("nonlinear", "lota", "talos")}, density=0.3, samples=5,
    weight_decay=0.25, seed=3, limit=7, test_limit=4, batch_size=5, evaluation_batch=11,
    calibration={"rounds": 2},
)  # fmt: skip
TASK = image_task()


@pytest.fixture(scope="module")
def backbone():
    return tiny_clip()


@pytest.fixture
def odd(backbone) -> Study:
    return Study(backbone, [TASK], TASK, ODD, progress=False)


@pytest.fixture
def read(monkeypatch) -> list[tuple[str, int | None, int]]:
    """The (split, limit, seed) of all batches of TASK."""
    batches, found = Backbone.batches, []
    splits = {id(getattr(TASK, split)): split for split in ("train", "validation", "test")}

    def watched(self, split, *, limit=None, seed=0, **options):
        found.append((splits[id(split)], limit, seed))
        return batches(self, split, limit=limit, seed=seed, **options)

    monkeypatch.setattr(Backbone, "batches", watched)
    return found


def vector(size: float) -> TaskVector:
    return TaskVector({"w": torch.zeros(2)}, {"w": torch.tensor([size, 0.0])})


def test_a_mask_is_made_of_the_plan_and_of_training_examples(odd, read):
    info = odd.mask(TASK).info
    assert read == [("train", 5, 3)]
    assert (info["density"], info["seed"], info["samples"], info["rounds"]) == (0.3, 3, 5, 2)


@pytest.mark.parametrize("method", ODD.learning_rates)
def test_a_vector_is_made_of_the_plan_and_of_training_examples(odd, read, method):
    """LoTA's first run is the vector of another method, whose rate is chosen on validation examples."""
    info = odd._learner.vector(method, 1e-3, TASK).info
    assert (info["weight_decay"], info["seed"], info["steps"]) == (0.25, 3, 3)
    assert {split for split, *_ in read} == {"train", *(["validation"] if method == "lota" else [])}
    assert method != "lota" or info["density"] == 0.3


def test_choices_are_made_on_validation_examples_and_test_examples_are_reported(odd, read):
    odd._examiner.validate(TASK, odd._nothing)
    odd._examiner.test(TASK, odd._nothing)
    odd.predict(TASK, 5)
    assert read == [("validation", 7, 3), ("test", 4, 3), ("validation", 5, 3)]


def test_training_is_shuffled_and_evaluation_in_batches_of_its_own(odd, monkeypatch):
    asked, batches = [], Backbone.batches

    def watched(self, split, *, batch_size, shuffle=False, **options):
        asked.append((batch_size, shuffle))
        return batches(self, split, batch_size=batch_size, shuffle=shuffle, **options)

    monkeypatch.setattr(Backbone, "batches", watched)
    odd.mask(TASK)
    odd._learner.vector("nonlinear", 1e-3, TASK)
    odd._examiner.test(TASK, odd._nothing)
    assert asked == [(5, False), (5, True), (11, False)]


@pytest.mark.parametrize("limit, kept", [(2 * 4 * 8, True), (2 * 4 * 8 - 1, False)])
def test_batches_are_prepared_once_if_all_of_them_fit(monkeypatch, limit, kept):
    """Of two batches each takes four numbers of eight bytes."""
    monkeypatch.setattr(examiner, "PREPARED_BYTES", limit)
    loader = DataLoader(torch.arange(8), batch_size=4)
    assert isinstance(examiner.prepared(loader), list if kept else DataLoader)


def test_the_seconds_of_a_vector_are_those_of_all_that_it_needs(odd):
    learner = odd._learner
    alone = {name: learner.vector(name, 1e-3, TASK).info["seconds"] for name in ODD.learning_rates}
    found = {name: learner.outcomes(name, [(1e-3, TASK)], "")[0]["seconds"] for name in ODD.learning_rates}
    assert found["nonlinear"] == alone["nonlinear"] > 0
    assert found["talos"] == alone["talos"] + odd.mask(TASK).info["seconds"]
    assert found["lota"] == alone["lota"] + alone["nonlinear"]
    assert odd.learn("talos")[0].seconds == found["talos"]


@pytest.mark.parametrize("selection, best", [(1, 1e-3), (2, 1e-2), (None, 1e-2)])
def test_a_rate_is_chosen_by_the_mean_over_the_first_tasks(backbone, monkeypatch, selection, best):
    tasks = [image_task("three", 3), image_task("four", 4)]
    plan = replace(PLAN, learning_rates={"nonlinear": (1e-3, 1e-2)}, selection=selection)
    made = Study(backbone, tasks, None, plan, progress=False)
    known = {("three", 1e-3): 0.5, ("three", 1e-2): 0.25, ("four", 1e-3): 0.25, ("four", 1e-2): 0.75}
    monkeypatch.setattr(made._learner, "_outcome", lambda method, lr, task: {"validation": known[task.name, lr]})
    found = made._learner.rate("nonlinear")
    assert found["lr"] == best and found["validation_by_lr"]["0.01"] == (0.25 if selection == 1 else 0.5)


def test_lota_starts_from_the_vector_of_nonlinear_if_that_is_learned(backbone, odd, monkeypatch):
    start, given = odd._learner.vector("nonlinear", 1e-3, TASK), []

    def watched(*_, finetuned, **__):
        given.append(finetuned)
        return start

    monkeypatch.setattr("talos_fast.study.learner.finetune", watched)
    alone = Study(backbone, [TASK], None, replace(ODD, learning_rates={"lota": (1e-3,)}), progress=False)
    for made in (odd, alone):
        made._learner.vector("lota", 1e-3, TASK)
    assert len(given) == 2 and (given[0] - start).norm() == 0 and given[1] is None


@pytest.mark.parametrize("progress, terminal, shown", [(True, True, True), (True, False, False), (False, True, False)])
def test_bars_are_for_terminals(backbone, monkeypatch, progress, terminal, shown):
    monkeypatch.setattr(sys, "stderr", stream := io.StringIO())
    monkeypatch.setattr(stream, "isatty", lambda: terminal, raising=False)
    made = Study(backbone, [TASK], None, PLAN, progress=progress)
    assert bool(made._learner.bar("learn", 1)([1]).disable) != shown


def test_each_rate_has_a_vector_of_its_own(odd):
    one, other = (odd._learner.vector("nonlinear", lr, TASK) for lr in (1e-3, 1.25e-3))
    assert (one.info["lr"], other.info["lr"]) == (1e-3, 1.25e-3) and (one - other).norm() > 0


def test_what_a_task_s_recipe_says_goes_before_the_plan(backbone):
    recipes = {TASK.name: {"warmup": 1, "weight_decay": 0.5}}
    made = Study(backbone, [TASK], None, replace(ODD, steps=2), progress=False, recipes=recipes)
    info = made._learner.vector("lota", 1e-3, TASK).info
    assert (info["warmup"], info["weight_decay"], info["steps"]) == (1, 0.5, 2)


def test_of_equal_rates_the_least_is_chosen(backbone, monkeypatch):
    plan = replace(PLAN, learning_rates={"nonlinear": (1e-3, 1e-2)})
    made = Study(backbone, [TASK], None, plan, progress=False)
    monkeypatch.setattr(made._learner, "_outcome", lambda method, lr, task: {"validation": 0.5})
    assert made._learner.rate("nonlinear")["lr"] == 1e-3


def test_addition_is_held_against_each_task_s_own_vector(backbone, monkeypatch):
    tasks = [image_task("three", 3), image_task("four", 4)]
    made = Study(backbone, tasks, None, replace(PLAN, addition_grid=(0.0, 2.0)), progress=False)
    monkeypatch.setattr(made._examiner, "validate", lambda task, v, alphas=(1.0,): [v.norm() * a for a in alphas])
    found = made._search_addition({"three": vector(0.25), "four": vector(0.5)}, vector(0.75))
    assert found.references == (0.25, 0.5) and found.alpha == 2.0 and found.best.accuracies == (1.5, 1.5)
    monkeypatch.setattr(made._examiner, "test", lambda task, v, alpha=1.0: v.norm() * alpha)
    found = {"search": found.to_json(), "added": {"three": 1.5, "four": 1.5}}  # of the sum, at the best coefficient
    assert made._added({"three": vector(0.25), "four": vector(0.5)}) == found


def test_negation_has_a_grid_and_a_floor_of_its_own(backbone, monkeypatch):
    task, control = image_task("three", 3), image_task("control", 4)
    plan = replace(PLAN, negation_grid=(0.0, 2.0), control_floor=0.5)
    made, start = Study(backbone, [task], control, plan, progress=False), {"three": 0.8, "control": 0.6}
    monkeypatch.setattr(
        made._examiner, "validate", lambda task, v, alphas=(1.0,): [start[task.name] - 0.1 * a for a in alphas]
    )
    found = made._search_negation(task, control, -vector(1.0))
    assert (found.alpha, found.references, found.control) == (2.0, (0.8,), 0.6)
    tested = {}

    def test(task, v, alpha=1.0) -> float:
        tested[task.name] = (float(v.deltas["w"].dense()[0]), alpha)
        return 0.5

    monkeypatch.setattr(made._examiner, "test", test)
    made._negated(task, vector(1.0))
    assert tested == {"three": (-1.0, 2.0), "control": (-1.0, 2.0)}


def test_a_model_is_tested_at_the_coefficient_that_is_asked_for(odd, monkeypatch):
    monkeypatch.setattr(examiner, "evaluate_along", lambda model, vector, batches, alphas: alphas)
    assert odd._examiner.test(TASK, odd._nothing, 0.25) == 0.25 and odd._examiner.test(TASK, odd._nothing) == 1.0


def test_a_rival_merges_by_its_own_method(backbone, monkeypatch):
    given, combine = [], engine.combine

    def watched(vectors, **options):
        given.append(options)
        return combine(vectors, **options)

    monkeypatch.setattr(engine, "combine", watched)
    plan = replace(PLAN, learning_rates={"nonlinear": (1e-3,)}, addition_grid=(0.0, 1.0))
    made = Study(backbone, [image_task("three", 3), image_task("four", 4)], None, plan, progress=False)
    assert [row.method for row in made.rows(["magnitude_prune"])] == ["nonlinear", "nonlinear+magnitude_prune"]
    assert given == [{"method": "task_arithmetic"}, {"method": "magnitude_prune"}]


def test_a_checkpoint_goes_when_its_vector_is_saved(tmp_path, monkeypatch):
    cells = Cells(tmp_path, {}, checkpoints=True)
    kept = cells.checkpoint("v")
    kept.mkdir(parents=True)
    with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):
        patched.setattr(TaskVector, "save_pretrained", lambda *_: 1 / 0)
        cells.vector("v", lambda: vector(1.0))
    assert kept.is_dir()
    cells.vector("v", lambda: vector(1.0))
    assert not kept.exists() and Cells(tmp_path, {}).checkpoint("v") is None


def test_rivals_come_as_named_each_with_its_own_addition(backbone, monkeypatch):
    known = {"task_arithmetic": 0.5, "ties": 0.25, "magnitude_prune": 0.75}
    made = Study(backbone, [TASK], None, replace(PLAN, learning_rates={"nonlinear": (1e-3,)}), progress=False)
    search = made._search_addition({TASK.name: vector(0.0)}, vector(0.0)).to_json()

    def added(vectors, method="task_arithmetic"):
        return {"search": search, "added": {TASK.name: known[method]}}

    monkeypatch.setattr(made, "_added", added)
    rows = [*made.rows(["ties", "magnitude_prune", "ties"])]
    names = ("nonlinear", "nonlinear+ties", "nonlinear+magnitude_prune")
    assert [(row.method, row.added[TASK.name]) for row in rows] == [*zip(names, (0.5, 0.25, 0.75), strict=True)]
    assert [row.single for row in rows] == [rows[0].single] * 3


@pytest.mark.parametrize("kept", ["in memory", "in a folder"])
def test_dropped_vectors_are_made_again(tmp_path, kept):
    cells, made = Cells(tmp_path if kept == "in a folder" else None, {}), []

    def make() -> TaskVector:
        made.append(1)
        return vector(1.0)

    for _ in range(2):
        cells.vector("v", make)
    assert len(made) == 1
    for _ in range(2):  # as two processes do
        cells.drop("v")
    assert not (tmp_path / "v").exists()
    cells.vector("v", make)
    assert len(made) == 2
