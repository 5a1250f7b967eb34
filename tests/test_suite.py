"""`suite`: two local folder tasks from start to table, stopped in the middle in several ways, with the same results."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import published
import pytest
import torch
from cli_cases import run_line
from PIL import Image
from tiny_models import image_task, tiny_clip

from talos_fast import Mask, TalosError, TaskVector, tasks
from talos_fast.cli.suite import _done, _given, _shortened
from talos_fast.study import MethodResult, Plan, Study, StudyResult, examiner, learner
from talos_fast.suite import Suite, _goes_on, choose_methods, run_suite, task_digest
from talos_fast.tasks import Split

METHODS = ("nonlinear", "linearized", "l-lora", "lota", "talos")
PLAN = Plan({method: (1e-3,) for method in METHODS}, steps=3, batch_size=6, samples=8)
SMALL = Plan({"nonlinear": (1e-3,), "talos": (1e-3, 1e-2)}, steps=3, batch_size=6, samples=8)


def write_task(root: Path, classes: int) -> Path:
    """A folder of pictures, one grey level a class."""
    generator = np.random.default_rng(classes)
    for split, count in (("train", 6), ("val", 2), ("test", 2)):
        for label in range(classes):
            folder = root / split / ("red", "green", "blue", "grass")[label]
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 60, (12, 12, 3)) + 60 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suite")
    for name, classes in (("a", 3), ("b", 4), ("c", 2)):
        write_task(folder / name, classes)
    entries = [{"file": name, "name": name, "prompt_template": "a {}."} for name in "abc"]
    (folder / "datasets.json").write_text(json.dumps(entries))
    return folder


def whole(place, plan: Plan = PLAN) -> Suite:
    a, b, c = (tasks.load(place / name) for name in "abc")
    return Suite([a, b], c, plan, mergings=("ties",))


def backbone():
    torch.manual_seed(0)
    return tiny_clip()


def same(content):
    """Everything but the seconds, which no two runs share."""
    if isinstance(content, dict):
        return {key: same(value) for key, value in content.items() if "seconds" not in key}
    return [same(value) for value in content] if isinstance(content, list) else content


@pytest.fixture(scope="module")
def finished(place, tmp_path_factory):
    """A run that nothing stopped."""
    out = tmp_path_factory.mktemp("finished")
    model = backbone()
    before = {name: p.clone() for name, p in model.encoder.named_parameters()}
    result = run_suite(model, whole(place), out, progress=False)
    assert all(torch.equal(p, before[name]) for name, p in model.encoder.named_parameters())
    return out, result


@pytest.fixture(scope="module")
def small(place, tmp_path_factory):
    """What a smaller run reports that nothing stopped."""
    out = tmp_path_factory.mktemp("small")
    run_suite(backbone(), whole(place, SMALL), out, progress=False)
    return same(json.loads((out / "report.json").read_text()))


def test_a_table_of_all_methods(finished):
    out, result = finished
    table = (out / "table.md").read_text().splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in table[2:]] == ["zero-shot", *METHODS, "nonlinear+ties"]
    report = json.loads((out / "report.json").read_text())
    assert [row["method"] for row in report["methods"]] == [*METHODS, "nonlinear+ties"]
    for row in report["methods"]:
        assert set(row["single"]) == set(row["added"]) == {"a", "b"} and len(row["addition"]["trials"]) == 21
        assert set(row["target"]) == (set() if "+" in row["method"] else {"a", "b"})
    assert result.methods[-1].single == result.methods[0].single and set(result.zero_shot) == {"a", "b"}
    factors = TaskVector.from_pretrained(out / "cells" / "l-lora" / "0.001" / "a").info["factor_bytes"]
    assert report["methods"][2]["vector_bytes"]["a"] == factors != report["methods"][0]["vector_bytes"]["a"]
    lr = report["methods"][-2]["lr"]
    vector = TaskVector.from_pretrained(out / "cells" / "talos" / f"{lr:g}" / "a")
    mask = Mask.load(out / "cells" / "masks" / "a.safetensors")
    assert vector.nnz and all(not (moved & ~mask[name]).any() for name, moved in vector.mask().items())
    assert not list(out.rglob("checkpoint*"))


@pytest.mark.parametrize("calls", [6, 20])
def test_interrupted_and_resumed_it_gives_the_same(place, small, tmp_path, monkeypatch, calls):
    """Ctrl-C among the first fine-tunings, and among the evaluations; no vector is made twice."""
    evaluated, done, resumed = examiner.evaluate_along, [], backbone()

    def stopping(*arguments, **options):
        done.append(1)
        if len(done) == calls:
            raise KeyboardInterrupt
        return evaluated(*arguments, **options)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(examiner, "evaluate_along", stopping)
        run_suite(resumed, whole(place, SMALL), tmp_path, progress=False)
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("task_vector.safetensors")}
    run_suite(resumed, whole(place, SMALL), tmp_path, progress=False)
    assert written and all(path.stat().st_mtime_ns == at for path, at in written.items() if path.exists())
    assert same(json.loads((tmp_path / "report.json").read_text())) == small
    assert len(list(tmp_path.rglob("task_vector.safetensors"))) == 2 * 2  # at the best rates only


def test_nothing_is_measured_again(place, finished, monkeypatch):
    def refused(*arguments, **options):
        raise AssertionError("measured again")

    for module, name in ((learner, "finetune"), (learner, "calibrate"), (examiner, "evaluate_along")):
        monkeypatch.setattr(module, name, refused)
    again = run_suite(backbone(), whole(place), str(finished[0]), progress=False)
    assert [row.to_json() for row in again.methods] == [row.to_json() for row in finished[1].methods]


COMMAND = "suite --model tiny --tasks a b --control c --methods talos,nonlinear --lr 1e-3 --lr talos=1e-2 --steps 8"
COMMAND += " --batch-size 6 --samples 8 --limit 4 --test-limit 4 -q --out "


def test_killed_and_resumed_on_the_command_line(place, monkeypatch, capfd):
    """SIGKILL, when the first vectors are there; then the same command, held against a run that was left alone."""
    monkeypatch.chdir(place)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-m", "talos_fast", *(COMMAND + "killed").split()], env=environment)
    vectors, deadline = place / "killed" / "cells" / "nonlinear", time.monotonic() + 300
    while not list(vectors.rglob("task_vector.safetensors")):
        assert process.poll() is None and time.monotonic() < deadline, "it ended before it could be killed"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (place / "killed" / "report.json").exists()
    reports = []
    for out in ("killed", "alone"):
        code, said, errors = run_line(monkeypatch, capfd, COMMAND + out)
        assert code == 0, errors
        assert "talos: done" in said and (place / out / "table.md").is_file()
        reports.append(same(json.loads((place / out / "report.json").read_text())))
    assert reports[0] == reports[1]
    assert [row["lr"] for row in reports[0]["methods"]] == [1e-3, 1e-2]


def test_without_a_control_nothing_is_negated(place, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(place)
    line = f"suite --model tiny a b --methods nonlinear --lr 1e-3 --steps 1 --batch-size 6 -q --out {tmp_path / 'o'}"
    code, said, errors = run_line(monkeypatch, capfd, line)
    assert code == 0 and "nonlinear: done" in said and "table.md" in said, errors
    row = json.loads((tmp_path / "o" / "report.json").read_text())["methods"][0]
    assert row["target"] == {} and set(row["added"]) == {"a", "b"}
    assert (tmp_path / "o" / "table.md").read_text().splitlines()[3].split(" | ")[6:8] == ["", ""]


def test_a_preset_from_a_folder(tmp_path, monkeypatch, capfd):
    """The preset's tasks, control and recipe reach the runs; the reading alone of all nine is in test_presets."""
    from talos_fast.tasks import presets, vision_names

    published.mnist(tmp_path / "mnist")
    published.svhn(tmp_path / "SVHN")
    small = presets.Preset(
        "vision8", ("mnist",), "svhn", {"svhn": ("SVHN",)}, presets.read_vision, 8, 1e-3, 0.1,
        {"warmup": 500, "clip": 1.0}, {"mnist": 2},
    )  # fmt: skip
    # The embedded CLIP knows few words.
    monkeypatch.setattr(vision_names, "TEMPLATES", dict.fromkeys(("mnist", "svhn"), ("the number {}.",)))
    monkeypatch.setitem(presets.PRESETS, "vision8", small)
    line = (
        f"suite --model tiny --preset vision8 --data {tmp_path} --methods talos --samples 8 -q --out {tmp_path / 'o'}"
    )
    code, _, errors = run_line(monkeypatch, capfd, line)
    assert code == 0, errors
    cells = tmp_path / "o" / "cells" / "talos"
    info = TaskVector.from_pretrained(cells / "0.001" / "mnist").info
    assert (info["steps"], info["warmup"], info["weight_decay"], info["lr"]) == (2 * 4, 500, 0.1, 1e-3)
    assert json.loads((tmp_path / "o" / "report.json").read_text())["zero_shot_control"] is not None


