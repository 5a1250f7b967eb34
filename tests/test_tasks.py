"""Tasks from folders, arrays and rows of text; and what is said about files that are not so."""

import gzip
import json
import logging
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from talos_fast import tasks
from talos_fast.errors import TalosError
from talos_fast.tasks import Split, Task
from talos_fast.tasks.splits import hold_out


def write_folder(root: Path, splits: dict[str, int], classes=("a_cat", "dog")) -> Path:
    for split, count in splits.items():
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("L", (5, 4), 40 * label).save(root / split / name / f"{i:02}.png")
    return root


def write_npz(path: Path, n: int = 20, shape=(6, 5), keys=("train", "val", "test")) -> Path:
    arrays = {}
    for key in keys:
        arrays[f"x_{key}"] = np.random.default_rng(0).integers(0, 256, (n, *shape), dtype=np.uint8)
        arrays[f"y_{key}"] = np.arange(n) % 2
    np.savez_compressed(path, **arrays)
    return path


def write_rows(path: Path, labels, splits=("train", "validation", "test")) -> Path:
    rows = [{"split": s, "text": f"text {i}\u2028 é", "label": v} for s in splits for i, v in enumerate(labels)]
    raw = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def test_folder(tmp_path):
    task = tasks.load(write_folder(tmp_path / "pets", {"train": 10, "val": 2, "test": 3}))
    assert (task.name, task.class_names, task.templates, task.modality) == ("pets", ("a cat", "dog"), (), "image")
    assert [len(s) for s in (task.train, task.validation, task.test)] == [20, 4, 6]
    assert task.test.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert all(path.parent.name == "dog" for path in task.test.select([3, 5]).inputs)


def test_folder_without_validation_holds_a_tenth_of_each_class_out(tmp_path):
    root = write_folder(tmp_path, {"train": 20, "test": 1})
    task, again, other = (tasks.load(root, seed=seed) for seed in (0, 0, 1))
    assert np.bincount(task.validation.labels).tolist() == [2, 2]
    assert len(task.train) == 36
    assert not set(task.train.inputs) & set(task.validation.inputs)
    assert task.validation.inputs == again.validation.inputs != other.validation.inputs


def test_folder_without_test_reports_on_validation_and_says_so(tmp_path, caplog):
    root = write_folder(tmp_path, {"train": 10, "val": 3})
    with caplog.at_level(logging.WARNING, "talos_fast"):
        task = tasks.load(root)
    assert "no test split" in caplog.text
    assert [len(s) for s in (task.train, task.validation, task.test)] == [18, 2, 6]


@pytest.mark.parametrize("shape", [(6, 5), (6, 5, 3), (6, 5, 1)])
def test_npz_grey_and_colour(tmp_path, shape):
    task = tasks.load(write_npz(tmp_path / "x.npz", shape=shape), class_names=["zero", "one"], templates=["a {}"])
    assert task.train.inputs.shape == (20, 6, 5, 3) and task.train.inputs.dtype == np.uint8
    assert (task.name, task.templates) == ("x", ("a {}",))
    assert task.train.labels.dtype == np.int64


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_jsonl_with_names_and_with_indices(tmp_path, suffix):
    named = tasks.load(write_rows(tmp_path / f"n.{suffix}", ["no", "yes", "no"]))
    assert (named.name, named.class_names, named.modality) == ("n", ("no", "yes"), "text")
    assert named.train.labels.tolist() == [0, 1, 0]
    assert named.train.inputs[1] == "text 1\u2028 é"
    turned = tasks.load(tmp_path / f"n.{suffix}", class_names=["yes", "no"])
    assert turned.train.labels.tolist() == [1, 0, 1]
    indices = tasks.load(write_rows(tmp_path / f"i.{suffix}", [1, 0]), class_names=["no", "yes"], name="mine")
    assert (indices.name, indices.train.labels.tolist()) == ("mine", [1, 0])


def test_class_names_from_datasets_json_then_classes_txt(tmp_path):
    path = write_npz(tmp_path / "x.npz")
    (tmp_path / "classes.txt").write_text("nought\none\n")
    assert tasks.load(path).class_names == ("nought", "one")
    entry = {"name": "digits", "file": "x.npz", "class_names": ["0", "1"], "prompt_template": "digit {}"}
    for document in ([entry], {"datasets": [entry]}):
        (tmp_path / "datasets.json").write_text(json.dumps(document))
        task = tasks.load(path)
        assert (task.name, task.class_names, task.templates) == ("digits", ("0", "1"), ("digit {}",))
    assert tasks.load(path, class_names=["a", "b"]).class_names == ("a", "b")
    for broken in ("{}", "[1]", "["):
        (tmp_path / "datasets.json").write_text(broken)
        with pytest.raises(TalosError, match=r"datasets\.json: not a list"):
            tasks.load(path)
    for key, value in (("class_names", 3), ("class_names", "ab"), ("class_names", ["a", 1]), ("name", ["x"])):
        (tmp_path / "datasets.json").write_text(json.dumps([{**entry, key: value}]))
        with pytest.raises(TalosError, match=rf"datasets\.json: found {key} .* for x\.npz; give a "):
            tasks.load(path)


