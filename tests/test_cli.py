"""The command line in one process: the verbs on a tiny text model, and one clear line for bad input."""

import itertools
import json
import os
import re
import signal
from functools import partial

import pytest
import torch
from cli_cases import made, run_line, write_place
from safetensors.torch import load_file

from talos_fast import Mask, TaskVector
from talos_fast.cli.options import Run
from talos_fast.models import encoders


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return write_place(tmp_path_factory.mktemp("cli"))


@pytest.fixture
def run(monkeypatch, capfd, place):
    """``run("calibrate --data words.jsonl.gz")`` -> (exit code, stdout, stderr), in the folder of the files."""
    monkeypatch.chdir(place)
    return partial(run_line, monkeypatch, capfd)


def test_the_verbs_in_a_row(run, place):
    """calibrate, finetune, inspect, evaluate, merge by number and by search, evaluate what was merged."""
    model = "--model hf:bert --batch-size 8 -q"
    for task in ("words", "more"):
        out = made(run, f"calibrate {model} --data {task}.jsonl.gz --out {task}.mask.safetensors --rounds 2")
        assert "density 0.1" in out
        fit = f"--mask {task}.mask.safetensors --lr 3e-2 --steps 12"
        out = made(run, f"finetune {model} --data {task}.jsonl.gz {fit} --out {task}.vector")
        assert re.search(r"validation accuracy .*, before [\d.]+%", out)
        assert not (place / f"{task}.vector" / "checkpoint").exists()
    mask, vector = Mask.load(place / "words.mask.safetensors"), TaskVector.from_pretrained(place / "words.vector")
    assert mask.info["task"] == vector.info["task"] == "words"
    assert not (vector.mask()[name] & ~mask[name]).any() if (name := next(iter(vector))) else False

    out = made(run, "inspect words.vector --plot mask.png")
    assert "fraction that moved" in out and "method: talos" in out
    assert "fraction that trains" in made(run, "inspect words.mask.safetensors")
    assert (place / "mask.png").read_bytes().startswith(b"\x89PNG")

    tasks = "--data words.jsonl.gz --data more.jsonl.gz"
    made(run, f"merge {model} --add words.vector --subtract more.vector --alpha 0.5 --out merged")
    made(run, f"evaluate {model} {tasks} --weights merged/model.safetensors --out a.json")
    made(run, f"evaluate {model} {tasks} --add words.vector --subtract more.vector --alpha 0.5 --out b.json")
    assert json.loads((place / "a.json").read_text()) == json.loads((place / "b.json").read_text())

    out = made(run, f"merge {model} --add words.vector --add more.vector --alpha search {tasks} --out added")
    report = json.loads((place / "added" / "merge.json").read_text())
    assert f"alpha {report['alpha']:g}:" in out and len(report["search"]["trials"]) == 21
    best = next(trial for trial in report["search"]["trials"] if trial["alpha"] == report["alpha"])
    for task, accuracy in zip(("words", "more"), best["accuracies"], strict=True):
        assert f"  {task}: {accuracy:.2%}, " in out
    code, _, err = run("inspect added")
    assert code == 2 and "described in its merge.json" in err
    ties = "--add words.vector --add more.vector --method ties --option density=0.5 --option scope=per_tensor"
    made(run, f"merge {model} {ties} --out trimmed")
    merged = json.loads((place / "trimmed" / "merge.json").read_text())
    assert (merged["method"], merged["options"]) == ("ties", {"density": 0.5, "scope": "per_tensor"})
    swapped = "--add more.vector --add words.vector"
    code, _, err = run(f"merge {model} {swapped} --alpha search {tasks} --out wrong")
    assert code == 2 and "--data: words, more, but the vectors are of more, words" in err
    made(run, f"merge {model} --add words.vector --method ties --option density=5e-1 --out trimmed_too")
    code, _, err = run(f"merge {model} {ties} --option lam=1")
    assert code == 2 and "no option 'lam'" in err
    out = made(run, "interference words.vector more.vector --out i.json --plot i.png")
    assert "sign conflict" in out and json.loads((place / "i.json").read_text())["names"] == [
        "words.vector", "more.vector",
    ]  # fmt: skip
    assert (place / "i.png").read_bytes().startswith(b"\x89PNG")
    forget = "--subtract words.vector --alpha search --data words.jsonl.gz --control more.jsonl.gz"
    assert "control" in made(run, f"merge {model} {forget} --out negated")