def test_a_preset_s_control_gives_way_to_another(place, monkeypatch):
    preset = SimpleNamespace(
        tasks=("a",), control="b", task=lambda name, *_: image_task(name), batch_size=1, weight_decay=0.0, lr=1e-3,
        recipes=dict,
    )  # fmt: skip
    monkeypatch.setattr("talos_fast.cli.suite.get_preset", lambda _: preset)
    assert [_given([], "p", place, control, 0).control.name for control in (None, place / "c")] == ["b", "c"]


@pytest.mark.parametrize("line, said", [
    ("", "give either --preset with --data, or --tasks"),
    ("a --preset vision8 --data .", "give either --preset with --data, or --tasks"),
    ("a --data .", "--data . is the folder of a preset"),
    ("--preset vision8", "--preset vision8 needs --data"),
    ("--preset vision8 --data .", "found no folder cars or stanford_cars or Cars"),
    ("--preset none --data .", "preset 'none'"),
    ("a b --methods magic", "method='magic'"),
    ("a b --lr x", "--lr x: give a number"),
    ("a b --methods talos --lr lota=1", "'lota' is not among the methods"),
    ("a b --lr 0", "learning rates [0.0] of 'nonlinear'"),
    ("a b --lr nan", "learning rates [nan]"),
    ("a b --lr inf --methods talos", "learning rates [inf] of 'talos'"),
    ("a b --density 2", "density=2.0"),
    ("a b --weight-decay -1", "weight_decay=-1.0: must be finite"),
    ("a b --seed -1", "seed=-1"),
    ("a b --merge average", "merging 'average'"),
    ("a b --merge ties --methods talos", "starts from the vectors of 'nonlinear'"),
    ("a --out datasets.json", "--out datasets.json: "),
    ("a a", "two tasks are called 'a'"),
])  # fmt: skip
def test_bad_commands(place, monkeypatch, capfd, line, said):
    monkeypatch.chdir(place)
    code, _, errors = run_line(monkeypatch, capfd, f"suite --model tiny {line}")
    assert code == 2 and said in errors and errors.startswith("error: ") and errors.count("\n") == 1
    assert not (place / "suite").exists()


