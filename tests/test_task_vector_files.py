"""The files of a vector: what they say, how large they are, and what does not fit."""

import json

import pytest
import torch
from safetensors.torch import load_file
from test_task_vector import DTYPES, states

from talos_fast import TalosError, TaskVector, storage, vector_file


def test_the_config_says_what_moved(tmp_path):
    base = {"w": torch.zeros(10), "still": torch.zeros(90)}
    vector = TaskVector(base, {**base, "w": torch.arange(10.0)})
    vector.save_pretrained(tmp_path)
    assert (vector.density, vector.numel, vector.mask().base) == (0.09, 100, vector.base)
    config = json.loads((tmp_path / "task_vector_config.json").read_text())
    assert (config["kind"], config["entries_moved"], config["density"]) == ("delta", 9, 0.09)


def test_of_an_unknown_base_no_share_moved(tmp_path):
    base = {"w": torch.zeros(10)}
    TaskVector.from_deltas(TaskVector(base, {"w": torch.ones(10)}).deltas).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "task_vector_config.json").read_text())
    assert (config["entries_moved"], config["density"]) == (10, None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nbytes_are_those_of_the_tensors_in_the_file(tmp_path, dtype):
    vector = TaskVector(*states(dtype))
    vector.save_pretrained(tmp_path)
    assert vector.nbytes == sum(t.nbytes for t in load_file(tmp_path / "task_vector.safetensors").values())


def test_a_repository_is_asked_for_as_one_says(tmp_path, monkeypatch):
    asked = {}

    def download(name, file, **options):
        asked.update(options, name=name)
        return str(tmp_path / file)

    TaskVector(*states(torch.float32)).save_pretrained(tmp_path)
    monkeypatch.setattr(vector_file, "hf_hub_download", download)
    options = {"revision": "r", "cache_dir": "c", "token": "t", "local_files_only": True}
    TaskVector.from_pretrained("user/name", **options)
    assert asked == {**options, "name": "user/name", "dry_run": False}


def test_a_name_that_no_repository_can_have_is_refused():
    with pytest.raises(TalosError, match="user/na..me: neither a folder nor a repository that can be reached"):
        TaskVector.from_pretrained("user/na..me")


def test_values_that_do_not_fit_their_selection_are_damage(tmp_path):
    tensors = {"w.indices": torch.tensor([0, 2], dtype=torch.int32), "w.values": torch.ones(3)}
    storage.write(
        tmp_path / "task_vector.safetensors", "delta", tensors, {"shapes": {"w": [9]}, "base": {}, "info": {}}
    )
    with pytest.raises(TalosError, match="values of 'w' are missing or do not fit its selection"):
        TaskVector.from_pretrained(tmp_path)


def test_replacing_entries_needs_the_base_itself(tmp_path):
    base, tuned = states(torch.bfloat16)
    vector, other = TaskVector(base, tuned), {name: t + 1 for name, t in base.items()}
    with pytest.raises(TalosError, match="the task vector belongs to another base"):
        vector.save_pretrained(tmp_path, kind="replace", base=other)
    vector.save_pretrained(tmp_path, kind="replace", base=base)
    with pytest.raises(TalosError, match="task_vector.safetensors belongs to another base"):
        TaskVector.from_pretrained(tmp_path, base=other)
