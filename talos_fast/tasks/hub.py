"""Tasks from Hugging Face data sets: of the Hub, by name and pinned revision, or in local files. Needs `datasets`."""

import os
import re
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from talos_fast.errors import TalosError, needs
from talos_fast.tasks.base import Inputs, Split, Task
from talos_fast.tasks.splits import complete, named_splits

TEXT_COLUMNS = ("text", "sentence", "content")
LABEL_COLUMNS = ("label", "labels", "fine_label", "coarse_label")


def load_dataset(
    source: str | Path, *, revision: str | None = None, config: str | None = None, cache_dir: str | Path | None = None
) -> Any:
    """The `datasets.DatasetDict` of a local folder or of a repository on the Hub.

    Args:
        source: a folder of parquet, JSON lines or CSV files whose names hold their split, one that `save_to_disk`
            wrote, or ``user/name`` on the Hub.
        revision: on the Hub: the full hash of a commit, which pins the data.
        config: of the data set, if it has several.
        cache_dir: of `datasets`.

    Raises:
        TalosError: `datasets` is not installed, a Hub data set without a full commit as revision, or files that are
            missing or damaged.
    """
    with needs("data", source):
        import datasets
    folder = Path(source)
    if not folder.is_dir() and not re.fullmatch(r"[0-9a-f]{40}", revision or ""):
        raise TalosError(
            f"{source}: no such folder; for a data set of the Hub give revision=, a commit of 40 digits, "
            f"found {revision!r}"
        )
    try:
        if (folder / "dataset_dict.json").is_file():
            return datasets.load_from_disk(str(folder))
        cache = None if cache_dir is None else str(cache_dir)
        return datasets.load_dataset(str(source), config, revision=revision, cache_dir=cache)
    except (OSError, ValueError, RuntimeError, TypeError, datasets.exceptions.DatasetsError) as error:
        raise TalosError(
            f"{source}: cannot be read as a data set ({error}); give a folder of parquet, .jsonl or .csv files named "
            "after their splits, or check the name, the revision and the network"
        ) from error


def from_hub(
    source: str | Path,
    *,
    revision: str | None = None,
    config: str | None = None,
    name: str | None = None,
    input_column: str | None = None,
    label_column: str | None = None,
    class_names: Sequence[str] | None = None,
    templates: Sequence[str] = (),
    seed: int = 0,
    cache_dir: str | Path | None = None,
) -> Task:
    """A classification task out of a data set.

    Args:
        source: see `load_dataset`.
        revision: see `load_dataset`.
        config: of the data set, if it has several.
        name: of the task; by default the last part of ``source``.
        input_column: of the images or texts; by default the only column of images, else "text", "sentence", "content".
        label_column: by default "label", "labels", "fine_label" or "coarse_label".
        class_names: by default those of the data set, else its text labels, sorted.
        templates: prompts with one ``{}``.
        seed: of a validation split that the data set does not have.
        cache_dir: of `datasets`, and of the image files of data sets that hold them packed.

    Raises:
        TalosError: as `load_dataset`; columns or class names that cannot be told; labels that are missing.

    Example:
        >>> from_hub("user/name", revision="<the 40 digits of a commit>")
    """
    content = load_dataset(source, revision=revision, config=config, cache_dir=cache_dir)
    splits = {split: content[key] for split, key in named_splits(content, Path(source)).items()}
    if not splits:
        raise TalosError(f"{source}: found the splits {sorted(content)}; a task needs train and test")
    features = next(iter(splits.values())).features
    inputs = input_column or _input_column(features, str(source))
    labels = label_column or _first(LABEL_COLUMNS, features, f"{source}: label_column=")
    for column in (inputs, labels):
        if column not in features:
            raise TalosError(f"{source}: has no column {column!r}; it has {', '.join(features)}")
    names = tuple(class_names or getattr(features[labels], "names", None) or _text_labels(splits, labels, str(source)))
    images = type(features[inputs]).__name__ == "Image"
    found = {}
    for split, part in splits.items():
        raw = part.with_format(None)
        values: Inputs = _image_files(raw, inputs, cache_dir) if images else [str(text) for text in raw[inputs]]
        found[split] = Split(values, _labels(raw[labels], names, f"{source}, split {split}"))
    train, validation, test = complete(found, Path(source), seed)
    title = name or Path(source).name
    return Task(title, names, tuple(templates), train, validation, test)


def _input_column(features: Mapping[str, Any], source: str) -> str:
    images = [name for name, feature in features.items() if type(feature).__name__ == "Image"]
    if len(images) == 1:
        return images[0]
    return _first(TEXT_COLUMNS, features, f"{source}: input_column=")


def _first(candidates: Sequence[str], features: Mapping[str, Any], what: str) -> str:
    for name in candidates:
        if name in features:
            return name
    raise TalosError(f"{what} cannot be told from the columns {', '.join(features)}; give it")


def _text_labels(splits: Mapping[str, Any], column: str, source: str) -> list[str]:
    values = {value for part in splits.values() for value in part.unique(column)}
    if not all(isinstance(value, str) for value in values):
        raise TalosError(
            f"{source}: the names of its classes are not known; give class_names=, in the order of the labels"
        )
    return sorted(str(value) for value in values)


def _labels(values: Sequence[Any], names: tuple[str, ...], where: str) -> Any:
    position = {name: label for label, name in enumerate(names)}
    labels = [position.get(value, -1) if isinstance(value, str) else value for value in values]
    if any(label is None or label < 0 for label in labels):
        raise TalosError(f"{where}: some rows have no label, or one that is not among the class names")
    return np.asarray(labels, dtype=np.int64)


def _image_files(part: Any, column: str, cache_dir: str | Path | None) -> list[Path]:
    """The images as files: their own where they are on disk, else unpacked once into the cache, bytes as they are."""
    import datasets

    encoded = part.cast_column(column, datasets.Image(decode=False))
    rows = encoded[column]
    if all(row["bytes"] is None and row["path"] and Path(row["path"]).is_file() for row in rows):
        return [Path(row["path"]) for row in rows]
    folder = Path(cache_dir or datasets.config.HF_DATASETS_CACHE) / "talos_fast_images" / encoded._fingerprint
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".partial-"))
        try:
            for number, row in enumerate(rows):
                content = row["bytes"] if row["bytes"] is not None else Path(row["path"]).read_bytes()
                (partial / f"{number:07}.img").write_bytes(content)
            os.replace(partial, folder)
        except OSError as error:
            if not folder.is_dir():  # another process may have been first
                raise TalosError(f"{folder}: images cannot be unpacked ({error}); free some space") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return sorted(folder.glob("*.img"))