@pytest.mark.parametrize("changes, said", [
    ({"learning_rates": {"talos": ()}}, r"learning rates \[\] of 'talos'"),
    ({"learning_rates": {"talos": (2e-3, 1e-3)}}, "ascending"),
    ({"learning_rates": {"talos": (1e-3, 1.0000001e-3)}}, "ascending"),  # one file, one line of a table
    ({"learning_rates": {"talos": (-1e-3,)}}, "positive"),
    ({"extend": 1}, "extend=1: 'nonlinear' has one learning rate"),
    ({"steps": 0}, "steps=0: must be an integer, at least 1"),
    ({"batch_size": 2.5}, "batch_size=2.5"),
    ({"selection": 0}, "selection=0"),
    ({"density": 0}, "density=0"),
    ({"weight_decay": float("nan")}, "weight_decay=nan"),
    ({"control_floor": 1.5}, "control_floor=1.5"),
    ({"negation_grid": (0.0, float("inf"))}, "negation_grid"),
    ({"addition_grid": (0.5, 0.0)}, "addition_grid"),
    ({"seed": -1}, "seed=-1"),
])  # fmt: skip
def test_bad_plans(changes, said):
    with pytest.raises(TalosError, match=said):
        replace(PLAN, **changes)


def test_plans_at_their_bounds():
    """Everything may be forgotten, and what is least may be asked for."""
    least = replace(PLAN, control_floor=0, steps=1, extend=0, selection=1, limit=1, test_limit=1)
    assert (least.control_floor, least.limit) == (0, 1)


