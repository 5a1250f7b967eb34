"""Several processes that run one suite: each part is made once, by whoever is free, and all tell the same."""

import json
import os
import shutil
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from cli_cases import run_line, write_place
from tiny_models import image_task, tiny_clip

from talos_fast import TalosError, locking, writing
from talos_fast.cells import Cells
from talos_fast.locking import is_being_made, making
from talos_fast.study import Plan, learner
from talos_fast.suite import Suite, run_suite

PLAN = Plan(
    {"nonlinear": (1e-3,), "lota": (1e-3,), "talos": (1e-3, 1e-2)}, steps=3, batch_size=6, samples=8,
    addition_grid=(0.0, 0.5, 1.0), negation_grid=(0.0, 0.5, 1.0),
)  # fmt: skip
RUNS = 2 + 2 + 4


def run_shared(rank: int, out: Path, made: Path) -> None:
    """A process of the suite: says which vectors it trains, and takes its time, so that another finds work."""
    torch.manual_seed(0)
    train = learner.finetune

    def watched(*arguments, **options):
        (made / f"{rank} {options['method']} {time.monotonic_ns()}").touch()
        time.sleep(0.3)
        return train(*arguments, **options)

    learner.finetune = watched
    suite = Suite([image_task("three", 3), image_task("four", 4)], image_task("five", 5), PLAN, mergings=("ties",))
    result = run_suite(tiny_clip(), suite, out, progress=False)
    (made / f"result{rank}.json").write_text(json.dumps([row.to_json() for row in result.methods]))


