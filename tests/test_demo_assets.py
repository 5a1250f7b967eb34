"""The demo's tasks and tiny CLIP: sound data, weights that load, a starting point with room to improve."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

pytest.importorskip("open_clip")
pytest.importorskip("skimage")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from talos_fast.demo import control_task, corpus, coverage, demo_tasks, load_backbone, photos, pretrain, tasks
from talos_fast.demo.concepts import SHAPES, SURFACES
from talos_fast.demo.model import CONFIG_NAME, FOLDER, WEIGHTS_NAME
from talos_fast.demo.tokenizer import WordTokenizer
from talos_fast.errors import TalosError
from talos_fast.models.base import Backbone
from talos_fast.tasks.base import Split, Task

PACKAGE_DATA_LIMIT = 6 * 2**20  # bytes: what an installation carries for the demo
NAMES = ["digits", "surfaces", "letters", "shapes", "counts", "patterns", "colours"]


@pytest.fixture(scope="module")
def all_tasks() -> dict[str, Task]:
    return {task.name: task for task in [*demo_tasks(), control_task()]}


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return load_backbone()


def pixels(split: Split) -> np.ndarray:
    assert isinstance(split.inputs, np.ndarray)
    return split.inputs


@pytest.mark.parametrize("name", NAMES)
def test_splits_are_balanced_and_disjoint(all_tasks: dict[str, Task], name: str) -> None:
    task = all_tasks[name]
    seen: set[bytes] = set()
    for part, size in tasks.SIZES.items():
        split = getattr(task, part)
        assert pixels(split).shape == (size, 32, 32, 3) and pixels(split).dtype == np.uint8
        counts = np.bincount(split.labels, minlength=task.num_classes)
        assert counts.max() - counts.min() <= 1
        images = {image.tobytes() for image in pixels(split)}
        assert len(images) == size and not images & seen
        seen |= images


@pytest.mark.parametrize("name", ["digits", "surfaces", "shapes"])
def test_tasks_follow_their_seed(all_tasks: dict[str, Task], name: str) -> None:
    make = getattr(tasks, name)
    np.testing.assert_array_equal(pixels(make(0).train), pixels(all_tasks[name].train))
    assert not np.array_equal(pixels(make(1).train), pixels(all_tasks[name].train))


def test_a_written_digit_is_in_one_split_only(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[bytes] = []
    plain = tasks._handwritten

    def record(rng: np.random.Generator, ink: np.ndarray) -> np.ndarray:
        drawn.append(ink.tobytes())
        return plain(rng, ink)

    monkeypatch.setattr(tasks, "_handwritten", record)
    tasks.digits()
    assert len(drawn) == sum(tasks.SIZES.values()) == len(set(drawn))


@pytest.mark.parametrize("name", SURFACES)
def test_photographs_are_split_by_region(name: str) -> None:
    parts = [set(photos.tiles(name, part)) for part in ("train", "validation", "test")]
    assert all(parts)
    assert len(set.union(*parts)) == sum(len(part) for part in parts)
    side = photos._PHOTOS[name][3]
    pairs = itertools.combinations(set.union(*parts), 2)
    assert all(max(abs(x - u), abs(y - v)) >= side for (x, y), (u, v) in pairs), "no two share a pixel"


def test_a_crop_lies_within_one_tile_of_its_part(monkeypatch: pytest.MonkeyPatch) -> None:
    crop, boxes, rng = Image.Image.crop, [], np.random.default_rng(0)

    def watched(image: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
        boxes.append(box)
        return crop(image, box)

    monkeypatch.setattr(Image.Image, "crop", watched)
    for _ in range(20):
        photos.surface(rng, "coins", "test", (0.4, 0.7), grey=True)
    side, corners = photos._PHOTOS["coins"][3], photos.tiles("coins", "test")
    for left, top, right, bottom in boxes:
        assert any(x <= left < right <= x + side and y <= top < bottom <= y + side for x, y in corners)


def test_control_shares_no_class_with_the_targets(all_tasks: dict[str, Task]) -> None:
    control = set(all_tasks["colours"].class_names)
    assert not any(control & set(task.class_names) for name, task in all_tasks.items() if name != "colours")


@pytest.mark.parametrize("outline", [False, True])
def test_shapes_look_different(outline: bool) -> None:
    drawn = [coverage.shape(name, centre=(0.5, 0.5), radius=0.4, tilt=0, outline=outline) for name in SHAPES]
    for index, one in enumerate(drawn):
        assert one.shape == (32, 32) and one.min() >= 0 and one.max() <= 1 and one.sum() > 20
        assert all(np.abs(one - other).sum() > 20 for other in drawn[index + 1 :])


def test_package_data_is_small() -> None:
    carried = [path for path in FOLDER.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    assert {path.name for path in carried} == {CONFIG_NAME, WEIGHTS_NAME}
    assert sum(path.stat().st_size for path in carried) <= PACKAGE_DATA_LIMIT


def test_description_says_how_the_weights_were_made() -> None:
    made = json.loads((FOLDER / CONFIG_NAME).read_text())["made"]
    assert made["by"] == "python -m talos_fast.demo.pretrain"
    assert {"steps", "batch_size", "images", "lr", "seed", "torch", "loss"} <= set(made)


def test_encoder_is_open_clips_own(backbone: Backbone) -> None:
    from open_clip.transformer import VisionTransformer

    assert isinstance(backbone.encoder, VisionTransformer)
    names = {name for name, _ in backbone.encoder.named_parameters()}
    assert {"class_embedding", "positional_embedding", "proj", "ln_pre.weight", "ln_post.weight"} <= names
    assert "transformer.resblocks.0.attn.in_proj_weight" in names
    assert all(parameter.isfinite().all() for parameter in backbone.encoder.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_zero_shot_leaves_room(all_tasks: dict[str, Task], backbone: Backbone, name: str) -> None:
    task = all_tasks[name]
    classifier = backbone.classifier(task)
    with torch.no_grad():
        predicted = classifier(backbone.prepare(task.test.inputs)).argmax(dim=-1).numpy()
    accuracy = (predicted == task.test.labels).mean()
    if name == "colours":
        assert accuracy >= 0.8
    else:
        assert 1.8 / task.num_classes < accuracy < 0.85


def test_pretraining_runs_and_loads(tmp_path: Path, all_tasks: dict[str, Task]) -> None:
    threads = torch.get_num_threads()
    try:
        pretrain.main(f"--steps 3 --images 64 --batch-size 16 --threads 1 --out {tmp_path}".split())
    finally:
        torch.set_num_threads(threads)
    backbone = load_backbone(folder=tmp_path)
    logits = backbone.classifier(all_tasks["shapes"])(backbone.prepare(all_tasks["shapes"].test.inputs))
    assert logits.shape == (300, len(SHAPES)) and logits.isfinite().all()


def test_corpus_speaks_only_known_words() -> None:
    images, captions = corpus.corpus(120, seed=3)
    assert images.shape == (120, 32, 32, 3) and len(captions) == 120
    tokens = WordTokenizer(corpus.vocabulary(), pretrain.CONTEXT_LENGTH)(captions)
    assert tokens.shape == (120, pretrain.CONTEXT_LENGTH)


def test_tokenizer_puts_the_highest_id_at_the_end() -> None:
    tokenizer = WordTokenizer(["A", "a", "letter", "the"], context_length=6)
    assert tokenizer(["the letter A.", "a"]).tolist() == [[1, 5, 4, 2, 6, 0], [1, 3, 6, 0, 0, 0]]
    assert tokenizer.vocab_size == 7
    assert tokenizer("the a letter A").tolist() == [[1, 5, 3, 4, 2, 6]], "as many words as fit"
    assert tokenizer([]).shape == (0, 6)


@pytest.mark.parametrize(("text", "message"), [("a zebra", r"does not know \['zebra'\]"), ("a a a a a", "5 words")])
def test_tokenizer_refuses(text: str, message: str) -> None:
    with pytest.raises(TalosError, match=message):
        WordTokenizer(["a"], context_length=6)([text])


def test_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(TalosError, match=CONFIG_NAME):
        load_backbone(folder=tmp_path)
    for text in ("{", "{}", "[]"):
        (tmp_path / CONFIG_NAME).write_text(text)
        with pytest.raises(TalosError, match=f"{CONFIG_NAME}: not the description of a tiny CLIP"):
            load_backbone(folder=tmp_path)
    (tmp_path / CONFIG_NAME).write_text((FOLDER / CONFIG_NAME).read_text())
    with pytest.raises(TalosError, match=WEIGHTS_NAME):
        load_backbone(folder=tmp_path)
    (tmp_path / WEIGHTS_NAME).write_bytes((FOLDER / WEIGHTS_NAME).read_bytes()[:1000])
    with pytest.raises(TalosError, match=WEIGHTS_NAME):
        load_backbone(folder=tmp_path)
    weights = load_file(FOLDER / WEIGHTS_NAME)
    del weights["logit_scale"]
    save_file(weights, tmp_path / WEIGHTS_NAME)
    with pytest.raises(TalosError, match="not the weights that tiny_clip.json describes"):
        load_backbone(folder=tmp_path)