def test_another_run_is_refused(place, finished):
    suite, model = whole(place), backbone()
    other = Suite(suite.tasks, suite.control, replace(PLAN, steps=4))
    with pytest.raises(TalosError, match=r"another plan \(plan.steps: 3 there, 4 here\)"):
        run_suite(model, other, finished[0], progress=False)
    rates = Suite(suite.tasks, suite.control, replace(PLAN, learning_rates={"talos": (1e-2,)}))
    with pytest.raises(TalosError, match="results of 'talos' there were made with the learning rates"):
        run_suite(model, rates, finished[0], progress=False)
    with pytest.raises(TalosError, match=r"another plan \(control: .* there, None here, tasks.a: "):
        run_suite(model, Suite([image_task("a")], None, PLAN), finished[0], progress=False)
    with pytest.raises(TalosError, match="no task to run"):
        Suite([], None, PLAN)
    with pytest.raises(TalosError, match="no method is given"):
        choose_methods([","])
    assert choose_methods(["talos, nonlinear"]) == ["nonlinear", "talos"] and choose_methods(["all"]) == list(METHODS)
    with pytest.raises(TalosError, match="method='magic'"):
        choose_methods(["all,magic"])


def test_what_makes_it_another_run(tmp_path, monkeypatch):
    def stopped(self):
        raise ZeroDivisionError

    monkeypatch.setattr(Study, "zero_shot", stopped)
    model, task, plan = backbone(), image_task(), replace(SMALL, learning_rates={"lota": (1e-3,)})
    with pytest.raises(ZeroDivisionError):
        run_suite(model, Suite([task], None, plan), tmp_path, progress=False)
    with pytest.raises(TalosError, match=r"another plan \(recipes.colours"):
        run_suite(model, Suite([task], None, plan, {"colours": {"warmup": 1}}), tmp_path, progress=False)
    with pytest.raises(TalosError, match=r"another plan \(dtype: None there, bf16 here\)"):
        run_suite(model, Suite([task], None, plan), tmp_path, identity={"dtype": "bf16"}, progress=False)
    with monkeypatch.context() as patched, pytest.raises(TalosError, match=r"another plan \(model: tiny-clip there"):
        patched.setattr(model, "name", "another")
        run_suite(model, Suite([task], None, plan), tmp_path, progress=False)
    controlled, control = tmp_path / "controlled", image_task("control", 4)
    with pytest.raises(ZeroDivisionError):
        run_suite(model, Suite([task], control, plan), controlled, progress=False)
    for other in (replace(control, name="else"), replace(control, templates=("x {}",))):
        with pytest.raises(TalosError, match=r"another plan \(control: "):
            run_suite(model, Suite([task], other, plan), controlled, progress=False)
    both = replace(plan, learning_rates={"nonlinear": (1e-2,), "lota": (1e-3,)})  # whose vectors LoTA would start from
    with pytest.raises(TalosError, match="the results of 'lota' there were made with the learning rates"):
        run_suite(model, Suite([task], None, both), tmp_path, progress=False)
    for rates in ({"talos": (1e-3,)}, {"talos": (1e-3,), "nonlinear": (1e-2,)}):  # more methods are no other run
        with pytest.raises(ZeroDivisionError):
            run_suite(model, Suite([task], None, replace(plan, learning_rates=rates)), tmp_path, progress=False)
    with torch.no_grad():
        next(model.encoder.parameters()).add_(1)
    with pytest.raises(TalosError, match=r"another plan \(base: "):
        run_suite(model, Suite([task], None, plan), tmp_path, progress=False)


def test_digests_follow_the_content(place):
    a = tasks.load(place / "a")
    assert task_digest(a) == task_digest(tasks.load(place / "a")) != task_digest(tasks.load(place / "b"))
    assert task_digest(image_task(per_split=12)) != task_digest(image_task(per_split=13))