def test_unknown_class_names_say_where_to_put_them(tmp_path):
    with pytest.raises(TalosError, match=r"give class_names=, or write them to .*classes\.txt"):
        tasks.load(write_npz(tmp_path / "x.npz"))
    (tmp_path / "classes.txt").write_text("\n")
    with pytest.raises(TalosError, match=r"classes\.txt: found no names"):
        tasks.load(tmp_path / "x.npz")
    (tmp_path / "classes.txt").write_text("fée\nelfe\n", encoding="latin-1")
    with pytest.raises(TalosError, match=r"classes\.txt: not a UTF-8 text file"):
        tasks.load(tmp_path / "x.npz")


def test_damaged_files_are_named(tmp_path):
    archive, rows = write_npz(tmp_path / "x.npz"), write_rows(tmp_path / "r.jsonl.gz", ["a", "b"] * 50)
    for path in (archive, rows):
        whole = path.read_bytes()
        for content in (whole[: len(whole) // 2], whole[:-9], b"", b"\x00\xff nothing of the kind"):
            path.write_bytes(content)
            with pytest.raises(TalosError, match=f"{path.name}: (not a whole|found no rows)"):
                tasks.load(path, class_names=["a", "b"])
    np.savez(archive, x_train=np.array([{"pickled": 1}], dtype=object))
    with pytest.raises(TalosError, match="without pickled objects"):
        tasks.load(archive)
    with archive.open("wb") as file:  # a bare array under the other name
        np.save(file, np.zeros(3))
    with pytest.raises(TalosError, match="not a whole"):
        tasks.load(archive)


def test_names_that_are_those_of_the_folders_go_with_their_folder(tmp_path):
    """Folders are sorted as texts, so a list in any other order would name each class after another one."""
    folder = write_folder(tmp_path / "pets", {"train": 4, "test": 2})
    (tmp_path / "classes.txt").write_text("dog\na cat\n")
    assert tasks.load(folder).class_names == ("a cat", "dog")
    assert tasks.load(folder, class_names=["dog", "a_cat"]).class_names == ("a_cat", "dog")
    assert tasks.load(folder, class_names=["hound", "tabby"]).class_names == ("hound", "tabby")
    twins = write_folder(tmp_path / "twins", {"train": 4, "test": 2})
    for split in ("train", "test"):
        (twins / split / "dog").rename(twins / split / "a cat")
    assert tasks.load(twins, class_names=["a cat", "a_cat"]).class_names == ("a cat", "a_cat")


def test_npz_splits_by_other_names_and_by_halves(tmp_path):
    path = write_npz(tmp_path / "x.npz", keys=("train", "validation", "test"))
    assert len(tasks.load(path, class_names=["a", "b"]).validation) == 20
    arrays = dict(np.load(path))
    np.savez(path, **arrays, x_val=arrays["x_test"], y_val=arrays["y_test"])
    with pytest.raises(TalosError, match="val and validation are both names of validation; keep one"):
        tasks.load(path, class_names=["a", "b"])
    del arrays["y_validation"]
    np.savez(path, **arrays)
    with pytest.raises(TalosError, match="found only one of x_validation and y_validation; give both, or none"):
        tasks.load(path, class_names=["a", "b"])


def test_foreign_npz(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, images=np.zeros(3))
    with pytest.raises(TalosError, match=r"found the arrays \['images'\]; expected x_train"):
        tasks.load(path)
    np.savez(path, x_train=np.zeros((4, 2, 2)), y_train=np.zeros(4, dtype=int))
    with pytest.raises(TalosError, match=r"x_train and y_train: inputs: found an array of dtype float64"):
        tasks.load(path)
    np.savez(path, x_train=np.zeros((4, 2, 2), np.uint8), y_train=np.zeros(3, dtype=int))
    with pytest.raises(TalosError, match="found 3 labels for 4 inputs"):
        tasks.load(path)
    with pytest.raises(TalosError, match=r"found the splits \['train'\]"):
        tasks.load(write_npz(path, keys=["train"]), class_names=["a", "b"])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: found list; every row needs split, text and label"),
        ('{"split": "train", "text": "x"}', r"line 2: found \['split', 'text'\]"),
        ('{"split": "extra", "text": "x", "label": 0}', "line 2: found the split 'extra'"),
        ('{"split": "train", "text": 3, "label": 0}', "line 2: found text 3"),
        ('{"split": "train", "text": "x", "label": true}', "line 2: found text 'x' and label True"),
        ('{"split": "train", "text": "x", "label": "b"}', "labels of both kinds"),
        ('{"split": "test", "text": "x", "label": 7}', "split test: found labels from 7 to 7 for 2 class names"),
    ],
)
def test_foreign_rows(tmp_path, line, message):
    path = tmp_path / "r.jsonl"
    rows = [json.dumps({"split": s, "text": "x", "label": 0}) for s in ("train", "validation")]
    path.write_text("\n".join([rows[0], line, rows[1]]))
    with pytest.raises(TalosError, match=message):
        tasks.load(path, class_names=["a", "b"])


