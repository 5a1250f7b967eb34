"""Where the names of the classes come from."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from talos_fast.errors import TalosError


@dataclass(frozen=True)
class Description:
    """What the caller, or a file beside the data, says about a task; None where nothing does."""

    name: str
    class_names: tuple[str, ...] | None
    templates: tuple[str, ...]


def describe(
    path: Path, name: str | None, class_names: Sequence[str] | None, templates: Sequence[str] | None
) -> Description:
    """The arguments first, then the entry for `path` in a `datasets.json` beside it, then `classes.txt`.

    `datasets.json` holds a list of entries (or `{"datasets": [...]}`) with `file`, `name`, `class_names` and
    `prompt_template`; `classes.txt` holds one name a line, in the order of the labels, and lies beside a file or inside
    a folder.

    Raises:
        TalosError: a `datasets.json` that is not of this form, or a `classes.txt` that is empty or not UTF-8.
    """
    entry = _entry(path)
    if class_names is None:
        class_names = entry.get("class_names") or _read_classes(path)
    if templates is None:
        template = entry.get("prompt_template")
        templates = (template,) if template else ()
    stem = path.name if path.is_dir() else path.name.removesuffix(".gz").rsplit(".", 1)[0]
    return Description(
        name=name or entry.get("name") or stem,
        class_names=None if class_names is None else tuple(class_names),
        templates=(templates,) if isinstance(templates, str) else tuple(templates),
    )


def _entry(path: Path) -> dict[str, Any]:
    index = path.parent / "datasets.json"
    if not index.is_file():
        return {}
    try:
        document = json.loads(index.read_text(encoding="utf-8-sig"))
        entries = document["datasets"] if isinstance(document, dict) else document
        found = next((dict(entry) for entry in entries if entry["file"] == path.name), {})
    except (KeyError, TypeError, ValueError, OSError) as error:
        raise TalosError(
            f"{index}: not a list of data sets with `file`, `name`, `class_names` ({error!r}); correct or remove it"
        ) from error
    for key in ("class_names", "name", "prompt_template"):
        value, listed = found.get(key), key == "class_names"
        texts = value if isinstance(value, list) else [value]
        if value and not (isinstance(value, list) == listed and all(isinstance(text, str) for text in texts)):
            wanted = "a list of strings" if listed else "a string"
            raise TalosError(f"{index}: found {key} {value!s:.60} for {path.name}; give {wanted}")
    return found


def _read_classes(path: Path) -> tuple[str, ...] | None:
    listing = (path if path.is_dir() else path.parent) / "classes.txt"
    if not listing.is_file():
        return None
    try:
        lines = listing.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TalosError(f"{listing}: not a UTF-8 text file ({error}); write it again") from error
    names = tuple(line.strip() for line in lines if line.strip())
    if not names:
        raise TalosError(f"{listing}: found no names; write one class name a line, or remove the file")
    return names
