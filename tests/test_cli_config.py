"""What a YAML file may say on the command line, word by word, and names that look like folders."""

import sys

import pytest
import yaml

from talos_fast.cli import main
from talos_fast.cli.options import _Loader
from talos_fast.errors import TalosError
from talos_fast.models import load


def test_off_is_a_word_and_true_is_none():
    text = "amp: off\nname: yes\nquiet: true\nresume: False\nlr: 1.0e-3\nword: truest\nsteps: 3"
    expected = {"amp": "off", "name": "yes", "quiet": True, "resume": False, "lr": 1e-3, "word": "truest", "steps": 3}
    assert yaml.load(text, _Loader) == expected


@pytest.mark.parametrize("said, expected", [
    ("amp: off", "none.safetensors: no such file"), ("quiet: true", "none.safetensors: no such file"),
    ("quiet: on", "none.safetensors: no such file"), ("lr: true", "lr takes a value, found true"),
    ("steps: false", "steps takes a value, found false; put a word in quotes"), ("amp: maybe", "'maybe' is not one of"),
])  # fmt: skip
def test_switches_and_words(tmp_path, monkeypatch, capfd, said, expected):
    """A run whose options are fine ends where its mask is missing."""
    (tmp_path / "run.yaml").write_text(said)
    monkeypatch.chdir(tmp_path)
    line = "finetune --model tiny --data demo:digits --mask none.safetensors --out out --config run.yaml"
    monkeypatch.setattr(sys, "argv", ["talos-fast", *line.split()])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2 and expected in capfd.readouterr().err


@pytest.mark.parametrize("name", ["hf:/none/here", "t5:/none/here", "hf:./none"])
def test_a_folder_that_is_not_there_is_no_name_on_the_hub(name):
    with pytest.raises(TalosError, match=f"^{name}: no such folder"):
        load(name)