def test_an_edit_is_a_base_like_any_other(run, place):
    """calibrate, finetune and merge on what merge wrote; it is not the pre-trained base, and vectors know it."""
    model, edit = "--model hf:bert --batch-size 8 -q", "edit/model.safetensors"
    fit = f"{model} --method nonlinear --lr 3e-2 --steps 3"
    made(run, f"finetune {fit} --data words.jsonl.gz --out first")
    made(run, f"merge {model} --add first --alpha 0.5 --out edit")
    made(run, f"calibrate {model} --data more.jsonl.gz --weights {edit} --out on.safetensors")
    made(run, f"calibrate {model} --data more.jsonl.gz --out off.safetensors")
    assert Mask.load(place / "on.safetensors") != Mask.load(place / "off.safetensors")
    made(run, f"finetune {fit} --data more.jsonl.gz --weights {edit} --out second")
    made(run, f"finetune {fit} --data more.jsonl.gz --out plain")  # of the pre-trained model, as the edit's own is
    made(run, f"merge {model} --onto {edit} --add plain --alpha 0.25 --out by_turns")
    made(run, f"merge {model} --add first --add plain --weights 0.5 --weights 0.25 --out at_once")
    by_turns, at_once = (load_file(place / out / "model.safetensors") for out in ("by_turns", "at_once"))
    assert all(torch.allclose(by_turns[name], at_once[name], rtol=0, atol=1e-6) for name in at_once)
    data = "--data words.jsonl.gz --data more.jsonl.gz"
    made(run, f"evaluate {model} {data} --weights by_turns/model.safetensors --out a.json")
    made(run, f"evaluate {model} {data} --weights {edit} --add plain --alpha 0.25 --out b.json")
    assert json.loads((place / "a.json").read_text()) == json.loads((place / "b.json").read_text())
    made(run, f"finetune {fit} --data more.jsonl.gz --method linearized --out linear")
    code, _, err = run(f"evaluate {model} {data} --weights {edit} --add linear")
    assert code == 2 and "another base" in err  # an expansion is around one point
    search = "--alpha search --data more.jsonl.gz --control words.jsonl.gz"
    made(run, f"merge {model} --onto {edit} --subtract plain {search} --out forgot")
    assert TaskVector.from_pretrained(place / "second").info["encoder_weights"] == edit
    for alpha in ("--alpha 1", "--alpha search --data more.jsonl.gz"):
        made(run, f"merge {model} --onto {edit} --add second {alpha} --out both")
        code, _, err = run(f"merge {model} --add second {alpha} --out refused")
        assert code == 2 and "another" in err
    alpha = json.loads((place / "both" / "merge.json").read_text())["alpha"]
    tasks = "--data words.jsonl.gz --data more.jsonl.gz"
    made(run, f"evaluate {model} {tasks} --weights both/model.safetensors --out a.json")
    made(run, f"evaluate {model} {tasks} --weights {edit} --add second --alpha {alpha} --out b.json")
    assert json.loads((place / "a.json").read_text()) == json.loads((place / "b.json").read_text())


