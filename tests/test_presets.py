"""The paper's suites from small files of their published formats. No network."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import published
import pytest

from talos_fast import TalosError
from talos_fast.tasks import PRESETS, get_preset, language
from talos_fast.tasks.language import Example

VISION, LANGUAGE = get_preset("vision8"), get_preset("language7")

# task: examples of train, validation and test; first and last class; the labels of test
EXPECTED = {
    "cars": ((18, 2, 4), "AM General Hummer SUV 2000", "Acura RL Sedan 2012", [0, 1, 0, 1]),
    "dtd": ((36, 4, 6), "banded", "polka-dotted", [0, 0, 0, 1, 1, 1]),
    "eurosat": ((48, 6, 6), "annual crop land", "lake or sea", [0, 0, 1, 1, 2, 2]),
    "gtsrb": ((43, 43, 3), "a 20 km/h speed limit", "the end of no passing for trucks", [14, 0, 42]),
    "mnist": ((30, 10, 10), "zero", "nine", list(range(10))),
    "resisc45": ((10, 4, 6), "airplane", "baseball diamond", [0, 0, 0, 1, 1, 1]),
    "sun397": ((18, 2, 4), "abbey", "indoor bow window", [0, 0, 1, 1]),
    "svhn": ((30, 10, 10), "zero", "nine", [*range(1, 10), 0]),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_vision_as_published(tmp_path, name):
    published.VISION[name](tmp_path / name)
    task = VISION.task(name, tmp_path)
    sizes, first, last, labels = EXPECTED[name]
    assert (len(task.train), len(task.validation), len(task.test)) == sizes
    assert (task.class_names[0], task.class_names[-1]) == (first, last)
    assert task.test.labels.tolist() == labels and task.name == name and task.templates
    files = [
        path for split in (task.train, task.validation, task.test) for path in split.inputs if isinstance(path, Path)
    ]
    assert len(set(files)) == len(files) and all(path.is_file() for path in files)


def test_mnist_and_svhn_keep_their_pixels(tmp_path):
    published.mnist(tmp_path / "mnist")
    published.svhn(tmp_path / "svhn")
    digits, numbers = VISION.task("mnist", tmp_path), VISION.task("svhn", tmp_path)
    raw = (tmp_path / "mnist" / "MNIST" / "raw" / "t10k-images-idx3-ubyte").read_bytes()
    assert digits.test.inputs.shape == (10, 28, 28, 3) and digits.test.inputs[..., 1].tobytes() == raw[16:]
    expected = np.random.default_rng(1).integers(0, 256, (32, 32, 3, 10), dtype=np.uint8)
    assert (numbers.test.inputs == np.moveaxis(expected, -1, 0)).all()


def test_imagenet_is_the_control(tmp_path):
    published.imagenet(tmp_path / "ImageNet")
    task = VISION.task("imagenet", tmp_path)
    assert VISION.control == "imagenet" and task.num_classes == 1000 and len(task.templates) == 80
    assert task.class_names[0] == "tench" and task.templates[0].count("{}") == 1
    assert (len(task.train), len(task.validation), len(task.test)) == (1000, 1000, 1000)
    assert all(path.parts[-3] == "val" for path in task.test.inputs)


def test_a_plain_image_folder_will_do(tmp_path):
    for split, count in (("train", 10), ("val", 2), ("test", 3)):
        for name in ("AnnualCrop", "River"):
            for i in range(count):
                published.image(tmp_path / "EuroSAT_splits" / split / name / f"{i}.png")
    task = VISION.task("eurosat", tmp_path)
    assert task.class_names == ("annual crop land", "river") and len(task.test) == 6


def test_what_is_hidden_is_no_class_and_no_image(tmp_path):
    published.VISION["eurosat"](tmp_path / "eurosat")
    before = VISION.task("eurosat", tmp_path)
    for folder in {path.parent.parent for path in before.train.inputs}:
        published.image(folder / ".ipynb_checkpoints" / "0.jpg")
    for path in before.train.inputs[:3]:
        (path.parent / f"._{path.name}").write_bytes(b"of macOS")
    after = VISION.task("eurosat", tmp_path)
    assert (after.class_names, after.train.inputs) == (before.class_names, before.train.inputs)


@pytest.mark.parametrize("name", ["eurosat", "dtd"])
def test_what_is_held_out_follows_the_seed(tmp_path, name):
    published.VISION[name](tmp_path / name)
    first, again, other = (VISION.task(name, tmp_path, seed=seed).train.inputs for seed in (0, 0, 1))
    assert first == again != other


LANGUAGE_EXPECTED = {
    "qasc": ((40, 32, 8), 2, "ABCDEFGH", "sand, forests"),
    "wiki_qa": ((40, 40, 40), 1, ("no", "yes"), "how are caves formed"),
    "quartz": ((40, 40, 40), 1, "AB", "Heavy things"),
    "paws": ((40, 40, 40), 0, ("no", "yes"), "A beats B."),
    "story_cloze": ((40, 32, 8), None, "AB", "Rick grew up, poor. He fell."),
    "winogrande": ((40, 32, 8), 1, "AB", "because _ helped"),
    "wsc": ((40, 32, 8), 0, ("no", "yes"), '"he" stand for "Tom"'),
    "rte": ((40, 32, 8), 0, ("yes", "no"), "it is wet."),
}


@pytest.fixture(scope="module")
def language_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("language")
    for name in published.LANGUAGE:
        published.language(root / name, name)
    return root


@pytest.mark.parametrize("name", LANGUAGE_EXPECTED)
def test_language_as_published(language_root, hub_cache, name):
    task = LANGUAGE.task(name, language_root)
    sizes, label, names, part = LANGUAGE_EXPECTED[name]
    assert (len(task.train), len(task.validation), len(task.test)) == sizes
    assert task.class_names == tuple(names) and part in task.train.inputs[0]
    if label is not None:
        assert set(task.train.labels.tolist()) == {label}
    if task.has_choices:
        right = {row[k] for row, k in zip(task.test.choices, task.test.labels.tolist(), strict=True)}
        known = {
            "qasc": {"local weather"},
            "quartz": {"faster"},
            "winogrande": {"Bea"},
            "story_cloze": {"He wept.", "He smiled."},
        }
        assert right == known[name]


def test_the_cut_of_validation_is_the_same_each_time(language_root, hub_cache):
    first, second = (LANGUAGE.task("story_cloze", language_root) for _ in range(2))
    assert first.validation.labels.tolist() == second.validation.labels.tolist()


@pytest.mark.parametrize("name", language.SOURCES)
def test_each_split_is_made_of_its_own_rows(name):
    source = replace(language.SOURCES[name], example=lambda row: Example(row["text"], 0), columns=())
    rows = {split: [{"text": f"{split} {i}"} for i in range(40)] for split in ("train", "validation", "test")}
    found = source.read(rows, "here")
    train, cut = ("validation", "test") if name == "story_cloze" else ("train", "validation")
    labelled = name in ("wiki_qa", "quartz", "paws")  # the published test rows
    origins = {split: {text.split()[0] for text in part.inputs} for split, part in found.items()}
    assert origins == {"train": {train}, "validation": {cut}, "test": {"test" if labelled else cut}}
    assert not set(found["validation"].inputs) & set(found["test"].inputs)


def test_presets_are_the_papers():
    assert len(VISION.tasks) == 8 and len(LANGUAGE.tasks) == 7 and LANGUAGE.control == "rte"
    assert VISION.recipes()["dtd"] == {"warmup": 500, "clip": 1.0, "epochs": 76}
    assert LANGUAGE.recipes()["paws"]["steps"] == 75_000 and "epochs" not in LANGUAGE.recipes()["paws"]
    assert LANGUAGE.batch_size * LANGUAGE.recipe["accumulate"] == 1024
    assert (VISION.batch_size, VISION.lr, VISION.weight_decay) == (128, 1e-5, 0.1)
    assert (LANGUAGE.batch_size, LANGUAGE.lr, LANGUAGE.weight_decay) == (64, 1e-4, 0.0)
    assert set(VISION.epochs) == set(VISION.tasks) and set(PRESETS) == {"vision8", "language7"}


def test_presets_refuse(tmp_path, hub_cache):
    with pytest.raises(TalosError, match="preset 'vision9': choose one of vision8, language7"):
        get_preset("vision9")
    with pytest.raises(TalosError, match="vision8 has no task 'food'"):
        VISION.task("food", tmp_path)
    with pytest.raises(TalosError, match="found no folder cars or stanford_cars or Cars for cars"):
        VISION.task("cars", tmp_path)
    for name in ("mnist", "svhn", "dtd", "cars"):
        (tmp_path / name).mkdir()
        with pytest.raises(TalosError, match=r"found no .*, in it or up to two folders below"):
            VISION.task(name, tmp_path)
    published.mnist(tmp_path / "MNIST2")
    (tmp_path / "mnist").rmdir()
    (tmp_path / "MNIST2").rename(tmp_path / "mnist")
    path = tmp_path / "mnist" / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(TalosError, match="not a whole idx file"):
        VISION.task("mnist", tmp_path)
    published.svhn(tmp_path / "SVHN2")
    (tmp_path / "SVHN2" / "test_32x32.mat").write_bytes(b"nothing")
    (tmp_path / "svhn").rmdir()
    (tmp_path / "SVHN2").rename(tmp_path / "svhn")
    with pytest.raises(TalosError, match="not a whole MATLAB file"):
        VISION.task("svhn", tmp_path)
    published.resisc45(tmp_path / "resisc45")
    (tmp_path / "resisc45" / "resisc45-val.txt").unlink()
    with pytest.raises(TalosError, match="no such list"):
        VISION.task("resisc45", tmp_path)
    (tmp_path / "story_cloze").mkdir()
    with pytest.raises(TalosError, match="no CSV file of the validation stories"):
        LANGUAGE.task("story_cloze", tmp_path)
    published.language(tmp_path / "rte", "rte", count=32)
    with pytest.raises(TalosError, match="32 rows to test on; more than 32 are needed"):
        LANGUAGE.task("rte", tmp_path)
    published.language(tmp_path / "wsc", "rte")
    with pytest.raises(TalosError, match="but no text; another data set"):
        LANGUAGE.task("wsc", tmp_path)
