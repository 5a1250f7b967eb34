"""What happens to files that are missing, cut, changed, foreign, or cannot be written."""

import os

import pytest
import torch
from safetensors.torch import save_file

from talos_fast import Mask, TalosError, TaskVector
from talos_fast.writing import require_file, require_folder, write_json


@pytest.fixture
def mask() -> Mask:
    return Mask({"w": torch.rand(64, 64) < 0.3})


@pytest.fixture
def path(mask, tmp_path):
    mask.save(tmp_path / "mask.safetensors")
    return tmp_path / "mask.safetensors"


def test_missing(tmp_path):
    with pytest.raises(TalosError, match="none.safetensors: no such file"):
        Mask.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated(path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(TalosError, match="mask.safetensors: truncated or not a safetensors file"):
        Mask.load(path)


def test_one_flipped_bit(path):
    content = bytearray(path.read_bytes())
    content[-7] ^= 4
    path.write_bytes(bytes(content))
    with pytest.raises(TalosError, match="corrupted"):
        Mask.load(path)


def test_foreign(path):
    save_file({"w": torch.zeros(3)}, path)
    with pytest.raises(TalosError, match="not one of talos-fast"):
        Mask.load(path)


def test_another_kind(tmp_path):
    vector = TaskVector({"w": torch.zeros(4)}, {"w": torch.ones(4)})
    vector.save_pretrained(tmp_path)
    with pytest.raises(TalosError, match="holds a delta, expected a mask"):
        Mask.load(tmp_path / "task_vector.safetensors")
    with pytest.raises(TalosError, match="no such file"):
        TaskVector.from_pretrained(tmp_path.parent)


def test_an_unwritable_place_leaves_the_old_file(mask, path, monkeypatch):
    before = path.read_bytes()

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(TalosError, match="cannot be written.*No space left"):
        Mask({"w": ~mask["w"]}).save(path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["mask.safetensors"]


def test_a_place_that_is_no_folder(mask):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full on this system")
    with pytest.raises(TalosError, match="cannot be written"):
        mask.save("/dev/full/mask.safetensors")


def test_an_output_is_checked_before_the_work(tmp_path, monkeypatch):
    require_file(tmp_path / "new" / "a.json", "--out")
    require_folder(tmp_path / "new" / "b", "--out")
    monkeypatch.setattr(os, "access", lambda *_: False)
    for require in (require_file, require_folder):
        with pytest.raises(TalosError, match=f"--out {tmp_path}/new.*: {tmp_path} cannot be written"):
            require(tmp_path / "new" / "c", "--out")
    assert not [*tmp_path.iterdir()]


def test_json_is_written_whole(tmp_path):
    write_json(tmp_path / "a" / "b.json", {"x": 1})
    assert (tmp_path / "a" / "b.json").read_text() == '{\n  "x": 1\n}\n'