@pytest.mark.parametrize("command, said", [
    ("calibrate", "--checkpoint-dir would keep finished rounds"),
    ("calibrate --checkpoint-dir rounds", "the same command goes on from rounds"),
    ("finetune --method nonlinear --out stopped", "the same command goes on from stopped/checkpoint"),
])  # fmt: skip
def test_interrupted_it_says_where_it_goes_on(run, place, monkeypatch, command, said):
    texts = itertools.count()

    def reading(tokenizer, batch, *rest, tokenize=encoders.tokenize):
        if next(texts) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return tokenize(tokenizer, batch, *rest)

    monkeypatch.setattr(encoders, "tokenize", reading)
    line = f"{command} --model hf:bert --batch-size 8 -q --data"
    code, _, err = run(f"{line} words.jsonl.gz")
    assert code == 130 and f"interrupted; {said}" in err
    if "stopped" in command:
        code, _, err = run(f"{line} more.jsonl.gz")
        assert code == 2 and "stopped/checkpoint/checkpoint.safetensors: of a run with other batches" in err
        assert "--no-resume" in err
        made(run, f"{line} words.jsonl.gz")
        assert json.loads((place / "stopped" / "task_vector_config.json").read_text())["info"]["task"] == "words"


def test_vectors_of_linearized_models(run, place):
    """They are evaluated as they were trained, and cannot be written as weights."""
    model = "--model hf:bert --batch-size 8 -q"
    fit = "--method l-lora --rank 2 --lr 5e-2 --steps 8 --out line.vector"
    out = made(run, f"finetune {model} --data words.jsonl.gz {fit}")
    made(run, f"evaluate {model} --data words.jsonl.gz --split validation --add line.vector --out line.json")
    accuracy = json.loads((place / "line.json").read_text())["words"]
    assert f"({accuracy['correct']} of {accuracy['total']})" in out
    code, _, err = run(f"merge {model} --add line.vector --out nowhere")
    assert code == 2 and "of a linearized model (method l-lora)" in err and not (place / "nowhere").exists()


def test_tables_are_as_wide_as_they_must_be_and_names_are_no_markup(run, place, monkeypatch):
    """Nothing is cut off, in a pipe of 80 columns or of 20."""
    for name in ("a[red]", "[bold]b"):
        TaskVector.from_pretrained(place / "alien.vector").save_pretrained(place / name)
    for columns in ("80", "20"):
        monkeypatch.setenv("COLUMNS", columns)
        out = made(run, "interference a[red] [bold]b")
        assert "a[red], [bold]b" in out and "…" not in out
        assert "…" not in made(run, "inspect alien.vector")


def test_a_config_file_gives_defaults_and_flags_win(run, place):
    (place / "c.yaml").write_text("model: hf:bert\ndata: words.jsonl.gz\ndensity: 0.2\nout: c.safetensors\nrounds: 1\n")
    made(run, "calibrate --config c.yaml -q --density 0.5")
    mask = Mask.load(place / "c.safetensors")
    assert mask.info["density"] == 0.5 and mask.info["rounds"] == 1


