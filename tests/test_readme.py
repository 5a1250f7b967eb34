"""The README shows what a program measured, code that runs, and commands that exist."""

import copy
import json
import re
import shlex
from types import SimpleNamespace

import pytest
import torch
import typer
from conftest import ROOT

import talos_fast
from talos_fast.cli import app


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def test_the_table_is_the_committed_result():
    readme, results = (ROOT / "README.md").read_text(), ROOT / "benchmarks" / "results"
    table = (results / "demo.md").read_text()
    assert table in readme
    measured = json.loads((results / "demo.json").read_text())
    assert {"machine", "threads", "torch", "plan", "seconds"} <= measured.keys()
    for method in measured["methods"]:
        single = 100 * sum(method["single"].values()) / len(method["single"])
        assert f"| {method['method']} | {method['lr']:g} | {single:.1f} |" in table


def test_links_lead_somewhere():
    readme = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", readme):
        assert (ROOT / target).is_file(), target


def test_both_commands_are_shown():
    readme = (ROOT / "README.md").read_text()
    assert "make demo" in readme and "make test" in readme


class Classifier(torch.nn.Sequential):
    """Answers as the models of transformers do."""

    def __init__(self) -> None:
        super().__init__(torch.nn.Linear(8, 16), torch.nn.Linear(16, 3))

    def forward(self, x):
        logits = super().forward(x)
        return SimpleNamespace(logits=logits, loss=logits.square().mean())


def test_the_code_runs(tmp_path, monkeypatch):
    """All but the equivalence, in one namespace, in the order of the page."""
    monkeypatch.chdir(tmp_path)
    verbs, drop_in, _, compact = blocks("python")
    x = torch.randn(32, 8)
    batches, base = [(x, x[:, :3].argmax(1))] * 4, Classifier()
    vectors = [
        talos_fast.finetune(copy.deepcopy(base), batches, method="nonlinear", steps=2, progress=False) for _ in range(2)
    ]

    def accuracy(model):
        return talos_fast.evaluate(model, batches)

    known = {
        "model": copy.deepcopy(base), "base": base, "batches": batches, "x": x,
        "vector_a": vectors[0], "vector_b": vectors[1], "accuracy_a": accuracy, "accuracy_b": accuracy,
    }  # fmt: skip
    for block in (verbs, drop_in, compact):
        exec(block, known)
    assert known["vector"].nnz > 0 and (tmp_path / "digits").is_dir()
    assert isinstance(known["optimizer"], talos_fast.MaskedAdam)


def test_the_equivalence_holds_bit_for_bit():
    equivalence = blocks("python")[2]
    p, mask = torch.nn.Parameter(torch.randn(6, 5)), torch.rand(6, 5) < 0.4
    q = torch.nn.Parameter(p.detach().clone())
    p.grad = q.grad = torch.randn(6, 5)
    optimizer = talos_fast.MaskedAdam([q], lr=1e-4, weight_decay=0.1, masks=[mask], fused=False)
    optimizer.step()
    start = p.detach().clone()
    exec(equivalence, {"torch": torch, "p": p, "mask": mask})
    assert torch.equal(p, q) and not torch.equal(p, start) and torch.equal(p[~mask], start[~mask])


COMMANDS = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("talos-fast ")]
COMMANDS += re.findall(r"`(talos-fast [a-z][^`]*)`", (ROOT / "README.md").read_text())


@pytest.mark.parametrize("line", [" ".join(line.split()) for line in COMMANDS])
def test_commands_have_these_options(line):
    """Parsed, not run."""
    command, *arguments = shlex.split(line, comments=True)[1:]
    typer.main.get_command(app).commands[command].make_context(command, arguments)