def test_digests_follow_labels_prompts_and_choices_but_not_the_place(tmp_path):
    task = image_task()
    turned = replace(task, test=Split(task.test.inputs, task.test.labels[::-1]))
    assert len({task_digest(one) for one in (task, turned, replace(task, templates=("x {}",)))}) == 3
    rows = [Split(["x", "y"], np.array([0, 1]), choices=[("a", last), ("a", "b")]) for last in "bc"]
    assert len({task_digest(replace(task, class_names=("A", "B"), train=r, validation=r, test=r)) for r in rows}) == 2
    places = [Split([tmp_path / place / "cat" / "1.png"], np.array([0])) for place in ("here", "there")]
    assert len({task_digest(replace(task, train=p, validation=p, test=p)) for p in places}) == 1


def test_digests_follow_every_part():
    task = image_task()
    split, renamed = task.validation, tuple(name.upper() for name in task.class_names)
    turned, dark = Split(split.inputs, split.labels[::-1]), Split(split.inputs // 2, split.labels)
    flat = Split(split.inputs.reshape(len(split.labels), 6, 24, 3), split.labels)
    changes = [{}, {"class_names": renamed}, *({"validation": other} for other in (turned, dark, flat))]
    for inputs in (["ab", "c"], ["a", "bc"], [Path("cat/1.png")] * 2, [Path("dog/1.png")] * 2):
        changes.append({"train": (part := Split(inputs, np.array([0, 1]))), "validation": part, "test": part})
    assert len({task_digest(replace(task, **change)) for change in changes}) == len(changes)


def test_a_fine_tuning_keeps_its_state_in_the_folder(tmp_path, monkeypatch):
    def stopped(*_, checkpoint_dir, **__):
        raise ZeroDivisionError(checkpoint_dir)

    monkeypatch.setattr(learner, "finetune", stopped)
    with pytest.raises(ZeroDivisionError, match="cells/nonlinear/0.001/colours/checkpoint"):
        run_suite(backbone(), Suite([image_task()], None, SMALL), tmp_path, progress=False)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\\b"])
def test_results_need_a_name_that_a_file_can_have(name):
    one, good = image_task(name), image_task("good")
    for learned, control in ((one, None), (good, one)):
        with pytest.raises(TalosError, match="kept in files of its name"):
            Suite([learned], control, SMALL)


def test_a_consensus_takes_two_tasks(place):
    with pytest.raises(TalosError, match="'consensus' takes what two tasks agree on"):
        Suite([tasks.load(place / "a")], None, SMALL, mergings=("consensus",))
    assert Suite([image_task("a"), image_task("b")], None, SMALL, mergings=("consensus",))


@pytest.mark.parametrize("there, ahead", [(None, False), ("a", False), ("ab", True), ("ba", False)])
def test_a_report_goes_on_if_it_has_the_same_rows_and_more(tmp_path, there, ahead):
    path, mine = tmp_path / "report.json", StudyResult(SMALL, {}, None, [MethodResult("a", 1e-3, {})])
    if there:
        path.write_text(json.dumps({"methods": [{"method": name} for name in there]}))
    assert _goes_on(path, mine) == ahead


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"methods": [1, 2]}'])
def test_a_report_of_something_else_is_written_over(tmp_path, content):
    (tmp_path / "report.json").write_text(content)
    assert not _goes_on(tmp_path / "report.json", StudyResult(SMALL, {}, None, [MethodResult("a", 1e-3, {})]))


def test_a_rate_at_the_end_of_those_tried_is_said():
    row = MethodResult("talos", 1.2345678e-2, {f"{lr:g}": 0.5 for lr in (1e-3, 1.2345678e-2)})
    assert "0.0123457 is the largest rate tried" in _done(row) and "--lr talos=RATE" in _done(row)
    assert _done(replace(row, lr=1e-3)) == "talos: done"
    assert _done(replace(row, method="nonlinear+ties")) == "nonlinear+ties: done"


def test_a_shorter_run_warms_up_for_a_tenth():
    assert _shortened({"epochs": 5, "warmup": 500, "clip": 1.0}, 20) == {"warmup": 2, "clip": 1.0, "steps": 20}
    assert _shortened({"warmup": 500}, 50_000) == {"warmup": 500, "steps": 50_000}
