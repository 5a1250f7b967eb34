"""What is given on the command line reaches the functions, and each command reads the split that it is for."""

import json
from functools import partial

import pytest
import torch
from cli_cases import made, run_line, write_place
from tiny_models import text_task

import talos_fast
from talos_fast import TalosError, TaskVector, models, tasks
from talos_fast.cli import app
from talos_fast.cli.options import Run
from talos_fast.cli.suite import _Given
from talos_fast.models import Backbone


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_place(tmp_path_factory.mktemp("cli"))


@pytest.fixture
def run(monkeypatch, capfd, place):
    """``run("calibrate --data words.jsonl.gz")`` -> (exit code, stdout, stderr), in the folder of the files."""
    monkeypatch.chdir(place)
    return partial(run_line, monkeypatch, capfd)


@pytest.mark.parametrize("verb, line, expected", [
    ("calibrate", "--damage 0.3 --rounds 2 --seed 7 --samples-per-input 2 --estimator jacobian --no-stability",
     {"damage": 0.3, "rounds": 2, "seed": 7, "samples_per_input": 2, "estimator": "jacobian", "stability": False}),
    ("finetune", "--method nonlinear --clip 0 --weight-decay 0.25 --seed 7 --warmup 1 --accumulate 2 --no-resume",
     {"clip": None, "weight_decay": 0.25, "seed": 7, "warmup": 1, "accumulate": 2, "resume": False}),
    ("profile", "--method l-lora --clip 0 --rank 2 --lora-alpha 3 --rounds 1 --warmup 0",
     {"clip": None, "rank": 2, "lora_alpha": 3.0, "rounds": 1, "warmup": 0}),
])  # fmt: skip
def test_options_reach_the_function(run, monkeypatch, verb, line, expected):
    given = {}

    def recorded(model, batches, **options):
        given.update(options)
        raise TalosError("recorded")

    monkeypatch.setattr(talos_fast, verb, recorded)
    code, _, err = run(f"{verb} --model hf:bert --data words.jsonl.gz -q {line}")
    assert code == 2 and err == "error: recorded\n"
    assert {name: given[name] for name in expected} == expected


def test_options_reach_the_plan(run, monkeypatch):
    plans = []

    def recorded(backbone, suite, *_, **__):
        plans.append(suite.plan)
        raise TalosError("recorded")

    monkeypatch.setattr("talos_fast.cli.suite.run_suite", recorded)
    line = "--methods talos --steps 7 --batch-size 6 --density 0.3 --samples 9 --limit 5 --test-limit 4 --seed 3"
    code, _, err = run(f"suite --model hf:bert words.jsonl.gz {line} --weight-decay 0.25 -q")
    assert code == 2 and err == "error: recorded\n"
    (plan,) = plans
    assert (plan.steps, plan.batch_size, plan.density, plan.samples, plan.limit) == (7, 6, 0.3, 9, 5)
    assert (plan.test_limit, plan.seed, plan.weight_decay) == (4, 3, 0.25)


def test_a_suite_goes_on_on_another_gpu_but_not_in_another_precision(run, monkeypatch):
    given = []

    def recorded(*_, identity, **__):
        given.append(identity)
        raise TalosError("recorded")

    monkeypatch.setattr("talos_fast.cli.suite.run_suite", recorded)
    monkeypatch.setattr(Run, "backbone", lambda self: None)
    for device in ("cuda", "cuda:1"):
        run(f"suite --model tiny words.jsonl.gz --pretrained file --device {device} --dtype bfloat16")
    assert given == [{"pretrained": "file", "device": "cuda", "dtype": "bfloat16"}] * 2


