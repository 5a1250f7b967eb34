"""Tasks from files: image folders, `.npz` arrays of images, `.jsonl` rows of text."""

import gzip
import json
import logging
import os
import re
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from talos_fast.errors import TalosError
from talos_fast.tasks.base import Split, Task
from talos_fast.tasks.class_names import describe
from talos_fast.tasks.splits import ALIASES, complete, named_splits

logger = logging.getLogger("talos_fast")

IMAGE_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})


def from_files(
    path: str | Path,
    *,
    name: str | None = None,
    class_names: Sequence[str] | None = None,
    templates: Sequence[str] | None = None,
    seed: int = 0,
) -> Task:
    """Read a task.

    Three forms are known:

    - a folder in the ImageFolder layout, `train/<class>/*.png` and so on, with `val`, `valid`, `validation` or `dev`
      and `test` beside `train`; images in folders within a class folder are of that class, hidden ones are none;
    - `.npz` with uint8 images `x_train`, `x_val`, `x_test`, of shape (N, H, W) or (N, H, W, 3), and labels `y_train`,
      `y_val`, `y_test`;
    - `.jsonl` or `.jsonl.gz` with one `{"split": ..., "text": ..., "label": ...}` a line, labels as indices or names.

    Where there is no validation split, a stratified tenth of train is held out.

    Args:
        path: the folder or file.
        name: of the task; by default that in `datasets.json`, else the name of the file or folder.
        class_names: in the order of the labels (for a folder: of its sorted sub-folders, or their own names in any
            order). By default those of a `datasets.json` beside the file, else of a `classes.txt`, else the sub-folders
            or text labels, sorted.
        templates: prompts with `{}`; by default the `prompt_template` of `datasets.json`, else none.
        seed: of the held-out validation split.

    Example:
        >>> task = from_files("cifar10.npz", class_names=["airplane", "automobile", ...])

    Raises:
        TalosError: a file that is missing, cut off, empty or of another form, or class names that are not known.
    """
    path = Path(path)
    about = describe(Path(os.path.abspath(path)), name, class_names, templates)  # "." and ".." are no names
    names = about.class_names
    if path.is_dir():
        found, names = _read_folder(path, names)
    elif not path.is_file():
        raise TalosError(f"{path}: no such file or folder; give an image folder, a .npz, .jsonl or .jsonl.gz file")
    elif path.suffix == ".npz":
        found = _read_npz(path)
    elif path.name.endswith((".jsonl", ".jsonl.gz")):
        found, names = _read_jsonl(path, names)
    else:
        raise TalosError(f"{path}: unknown kind of file; give an image folder, a .npz, .jsonl or .jsonl.gz file")
    if names is None:
        raise TalosError(
            f"{path}: the names of its classes are not known; give class_names=, or write them to "
            f"{path.parent / 'classes.txt'}, one a line in the order of the labels"
        )
    train, validation, test = complete(found, path, seed)
    return Task(about.name, names, about.templates, train, validation, test)


def _read_folder(path: Path, names: tuple[str, ...] | None) -> tuple[dict[str, Split], tuple[str, ...]]:
    folders = [folder.name for folder in path.iterdir() if folder.is_dir()]
    roots = {split: path / name for split, name in named_splits(folders, path).items()}
    if "train" not in roots:
        raise TalosError(f"{path}: found no train folder; lay images out as train/<class>/*.png and test/<class>/*.png")
    classes = [folder.name for folder in class_folders(roots["train"])]
    if not classes:
        raise TalosError(f"{roots['train']}: found no class folders; lay images out as train/<class>/*.png")
    if names is None:
        names = tuple(c.replace("_", " ") for c in classes)
    if len(names) != len(classes):
        raise TalosError(
            f"class_names: found {len(names)} names for the {len(classes)} folders of {roots['train']}; "
            "give one a folder, in the order of the sorted folder names"
        )
    by_folder = {name.replace("_", " "): name for name in names}
    same = by_folder.keys() == {folder.replace("_", " ") for folder in classes}
    if same and len(by_folder) == len(names):  # the folders' own names, in whatever order
        names = tuple(by_folder[folder.replace("_", " ")] for folder in classes)
    found = {split: _read_class_folders(root, classes) for split, root in roots.items()}
    if empty := sorted(set(range(len(classes))) - set(found["train"].labels.tolist())):
        raise TalosError(
            f"{roots['train'] / classes[empty[0]]}: found no images ({', '.join(sorted(IMAGE_SUFFIXES))}); "
            "add some, or remove the folder"
        )
    return found, names


def class_folders(root: Path) -> list[Path]:
    """All but hidden ones, such as .ipynb_checkpoints."""
    return sorted(d for d in root.iterdir() if d.is_dir() and not d.name.startswith("."))


def images_in(folder: Path) -> list[Path]:
    """Those below it, but hidden ones, such as ._NAME of macOS."""
    below = (f for f in folder.rglob("*") if f.suffix.lower() in IMAGE_SUFFIXES and not f.is_dir())
    return sorted(f for f in below if not any(part[0] == "." for part in f.relative_to(folder).parts))


