"""The command line in the process of a test, and a folder of files for its verbs."""

import gzip
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import text_task, write_bert

from talos_fast import TaskVector
from talos_fast.cli import main


def write_place(folder: Path) -> Path:
    """A model and two tasks in files."""
    write_bert(folder / "bert")
    save_file({"odd": torch.zeros(2)}, folder / "odd.safetensors")
    TaskVector({"w": torch.zeros(2)}, {"w": torch.ones(2)}).save_pretrained(folder / "alien.vector")
    for name, classes in (("words", 3), ("more", 4)):
        task = text_task(name, classes, per_split=24)
        with gzip.open(folder / f"{name}.jsonl.gz", "wt") as file:
            for split in ("train", "validation", "test"):
                part = getattr(task, split)
                for text, label in zip(part.inputs, part.labels.tolist(), strict=True):
                    file.write(json.dumps({"split": split, "text": text, "label": task.class_names[label]}) + "\n")
    return folder


def run_line(monkeypatch, capfd, line: str) -> tuple[int, str, str]:
    """A command's exit code, stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["talos-fast", *line.split()])
    with pytest.raises(SystemExit) as stop:
        main()
    captured = capfd.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def made(run, line: str) -> str:
    code, out, err = run(line)
    assert code == 0, err
    return out