@pytest.mark.parametrize("line, said", [
    ("calibrate --model hf:bert --data none.npz", "none.npz"),
    ("calibrate --model nothing --data words.jsonl.gz", "model 'nothing'"),
    ("calibrate --model hf:bert --data words.jsonl.gz --density 2", "density=2.0"),
    ("calibrate --model hf:bert --data words.jsonl.gz --density 0.1 --sparsity 0.9", "give one of them"),
    ("calibrate --model hf:bert --data words.jsonl.gz --include x*", "'x*' matches no parameter"),
    ("calibrate --model hf:bert --data words.jsonl.gz --dtype int8", "--dtype int8"),
    ("calibrate --model hf:bert --data words.jsonl.gz --device nowhere", "nowhere"),
    ("calibrate --model hf:bert --data words.jsonl.gz --scores-device nowhere", "scores_device: nowhere"),
    ("calibrate --config none.yaml", "none.yaml"),
    ("finetune --model hf:bert --data words.jsonl.gz --mask words.jsonl.gz", "not a safetensors file"),
    ("finetune --model hf:bert --data words.jsonl.gz --mask bert", "bert: a folder, where the file of a mask"),
    ("finetune --model hf:bert --data words.jsonl.gz --method x --steps 1", "method='x'"),
    ("evaluate --model hf:bert --data words.jsonl.gz --split x", "--split x"),
    ("evaluate --model hf:bert --data words.jsonl.gz --weights none", "none"),
    ("evaluate --model hf:bert --data words.jsonl.gz --weights odd.safetensors", "does not fit this model"),
    ("evaluate --model tiny --data demo:none", "embedded tasks are"),
    ("merge --model hf:bert", "--add or --subtract"),
    ("merge --model hf:bert --option density", "--option density: give NAME=VALUE"),
    ("evaluate --model hf:bert --data hub:user/name@main", "a commit of 40 digits"),
    ("interference none none", "none: no such folder"),
    ("interference alien.vector", "give two or more"),
    ("calibrate --model tiny --data demo:shapes --seed -1", "seed=-1: must be an integer, from 0 to 2**63 - 1"),
    ("calibrate --model tiny --data demo:shapes --seed 9223372036854775808", "seed=9223372036854775808"),
    ("calibrate --model tiny --data words.jsonl.gz --device meta", "device: meta cannot be used"),
    ("calibrate --model hf:bert --data words.jsonl.gz --scores-device meta", "scores_device: meta cannot be used"),
    ("profile --model hf:bert --data words.jsonl.gz --trace x.txt --method nonlinear", "trace=x.txt"),
    ("merge --model tiny --add alien.vector --method ties --option density=abc", "density='abc'"),
    ("merge --model tiny --add alien.vector --method ties --option density=[1", "--option density=[1"),
    ("merge --model tiny --add alien.vector --data demo:shapes", "--data means nothing without --alpha search"),
    ("merge --model tiny --add alien.vector --control demo:shapes", "--control means nothing without --alpha"),
    ("merge --model tiny --add alien.vector --control-floor 0", "--control-floor means nothing without --control"),
    ("merge --model tiny --add alien.vector --alpha search --weights 1", "--weights means nothing with --alpha search"),
    ("merge --model tiny --add alien.vector --alpha search", "0 --data for 1"),
    ("merge --model tiny --add alien.vector --subtract alien.vector --alpha search --data words --data words",
     "--alpha search has one goal"),
    ("merge --model tiny --subtract alien.vector --alpha search --data demo:shapes", "--subtract needs --control"),
    ("merge --model tiny --add alien.vector --alpha search --data demo:shapes --control demo:digits",
     "--control goes with --subtract"),
    ("finetune --model none --data none --steps 1", "--method talos needs --mask"),
    ("profile --model none --data none", "--method talos needs --mask"),
    ("evaluate --model tiny --data demo:shapes --alpha 0.5", "--alpha means nothing without --add"),
    ("merge --model hf:bert --add bert", "task_vector.safetensors: no such file"),
    ("inspect none", "none: no such file"),
    ("merge --model tiny --add bert/none", "bert/none: no such folder"),
    ("merge --model tiny --subtract alien.vector --alpha search --data demo:shapes --control demo:digits "
     "--control-floor 95", "control_floor=95.0: give a fraction"),
    ("calibrate --model tiny --data demo:shapes --sparsity 90", "sparsity=90.0"),
    ("finetune --model hf:bert --data words.jsonl.gz --method nonlinear --out bert", "bert: holds a model"),
    ("merge --model tiny --add alien.vector --out bert", "bert: holds a model"),
    ("evaluate --model tiny --data demo:shapes --data demo:shapes", "two tasks are called 'shapes'"),
])  # fmt: skip
def test_bad_input_gets_one_line_and_code_two(run, line, said):
    code, _, err = run(line)
    assert code == 2 and said in err
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err


@pytest.mark.parametrize("content, said", [
    (b"density: 0.1\nx: 1\n", "no option 'x'"),
    (b"- 1\n", "expected a mapping"),
    (b"a: [", "YAML"),
    (b"\xff\xfe\x00", "cannot be read as YAML"),
    (b"density: [0.1]\n", "density takes one value"),
    (b"density: {a: 1}\n", "density takes one value"),
])  # fmt: skip
def test_bad_config_files(run, place, content, said):
    (place / "bad.yaml").write_bytes(content)
    code, _, err = run("calibrate --config bad.yaml")
    assert code == 2 and said in err and err.count("\n") == 1


