"""What happens to files that are missing, cut, changed, foreign, or cannot be written."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from talos_fast import Mask, TalosError, TaskVector, storage
from talos_fast.indexing import index_dtype
from talos_fast.writing import atomic, require_file, require_folder, write_json


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
    with pytest.raises(TalosError, match="a folder, where the file of a mask is expected"):
        Mask.load(tmp_path)


def test_what_the_system_does_not_let_one_read_is_named(path, monkeypatch):
    def refuses(*_, **options):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(storage, "safe_open", refuses)
    with pytest.raises(TalosError, match="mask.safetensors: .*Permission denied"):
        Mask.load(path)


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


def test_content_under_another_name_is_corrupted(path):
    """A selection that is not found would be taken for everything."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({"v.bitmask": load_file(path)["w.bitmask"]}, path, metadata=metadata)
    with pytest.raises(TalosError, match="corrupted"):
        Mask.load(path)


@pytest.mark.parametrize("kind, content, said", [
    ("indices", torch.tensor([1, 9], dtype=torch.int32), "indices are not ascending within 9 entries"),
    ("indices", torch.tensor([-1, 2], dtype=torch.int32), "indices are not ascending within 9 entries"),
    ("indices", torch.tensor([2, 2], dtype=torch.int32), "indices are not ascending within 9 entries"),
    ("bitmask", torch.zeros(3, dtype=torch.uint8), "a bitmask of 3 bytes for 9 entries"),
])  # fmt: skip
def test_a_selection_that_does_not_fit_is_damage(path, kind, content, said):
    storage.write(path, "mask", {f"w.{kind}": content}, {"shapes": {"w": [9]}, "base": {}, "info": {}})
    with pytest.raises(TalosError, match=said):
        Mask.load(path)


def test_a_mask_that_selects_nothing_is_a_mask(tmp_path):
    nothing = Mask({"w": torch.zeros(9, dtype=torch.bool)})
    nothing.save(tmp_path / "mask.safetensors")
    assert Mask.load(tmp_path / "mask.safetensors") == nothing


def test_a_newer_format(mask, path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(storage, "FORMAT_VERSION", 2)
        mask.save(path)
    with pytest.raises(TalosError, match="mask.safetensors: format 2, this version reads format 1; upgrade"):
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


def test_files_have_the_permissions_that_open_gives(mask, path):
    before = os.umask(0o027)
    try:
        mask.save(path)
    finally:
        assert os.umask(before) == 0o027
    assert path.stat().st_mode & 0o777 == 0o640


def test_a_place_that_is_no_folder(mask):
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full on this system")
    with pytest.raises(TalosError, match="cannot be written"):
        mask.save("/dev/full/mask.safetensors")


@pytest.mark.parametrize("number, advice", [
    (errno.ENOSPC, "free some space or choose another place"), (errno.EDQUOT, "free some space"),
    (errno.EFBIG, "free some space"), (errno.EISDIR, r"\); choose another place"),
])  # fmt: skip
def test_the_advice_is_about_what_happened(tmp_path, monkeypatch, number, advice):
    def fails(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(TalosError, match=f"cannot be written .*{advice}"):
        write_json(tmp_path / "a.json", {})
    assert not [*tmp_path.iterdir()]


def test_what_safetensors_could_not_write_is_a_disk_that_is_full(tmp_path):
    with pytest.raises(TalosError, match=r"a: cannot be written \(.*\); free some space"), atomic(tmp_path / "a"):
        raise SafetensorError("I/O error")


@pytest.mark.parametrize("lacking", [os.W_OK, os.X_OK])
def test_an_output_is_checked_before_the_work(tmp_path, monkeypatch, lacking):
    require_file(tmp_path / "new" / "a.json", "--out")
    require_folder(tmp_path / "new" / "b", "--out")
    monkeypatch.setattr(os, "access", lambda _, mode: not mode & lacking)
    for require in (require_file, require_folder):
        with pytest.raises(TalosError, match=f"--out {tmp_path}/new.*: {tmp_path} cannot be written"):
            require(tmp_path / "new" / "c", "--out")
    assert not [*tmp_path.iterdir()]


def test_an_output_below_a_file_or_in_a_device_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(TalosError, match=f"--out {os.devnull}: a device; give the name of a file"):
        require_file(Path(os.devnull), "--out")
    with pytest.raises(TalosError, match=f"--out {tmp_path}/file/new/a: {tmp_path}/file is no folder"):
        require_folder(tmp_path / "file" / "new" / "a", "--out")


def test_positions_are_narrow_while_the_format_says_so():
    assert [index_dtype(numel) for numel in (2**31 - 1, 2**31)] == [torch.int32, torch.int64]


def test_json_is_written_whole(tmp_path):
    write_json(tmp_path / "a" / "b.json", {"y": np.float32(2), "x": 1})
    assert (tmp_path / "a" / "b.json").read_text() == '{\n  "x": 1,\n  "y": 2.0\n}\n'
