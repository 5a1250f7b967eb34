"""The eight vision tasks and ImageNet, read from the folders and archives in which they are published."""

import csv
import gzip
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from talos_fast.errors import TalosError, needs
from talos_fast.tasks.base import Split
from talos_fast.tasks.files import class_folders, images_in
from talos_fast.tasks.splits import hold_out
from talos_fast.tasks.vision_names import DIGITS, GTSRB

Found = tuple[dict[str, Split], tuple[str, ...] | None]
"""Splits by name, and class names if the source has them, in the order of the labels."""

Reader = Callable[[Path, int], Found]
"""``reader(folder, seed)``; the seed is of splits that the source does not define."""


def holding(folder: Path, marker: str) -> Path:
    """The folder itself, or one at most two levels below, that holds ``marker``: archives unpack into folders.

    Raises:
        TalosError: there is none.
    """
    for depth in ("", "*/", "*/*/"):
        if found := sorted(folder.glob(f"{depth}{marker}")):
            return found[0].parents[len(Path(marker).parts) - 1]
    raise TalosError(f"{folder}: found no {marker}, in it or up to two folders below; unpack the data set there")


def cars(folder: Path, seed: int) -> Found:
    """Stanford Cars: ``devkit/cars_train_annos.mat``, ``cars_test_annos_withlabels.mat`` beside it or in the devkit."""
    root = holding(folder, "devkit/cars_meta.mat")
    names = tuple(str(name) for name in _mat(root / "devkit" / "cars_meta.mat")["class_names"])
    tests = [p / "cars_test_annos_withlabels.mat" for p in (root, root / "devkit")]
    annotations = {
        "train": root / "devkit" / "cars_train_annos.mat",
        "test": next((p for p in tests if p.is_file()), tests[0]),
    }
    splits = {}
    for split, path in annotations.items():
        rows = np.atleast_1d(_mat(path)["annotations"])
        files = [root / f"cars_{split}" / str(row["fname"]) for row in rows]
        splits[split] = _images(files, [int(row["class"]) - 1 for row in rows])
    return splits, names


def dtd(folder: Path, seed: int) -> Found:
    """DTD, its first partition: train1 and val1 are trained on, test1 is tested on."""
    root = holding(folder, "labels/test1.txt")
    parts = {name: _lines(root / "labels" / f"{name}.txt") for name in ("train1", "val1", "test1")}
    return _listed(
        {"train": parts["train1"] + parts["val1"], "test": parts["test1"]},
        lambda line: root / "images" / line,
        lambda line: line.split("/")[0],
    )


def eurosat(folder: Path, seed: int) -> Found:
    """EuroSAT (RGB): class folders; no split is published: 80 % train, 10 % validation, 10 % test, stratified."""
    root = holding(folder, "AnnualCrop")
    classes = _subfolders(root)
    files, labels = _class_images(root, classes)
    kept, held = hold_out(labels, 0.2, seed)
    half, other = hold_out(labels[held], 0.5, seed)
    rows = {"train": kept, "validation": [held[i] for i in half], "test": [held[i] for i in other]}
    return {split: _images([files[i] for i in index], labels[index]) for split, index in rows.items()}, tuple(classes)


def gtsrb(folder: Path, seed: int) -> Found:
    """GTSRB: ``Training/<number>/*.ppm``, and ``GT-final_test.csv`` with the images of ``Final_Test/Images``."""
    root = holding(folder, "Training/00000").parent
    training = holding(folder, "Training/00000") / "Training"
    classes = _subfolders(training)
    train = _images(*_class_images(training, classes))
    table = holding(folder, "GT-final_test.csv") / "GT-final_test.csv"
    pictures = holding(folder, "Final_Test/Images") / "Final_Test" / "Images"
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter=";"))
    if not rows or not {"Filename", "ClassId"} <= rows[0].keys():
        raise TalosError(
            f"{table}: no columns Filename and ClassId separated by ';'; fetch {root.name}'s ground truth again"
        )
    test = _images([pictures / row["Filename"] for row in rows], [int(row["ClassId"]) for row in rows])
    return {"train": train, "test": test}, GTSRB


def mnist(folder: Path, seed: int) -> Found:
    """MNIST: the four idx files, packed or not."""
    splits = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images = _idx(folder, f"{prefix}-images-idx3-ubyte")
        labels = _idx(folder, f"{prefix}-labels-idx1-ubyte").astype(np.int64)
        splits[split] = Split(np.repeat(images[..., None], 3, axis=-1), labels)
    return splits, DIGITS


def resisc45(folder: Path, seed: int) -> Found:
    """RESISC45: class folders, and the partition of ``resisc45-train.txt``, ``-val.txt`` and ``-test.txt``."""
    lists = holding(folder, "resisc45-test.txt")
    first = _lines(lists / "resisc45-test.txt")[0]
    root = holding(folder, f"{first.rsplit('_', 1)[0]}/{first}")
    return _listed(
        {split: _lines(lists / f"resisc45-{part}.txt") for split, part in
         (("train", "train"), ("validation", "val"), ("test", "test"))},
        lambda line: root / line.rsplit("_", 1)[0] / line,
        lambda line: line.rsplit("_", 1)[0],
    )  # fmt: skip