def without_seconds(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def test_processes_share_a_suite(tmp_path):
    found = {}
    for name, count in (("shared", 2), ("alone", 1)):
        out, made = tmp_path / name, tmp_path / f"{name}-made"
        made.mkdir()
        mp.spawn(run_shared, (out, made), nprocs=count)
        trained = [path.name.split() for path in made.glob("* *")]
        assert len(trained) == RUNS and len({rank for rank, *_ in trained}) == count
        found[name] = [json.loads((made / f"result{rank}.json").read_text()) for rank in range(count)]
        assert json.loads((out / "report.json").read_text())["methods"] == found[name][0]
        assert not list(out.rglob("*.lock")) and not list(out.rglob("checkpoint*"))
    assert found["shared"][0] == found["shared"][1]
    assert without_seconds(found["shared"][0]) == without_seconds(found["alone"][0])


def hold(_: int, path: Path, end: str) -> None:
    with making(path):
        (path.parent / "held").touch()
        if end == "killed":
            time.sleep(3600)
        while not (path.parent / "go on").exists():
            time.sleep(0.01)
        if end == "failed":
            raise ZeroDivisionError
        path.write_text("theirs")


def held_by_another(path: Path, end: str) -> mp.ProcessContext:
    context = mp.spawn(hold, (path, end), join=False)
    while not (path.parent / "held").exists():
        context.join(0.01)
    return context


@pytest.mark.parametrize("end", ["made", "failed", "killed"])
def test_one_waits_for_another(tmp_path, monkeypatch, end):
    """Until the other has made it, or lets go, whatever ends it."""
    path = tmp_path / "part.json"
    other = held_by_another(path, end)
    assert is_being_made(path)

    said = []

    def waits(text: str, *given: object) -> None:
        said.append(text % given)
        (tmp_path / "go on").touch()
        if end == "killed":
            other.processes[0].kill()

    monkeypatch.setattr(locking.logger, "info", waits)
    with making(path):
        assert path.exists() == (end == "made")
    assert said == [f"{path}: waiting for the process that makes it"] and not is_being_made(path)
    other.processes[0].join()


def test_asking_leaves_no_lock_behind(tmp_path, monkeypatch):
    """Where the part is finished just then, and its lock removed."""
    path, lock = tmp_path / "part.json", locking._lock(tmp_path / "part.json")
    Path(lock.lock_file).touch()
    acquire = lock.acquire

    def late(timeout: float):
        path.touch()
        Path(lock.lock_file).unlink()
        return acquire(timeout=timeout)

    monkeypatch.setattr(lock, "acquire", late)
    monkeypatch.setattr(locking, "_lock", lambda _: lock)
    assert not is_being_made(path) and list(tmp_path.iterdir()) == [path]


def test_asking_leaves_the_lock_of_a_part_that_is_not_made(tmp_path):
    lock = locking._lock(tmp_path / "part.json")
    Path(lock.lock_file).touch()  # its maker died; whoever comes may be opening it
    assert not is_being_made(tmp_path / "part.json") and Path(lock.lock_file).exists()


def test_what_fails_is_made_by_the_next(tmp_path):
    cells = Cells(tmp_path, {})
    with pytest.raises(ZeroDivisionError):
        cells.value("part", lambda: 1 / 0)
    assert list(tmp_path.rglob("*.lock"))  # whoever waits may hold it by now
    assert cells.value("part", lambda: 2) == Cells(tmp_path, {}).value("part", lambda: 3) == 2
    assert not list(tmp_path.rglob("*.lock"))


def test_of_two_plans_at_once_one_is_refused(tmp_path, monkeypatch):
    write, waits, refused = writing.write_json, threading.Event(), []

    def second() -> None:
        with pytest.raises(TalosError, match="another plan"):
            Cells(tmp_path, {"steps": 2})
        refused.append(True)

    other = threading.Thread(target=second)

    def slow(path: Path, content: object) -> None:
        other.start()
        assert waits.wait(10)
        write(path, content)

    monkeypatch.setattr(locking.logger, "info", lambda *said: waits.set())
    monkeypatch.setattr(writing, "write_json", slow)
    Cells(tmp_path, {"steps": 1})
    other.join()
    assert refused and json.loads((tmp_path / "plan.json").read_text()) == {"steps": 1}


def test_a_finished_suite_again(tmp_path):
    """Nothing is trained, even where the vectors were removed, and the table does not shrink while it is read."""
    model, seen = tiny_clip(), []

    def written() -> list[str]:
        return [row["method"] for row in json.loads((tmp_path / "report.json").read_text())["methods"]]

    def run(*mergings: str) -> list[list[str]]:
        seen.clear()
        plan = replace(PLAN, learning_rates={"nonlinear": (1e-3,)})
        suite = Suite([image_task("three", 3), image_task("four", 4)], None, plan, mergings=mergings)
        run_suite(model, suite, tmp_path, progress=False, finished=lambda _: seen.append(written()))
        return seen

    both = ["nonlinear", "nonlinear+ties"]
    assert run("ties") == [both[:1], both]
    for file in list(tmp_path.rglob("task_vector.safetensors")):
        shutil.rmtree(file.parent)
    assert run("ties") == [both, both] and not list(tmp_path.rglob("task_vector.safetensors"))
    assert run() == [both] and written() == both[:1]


def test_parts_that_another_makes_come_last(tmp_path):
    cells, order = Cells(tmp_path, {}), []

    def make(name: str) -> str:
        order.append(name)
        return name

    parts = {name: partial(make, name) for name in "abc"}
    lock = locking._lock(tmp_path / "a.json")
    with lock.acquire(timeout=0):
        names = cells._in_turn(parts)
        taken = [next(names), next(names)]
    assert [*taken, *names] == ["b", "c", "a"]
    assert cells.values(parts, bar=iter) == {name: name for name in "abc"} and order == ["a", "b", "c"]
    assert [*Cells().values(parts, bar=lambda names: reversed([*names]))] == ["a", "b", "c"]


def test_a_folder_in_which_nothing_can_be_locked(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(TalosError, match=r"part.json: cannot be locked \(.*; choose another place"),
        making(tmp_path / "file" / "part.json"),
    ):
        raise AssertionError
    assert not is_being_made(tmp_path / "file" / "part.json")
    (tmp_path / ".part.json.lock").mkdir()  # nor opened, as that of another user
    assert not is_being_made(tmp_path / "part.json")


@pytest.mark.usefixtures("logged")  # which puts back how much is logged
@pytest.mark.parametrize("rank", [0, 1])
def test_under_a_launcher_the_first_process_speaks(tmp_path, monkeypatch, capfd, rank):
    monkeypatch.chdir(write_place(tmp_path))
    for name, value in (("WORLD_SIZE", "2"), ("RANK", str(rank)), ("LOCAL_RANK", str(rank))):
        monkeypatch.setenv(name, value)
    line = "suite --model bert words.jsonl.gz more.jsonl.gz --methods nonlinear --lr 1e-3 --steps 1 --batch-size 4"
    code, said, errors = run_line(monkeypatch, capfd, line)
    assert code == 0 and not torch.distributed.is_initialized()
    assert ("nonlinear: done" in said and "table.md" in said) if rank == 0 else said == errors == ""
    assert (Path("suite") / "table.md").is_file() and os.environ["RANK"] == str(rank)
