"""The paper's suites from small files of their published formats, and Hugging Face data sets. No network."""

from pathlib import Path

import numpy as np
import published
import pytest
import torch
from PIL import Image
from tiny_models import text_task, write_bert, write_t5

from talos_fast import TalosError, calibrate, evaluate, models
from talos_fast.tasks import PRESETS, Split, Task, from_hub, get_preset

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


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """Where `datasets` keeps its Arrow files during a test."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


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


def test_presets_are_the_papers():
    assert len(VISION.tasks) == 8 and len(LANGUAGE.tasks) == 7 and LANGUAGE.control == "rte"
    assert VISION.recipes()["dtd"] == {"warmup": 500, "clip": 1.0, "epochs": 76}
    assert LANGUAGE.recipes()["paws"]["steps"] == 75_000 and "epochs" not in LANGUAGE.recipes()["paws"]
    assert LANGUAGE.batch_size * LANGUAGE.recipe["accumulate"] == 1024
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


def test_a_hugging_face_data_set_of_texts(tmp_path, hub_cache):
    import datasets

    label = datasets.ClassLabel(names=["bad", "good"])
    for split, count in (("train", 20), ("test", 4)):
        rows = {"sentence": [f"text {i}" for i in range(count)], "label": [i % 2 for i in range(count)]}
        features = datasets.Features({"sentence": datasets.Value("string"), "label": label})
        datasets.Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "set" / f"{split}.parquet")
    task = from_hub(tmp_path / "set", cache_dir=tmp_path / "cache", templates=["it was {}"])
    assert (task.name, task.class_names, task.modality) == ("set", ("bad", "good"), "text")
    assert [len(split) for split in (task.train, task.validation, task.test)] == [18, 2, 4]
    renamed = from_hub(tmp_path / "set", cache_dir=tmp_path / "cache", class_names=["no", "yes"], name="mine")
    assert (renamed.name, renamed.class_names) == ("mine", ("no", "yes"))
    with pytest.raises(TalosError, match="has no column 'x'"):
        from_hub(tmp_path / "set", cache_dir=tmp_path / "cache", label_column="x")


def test_a_hugging_face_data_set_of_images(tmp_path, hub_cache):
    """Packed in parquet the images are unpacked once, bytes as they are; sizes may differ."""
    import datasets

    pixels = [np.full((4 + i % 3, 5, 3), 10 * i, np.uint8) for i in range(12)]
    features = datasets.Features({"img": datasets.Image(), "labels": datasets.Value("string")})
    rows = {"img": [Image.fromarray(p) for p in pixels], "labels": ["cat" if i % 2 else "dog" for i in range(12)]}
    whole = datasets.Dataset.from_dict(rows, features=features)
    content = datasets.DatasetDict(
        train=whole.select(range(8)), validation=whole.select(range(8, 10)), test=whole.select(range(10, 12))
    )
    content.save_to_disk(tmp_path / "disk")
    for _ in range(2):
        task = from_hub(tmp_path / "disk", cache_dir=tmp_path / "cache")
        assert task.class_names == ("cat", "dog") and task.modality == "image"
        assert [
            (np.asarray(Image.open(path)) == p).all() for path, p in zip(task.train.inputs, pixels[:8], strict=True)
        ] == [True] * 8
        assert task.test.labels.tolist() == [1, 0]


def test_hub_refusals(tmp_path, hub_cache, monkeypatch):
    with pytest.raises(TalosError, match="give revision=, a commit of 40 digits, found 'main'"):
        from_hub("user/name", revision="main")
    (tmp_path / "empty").mkdir()
    with pytest.raises(TalosError, match="cannot be read as a data set"):
        from_hub(tmp_path / "empty", cache_dir=tmp_path / "cache")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "train.jsonl").write_text('{"words": "x", "label": 0}\n')
    (tmp_path / "odd" / "test.jsonl").write_text('{"words": "x", "label": 0}\n')
    with pytest.raises(TalosError, match="input_column= cannot be told from the columns"):
        from_hub(tmp_path / "odd", cache_dir=tmp_path / "cache")
    with pytest.raises(TalosError, match="give class_names="):
        from_hub(tmp_path / "odd", cache_dir=tmp_path / "cache", input_column="words")
    with pytest.raises(TalosError, match="some rows have no label"):
        from_hub(
            tmp_path / "odd",
            cache_dir=tmp_path / "cache",
            input_column="words",
            label_column="words",
            class_names=["a", "b"],
        )
    import sys

    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TalosError, match=r"needs the package datasets; pip install 'talos-fast\[data\]'"):
        from_hub(tmp_path / "odd")


def choice_task() -> Task:
    """Ten questions whose answers differ, in words the tiny tokenizer knows."""
    rows = [("red", "green"), ("blue", "warm cold"), ("sky", "sea"), ("fire", "grass"), ("ice", "good")] * 2
    split = Split([f"{a} of the {b}" for a, b in rows], np.array([0, 1] * 5), choices=rows)
    return Task("choices", ("A", "B"), (), split, split.select([0, 1, 2]), split)


def test_t5_scores_the_choices_of_each_example(tmp_path):
    """Each row's scores are those of a model whose class names are that row's choices."""
    torch.manual_seed(0)
    backbone, task = models.load(f"t5:{write_t5(tmp_path)}"), choice_task()
    model = backbone.classifier(task)
    batch = next(iter(backbone.batches(task.test, batch_size=10)))
    assert batch["choice_ids"].shape[:2] == (10, 2)
    with torch.no_grad():
        scores = model(**{key: value for key, value in batch.items() if key != "labels"})
        for row in range(5):
            one = task.test.select([row])
            alone = Task("one", one.choices[0], (), *(Split(one.inputs, one.labels),) * 3)
            inputs = backbone.prepare(one.inputs)
            torch.testing.assert_close(backbone.classifier(alone)(**inputs)[0], scores[row], rtol=1e-4, atol=1e-4)
    assert 0 <= float(evaluate(model, backbone.batches(task.test, batch_size=4))) <= 1
    mask = calibrate(model, backbone.batches(task.train, batch_size=5), rounds=1, progress=False)
    assert mask.selected == int(0.1 * mask.numel)


def test_choices_are_checked(tmp_path):
    with pytest.raises(TalosError, match="choices: found 1 for 2 inputs"):
        Split(["x", "y"], np.array([0, 1]), choices=[("a", "b")])
    two, three = (Split(["x", "y"], np.array([0, 1]), choices=[names] * 2) for names in (("a", "b"), ("a", "b", "c")))
    with pytest.raises(TalosError, match=r"found \[3\] choices an example for 2 class names"):
        Task("t", ("A", "B"), (), two, two, three)
    with pytest.raises(TalosError, match="found no choices an example"):
        Task("t", ("A", "B"), (), two, two, Split(["x"], np.array([0])))
    with pytest.raises(TalosError, match="use a T5"):
        models.load(f"hf:{write_bert(tmp_path)}").classifier(choice_task())
    assert not text_task().has_choices