def test_options_go_before_a_preset(run, monkeypatch):
    suites = []
    given = _Given([text_task()], None, 8, 0.1, 1e-3, {"words": {"epochs": 2, "warmup": 500}})
    monkeypatch.setattr("talos_fast.cli.suite._given", lambda *_: given)
    monkeypatch.setattr("talos_fast.cli.suite.run_suite", lambda _, suite, *__, **___: suites.append(suite) or 1 / 0)
    monkeypatch.setattr(Run, "backbone", lambda self: None)
    rates = "--lr 3 --lr 2 --lr talos=1e-2 --lr talos=1e-3 --lr talos=1e-2"
    with pytest.raises(ZeroDivisionError):
        app(f"suite --model tiny --methods talos,lota --steps 20 --weight-decay 0 {rates}".split())
    (suite,) = suites
    assert suite.recipes == {"words": {"warmup": 2, "steps": 20}} and suite.plan.weight_decay == 0
    assert suite.plan.learning_rates == {"lota": (2, 3), "talos": (1e-3, 1e-2)}


@pytest.mark.usefixtures("logged")  # which puts back how much is logged
@pytest.mark.parametrize("rank, quiet, shown", [("0", "", True), ("0", "-q", False), ("1", "", False)])
def test_an_interrupted_suite_says_where_it_goes_on(run, monkeypatch, rank, quiet, shown):
    """And the first process had shown bars."""

    def interrupted(*_, progress, **__):
        assert progress == shown
        raise KeyboardInterrupt

    monkeypatch.setattr("talos_fast.cli.suite.run_suite", interrupted)
    monkeypatch.setattr(Run, "backbone", lambda self: None)
    for name, value in (("WORLD_SIZE", "2"), ("RANK", rank)):
        monkeypatch.setenv(name, value)
    code, _, err = run(f"suite --model tiny words.jsonl.gz --out there {quiet}")
    assert code == 130 and ("the same command goes on from there" in err) == (rank == "0")


def test_each_command_reads_the_split_that_it_is_for(run, place, monkeypatch):
    """α is searched on validation examples, and reported on test examples."""
    task, batches, read = tasks.load(place / "words.jsonl.gz"), Backbone.batches, []
    splits = {tuple(getattr(task, split).inputs): split for split in ("train", "validation", "test")}

    def watched(self, split, **options):
        read.append((splits[tuple(split.inputs)], options.get("limit")))
        return batches(self, split, **options)

    monkeypatch.setattr(Backbone, "batches", watched)
    for line, expected in (
        ("calibrate --rounds 1 --samples 10 --out few.safetensors", [("train", 10)]),
        ("finetune --method nonlinear --steps 1 --out split", [("train", None), ("validation", None)]),
        ("merge --add split --alpha search --out searched", [("validation", None)]),
        ("evaluate --add split", [("test", None)]),
        ("evaluate --split train", [("train", None)]),
    ):
        read.clear()
        made(run, f"{line} --model hf:bert --batch-size 8 -q --data words.jsonl.gz")
        assert read == expected, line


def test_folders_of_one_name_are_told_apart_by_their_paths(run, place):
    for folder in ("x", "y"):
        TaskVector.from_pretrained(place / "alien.vector").save_pretrained(place / folder / "v")
    made(run, "interference x/v y/v --out names.json")
    assert json.loads((place / "names.json").read_text())["names"] == ["x/v", "y/v"]


def test_a_merge_says_what_it_did(run, place):
    model = "--model hf:bert --batch-size 8 -q"
    made(run, f"finetune {model} --data words.jsonl.gz --method nonlinear --steps 1 --out once")
    made(run, f"merge {model} --add once --subtract once --weights 0.5 --weights 0.25 --alpha 2 --out said")
    said = json.loads((place / "said" / "merge.json").read_text())
    assert (said["alpha"], said["weights"], said["add"], said["subtract"]) == (2.0, [0.5, 0.25], ["once"], ["once"])


def test_random_weights_are_those_of_the_seed(monkeypatch):
    monkeypatch.setattr(models, "load", lambda *_, **__: float(torch.rand(())))
    first, again, other = (Run(model="tiny", seed=seed).backbone() for seed in (3, 3, 4))
    assert first == again != other