def test_one_value_in_a_config_file_is_a_list_of_one(run, place):
    (place / "one.yaml").write_text("model: hf:bert\ndata: words.jsonl.gz\nbatch-size: 8\n")
    assert made(run, "evaluate --config one.yaml -q").startswith("words: ")


WORK = "--model tiny --data demo:shapes"


@pytest.mark.parametrize("line, said", [
    (f"calibrate {WORK} --out bert", "--out bert: a folder; give the name of a file"),
    (f"calibrate {WORK} --out words.jsonl.gz/a/mask", "words.jsonl.gz is no folder"),
    (f"calibrate {WORK} --checkpoint-dir words.jsonl.gz", "--checkpoint-dir words.jsonl.gz: "),
    (f"finetune {WORK} --out words.jsonl.gz", "--out words.jsonl.gz: "),
    (f"finetune {WORK} --out new --checkpoint-dir words.jsonl.gz/c", "--checkpoint-dir words.jsonl.gz/c: "),
    (f"evaluate {WORK} --out bert", "--out bert: "),
    (f"profile {WORK} --out bert", "--out bert: "),
    (f"profile {WORK} --trace bert", "--trace bert: "),
    ("suite --model tiny --tasks demo:shapes --out words.jsonl.gz", "--out words.jsonl.gz: "),
    ("demo --out words.jsonl.gz", "--out words.jsonl.gz: "),
    ("merge --model tiny --add alien.vector --out words.jsonl.gz/b", "--out words.jsonl.gz/b: "),
    ("inspect alien.vector --plot x.jpg", "x.jpg: pictures are .png, .pdf or .svg"),
    ("interference alien.vector alien.vector --plot bert", "--plot bert: "),
    ("interference alien.vector alien.vector --out /dev/null", "--out /dev/null: a device; give the name of a file"),
])  # fmt: skip
def test_an_output_that_cannot_be_written_is_refused_before_the_work(run, place, monkeypatch, line, said):
    before = {*place.rglob("*")}
    monkeypatch.setattr("talos_fast.models.load", lambda *_, **__: pytest.fail("the model was loaded"))
    code, out, err = run(line)
    assert code == 2 and said in err and err.startswith("error: ") and err.count("\n") == 1 and out == ""
    assert {*place.rglob("*")} == before


def test_files_of_others_in_the_checkpoint_folder_stay(run, place):
    own = place / "kept.vector" / "checkpoint" / "notes.txt"
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    fit = "--data words.jsonl.gz --method lota --steps 1 --out kept.vector"
    made(run, f"finetune --model hf:bert --batch-size 8 -q {fit}")
    assert [*own.parent.iterdir()] == [own] and own.read_text() == "mine"


def test_help_and_version(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    verbs = "calibrate", "finetune", "merge", "evaluate", "inspect", "interference", "profile", "suite", "demo"
    code, out, _ = run("--help")
    assert code == 0 and all(verb in out for verb in verbs)
    assert not any("…" in made(run, f"{verb} --help") for verb in verbs), "cut off"
    assert "talos-fast 0." in made(run, "--version")


def test_the_functions_and_the_commands_share_names_and_defaults():
    """Every keyword of calibrate and finetune that has a plain value is an option with the same default."""
    import inspect

    import talos_fast
    from talos_fast.cli import commands

    for verb in ("calibrate", "finetune"):
        function = inspect.signature(getattr(talos_fast, verb)).parameters
        command = inspect.signature(getattr(commands, verb)).parameters
        for name in function.keys() - {"model", "batches", "forward", "loss", "progress", "mask"}:
            assert name in command, f"{verb} --{name}"
            assert command[name].default == function[name].default, f"{verb} --{name}"


@pytest.mark.parametrize("device, there, place", [("auto", True, "cuda"), ("auto", False, "cpu"), ("cpu", True, "cpu")])
def test_auto_is_cuda_where_there_is_one(device, there, place, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: there)
    assert Run(model="tiny", device=device).place == place