def test_foreign_labels_and_paths(tmp_path):
    path = write_rows(tmp_path / "r.jsonl", ["a", "b", "c"])
    with pytest.raises(TalosError, match=r"found the labels \['c'\], which are not among the class names"):
        tasks.load(path, class_names=["a", "b"])
    with pytest.raises(TalosError, match="no such file or folder"):
        tasks.load(tmp_path / "missing.npz")
    (tmp_path / "t.csv").write_text("a,b")
    with pytest.raises(TalosError, match="unknown kind of file"):
        tasks.load(tmp_path / "t.csv")


def test_spaces_around_a_label_make_no_class(tmp_path, caplog):
    path = tmp_path / "r.jsonl"
    rows = [("train", "a"), ("train", " a "), ("validation", "b "), ("train", "c"), ("test", "a"), ("test", "d")]
    path.write_text("\n".join(json.dumps({"split": split, "text": "x", "label": label}) for split, label in rows))
    task = tasks.load(path)
    assert task.class_names == ("a", "b", "c", "d") and task.train.labels.tolist() == [0, 0, 2]
    assert "train has no example of b, d; no method can learn them" in caplog.text
    caplog.clear()
    tasks.load(write_rows(tmp_path / "whole.jsonl", ["a", "b"] * 20))
    assert not caplog.text


def test_spaces_in_names_that_are_given_stay(tmp_path):
    path = write_rows(tmp_path / "r.jsonl", [" yes", " no"] * 20)
    assert tasks.load(path, class_names=[" yes", " no"]).class_names == (" yes", " no")


def test_foreign_folders(tmp_path):
    with pytest.raises(TalosError, match="found no train folder"):
        tasks.load(tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(TalosError, match="found no class folders"):
        tasks.load(tmp_path)
    root = write_folder(tmp_path / "pets", {"train": 3, "test": 1})
    with pytest.raises(TalosError, match="found 3 names for the 2 folders"):
        tasks.load(root, class_names=["a", "b", "c"])
    (root / "test" / "bird").mkdir()
    with pytest.raises(TalosError, match="train has no class 'bird'"):
        tasks.load(root)
    empty = write_folder(tmp_path / "empty", {"train": 2, "test": 0})
    with pytest.raises(TalosError, match="test: found no images"):
        tasks.load(empty)
    single = write_folder(tmp_path / "single", {"train": 1, "test": 1})
    with pytest.raises(TalosError, match="one example a class"):
        tasks.load(single)


SPLIT = Split(["x", "y"], np.array([0, 1]))


@pytest.mark.parametrize(
    ("names", "templates", "split", "message"),
    [
        (("a",), (), SPLIT, "at least two non-empty names"),
        (("a", " "), (), SPLIT, "at least two non-empty names"),
        (("a", "a"), (), SPLIT, r"class_names \['a'\] occur twice"),
        ("ab", (), SPLIT, "tuples of strings"),
        (("a", "b"), ("no place",), SPLIT, "'no place' needs one {}, for the class name"),
        (("a", "b"), ("a {} of {x}",), SPLIT, "and no other braces"),
        (("a", "b"), (), Split([], np.array([])), "split test: found no examples"),
        (("a", "b"), (), Split(["x"], np.array([-1])), "labels from -1 to -1 for 2 class names"),
        (("a", "b"), (), Split([Path("x.png")], np.array([0])), "found image inputs, but train has text inputs"),
    ],
)
def test_task_is_checked(names, templates, split, message):
    with pytest.raises(TalosError, match=message):
        Task("t", names, templates, SPLIT, SPLIT, split)


@pytest.mark.parametrize(
    ("inputs", "labels", "message"),
    [
        (["x"], np.array([0.5]), "labels: found dtype float64"),
        (["x"], np.array([[0]]), r"shape \(1, 1\)"),
        (["x"], np.array([0, 1]), "found 2 labels for 1 inputs"),
        (["x", Path("y")], np.array([0, 1]), "inputs: found a list of path, str"),
        ("xy", np.array([0, 1]), "inputs: found str"),
        (np.zeros((2, 4, 4), np.uint8), np.array([0, 1]), "give uint8 images"),
    ],
)
def test_split_is_checked(inputs, labels, message):
    with pytest.raises(TalosError, match=message):
        Split(inputs, labels)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=80), st.integers(0, 5))
