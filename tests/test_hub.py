"""Hugging Face data sets as tasks, from a folder. No network."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from talos_fast import TalosError
from talos_fast.tasks import from_hub
from talos_fast.tasks.hub import load_dataset

pytestmark = pytest.mark.usefixtures("hub_cache")


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


def test_what_is_held_out_of_a_hugging_face_data_set_follows_the_seed(tmp_path):
    (tmp_path / "set").mkdir()
    for split, count in (("train", 40), ("test", 4)):
        rows = [{"text": f"text {i}", "label": "ab"[i % 2]} for i in range(count)]
        (tmp_path / "set" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    first, again, other = (from_hub(tmp_path / "set", seed=seed).validation.inputs for seed in (0, 0, 1))
    assert first == again != other


def test_the_pinned_revision_is_what_is_asked_for(monkeypatch):
    import datasets

    asked = {}
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **options: asked.update(options, names=names))
    load_dataset("user/name", revision="0a" * 20, config="plain")
    assert asked["names"] == ("user/name", "plain") and asked["revision"] == "0a" * 20


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
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TalosError, match=r"odd: .*datasets.*; pip install 'talos-fast\[data\]'"):
        from_hub(tmp_path / "odd")