def _read_class_folders(root: Path, classes: list[str]) -> Split:
    inputs: list[Path] = []
    labels: list[int] = []
    for folder in class_folders(root):
        if folder.name not in classes:
            raise TalosError(f"{folder}: train has no class {folder.name!r}; use the same class folders in every split")
        files = images_in(folder)
        inputs.extend(files)
        labels.extend([classes.index(folder.name)] * len(files))
    if not inputs:
        raise TalosError(f"{root}: found no images ({', '.join(sorted(IMAGE_SUFFIXES))}) in class folders; add some")
    return Split(inputs, np.asarray(labels, dtype=np.int64))


def _read_npz(path: Path) -> dict[str, Split]:
    try:
        with np.load(path, allow_pickle=False) as file:
            # .npz is a ZIP archive; np.load hands back a bare array for a renamed .npy file
            arrays = {key: file[key] for key in file.files}
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, AttributeError, TypeError) as error:
        raise TalosError(f"{path}: not a whole .npz file without pickled objects ({error}); write it again") from error
    inputs, labels = ({key[2:]: key for key in arrays if key.startswith(start)} for start in ("x_", "y_"))
    words = named_splits(inputs.keys() | labels.keys(), path)
    if not words:
        raise TalosError(f"{path}: found the arrays {sorted(arrays)}; expected x_train, y_train, x_val ... y_test")
    if single := sorted(word for word in words.values() if not (word in inputs and word in labels)):
        raise TalosError(f"{path}: found only one of x_{single[0]} and y_{single[0]}; give both, or none")
    found = {}
    for split, word in words.items():
        try:
            found[split] = Split(_as_rgb(arrays[inputs[word]]), arrays[labels[word]])
        except TalosError as error:
            raise TalosError(f"{path}, x_{word} and y_{word}: {error}") from error
    return found


def _as_rgb(images: npt.NDArray[Any]) -> npt.NDArray[Any]:
    if images.ndim == 3:
        images = images[..., None]
    return images.repeat(3, axis=-1) if images.ndim == 4 and images.shape[-1] == 1 else images


def _read_jsonl(path: Path, names: tuple[str, ...] | None) -> tuple[dict[str, Split], tuple[str, ...] | None]:
    texts: dict[str, list[str]] = defaultdict(list)
    labels: dict[str, list[int | str]] = defaultdict(list)
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            word, text, label = _parse_row(line, f"{path}, line {number}")
            texts[word].append(text)
            labels[word].append(label.strip() if names is None and isinstance(label, str) else label)
    words = named_splits(texts, path).items()
    if not texts:
        raise TalosError(f'{path}: found no rows; write one {{"split": ..., "text": ..., "label": ...}} a line')
    values = {label for split in labels.values() for label in split}
    if len({type(value) for value in values}) > 1:
        raise TalosError(f"{path}: found labels of both kinds, names and indices; use one")
    train = next((set(labels[word]) for split, word in words if split == "train"), values)
    if unlearned := sorted(map(str, values - train)):
        logger.warning(
            "%s: train has no example of %s; no method can learn %s",
            path,
            ", ".join(unlearned[:5]) + ", …" * (len(unlearned) > 5),
            "it" if len(unlearned) == 1 else "them",
        )
    if all(isinstance(value, str) for value in values):
        names = names or tuple(sorted(map(str, values)))
        foreign = sorted(map(str, values - set(names)))
        if foreign:
            raise TalosError(
                f"{path}: found the labels {foreign[:5]}, which are not among the class names "
                f"{', '.join(names[:5])}{', …' * (len(names) > 5)}; correct class_names=, datasets.json or classes.txt"
            )
        index: dict[int | str, int] = {value: position for position, value in enumerate(names)}
        return {split: Split(texts[word], np.asarray([index[v] for v in labels[word]])) for split, word in words}, names
    return {split: Split(texts[word], np.asarray(labels[word])) for split, word in words}, names


def _lines(path: Path) -> list[str]:
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return raw.decode("utf-8-sig").split("\n")  # not splitlines: texts may hold U+2028
    except (EOFError, zlib.error, OSError, UnicodeDecodeError) as error:
        raise TalosError(f"{path}: not a whole UTF-8 text file ({error}); write it again") from error


def _is_text(value: Any) -> bool:
    """Whether it is a string without lone surrogates: JSON can spell them, and no tokenizer takes them."""
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def _parse_row(line: str, where: str) -> tuple[str, str, int | str]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise TalosError(f"{where}: not JSON ({error}); write one object a line") from error
    keys = sorted(row) if isinstance(row, dict) else type(row).__name__
    if not isinstance(row, dict) or not {"split", "text", "label"} <= row.keys():
        raise TalosError(f"{where}: found {keys}; every row needs split, text and label")
    word, text, label = str(row["split"]).lower(), row["text"], row["label"]
    if word not in ALIASES:
        raise TalosError(f"{where}: found the split {row['split']!r}; use train, validation or test")
    if not _is_text(text) or isinstance(label, bool) or not isinstance(label, int | str):
        raise TalosError(
            f"{where}: found text {text!r:.30} and label {label!r:.40}; give a string, and an index or a name in quotes"
        )
    return word, text, label
