"""A study in a folder: killed and resumed it measures the same, and each method gets its own best rate."""

import json
from dataclasses import asdict, replace

import pytest
from tiny_models import image_task, tiny_clip

from talos_fast import TalosError
from talos_fast.cells import Cells
from talos_fast.study import Plan, Study, learner

PLAN = Plan({"nonlinear": (1e-3, 3e-3), "lota": (1e-3, 3e-3)}, steps=3, batch_size=6, selection=1)


@pytest.fixture(scope="module")
def backbone():
    return tiny_clip()


def rows(backbone, plan: Plan, cells: Cells, stand_in=None) -> dict:
    tasks = [image_task("three", 3), image_task("four", 4)]
    made = Study(backbone, tasks, tasks[1], plan, progress=False, cells=cells, stand_in=stand_in)
    return {method: made.row(method) for method in plan.learning_rates}


def without_seconds(found: dict) -> dict:
    return {method: {key: value for key, value in row.items() if key != "seconds"} for method, row in found.items()}


def test_killed_and_resumed_measures_the_same(backbone, tmp_path, monkeypatch):
    whole = json.loads(json.dumps(rows(backbone, PLAN, Cells())))
    train, calls = learner.finetune, []

    def dying(*arguments, **options):
        calls.append(options["method"])
        if len(calls) in (2, 6):
            raise KeyboardInterrupt
        return train(*arguments, **options)

    monkeypatch.setattr(learner, "finetune", dying)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            rows(backbone, PLAN, Cells(tmp_path, asdict(PLAN)))
    again = rows(backbone, PLAN, Cells(tmp_path, asdict(PLAN)))
    assert without_seconds(json.loads(json.dumps(again))) == without_seconds(whole)
    # Three runs a method: two rates on the first task, the better one on the second; and the two that died.
    assert len(calls) == 2 * 3 + 2
    kept = {path.parent.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("task_vector.safetensors")}
    assert kept == {f"{method}/{row['lr']:g}/{task}" for method, row in again.items() for task in ("three", "four")}
    assert rows(backbone, PLAN, Cells(tmp_path, asdict(PLAN))) == json.loads(json.dumps(again)) and len(calls) == 8


def test_nothing_is_locked_while_processes_share_out_parts(backbone, tmp_path, monkeypatch):
    locked, values = [], Cells.values

    def watched(self, parts, bar):
        locked.append(list(tmp_path.rglob(".*.lock")))
        return values(self, parts, bar)

    monkeypatch.setattr(Cells, "values", watched)
    plan = replace(PLAN, learning_rates={"nonlinear": (1e-3,)}, steps=1)
    Study(backbone, [image_task()], None, plan, progress=False, cells=Cells(tmp_path, {})).row("nonlinear")
    assert locked == [[]] * 3


def test_another_plan_is_refused(tmp_path):
    Cells(tmp_path, asdict(PLAN))
    with pytest.raises(TalosError, match=r"another plan \(.*seed: 0 there, 1 here.*steps: 3 there, 4 here"):
        Cells(tmp_path, asdict(replace(PLAN, steps=4, seed=1)))
    Cells(tmp_path / "more", {"control": 1})
    with pytest.raises(TalosError, match=r"another plan \(control: 1 there, None here\)"):
        Cells(tmp_path / "more", {})


@pytest.mark.parametrize("extend", [0, 1, 2])
def test_rates_grow_no_further_than_they_may(backbone, monkeypatch, extend):
    plan = replace(PLAN, learning_rates={"nonlinear": (1.0, 2.0)}, extend=extend)
    made = Study(backbone, [task := image_task()], task, plan, progress=False)
    monkeypatch.setattr(made._learner, "_outcome", lambda method, lr, task: {"validation": lr})
    assert made._learner.rate("nonlinear")["lr"] == 2.0 ** (1 + extend)


@pytest.mark.parametrize("best, tried", [
    (8.0, [1, 2, 4, 8, 16]), (0.25, [0.125, 0.25, 0.5, 1, 2]), (64.0, [1, 4, 16, 64, 256]),
])  # fmt: skip
def test_rates_grow_while_an_end_is_best(backbone, monkeypatch, best, tried):
    """Validation accuracy falls on both sides of the best rate: two grow until one beyond it was tried."""
    start = (1.0, 4.0) if 64 in tried else (1.0, 2.0)
    plan = replace(PLAN, learning_rates={"nonlinear": start}, extend=5)
    made = Study(backbone, [task := image_task()], task, plan, progress=False)
    monkeypatch.setattr(made._learner, "_outcome", lambda method, lr, task: {"validation": -abs(lr - best)})
    found = made._learner.rate("nonlinear")
    assert found["lr"] == best and [float(lr) for lr in found["validation_by_lr"]] == tried


def test_the_control_has_a_stand_in_when_it_is_forgotten(backbone):
    plan, other = replace(PLAN, learning_rates={"nonlinear": (1e-3,)}), image_task("five", 5)
    negation = rows(backbone, plan, Cells(), stand_in=other)["nonlinear"]["negation"]
    control = Study(backbone, [other], other, plan, progress=False)
    reference = control._examiner.validate(other, control._nothing)[0]
    assert negation["four"]["control"] == reference
    tasks = [image_task("three", 3), image_task("four", 4)]
    made = Study(backbone, tasks, tasks[1], plan, progress=False, stand_in=other)
    assert [made._control_of(task) for task in tasks] == [tasks[1], other]