def sun397(folder: Path, seed: int) -> Found:
    """SUN397: the first partition, ``Training_01.txt`` and ``Testing_01.txt``, and ``ClassName.txt``."""
    lists = holding(folder, "Training_01.txt")
    root = holding(folder, "ClassName.txt")
    classes = sorted(_lines(root / "ClassName.txt"))
    splits, _ = _listed(
        {"train": _lines(lists / "Training_01.txt"), "test": _lines(lists / "Testing_01.txt")},
        lambda line: root / line.lstrip("/"),
        lambda line: line.rsplit("/", 1)[0],
        classes,
    )
    # "/b/bow_window/indoor" is an indoor bow window: the first part is the letter it is filed under.
    return splits, tuple(" ".join(reversed(name.split("/")[2:])).replace("_", " ") for name in classes)


def svhn(folder: Path, seed: int) -> Found:
    """SVHN, cropped digits: ``train_32x32.mat`` and ``test_32x32.mat``; the label 10 is the digit 0."""
    root, splits = holding(folder, "train_32x32.mat"), {}
    for split in ("train", "test"):
        content = _mat(root / f"{split}_32x32.mat")
        labels = np.asarray(content["y"], dtype=np.int64).reshape(-1) % 10
        splits[split] = Split(np.ascontiguousarray(np.moveaxis(content["X"], -1, 0)), labels)
    return splits, DIGITS


def imagenet(folder: Path, seed: int) -> Found:
    """ImageNet: ``train/<synset>`` and ``val/<synset>``; its validation images are tested on."""
    root = holding(folder, "val/n01440764")
    classes = _subfolders(root / "train")
    if _subfolders(root / "val") != classes:
        raise TalosError(
            f"{root}: train and val have different synset folders; unpack both as folders of class folders"
        )
    parts = (("train", "train"), ("test", "val"))
    return {split: _images(*_class_images(root / part, classes)) for split, part in parts}, None


def _listed(
    lines: dict[str, list[str]],
    file_of: Callable[[str], Path],
    class_of: Callable[[str], str],
    classes: Sequence[str] | None = None,
) -> Found:
    """Splits from lists of files; the classes are those of train, sorted, if they are not given."""
    order = list(classes) if classes is not None else sorted({class_of(line) for line in lines["train"]})
    position = {name: label for label, name in enumerate(order)}
    splits = {}
    for split, rows in lines.items():
        if foreign := sorted({class_of(row) for row in rows} - position.keys()):
            raise TalosError(f"the list of {split} names the class {foreign[0]!r}, which there is not; fetch it again")
        splits[split] = _images([file_of(row) for row in rows], [position[class_of(row)] for row in rows])
    return splits, tuple(order)


def _images(files: list[Path], labels: Sequence[int] | npt.NDArray[np.int64]) -> Split:
    if files and not files[0].is_file():
        raise TalosError(f"{files[0]}: no such image, but the labels name it; unpack the images beside the labels")
    return Split(files, np.asarray(labels, dtype=np.int64))


def _subfolders(root: Path) -> list[str]:
    return [folder.name for folder in class_folders(root)]


def _class_images(root: Path, classes: Sequence[str]) -> tuple[list[Path], npt.NDArray[np.int64]]:
    files = [images_in(root / name) for name in classes]
    labels = np.repeat(np.arange(len(classes)), [len(group) for group in files])
    return [path for group in files for path in group], labels.astype(np.int64)


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise TalosError(f"{path}: no such list; unpack the data set's partition there")
    return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def _mat(path: Path) -> dict[str, Any]:
    with needs("data", path):
        from scipy.io import loadmat
        from scipy.io.matlab import MatReadError
    try:
        content: dict[str, Any] = loadmat(str(path), squeeze_me=True)
    except (MatReadError, OSError, ValueError, TypeError, IndexError, NotImplementedError) as error:
        raise TalosError(f"{path}: not a whole MATLAB file ({error}); fetch it again") from error
    return content


def _idx(folder: Path, name: str) -> npt.NDArray[np.uint8]:
    """An idx file: two zero bytes, the type (8: uint8), the number of axes, their lengths (big-endian), the entries."""
    try:
        root = holding(folder, name)
        raw = (root / name).read_bytes()
    except TalosError:
        root = holding(folder, f"{name}.gz")
        try:
            raw = gzip.decompress((root / f"{name}.gz").read_bytes())
        except (OSError, EOFError) as error:
            raise TalosError(f"{root / name}.gz: not a whole gzip file ({error}); fetch it again") from error
    axes = raw[3] if raw[:3] == b"\0\0\x08" and len(raw) > 3 else 0
    shape = tuple(int(n) for n in np.frombuffer(raw, ">u4", axes, 4)) if len(raw) >= 4 + 4 * axes else (-1,)
    if not axes or len(raw) != 4 + 4 * axes + int(np.prod(shape)):
        raise TalosError(f"{root / name}: not a whole idx file of bytes; fetch it again")
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(shape)