def test_hold_out_is_stratified(labels, seed):
    array = np.array(labels)
    kept, held = hold_out(array, 0.1, seed)
    assert sorted(kept + held) == list(range(len(labels)))
    for label in set(labels):
        total = labels.count(label)
        assert (array[held] == label).sum() == (max(1, round(0.1 * total)) if total > 1 else 0)


def test_folders_hold_what_looks_like_images_of_their_class(tmp_path):
    root = write_folder(tmp_path / "pets", {"train": 10, "val": 2, "test": 2})
    (root / "train" / ".ipynb_checkpoints").mkdir()
    (root / "train" / "dog" / "a.png").mkdir()  # a folder of that name
    (root / "train" / "dog" / "._00.png").write_bytes(b"AppleDouble")
    for folder in ("more", ".hidden"):
        (root / "train" / "dog" / folder).mkdir()
        Image.new("L", (5, 4)).save(root / "train" / "dog" / folder / "b.png")
    task = tasks.load(root)
    assert task.class_names == ("a cat", "dog") and np.bincount(task.train.labels).tolist() == [10, 11]
    (root / "train" / "empty").mkdir()
    with pytest.raises(TalosError, match="empty: found no images"):
        tasks.load(root)


def test_the_folder_that_one_is_in_has_its_own_name(tmp_path, monkeypatch):
    root = write_folder(tmp_path / "pets", {"train": 10, "val": 2, "test": 2})
    monkeypatch.chdir(root / "train")
    assert tasks.load("..").name == "pets"
    monkeypatch.chdir(root)
    (tmp_path / "datasets.json").write_text(json.dumps([{"file": "pets", "name": "Pets", "prompt_template": "a {}."}]))
    assert tasks.load(".").name == "Pets"


def test_byte_order_marks_are_no_part_of_names_and_rows(tmp_path):
    (tmp_path / "classes.txt").write_text("good\nbad\n", encoding="utf-8-sig")
    path = write_rows(tmp_path / "rows.jsonl", [0, 1] * 10)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert tasks.load(path).class_names == ("good", "bad")


def test_half_characters_are_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"split": "train", "text": "\\ud800", "label": "a"}\n')
    with pytest.raises(TalosError, match="line 1: found text"):
        tasks.load(path)


def test_two_names_of_one_split_are_refused_in_rows_too(tmp_path):
    path = tmp_path / "rows.jsonl"
    words = "train", "Train", "test", "dev"
    rows = [{"split": word, "text": f"{word} {label}", "label": label} for word in words for label in ("a", "b")]
    path.write_text("\n".join(map(json.dumps, rows)))
    task = tasks.load(path)
    assert [len(split) for split in (task.train, task.validation, task.test)] == [4, 2, 2]
    path.write_text("\n".join(map(json.dumps, [*rows, rows[0] | {"split": "val"}])))
    with pytest.raises(TalosError, match="dev and val are both names of validation; keep one"):
        tasks.load(path)


def test_two_names_of_one_split_are_refused(tmp_path):
    for split in ("train", "test", "val", "dev"):
        (tmp_path / split / "a").mkdir(parents=True)
    with pytest.raises(TalosError, match="dev and val are both names of validation; keep one"):
        tasks.load(tmp_path)


def test_sources_are_those_of_the_commands(tmp_path):
    digits, other = tasks.load("demo:digits"), tasks.load("demo:digits", seed=1)
    assert digits.name == "digits" and len(digits.train) == len(other.train)
    assert not np.array_equal(digits.train.inputs, other.train.inputs)
    root = write_folder(tmp_path / "pets", {"train": 10, "test": 3})
    found = tasks.load(f"hub:{root}", name="mine", class_names=["hound", "tabby"], templates=["a {}"], seed=1)
    assert (found.name, found.class_names, found.templates) == ("mine", ("hound", "tabby"), ("a {}",))
    assert found.validation.labels.tolist() == tasks.from_hub(root, seed=1).validation.labels.tolist()
    with pytest.raises(TalosError, match="hub:: give hub:NAME@REVISION or hub:FOLDER"):
        tasks.load("hub:")
    with pytest.raises(TalosError, match="demo:none: the embedded tasks are digits, surfaces"):
        tasks.load("demo:none")
    with pytest.raises(TalosError, match="demo:digits has its own name, class names and templates; leave these out"):
        tasks.load("demo:digits", class_names=["a"])
